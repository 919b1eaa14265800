"""The check of instance masks, where they are used: polygons and both kinds of RLE."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .check import Use
from .check_boxes import SHARE_OF_SLIPS
from .coco import Table
from .masks import BROKEN, NO_MASK, PACKED_RLE, POLYGONS, RLE, Masks
from .report import Finding, findings, shown


def check_masks(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    """Masks that are missing or that the config cannot use. Only called where masks are used."""
    linked = table.image_of >= 0
    # A region that is not trained on needs a mask in evaluation only.
    needed = linked & (~table.crowd | use.test)
    remedy = "mend or remove these annotations, or train boxes only: MODEL.MASK_ON False"
    missing = needed & (masks.kind == NO_MASK)
    yield from table.findings(missing, "instances have no mask", remedy)
    text, write = "masks lack the outer list of polygons", "write [[x, y, ...]], not [x, y, ...]"
    yield from table.findings(linked & masks.flat, text, write)
    broken = linked & (masks.kind == BROKEN) & ~masks.flat
    text = "masks are neither polygons nor RLE with 'size' and 'counts'"
    yield from table.findings(broken, text, remedy)
    yield from _check_polygons(table, masks, use)
    yield from _check_rle(table, masks, use)


def _check_polygons(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    is_polygon = (masks.kind == POLYGONS) & (table.image_of >= 0)
    remedy = "they cannot be evaluated: mend or remove them, or set MODEL.MASK_ON False"
    if not use.test:
        remedy = "Detectron2 drops these objects from training; MODEL.MASK_ON False keeps the boxes"
    text = "masks have no polygon of three points"
    yield from table.findings(is_polygon & ~masks.usable, text, remedy, fatal=use.test)
    yield from table.findings(
        is_polygon & masks.some_short,
        "masks have polygons of fewer than three points among others",
        "these polygons are dropped",
        fatal=False,
    )
    usable = is_polygon & masks.usable
    yield from table.findings(
        usable & ~np.isfinite(masks.extent).all(axis=1),
        "masks have points that are NaN or infinite",
        "mend or remove these annotations",
    )
    with np.errstate(invalid="ignore"):
        small = (masks.extent >= 0).all(axis=1) & (masks.extent <= 1).all(axis=1)
        relative = usable & small & (table.boxes[:, 2:] > 2).all(axis=1)
        sizes = table.annotation_sizes
        outside = (masks.extent[:, :2] >= sizes) | (masks.extent[:, 2:] <= 0)
        lost = usable & ~relative & outside.any(axis=1)
    if relative.sum() >= max(1, SHARE_OF_SLIPS * usable.sum()):
        text = "masks look relative to the image's size"
        remedy = "multiply x by the image's width and y by its height"
        yield from table.findings(relative, text, remedy)
    text = "masks lie outside of their image"
    yield from table.findings(lost, text, "they are empty in training", fatal=False)


def _check_rle(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    linked = table.image_of >= 0

    def sized(place: int) -> str:
        width, height = table.annotation_sizes[place]
        size = f"{shown(masks.values[place]['size'])}, image [{height:.0f}, {width:.0f}]"
        return f"{table.annotation_words(place)}: {size}"

    remedy = "'size' is [height, width] of the image"
    text = "RLE masks are not of their image's size"
    yield from findings(linked & masks.wrong_size, text, remedy, sized)
    yield from table.findings(
        linked & masks.wrong_sum & ~masks.wrong_size,
        "RLE masks have counts that do not add up to their size",
        "mend or remove these annotations",
    )
    if use.train:
        yield from table.findings(
            linked & masks.empty & ~table.crowd,
            "RLE masks have no pixel",
            "Detectron2 drops these objects from training",
            fatal=False,
        )


def needs_bitmask(table: Table, masks: Masks) -> int:
    """How many objects that are trained on have RLE masks, which INPUT.MASK_FORMAT "polygon" cannot
    take."""
    is_rle = (masks.kind == RLE) | (masks.kind == PACKED_RLE)
    return int((is_rle & ~table.crowd & (table.image_of >= 0)).sum())
