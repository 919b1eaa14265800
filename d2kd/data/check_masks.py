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
    example = table.annotation_words
    linked = table.image_of >= 0
    # A region that is not trained on needs a mask in evaluation only.
    needed = linked & (~table.crowd | use.test)
    remedy = "mend or remove these annotations, or train boxes only: MODEL.MASK_ON False"
    yield from findings(needed & (masks.kind == NO_MASK), "instances have no mask", remedy, example)
    flat = linked & masks.flat
    yield from findings(
        flat,
        "masks lack the outer list of polygons",
        "write [[x, y, ...]], not [x, y, ...]",
        example,
    )
    broken = linked & (masks.kind == BROKEN) & ~masks.flat
    text = "masks are neither polygons nor RLE with 'size' and 'counts'"
    yield from findings(broken, text, remedy, example)
    yield from _check_polygons(table, masks, use)
    yield from _check_rle(table, masks, use)


def _check_polygons(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    example = table.annotation_words
    is_polygon = (masks.kind == POLYGONS) & (table.image_of >= 0)
    remedy = "they cannot be evaluated: mend or remove them, or set MODEL.MASK_ON False"
    if not use.test:
        remedy = "Detectron2 drops these objects from training; MODEL.MASK_ON False keeps the boxes"
    text = "masks have no polygon of three points"
    yield from findings(is_polygon & ~masks.usable, text, remedy, example, fatal=use.test)
    yield from findings(
        is_polygon & masks.some_short,
        "masks have polygons of fewer than three points among others",
        "these polygons are dropped",
        example,
        fatal=False,
    )
    usable = is_polygon & masks.usable
    yield from findings(
        usable & ~np.isfinite(masks.extent).all(axis=1),
        "masks have points that are NaN or infinite",
        "mend or remove these annotations",
        example,
    )
    with np.errstate(invalid="ignore"):
        small = (masks.extent >= 0).all(axis=1) & (masks.extent <= 1).all(axis=1)
        relative = usable & small & (table.boxes[:, 2:] > 2).all(axis=1)
        sizes = table.annotation_sizes
        lost = (
            usable
            & ~relative
            & ((masks.extent[:, :2] >= sizes).any(axis=1) | (masks.extent[:, 2:] <= 0).any(axis=1))
        )
    if relative.sum() >= max(1, SHARE_OF_SLIPS * usable.sum()):
        remedy = "multiply x by the image's width and y by its height"
        yield from findings(relative, "masks look relative to the image's size", remedy, example)
    text = "masks lie outside of their image"
    yield from findings(lost, text, "they are empty in training", example, fatal=False)


def _check_rle(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    example, linked = table.annotation_words, table.image_of >= 0

    def sized(place: int) -> str:
        size = table.annotation_sizes[place]
        value = masks.values[place]["size"]
        return f"{example(place)}: {shown(value)}, image [{size[1]:.0f}, {size[0]:.0f}]"

    remedy = "'size' is [height, width] of the image"
    yield from findings(
        linked & masks.wrong_size, "RLE masks are not of their image's size", remedy, sized
    )
    yield from findings(
        linked & masks.wrong_sum & ~masks.wrong_size,
        "RLE masks have counts that do not add up to their size",
        "mend or remove these annotations",
        example,
    )
    if use.train:
        yield from findings(
            linked & masks.empty & ~table.crowd,
            "RLE masks have no pixel",
            "Detectron2 drops these objects from training",
            example,
            fatal=False,
        )


def needs_bitmask(table: Table, masks: Masks) -> int:
    """How many objects that are trained on have RLE masks, which INPUT.MASK_FORMAT "polygon" cannot
    take."""
    is_rle = (masks.kind == RLE) | (masks.kind == PACKED_RLE)
    return int((is_rle & ~table.crowd & (table.image_of >= 0)).sum())
