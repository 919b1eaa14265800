"""Multi-value masks: how close each position of a pyramid level is to objects, told by anchors.

The mask of MAR (reconstruction): a position weighs as much as it has anchors that overlap an object
nearly as well as the level's best anchor does. The weight is zero far away, small near an object's
border and largest at its core.

Shapes: B images, G objects (of the batch, or of a chunk), L levels; a level has K anchors at each
of its H x W positions. Boxes and anchors are (x1, y1, x2, y2) in pixels of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_KINDS = ("count", "binary", "iou", "gauss", "zones", "roi_level")

# "zones": the outer zone ends at the box enlarged by this factor.
_RING = 1.5
# "roi_level": objects of this side (or less) lie on the finest level, of twice it on the next.
_FINEST_SIDE = 56
# Object-anchor pairs held at a time: 16 MiB of IoU and a few temporaries of that size.
_MAX_PAIRS = 1 << 22


@torch.no_grad()
def multi_value_masks(
    anchors: Mapping[int, Tensor],
    sizes: Mapping[int, tuple[int, int]],
    gt_boxes: Sequence[Tensor],
    *,
    kind: str = "count",
    iou_ratio: float = 0.5,
    participation: float = 0.1,
    cap: bool = False,
    max_pairs: int = _MAX_PAIRS,
) -> dict[int, Tensor]:
    """Masks of all images of a batch (MAR, reconstruction).

    An object takes part in the levels whose best anchor overlaps it at least ``participation``
    times as well as the best anchor of all levels. On such a level an anchor is *near* the object
    if its IoU exceeds ``iou_ratio`` times the best IoU of the level. ``kind`` says what a position
    receives:

    * ``count``: the number of its near anchors, summed over objects;
    * ``binary``: 1 where that number is positive (the formula of FGFI);
    * ``iou``: the largest IoU of a near anchor, divided by the best IoU of the level;
    * ``gauss``: a Gaussian of the cell centre inside the box, half a side being one sigma;
    * ``zones``: 2 for a cell centre inside the box, 1 inside the box enlarged by half;
    * ``roi_level``: as ``count``, but an object takes part in one level only, floor(log2(side/56))
      counted from the finest and clamped, where side is the square root of its area (DeFeat).

    ``iou``, ``gauss`` and ``zones`` take the maximum over objects. Objects without area, or that no
    anchor touches, are skipped.

    Args:
        anchors: stride -> (H * W * K, 4) in the order (y, x, anchor).
        sizes: stride -> (H, W), fine to coarse.
        gt_boxes: per image (n, 4).
        kind: one of ``MASK_KINDS``.
        iou_ratio: psi in the method's page.
        participation: kappa in the method's page.
        cap: at most K at a position, however many objects overlap there.
        max_pairs: object-anchor pairs held at a time; bounds the memory.

    Returns:
        stride -> (B, H, W) float32 on the device of the boxes.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {kind!r}, valid are {', '.join(MASK_KINDS)}")
    levels = _build_levels(anchors, sizes)
    boxes = torch.cat(list(gt_boxes)).float()
    images = torch.cat(
        [boxes.new_full((len(b),), i, dtype=torch.long) for i, b in enumerate(gt_boxes)]
    )
    masks = {stride: boxes.new_zeros(len(gt_boxes), *size) for stride, size in sizes.items()}
    step = max(1, max_pairs // max(1, sum(len(a) for a in anchors.values())))
    for box, image in zip(boxes.split(step), images.split(step), strict=True):
        ious = [level.iou(box) for level in levels]
        best = torch.stack([iou.amax((1, 2, 3)) for iou in ious])  # (L, G)
        active = _active_levels(best, box, None if kind == "roi_level" else participation)
        for i, level in enumerate(levels):
            values = _values(kind, level, box, ious[i], best[i], active[i], iou_ratio)
            _accumulate(masks[level.stride], image, values, kind)
    if kind == "binary":
        return {stride: (mask > 0).float() for stride, mask in masks.items()}
    if cap:
        return {level.stride: masks[level.stride].clamp(max=level.per_location) for level in levels}
    return masks


def pseudo_anchors(
    sizes: Mapping[int, tuple[int, int]],
    device: torch.device,
    scale: float = 8.0,
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
) -> dict[int, Tensor]:
    """Anchors for detectors that have none: centred on the cells, of side ``scale`` strides.

    Args:
        sizes: stride -> (H, W).
        device: where the anchors are needed.
        scale: square root of an anchor's area in strides.
        ratios: height / width of the K anchors of a position.

    Returns:
        stride -> (H * W * K, 4) in the order (y, x, anchor).
    """
    half = [(scale / 2 / math.sqrt(r), scale / 2 * math.sqrt(r)) for r in ratios]
    half = torch.tensor(half, device=device)  # (K, 2)
    anchors = {}
    for stride, (height, width) in sizes.items():
        y = torch.arange(height, device=device)[:, None, None] + 0.5
        x = torch.arange(width, device=device)[None, :, None] + 0.5
        centre = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (H, W, 1, 2)
        anchors[stride] = stride * torch.cat([centre - half, centre + half], -1).flatten(0, 2)
    return anchors


@dataclass(frozen=True)
class _Level:
    """Anchors of one level as intervals along x and along y, each (K, H, W, 2).

    On a regular grid x does not depend on the row nor y on the column. These axes then have
    length one, so that an overlap with an object takes H + W intervals and one outer product.
    """

    stride: int
    size: tuple[int, int]
    x: Tensor
    y: Tensor

    @property
    def per_location(self) -> int:
        return len(self.x)

    def iou(self, boxes: Tensor) -> Tensor:
        """IoU (G, K, H, W) of ``boxes`` (G, 4) with each anchor; zero for boxes without area."""
        x1, y1, x2, y2 = boxes[:, :, None, None, None].unbind(1)
        intersection = _overlap(self.x, x1, x2) * _overlap(self.y, y1, y2)
        anchor_area = (self.x[..., 1] - self.x[..., 0]) * (self.y[..., 1] - self.y[..., 0])
        box_area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
        union = (anchor_area + box_area).sub_(intersection)
        return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))

    def gauss(self, boxes: Tensor) -> Tensor:
        """(G, H, W) Gaussian of the cell centres inside ``boxes`` (G, 4), elsewhere zero."""
        u, v = self._offsets(boxes)
        inside = (u.abs() < 1) & (v.abs() < 1)
        return torch.exp(-0.5 * (u.square() + v.square())) * inside

    def zones(self, boxes: Tensor) -> Tensor:
        """(G, H, W) 2 for cell centres inside ``boxes`` (G, 4), 1 in a ring around, else 0."""
        u, v = self._offsets(boxes)
        distance = torch.maximum(u.abs(), v.abs())
        return (distance < 1).float() + (distance < _RING).float()

    def _offsets(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Cell centres from the box centre in half sides, along x (G, 1, W) and y (G, H, 1)."""
        x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
        x = (torch.arange(self.size[1], device=boxes.device) + 0.5) * self.stride
        y = (torch.arange(self.size[0], device=boxes.device)[:, None] + 0.5) * self.stride
        u = (2 * x - x1 - x2) / (x2 - x1).clamp(min=1e-6)
        v = (2 * y - y1 - y2) / (y2 - y1).clamp(min=1e-6)
        return u, v


def _build_levels(
    anchors: Mapping[int, Tensor], sizes: Mapping[int, tuple[int, int]]
) -> list[_Level]:
    """Anchors (H * W * K, 4) of each level as intervals; regular grids lose their idle axes."""
    grids = {}
    for stride, (height, width) in sizes.items():
        grid = anchors[stride].float().view(height, width, -1, 4).permute(2, 0, 1, 3)
        grids[stride] = grid[..., 0::2], grid[..., 1::2]
    regular = [(x == x[:, :1]).all() & (y == y[:, :, :1]).all() for x, y in grids.values()]
    # Waits for the device, once for all levels: regularity decides shapes.
    levels = []
    for (stride, (x, y)), is_regular in zip(
        grids.items(), torch.stack(regular).tolist(), strict=True
    ):
        if is_regular:
            x, y = x[:, :1], y[:, :, :1]
        levels.append(_Level(stride, sizes[stride], x, y))
    return levels


def _overlap(intervals: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Length (G, K, H, W) that ``intervals`` (K, H, W, 2) share with [start, end] (G, 1, 1, 1)."""
    return (torch.minimum(intervals[..., 1], end) - torch.maximum(intervals[..., 0], start)).clamp_(
        min=0
    )


def _active_levels(best: Tensor, boxes: Tensor, participation: float | None) -> Tensor:
    """Whether each object takes part in each level (L, G), from the levels' best IoU (L, G)."""
    touched = best > 0
    if participation is not None:
        return touched & (best >= participation * best.amax(0))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.log2(area.clamp(min=1e-6).sqrt() / _FINEST_SIDE).floor().clamp(0, len(best) - 1)
    return touched & (torch.arange(len(best), device=best.device)[:, None] == level)


def _values(
    kind: str,
    level: _Level,
    boxes: Tensor,
    iou: Tensor,
    best: Tensor,
    active: Tensor,
    iou_ratio: float,
) -> Tensor:
    """What each object gives each position of a level, (G, H, W)."""
    if kind == "gauss":
        return level.gauss(boxes) * active[:, None, None]
    if kind == "zones":
        return level.zones(boxes) * active[:, None, None]
    # The comparison with the threshold is strict, so that best = 0 selects nothing.
    threshold = torch.where(active, iou_ratio * best, torch.inf)[:, None, None, None]
    if kind == "iou":
        nearest = torch.where(iou > threshold, iou, 0).amax(1)
        return nearest / best.clamp(min=torch.finfo(best.dtype).tiny)[:, None, None]
    return (iou > threshold).sum(1, dtype=iou.dtype)


def _accumulate(mask: Tensor, image: Tensor, values: Tensor, kind: str) -> None:
    """Gather what objects (G, H, W) of images (G,) give into ``mask`` (B, H, W), in place."""
    if kind in ("count", "binary", "roi_level"):
        mask.index_add_(0, image, values)
    else:
        mask.scatter_reduce_(0, image[:, None, None].expand_as(values), values, "amax")
