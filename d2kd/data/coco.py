"""COCO-format annotation files: read once, and looked at as columns of NumPy arrays."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, first_line
from .report import Finding, findings, shown

# Ids below it are exact as doubles, which faster-coco-eval makes of them.
ID_LIMIT = 2**53
# Types that the ids of images may have; one of them in one file.
_IMAGE_ID_TYPES = (int, str)


def read_json(path: str) -> dict:
    """The content of an annotation file.

    Raises:
        ConfigError: in one line, without the path: it is not there, not readable, not JSON, or not
            an object with the lists that COCO format has.
    """
    if "://" not in path and not os.path.isfile(path):
        raise ConfigError("there is no such annotation file")
    try:
        with open(PathManager.get_local_path(path), encoding="utf-8", newline="") as file:
            text = file.read()
        if text.startswith("\ufeff"):
            raise ConfigError(
                "it starts with a byte order mark, which pycocotools cannot read: save it as UTF-8 "
                "without one"
            )
        with no_garbage_collection():
            content = json.loads(text)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"it is not readable: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: of decoding, too
        raise ConfigError(
            f"it is not in COCO format, for it is not JSON in UTF-8 ({first_line(error)})"
        ) from error
    _check_lists(content)
    return content


def _check_lists(content: Any) -> None:
    if not isinstance(content, dict):
        raise ConfigError(f"it is not in COCO format: it holds {_kind(content)}, not an object")
    for key in ("images", "categories", "annotations"):
        if key not in content and key == "annotations":
            continue  # a test set without them
        if not isinstance(content.get(key), list):
            found = _kind(content[key]) if key in content else "missing"
            raise ConfigError(f"it is not in COCO format: '{key}' must be a list, it is {found}")
        if not types_of(content[key]) <= {dict}:
            index = next(i for i, entry in enumerate(content[key]) if type(entry) is not dict)
            raise ConfigError(
                f"it is not in COCO format: {key}[{index}] must be an object with named values, it "
                f"is {_kind(content[key][index])}"
            )


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While millions of small objects are made, none of which is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Table:
    """An annotation file as columns. N images, M annotations, in the order of the file.

    Values that are not what they should be are marked, never an exception: the check names them.

    Attributes:
        images, annotations, categories: the entries as read.
        image_ids, names: (N) as read; None where missing.
        sizes: (N, 2) float, width and height; NaN where they are not positive whole numbers.
        image_of: (M,) int, position of the annotation's image; -1 where there is none.
        annotation_sizes: (M, 2) float, ``sizes`` of each annotation's image; NaN without one.
        category_ids: (M) as read.
        boxes: (M, 4) float, x, y, width, height; NaN where it is not a list of four numbers.
        box_is_list: (M,) bool, whether it is one.
        crowd: (M,) bool.
    """

    def __init__(self, content: dict):
        self.images: list[dict] = content["images"]
        self.categories: list[dict] = content["categories"]
        self.has_annotations = "annotations" in content
        self.annotations: list[dict] = content.get("annotations", [])
        self.image_ids = self.column(self.images, "id")
        self.names = self.column(self.images, "file_name")
        self.sizes = np.stack(
            [_whole_numbers(self.column(self.images, key)) for key in ("width", "height")], axis=1
        )
        self.image_of = self._image_positions()
        self.annotation_sizes = np.full((len(self.image_of), 2), np.nan)
        if len(self.sizes):
            linked = self.image_of[:, None] >= 0
            self.annotation_sizes = np.where(linked, self.sizes[self.image_of], np.nan)
        self.category_ids = self.column(self.annotations, "category_id")
        self.boxes, self.box_is_list = _boxes(self.column(self.annotations, "bbox"))
        self.crowd = np.array([bool(v) for v in self.column(self.annotations, "iscrowd")], bool)

    @staticmethod
    def column(entries: list[dict], key: str) -> list:
        """One value of each entry; None where it is missing."""
        return [entry.get(key) for entry in entries]

    def _image_positions(self) -> np.ndarray:
        known = {
            image_id: index
            for index, image_id in enumerate(self.image_ids)
            if type(image_id) in _IMAGE_ID_TYPES
        }
        wanted = hashable(self.column(self.annotations, "image_id"))
        return np.fromiter(map(known.get, wanted, repeat(-1)), np.int64, len(wanted))

    def image_name(self, annotation: int) -> str:
        """The file name of the image of annotation number ``annotation``."""
        image = self.image_of[annotation]
        return str(self.names[image]) if image >= 0 else "no image"

    def findings(
        self, bad: np.ndarray, text: str, remedy: str, fatal: bool = True
    ) -> Iterator[Finding]:
        """:func:`~d2kd.data.report.findings` with the annotations as examples."""
        return findings(bad, text, remedy, self.annotation_words, fatal)

    def annotation_words(self, annotation: int) -> str:
        """Which annotation it is, for a report."""
        name = shown(self.image_name(annotation))
        return f"annotation {self.annotation_id(annotation)} of {name}"

    def annotation_id(self, annotation: int) -> str:
        """Its id as it stands in the file, for a report."""
        return shown(self.annotations[annotation].get("id"))


def types_of(values: list) -> set[type]:
    """The types that occur among ``values``."""
    return set(map(type, values))


def hashable(values: list) -> list:
    """``values`` with None for lists and objects, which cannot be looked up."""
    if types_of(values) & {list, dict}:
        return [None if type(value) in (list, dict) else value for value in values]
    return values


def marked(values: list, test: Callable[[Any], bool]) -> np.ndarray:
    """(n,) bool, ``test`` of each value."""
    return np.fromiter(map(test, values), bool, len(values))


def repeated(values: list) -> np.ndarray:
    """(n,) bool, whether a value occurred before; all must be hashable."""
    if len(set(values)) == len(values):
        return np.zeros(len(values), bool)
    seen: set = set()
    return np.fromiter(
        ((value in seen) or bool(seen.add(value)) for value in values), bool, len(values)
    )


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number; true and false are not."""
    return type(value) in (int, float)


def numbers(values: list) -> np.ndarray | None:
    """(n,) float64 of ``values`` if all are numbers, else None."""
    if not types_of(values) <= {int, float}:
        return None
    try:
        return np.fromiter(values, np.float64, len(values))
    except OverflowError:  # a whole number of hundreds of digits
        return None


def number_or_nan(values: list) -> np.ndarray:
    """(n,) float64; NaN where a value is no number, or too large for one."""
    found = numbers(values)
    if found is None:
        found = np.array([v if is_number(v) and abs(v) < 1e18 else np.nan for v in values], float)
    return found


def _whole_numbers(values: list) -> np.ndarray:
    """(n,) float; NaN where a value is not a positive whole number."""
    found = number_or_nan(values)
    with np.errstate(invalid="ignore"):
        return np.where((found > 0) & (found < 1e9) & (found == np.floor(found)), found, np.nan)


def _boxes(values: list) -> tuple[np.ndarray, np.ndarray]:
    """(M, 4) float and (M,) bool, whether each is a list of four numbers."""
    fours = np.fromiter((type(v) is list and len(v) == 4 for v in values), bool, len(values))
    if fours.all():
        found = numbers(list(chain.from_iterable(values)))
        if found is not None:
            return found.reshape(-1, 4), fours
    boxes = np.full((len(values), 4), np.nan)
    for index in np.flatnonzero(fours):
        row = numbers(values[index])
        fours[index] = row is not None
        if row is not None:
            boxes[index] = row
    return boxes, fours
