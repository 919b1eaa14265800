"""Pages, docstrings, comments and messages are plain technical English."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("datasets", "tools")),
    *(ROOT / "docs").rglob("*.md"),
]
CODE = [*(ROOT / "d2kd").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train_net.py"]
TEXT = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))

# What stands for a dialect, and what to write.
MARKS = {
    r"\banew\b": "again, from scratch",
    r"\bbeside\b": "next to, with, in addition to",
    r"\bnobody\b": "no one, not",
    r"(?<!look-)\balike\b": "equal, in the same way",
    r"\b(swamp|dearest)": "the common word",
    r"\btold apart from\b": "differs from, is significant",
    r"\bone file a\b": "per",
    r"\b(objects|images|prototypes|boxes|anchors|maps|crops|digits|nodes|bits|ms|sigmoid) an? "
    r"(class|image|level|step|GPU|channel|location|position|iteration|object)\b": "per",
    r"\banchors? a location\b": "anchors per position",
    r"\b(student|students|model) alone\b": "baseline",
}


def text_of(path: Path) -> list[tuple[int, str]]:
    """(line, text) of what a reader reads: all of a page; comments and strings of code."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return list(enumerate(content.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(content).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in TEXT]


@pytest.mark.parametrize("mark", MARKS)
def test_no_dialect(mark):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {MARKS[mark]}"
        for path in PAGES + CODE
        for line, text in text_of(path)
        for match in re.finditer(mark, text)
    ]
    assert not found, "\n".join(found)
