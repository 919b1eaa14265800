"""The classes of a dataset: their names and order, compared by name between datasets.

A detector knows classes by number. Detectron2 numbers those of a file by category id, so two files
with the same names under other ids mean different things by a number, and nothing is said. Here the
first training set gives the order, and the others are matched to it by name.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from .coco import Table, hashable, read_json, types_of
from .report import Finding, plural, shown, some


@dataclass(frozen=True)
class Classes:
    """The classes of one file, in the order in which a detector numbers them."""

    names: tuple[str, ...]
    ids: tuple[int, ...]  # in the file

    @property
    def number_of(self) -> dict[int, int]:
        """Category id -> number of the class."""
        return {category: number for number, category in enumerate(self.ids)}


def classes_of(
    categories: list[dict],
    used: Collection,
    reference: Sequence[str] | None = None,
    owner: str = "the training set",
    expected: int | None = None,
) -> tuple[Classes | None, list[Finding]]:
    """The classes of a file, in the order of ``reference`` where that is given.

    Exporters write a root category, the supercategory of all others, that no object has. It is no
    class, unless ``expected`` counts it.

    Args:
        categories: as in the file.
        used: ids of the categories that annotations have.
        reference: names in the order that counts; None: by category id, as in Detectron2.
        owner: in words, whose names ``reference`` are.
        expected: number of classes of the model, where it is known.

    Returns:
        The classes, None where they cannot be told, and what there is to say.
    """
    findings = list(_broken_categories(categories))
    if findings:
        return None, findings
    entries = sorted(categories, key=lambda category: category["id"])
    names = [str(category["name"]) for category in entries]
    ids = [category["id"] for category in entries]
    root = _root(entries, names, used)
    if root is not None and not _is_counted(names, root, reference, expected):
        text = f"category {shown(names[root])} (id {ids[root]}) has no object and is the "
        remedy = "an exporter's root, which is no class"
        findings.append(Finding(text + "supercategory of all others", remedy))
        del names[root], ids[root]
    as_text = [entry["name"] for entry in entries if type(entry["name"]) is not str]
    if as_text:
        text = "category names are not text"
        findings.append(Finding(text, "taken as text", some(map(shown, as_text))))
    double = _double_names(names, ids)
    if double:
        return None, [*findings, double]
    if reference is not None:
        matched, more = _match(names, ids, reference, owner)
        return matched, findings + more
    return Classes(tuple(names), tuple(ids)), findings


def _double_names(names: list[str], ids: list[int]) -> Finding | None:
    """Names that stand for several categories, so that nothing can be matched by name."""
    double = [name for name, count in Counter(names).items() if count > 1]
    if not double:
        return None
    places = {name: [i for i, n in zip(ids, names, strict=True) if n == name] for name in double}
    return Finding(
        f"category names stand for several ids: {list_of(double)}",
        "give each class its own name",
        some(f"{shown(name)}: ids {', '.join(map(str, found))}" for name, found in places.items()),
        fatal=True,
    )


def _broken_categories(categories: list[dict]) -> Iterator[Finding]:
    """Categories without a name or a whole number as id, or with the id of another."""
    if not categories:
        yield Finding("it has no categories", "'categories' is an empty list", fatal=True)
    ids = [category.get("id") for category in categories]
    names = [category.get("name") for category in categories]
    bad_ids = [type(value) is not int for value in ids]
    bad_names = [type(value) not in (str, int, float) or value == "" for value in names]
    for bad, text in ((bad_ids, "whole number as 'id'"), (bad_names, "'name'")):
        if any(bad):
            examples = some(shown(category, 60) for category in compress(categories, bad))
            head = f"{sum(bad)} of {len(categories)} categories have no {text}"
            yield Finding(head, "each needs both", examples, fatal=True)
    counts = Counter(value for value in ids if type(value) is int)
    double = [str(value) for value, count in counts.items() if count > 1]
    if double:
        head = f"category ids occur several times: {list_of(double)}"
        yield Finding(head, "give each category its own", fatal=True)


def _root(entries: list[dict], names: list[str], used: Collection) -> int | None:
    """Position of a category that no object has and that all others have as supercategory."""
    for place, entry in enumerate(entries):
        parents = [other.get("supercategory") for other in entries if other is not entry]
        if parents and entry["id"] not in used and set(hashable(parents)) == {names[place]}:
            return place
    return None


def _is_counted(
    names: list[str], root: int, reference: Sequence[str] | None, expected: int | None
) -> bool:
    """Whether the root category is a class all the same."""
    if names.count(names[root]) > 1:
        return False
    if reference is not None:
        return names[root] in reference
    return expected == len(names)


def check_category_ids(table: Table) -> Iterator[Finding]:
    """Annotations of a category that the file does not list."""
    known = {category.get("id") for category in table.categories if type(category.get("id")) is int}
    counts = Counter(hashable(table.category_ids))
    counts.pop(None, None)  # missing or no id at all, which is named elsewhere
    unknown = {category: count for category, count in counts.items() if category not in known}
    if not unknown or not known:
        return
    remedy = "it must be the 'id' of one of 'categories'"
    if types_of(list(unknown)) - {int}:
        remedy += ", a whole number"
    elif set(counts) <= set(range(len(known))):
        remedy += f"; they look numbered from 0, where ids start at {min(known)}"
    total = len(table.category_ids)
    yield Finding(
        f"{sum(unknown.values()):,} of {total:,} annotations have an unknown category_id",
        remedy,
        some(f"{shown(category)}: {plural(n, 'annotation')}" for category, n in unknown.items()),
        fatal=True,
    )


def _match(
    names: list[str], ids: list[int], reference: Sequence[str], owner: str
) -> tuple[Classes | None, list[Finding]]:
    """The classes in the order of ``reference``."""
    if set(names) != set(reference):
        return None, [different_names(names, reference, owner)]
    id_of = dict(zip(names, ids, strict=True))
    matched = Classes(tuple(reference), tuple(id_of[name] for name in reference))
    if list(reference) == names:
        return matched, []
    moved = [name for name, first in zip(names, reference, strict=True) if name != first]
    text = f"{plural(len(moved), 'class')} have another order of ids than {owner}"
    return matched, [Finding(text, "matched by name", some(map(shown, moved)))]


def different_names(
    names: Sequence[str], reference: Sequence[str], owner: str = "the training set"
) -> Finding:
    """Two sets of class names that are not the same."""
    only_here = [name for name in names if name not in reference]
    only_there = [name for name in reference if name not in names]
    parts = []
    if only_here:
        parts.append(f"only here: {list_of(only_here)}")
    if only_there:
        parts.append(f"only there: {list_of(only_there)}")
    return Finding(
        f"its classes are not those of {owner}: {'; '.join(parts)}",
        "use one list of categories for all",
        (f"here {list_of(names, 160)}", f"there {list_of(reference, 160)}"),
        fatal=True,
    )


def list_of(names: Sequence[str], limit: int = 60) -> str:
    """Names for a message, cut to about ``limit`` characters."""
    shown_names: list[str] = []
    for name in names:
        if shown_names and sum(map(len, shown_names)) + len(name) > limit:
            return ", ".join(shown_names) + f" and {len(names) - len(shown_names)} more"
        shown_names.append(name if len(name) < 30 else name[:27] + "...")
    return ", ".join(shown_names)


def check_counts(table: Table, classes: Classes) -> Iterator[Finding]:
    """Classes of a training set that no object has."""
    used = set(hashable(table.category_ids))
    empty = [n for n, i in zip(classes.names, classes.ids, strict=True) if i not in used]
    if empty:
        head = f"{len(empty)} of {plural(len(classes.names), 'class')} have no object"
        yield Finding(head, "they cannot be learned", some(map(shown, empty)))


def read_categories(path: str) -> list[dict]:
    """The categories of an annotation file, without reading the rest of it where that is possible.

    Raises:
        ConfigError: see :func:`~d2kd.data.coco.read_json`.
    """
    with contextlib.suppress(OSError, ValueError):  # read_json says what is wrong
        _, *rest = Path(path).read_text(encoding="utf-8").split('"categories":')
        if len(rest) == 1:  # else one of them is something else
            found, _ = json.JSONDecoder().raw_decode(rest[0].lstrip())
            if isinstance(found, list) and types_of(found) == {dict}:
                return found
    return read_json(path)["categories"]
