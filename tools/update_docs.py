#!/usr/bin/env python
"""Write what is generated in README and docs: measured tables, and the two reference pages.

    python tools/update_docs.py          # rewrite
    python tools/update_docs.py --check  # exit 1 if a page is not what it would be
    python tools/update_docs.py --copy output/compare/digits_retinanet_strong_teacher output/demo

A measured table stands between ``<!-- measured: KIND FILE -->`` and ``<!-- end -->``. KIND is a key
of ``RENDER``, and FILE what the command that the page shows has written. ``--copy`` first brings
results, and the pictures that a page shows, from the folder of a comparison, a choice or the demo.
docs/api.md and docs/config.md are made by tools/reference.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from d2kd.benchmark import angles, balance_starts, evaluation, gradients, selection
from d2kd.benchmark import tables as benchmark
from d2kd.commands import demo
from d2kd.compare import choosing, plots
from d2kd.compare import tables as compare
from d2kd.files import write_json, write_text

if __package__:  # imported, and not run as a script
    from . import published, reference
else:
    import published
    import reference

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- measured: (\w+) ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def of_json(table: Callable[[dict], str]) -> Callable[[Path], str]:
    """``table`` of a JSON file."""
    return lambda path: table(json.loads(path.read_text()))


def render_benchmark(path: Path) -> str:
    """The table and the plot in the folder of the file, for pages in docs/."""
    text = benchmark.main_table(json.loads(path.read_text()))
    picture = path.with_suffix(".png")
    if not picture.is_file():
        return text
    link = picture.relative_to(ROOT / "docs")
    return f"{text}\n\n![Overhead of each method, and its growth]({link})"


def render_compare(path: Path) -> str:
    """AP and gains. Cost has a page of its own: other work on the machine disturbs long runs."""
    lines = compare.read_lines(path)
    tables = compare.tables(lines)[:-1]
    return "\n\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in tables)


RENDER = {
    "angles": of_json(angles.markdown),
    "benchmark": render_benchmark,
    "balance_starts": of_json(balance_starts.markdown),
    "gradients": of_json(gradients.markdown),
    "evaluation": of_json(evaluation.markdown),
    "growth": of_json(benchmark.growth_table),
    "teacher_options": of_json(benchmark.teacher_table),
    "profile": of_json(benchmark.profile_table),
    "selection": of_json(selection.markdown),
    "refresh": of_json(selection.refresh_markdown),
    "choose": choosing.markdown,
    "verdict": of_json(choosing.verdict),
    "compare": render_compare,
    "gains": lambda *paths: compare.gains_table([*map(compare.read_lines, paths)]).markdown(),
    "demo": lambda path: demo.markdown(compare.read_lines(path)),
    "published": published.markdown,
}


def update(text: str) -> str:
    """``text`` with each block rendered again; a block whose file is not there stays as it is."""

    def block(match: re.Match) -> str:
        begin, kind, names, end = match.groups()
        paths = [ROOT / name for name in names.split()]
        known = all(path.exists() for path in paths)
        return f"{begin}{RENDER[kind](*paths)}\n{end}" if known else match[0]

    return BLOCK.sub(block, text)


def pages() -> dict[Path, str]:
    """Each page, and what it has to say."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    docs = ROOT / "docs"
    made = {docs / "api.md": reference.api_page(), docs / "config.md": reference.config_page()}
    return {page: update(page.read_text()) for page in found if page not in made} | made


def copy_results(folder: Path) -> None:
    """Bring the results in an output folder into docs/, with the picture that docs/ has of them.

    Raises:
        SystemExit: there are none, or they name files outside of the clone.
    """
    name = folder.resolve().name
    if (folder / "choose.json").is_file():
        write_json(
            choosing.copied(folder / "choose.json"), ROOT / f"docs/results/choose_{name}.json"
        )
        return
    source, target = folder / "results.jsonl", ROOT / f"docs/results/{name}.jsonl"
    if not source.is_file():
        sys.exit(f"error: {folder} holds no results.jsonl")
    text = source.read_text().replace(f"{ROOT}/", "")
    if outside := re.search(r'"(/[^"]+)"', text):
        sys.exit(f"error: {source} names {outside[1]}, which is not in the clone: train from there")
    write_text(text, target)
    for made, kept in (("detections.jpg", f"{name}.jpg"), ("ap.svg", f"ap_{name}.svg")):
        if (folder / made).is_file() and (ROOT / "docs/images" / kept).is_file():
            shutil.copyfile(folder / made, ROOT / "docs/images" / kept)


def draw_gains() -> None:
    """Draw each picture of gains in docs/images/ from the results that it shows."""
    for picture in (ROOT / "docs/images").glob("gains_*.svg"):
        results = ROOT / f"docs/results/{picture.stem.removeprefix('gains_')}.jsonl"
        plots.plot_gains(compare.read_lines(results), picture, times=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="change nothing; exit 1 on a difference")
    what.add_argument("--copy", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args(argv)
    for folder in args.copy:
        copy_results(folder)
    if not args.check:
        draw_gains()
    stale = []
    for page, text in pages().items():
        if not page.is_file() or page.read_text() != text:
            stale.append(str(page.relative_to(ROOT)))
            if not args.check:
                write_text(text, page)
    if stale and args.check:
        sys.exit(f"error: stale: {', '.join(stale)}; run python tools/update_docs.py")
    if stale:
        print(f"updated: {', '.join(stale)}")


if __name__ == "__main__":
    main()
