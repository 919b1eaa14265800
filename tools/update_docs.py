#!/usr/bin/env python
"""Write the measured tables of README and docs from the JSON files in docs/results.

    python tools/update_docs.py          # rewrite the blocks
    python tools/update_docs.py --check  # exit 1 if a page does not say what the files say

A block is what stands between ``<!-- measured: KIND FILE -->`` and ``<!-- end -->``. KIND is
``benchmark``, ``growth``, ``teacher_options``, ``profile`` or ``cost`` (a file of
tools/benchmark.py --json), ``selection`` (of tools/selection.py --json), ``refresh``
(prototypes.json of a training with Global Knowledge), ``compare`` (results.jsonl of
tools/compare.py), ``gains`` (several of them), ``demo`` (demo.json of make demo) or ``published``
(a folder of configs, of which tools/published.py makes a table).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import published

from d2kd.benchmark import selection
from d2kd.benchmark import tables as benchmark
from d2kd.commands import demo
from d2kd.compare import tables as compare
from d2kd.files import write_text

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- measured: (\w+) ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def of_json(table: Callable[[dict], str]) -> Callable[[Path], str]:
    """``table`` of a JSON file."""
    return lambda path: table(json.loads(path.read_text()))


def render_benchmark(path: Path) -> str:
    """The table and the plot beside the file, for pages in docs/."""
    text = benchmark.main_table(json.loads(path.read_text()))
    picture = path.with_suffix(".png")
    if not picture.is_file():
        return text
    link = picture.relative_to(ROOT / "docs")
    return f"{text}\n\n![Overhead of each method, and its growth]({link})"


def render_compare(path: Path) -> str:
    """AP and gains. Cost has a page of its own: other work on the machine disturbs long runs."""
    lines = compare.read_lines(path)
    tables = [compare.ap_table(lines, task) for task in compare.tasks_of(lines)]
    return "\n\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in tables)


def render_gains(*paths: Path) -> str:
    return compare.gains_table([compare.read_lines(path) for path in paths]).markdown()


RENDER = {
    "benchmark": render_benchmark,
    "growth": of_json(benchmark.growth_table),
    "teacher_options": of_json(benchmark.teacher_table),
    "profile": of_json(benchmark.profile_table),
    "cost": of_json(benchmark.cost_table),
    "selection": of_json(selection.markdown),
    "refresh": of_json(selection.refresh_markdown),
    "compare": render_compare,
    "gains": render_gains,
    "demo": of_json(demo.markdown),
    "published": published.markdown,
}


def update(text: str) -> str:
    """``text`` with each block rendered anew; a block whose file is not there stays as it is."""

    def block(match: re.Match) -> str:
        begin, kind, names, end = match.groups()
        paths = [ROOT / name for name in names.split()]
        known = all(path.exists() for path in paths)
        return f"{begin}{RENDER[kind](*paths)}\n{end}" if known else match[0]

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 on a difference"
    )
    args = parser.parse_args(argv)
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = page.read_text()
        new = update(old)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                write_text(new, page)
    if stale:
        print(f"{'stale' if args.check else 'updated'}: {', '.join(stale)}")
        sys.exit(1 if args.check else 0)


if __name__ == "__main__":
    main()
