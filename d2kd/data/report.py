"""What the check of a dataset found, and how it is said: a short report, then one error line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import MAX_LINE

MAX_LINES = 20  # of a report that precedes an error
EXAMPLES = 5  # of each kind
_MAX_WIDTH = 240
_MAX_EXAMPLE = 72


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found in a dataset."""

    text: str  # what and how many, e.g. "3 of 18 boxes have a negative width or height"
    remedy: str = ""  # what to do about it, or what d2kd does
    examples: tuple[str, ...] = ()  # the first few, in words
    fatal: bool = False  # training or evaluation would fail or be wrong: refused, not only said

    def lines(self) -> list[str]:
        """Two lines: what and the remedy; the examples."""
        lines = [_cut(f"  {self}", _MAX_WIDTH)]
        if self.examples:
            examples = "; ".join(_cut(example, _MAX_EXAMPLE) for example in self.examples)
            lines.append(_cut(f"    {examples}", _MAX_WIDTH + _MAX_EXAMPLE * 2))
        return lines

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass
class DatasetReport:
    """All findings of one dataset."""

    name: str
    source: str = ""  # its annotation file
    counts: str = ""  # what it holds, in words
    findings: list[Finding] = field(default_factory=list)

    @property
    def fatal(self) -> list[Finding]:
        """The findings that are refused."""
        return [finding for finding in self.findings if finding.fatal]

    def heading(self) -> str:
        details = ", ".join(part for part in (self.source, self.counts) if part)
        return _cut(f"dataset '{self.name}'" + (f": {details}" if details else ""), _MAX_WIDTH)


def findings(
    bad: np.ndarray, text: str, remedy: str, example: Callable[[int], str], fatal: bool = True
) -> Iterator[Finding]:
    """One finding for all places where ``bad`` is true; none where there are none.

    Args:
        bad: (n,) bool.
        text: goes on after "3 of 18 ".
        example: place -> words for it.
    """
    places = np.flatnonzero(bad)
    if len(places):
        head = f"{len(places):,} of {len(bad):,} {text}"
        yield Finding(head, remedy, some(example(int(place)) for place in places), fatal)


def report_lines(reports: Sequence[DatasetReport], limit: int | None = MAX_LINES) -> list[str]:
    """The findings of all datasets, a block each; what is refused comes first.

    Args:
        limit: most lines; what does not fit is counted in the last one. None: all.
    """
    room = float("inf") if limit is None else limit - 1  # the last line counts what is left out
    blocks: dict[int, list[str]] = {}
    left_out = 0
    found = [(number, f) for number, report in enumerate(reports) for f in report.findings]
    for number, finding in sorted(found, key=lambda pair: not pair[1].fatal):
        lines = finding.lines()
        if number not in blocks:
            lines.insert(0, reports[number].heading())
        if len(lines) > room:
            left_out += 1
            continue
        room -= len(lines)
        blocks.setdefault(number, []).extend(lines)
    lines = [line for block in blocks.values() for line in block]
    if left_out:
        lines.append(f"  ... and {left_out} more; 'd2kd check' lists all")
    return lines


def error_line(reports: Sequence[DatasetReport]) -> str:
    """The line that a refused dataset ends in: its first finding, and how many more there are."""
    report = next(report for report in reports if report.fatal)
    more = sum(len(other.fatal) for other in reports) - 1
    tail = f" (and {more} more, above)" if more else ""
    where = f"dataset '{_cut(report.name, 40)}'"
    if report.source:
        source = report.source if len(report.source) <= 60 else "..." + report.source[-57:]
        where += f" ({source})"
    return _cut(f"{where}: {report.fatal[0]}", MAX_LINE - len(tail)) + tail


def some(items: Iterable) -> tuple[str, ...]:
    """The first few of many examples, as text."""
    return tuple(map(str, itertools.islice(items, EXAMPLES)))


def plural(count: int, noun: str) -> str:
    """``count`` and ``noun``: "1 image", "1,234 images"."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith(("x", "s")):
        return f"{count:,} {noun}es"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def shown(value: object, limit: int = 40) -> str:
    """``value`` as it stands in the file, cut to ``limit`` characters, on one line."""
    return _cut(repr(value), limit)


def _cut(text: str, limit: int) -> str:
    text = " ".join(text.split("\n")).replace("\r", " ")
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."
