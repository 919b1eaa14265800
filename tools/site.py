#!/usr/bin/env python
"""Build the pages as a site: python tools/site.py [FOLDER] (default: output/site).

Needs mkdocs (pip install -e '.[dev]'). A link that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)")

# Title -> page or further titles, in the order of a reader.
NAV = {
    "d2kd": "README.md",
    "Use": {
        "Quickstart": "docs/quickstart.md",
        "Your data": "datasets/README.md",
        "Light students": "docs/students.md",
        "Teachers of every kind": "docs/teachers.md",
        "The check of a teacher": "docs/check_teacher.md",
        "Training": "docs/training.md",
        "LazyConfig": "docs/lazy_config.md",
        "Your own train_net.py": "docs/own_trainer.md",
        "Choosing a method": "docs/choose.md",
        "Deployment": "docs/deploy.md",
    },
    "Methods": {},  # every page of docs/methods
    "Evidence": {
        "Results": "docs/results.md",
        "Performance": "docs/performance.md",
        "Faithfulness": "docs/faithfulness.md",
        "Published pairs": "docs/published.md",
    },
    "Reference": {
        "Config keys": "docs/config.md",
        "Python interface": "docs/api.md",
        "Extending": "docs/extending.md",
        "What is trusted": "SECURITY.md",
        "Contributing": "CONTRIBUTING.md",
        "Changes": "CHANGELOG.md",
    },
}


def navigation() -> list:
    """mkdocs' form of ``NAV``."""
    methods = {
        page.read_text().partition("\n")[0].lstrip("# "): f"docs/methods/{page.name}"
        for page in sorted((ROOT / "docs/methods").glob("*.md"))
    }
    parts = NAV | {"Methods": methods}
    return [
        {title: [{t: p} for t, p in part.items()] if isinstance(part, dict) else part}
        for title, part in parts.items()
    ]


def copy_with_links(page: Path, target: Path, done: set[Path]) -> None:
    """Copy ``page`` and the files of the repository that it links to, and theirs."""
    if page in done or not page.is_relative_to(ROOT) or not page.is_file():
        return
    done.add(page)
    copy = target / page.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(page, copy)
    if page.suffix == ".md":
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            copy_with_links((page.parent / link).resolve(), target, done)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "output/site")
    folder = parser.parse_args(argv).folder.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        pages, done = Path(temporary) / "pages", set[Path]()
        for page in re.findall(r"[\w/]+\.md", json.dumps(navigation())):
            copy_with_links(ROOT / page, pages, done)
        config = {"site_name": "d2kd", "docs_dir": str(pages), "nav": navigation()}
        config |= {"site_dir": str(folder), "theme": "readthedocs", "use_directory_urls": False}
        config["validation"] = {"omitted_files": "warn", "links": {"anchors": "warn"}}
        config["markdown_extensions"] = ["tables", "fenced_code", "toc"]
        file = Path(temporary) / "mkdocs.yml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(file)]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main()
