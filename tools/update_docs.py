#!/usr/bin/env python
"""Write the measured tables of README and docs from the JSON files in docs/results.

    python tools/update_docs.py          # rewrite the blocks
    python tools/update_docs.py --check  # exit 1 if a page does not say what the files say

A block is what stands between ``<!-- measured: KIND FILE -->`` and ``<!-- end -->``. KIND is
``benchmark`` (a file of tools/benchmark.py --json), ``compare`` (results.jsonl of
tools/compare.py), ``demo`` (demo.json of make demo) or ``published`` (a folder of configs, of which
tools/published.py makes a table).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import benchmark
import demo
import published
import report
from runs import ROOT

BLOCK = re.compile(r"(<!-- measured: (\w+) ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_benchmark(path: Path) -> str:
    data = json.loads(path.read_text())
    setting = data["setting"]
    where = f"{data['device']}, {data['threads']} threads, PyTorch {data['torch']}"
    what = (
        f"student R{setting['student']}, teacher R{setting['teacher']}, {setting['size']} px, "
        f"batch {setting['batch']}, {setting['objects']} objects an image, "
        f"medians of {setting['repeats']}"
    )
    return f"{benchmark.table(data['rows'])}\n\n{where}; {what}."


def render_compare(path: Path) -> str:
    return report.markdown(report.read_lines(path))


def render_gains(*paths: Path) -> str:
    return report.gains_table([report.read_lines(path) for path in paths]).markdown()


def render_demo(path: Path) -> str:
    return demo.markdown(json.loads(path.read_text()))


RENDER = {
    "benchmark": render_benchmark,
    "compare": render_compare,
    "gains": render_gains,
    "demo": render_demo,
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
                page.write_text(new)
    if stale:
        print(f"{'stale' if args.check else 'updated'}: {', '.join(stale)}")
        sys.exit(1 if args.check else 0)


if __name__ == "__main__":
    main()
