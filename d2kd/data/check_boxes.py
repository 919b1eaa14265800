"""The check of boxes: what is none, is of another format, or leaves its image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .coco import Table, marked
from .masks import Masks
from .report import Finding, findings, shown

# Boxes may leave the image by this many pixels without a word: annotation tools round.
_ROUNDING = 1.0
# Boxes of another kind are refused from this share of all boxes on: a single one is a slip.
SHARE_OF_SLIPS = 0.01
# A box read as x, y, width, height that reaches this share of the image beyond its border.
_FAR_OUT = 0.1


def check_boxes(table: Table, masks: Masks | None) -> Iterator[Finding]:
    """Boxes that are none, that are of another format, or that leave their image. Masks, where they
    are known, tell x1, y1, x2, y2 from x, y, width, height."""
    values = table.column(table.annotations, "bbox")

    def example(place: int) -> str:
        name, size = shown(table.image_name(place)), table.annotation_sizes[place]
        box = shown(values[place], 44)
        if table.box_is_list[place]:
            box = f"[{', '.join(f'{value:.4g}' for value in table.boxes[place])}]"
        of = f"{box} of annotation {table.annotation_id(place)} in {name}"
        return of if np.isnan(size).any() else f"{of} ({size[0]:.0f} x {size[1]:.0f})"

    is_missing = marked(values, lambda value: value is None)
    remedy = "each must be [x, y, width, height] in pixels"
    bad = ~table.box_is_list & ~is_missing
    yield from findings(bad, "boxes are not four numbers", remedy, example)
    x, y, width, height = table.boxes.T
    not_finite = table.box_is_list & ~np.isfinite(table.boxes).all(axis=1)
    yield from findings(not_finite, "boxes hold NaN or infinity", remedy, example)
    with np.errstate(invalid="ignore"):
        negative = (width < 0) | (height < 0)
    remedy = "boxes are [x, y, width, height], of which width and height are positive"
    yield from findings(negative, "boxes have a negative width or height", remedy, example)
    look = _looks_like(table, masks)
    refused = look["relative"] | look["corners"] | negative
    for kind, text in _LOOK_ALIKES.items():
        yield from findings(look[kind], text, _REMEDY_OF[kind], example)
    outside, beyond = _beyond(table)
    yield from findings(
        outside & ~refused,
        "boxes have no area inside their image",
        "Detectron2 drops them from training, d2kd from evaluation",
        example,
        fatal=False,
    )
    yield from findings(
        beyond & ~refused,
        "boxes reach beyond their image",
        "Detectron2 clips them in training, evaluation does not",
        example,
        fatal=False,
    )


_LOOK_ALIKES = {
    "relative": "boxes look relative to the image's size (all values from 0 to 1)",
    "corners": "boxes look like corners x1, y1, x2, y2",
}
_REMEDY_OF = {
    "relative": "multiply x and width by the image's width, y and height by its height",
    "corners": "COCO format wants [x, y, width, height]: width is x2 - x1, height is y2 - y1",
}


def _looks_like(table: Table, masks: Masks | None) -> dict[str, np.ndarray]:
    """Kind -> (M,) bool, boxes that look like another format; all false for rare slips."""
    sizes = table.annotation_sizes
    x, y, width, height = table.boxes.T
    far = sizes * (1 + _FAR_OUT)
    with np.errstate(invalid="ignore"):
        positive = (width > 0) & (height > 0) & (x >= 0) & (y >= 0)
        # No box of pixels fits into the image's first pixel.
        relative = positive & (table.boxes <= 1).all(axis=1) & (sizes > 2).all(axis=1)
        inside = (width <= sizes[:, 0] + _ROUNDING) & (height <= sizes[:, 1] + _ROUNDING)
        leaves = (x + width > far[:, 0]) | (y + height > far[:, 1])
        could_be_corners = positive & (width > x) & (height > y) & ~relative
        corners = could_be_corners & inside & leaves
        if masks is not None:
            corners |= could_be_corners & _mask_says_corners(table.boxes, masks.extent)
    found = {"relative": relative, "corners": corners}
    for kind, places in found.items():
        if places.sum() < SHARE_OF_SLIPS * len(places):
            found[kind] = np.zeros_like(places)
    return found


def _mask_says_corners(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(M,) bool, boxes that fit their mask as corners and not as x, y, width, height."""
    as_corners = np.abs(boxes - extent).max(axis=1) <= 2
    end = boxes[:, :2] + boxes[:, 2:]
    return as_corners & (np.abs(end - extent[:, 2:]).max(axis=1) > 4)


def _beyond(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(M,) bool each: boxes without area in their image; others that reach beyond it."""
    sizes = table.annotation_sizes
    start, extent = table.boxes[:, :2], table.boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        visible = np.minimum(start + extent, sizes) - np.maximum(start, 0)
        # 1e-5 is Detectron2's own threshold for boxes that are empty.
        outside = (visible <= 1e-5).any(axis=1) & (extent >= 0).all(axis=1)
        over = np.maximum(-start, start + extent - sizes).max(axis=1)
        return outside, ~outside & (over > _ROUNDING)


def boxes_without_area(table: Table) -> np.ndarray:
    """(M,) bool, boxes without area inside their image, which Detectron2 drops."""
    return _beyond(table)[0]
