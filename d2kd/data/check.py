"""The check of a dataset's content: what is wrong in it, and what Detectron2 drops or misreads.

Each function looks at the columns of one annotation file (:class:`~d2kd.data.coco.Table`) and
yields :class:`~d2kd.data.report.Finding`. What makes training or evaluation fail or go wrong
unnoticed is fatal; what is repaired, dropped or clipped is said. M annotations, N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .check_boxes import boxes_without_area
from .coco import ID_LIMIT, Table, hashable, marked, number_or_nan, repeated, types_of
from .report import Finding, findings, shown


@dataclass(frozen=True)
class Use:
    """What a config does with a dataset."""

    train: bool = True
    test: bool = False
    masks: bool = True  # instance masks are used
    keypoints: int = 0  # their number, 0 where they are not used
    min_keypoints: int = 0  # that must be visible in an image that is trained on
    keep_empty: bool = False  # images without objects are trained on
    strict_paths: bool = False
    files: bool = True  # its images are looked for,
    headers: int = 32  # and so many opened


def check_structure(table: Table, strict_ids: bool = True) -> Iterator[Finding]:
    """Required keys, their types, and ids: what everything else relies on.

    ``strict_ids`` refuses annotation ids that occur twice. COCO's own minival files have some, and
    Detectron2 lets them pass.
    """
    yield from _check_images(table)
    yield from _check_annotation_keys(table)
    if strict_ids:
        yield from _check_annotation_ids(table)
    yield from _check_flags(table)


def _check_images(table: Table) -> Iterator[Finding]:
    count = len(table.images)
    if not count:
        yield Finding("it has no images", "'images' is an empty list", fatal=True)
        return

    def example(place: int) -> str:
        return f"images[{place}] {shown(table.images[place], 60)}"

    ids = table.image_ids
    types = types_of(ids)
    missing = marked(ids, lambda value: value is None)
    yield from findings(missing, "images have no 'id'", "give each its own", example)
    if not missing.any() and types not in ({int}, {str}):
        common = str if sum(type(v) is str for v in ids) * 2 > count else int
        bad = marked(ids, lambda value: type(value) is not common)
        remedy = "use whole numbers, or text, for all, and the same in 'image_id'"
        yield from findings(bad, "image ids are of another type than the rest", remedy, example)
    elif not missing.any():
        yield from findings(
            repeated(ids),
            "image ids occurred before in the file",
            "if two files were joined, give the images of the second other ids, and its 'image_id'",
            lambda place: f"id {ids[place]} of {shown(table.names[place])}",
        )
    no_name = marked(table.names, lambda v: type(v) is not str or not v)
    remedy = "it must be the path of the image below the image directory"
    yield from findings(no_name, "images have no usable 'file_name'", remedy, example)
    yield from findings(
        np.isnan(table.sizes).any(axis=1),
        "images have no usable 'width' and 'height'",
        "they must be positive whole numbers of pixels",
        lambda place: (
            f"{shown(table.names[place])} "
            + " x ".join(shown(table.images[place].get(key)) for key in ("width", "height"))
        ),
    )


def _check_annotation_keys(table: Table) -> Iterator[Finding]:
    def example(place: int) -> str:
        entry = {k: v for k, v in table.annotations[place].items() if k != "segmentation"}
        return f"annotations[{place}] {shown(entry, 60)}"

    for key, words in (
        ("id", "give each its own whole number"),
        ("image_id", "it must be the 'id' of an image"),
        ("category_id", "it must be the 'id' of a category"),
        ("bbox", "each needs its box [x, y, width, height] in pixels"),
    ):
        values = table.column(table.annotations, key)
        if key != "bbox":
            values = hashable(values)  # a list is no id
        missing = marked(values, lambda value: value is None)
        yield from findings(missing, f"annotations have no usable '{key}'", words, example)


def _check_annotation_ids(table: Table) -> Iterator[Finding]:
    ids = hashable(table.column(table.annotations, "id"))
    if None not in ids:
        yield from findings(
            repeated(ids),
            "annotation ids occurred before in the file",
            "if two files were joined, give the annotations of the second other ids; else one "
            "object is listed twice",
            lambda place: f"id {ids[place]} of {shown(table.image_name(place))}",
        )


def _check_flags(table: Table) -> Iterator[Finding]:
    yield from table.findings(
        marked(table.column(table.annotations, "ignore"), bool),
        "annotations have 'ignore' set, which Detectron2 does not know",
        "use 'iscrowd': 1 for regions that are neither object nor background, or remove them",
    )
    bad = marked(table.column(table.annotations, "iscrowd"), lambda v: v not in (0, 1, None))
    text = "annotations have an 'iscrowd' that is not 0 or 1"
    yield from table.findings(bad, text, "use 1 for regions of many objects, else 0")


def check_links(table: Table, use: Use) -> Iterator[Finding]:
    """Annotations and the images they belong to."""
    count = len(table.annotations)
    orphan = table.image_of < 0
    if count:
        total = bool(orphan.all())
        ids = table.column(table.annotations, "image_id")
        remedy = "Detectron2 ignores them"
        if total:
            kinds = [sorted({t.__name__ for t in types_of(v)}) for v in (ids, table.image_ids)]
            remedy = "'image_id' must be the 'id' of an image"
            if kinds[0] != kinds[1]:
                remedy += f"; there it is {' and '.join(kinds[0])}, here {' and '.join(kinds[1])}"
        yield from findings(
            orphan,
            "annotations belong to no image",
            remedy,
            lambda place: f"annotation {table.annotation_id(place)} of image {shown(ids[place])}",
            fatal=total,
        )
    if use.train:
        yield from _check_trained_images(table, use)
    elif table.has_annotations:  # else it is a test set whose annotations are not public
        if not ((table.image_of >= 0) & ~table.crowd & ~boxes_without_area(table)).any():
            yield Finding(
                "no image has an object to evaluate",
                "take it out of DATASETS.TEST, or give it annotations",
                fatal=True,
            )


def _check_trained_images(table: Table, use: Use) -> Iterator[Finding]:
    """How many images have something to train on."""
    count = len(table.images)
    if not table.has_annotations:
        yield Finding("it has no 'annotations'", "a dataset of TRAIN needs them", fatal=True)
        return
    usable = (table.image_of >= 0) & ~table.crowd
    with_objects = np.bincount(table.image_of[usable], minlength=count) > 0
    if boxes_without_area(table)[usable].all():
        crowds = int(table.crowd.sum())
        why = f"all {crowds:,} annotations have 'iscrowd' 1" if crowds else "there are none"
        if usable.any():
            why = "no box has an area inside its image"
        yield Finding(f"no image has an object to train on: {why}", fatal=True)
    elif not use.keep_empty:
        yield from findings(
            ~with_objects,
            "images have no object and are not trained on",
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them as background",
            lambda place: shown(table.names[place]),
            fatal=False,
        )


def check_repairs(table: Table, use: Use) -> Iterator[Finding]:
    """What evaluation needs and d2kd computes, and what is read otherwise than it may look."""
    missing = marked(table.column(table.annotations, "iscrowd"), lambda value: value is None)
    text = "annotations have no 'iscrowd'"
    yield from table.findings(missing, text, "taken as 0", fatal=False)
    if not use.test:
        return
    text = "annotations have no 'area'"
    remedy = "computed from the mask, or from the box where there is none"
    yield from table.findings(~known_area(table), text, remedy, fatal=False)
    text = "annotation ids are not whole numbers between 0 and 2^53"
    remedy = "numbered from 1 for evaluation, which takes id 0 for 'not found'"
    yield from table.findings(~usable_ids(table), text, remedy, fatal=False)


def known_area(table: Table) -> np.ndarray:
    """(M,) bool, whether the annotation says its area."""
    areas = number_or_nan(table.column(table.annotations, "area"))
    with np.errstate(invalid="ignore"):
        return (areas >= 0) & (areas < np.inf)


def usable_ids(table: Table) -> np.ndarray:
    """(M,) bool, annotation ids that evaluation reads correctly: from 1 to below 2^53."""
    ids = table.column(table.annotations, "id")
    return marked(ids, lambda value: type(value) is int and 0 < value < ID_LIMIT)
