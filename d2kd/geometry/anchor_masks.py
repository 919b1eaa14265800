"""Multi-value masks: how close each position of a pyramid level is to objects, told by anchors.

The mask of MAR (reconstruction): a position weighs as much as it has anchors that overlap an object
nearly as well as the level's best anchor does. The weight is zero far away, small near an object's
border and largest at its core.

Shapes: B images, G objects (of the batch, or of a chunk), L levels of H x W positions, P positions
of all levels, K anchors at each. Boxes and anchors are (x1, y1, x2, y2) in pixels of the network's
input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import image_index, repeat_each
from .anchors import grid_anchors
from .boxes import assign_levels

MASK_KINDS = ("count", "binary", "iou", "gauss", "zones", "roi_level")

# "zones": the outer zone ends at the box enlarged by this factor.
_RING = 1.5
# "roi_level": objects of this side (or less) lie on the finest level, of twice it on the next.
_FINEST_SIDE = 56
# Object-anchor pairs held at a time: 16 MiB of IoU, and 6 times that while it is computed.
_MAX_PAIRS = 1 << 22

Sizes = Mapping[int, tuple[int, int]]


class MaskRule(NamedTuple):
    """What positions are worth.

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

    ``iou``, ``gauss`` and ``zones`` take the maximum over objects.

    Attributes:
        kind: one of ``MASK_KINDS``.
        iou_ratio: psi in the method's page.
        participation: kappa in the method's page.
        cap: at most K at a position, however many objects overlap there.
    """

    kind: str = "count"
    iou_ratio: float = 0.5
    participation: float = 0.1
    cap: bool = False


BY_COUNT = MaskRule()


@torch.no_grad()
def multi_value_masks(
    anchors: Mapping[int, Tensor],
    sizes: Sizes,
    gt_boxes: Sequence[Tensor],
    rule: MaskRule = BY_COUNT,
    max_pairs: int = _MAX_PAIRS,
) -> dict[int, Tensor]:
    """Masks of all images of a batch (MAR, reconstruction).

    Objects without area, or that no anchor touches, are skipped.

    Args:
        anchors: stride -> (H * W * K, 4) in the order (y, x, anchor).
        sizes: stride -> (H, W), fine to coarse.
        gt_boxes: per image (n, 4).
        max_pairs: object-anchor pairs held at a time; bounds the memory.

    Returns:
        stride -> (B, H, W) float32 on the device of the boxes.

    Raises:
        ValueError: the rule's kind is unknown.
    """
    if rule.kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {rule.kind!r}, valid are {', '.join(MASK_KINDS)}")
    grid = _Grid.of(anchors, sizes)
    boxes, images = torch.cat(list(gt_boxes)).float(), image_index(gt_boxes)
    mask = boxes.new_zeros(len(gt_boxes), sum(grid.lengths))
    step = max(1, max_pairs // max(1, grid.anchors[..., 0].numel()))
    for box, image in zip(boxes.split(step), images.split(step), strict=True):
        values = _values(grid, box, rule)
        if rule.kind in ("count", "binary", "roi_level"):
            mask.index_add_(0, image, values)
        else:
            mask.scatter_reduce_(0, image[:, None].expand_as(values), values, "amax")
    if rule.kind == "binary":
        mask = (mask > 0).float()
    masks = {}
    for (stride, size), level in zip(sizes.items(), mask.split(grid.lengths, 1), strict=True):
        masks[stride] = level.unflatten(1, size)
        if rule.cap:
            masks[stride] = masks[stride].clamp(max=len(anchors[stride]) // math.prod(size))
    return masks


@dataclass(frozen=True)
class _Grid:
    """All positions of all levels, level after level.

    Attributes:
        anchors: (P, K, 4). Where a level has fewer, the rest have no area and touch nothing.
        sizes: stride -> (H, W).
        lengths: positions of each level.
    """

    anchors: Tensor
    sizes: Sizes
    lengths: list[int]

    @classmethod
    def of(cls, anchors: Mapping[int, Tensor], sizes: Sizes) -> _Grid:
        lengths = [math.prod(size) for size in sizes.values()]
        levels = [anchors[s].float().view(n, -1, 4) for s, n in zip(sizes, lengths, strict=True)]
        most = max(level.shape[1] for level in levels)
        padded = [
            F.pad(level, (0, 0, 0, most - level.shape[1])) if level.shape[1] < most else level
            for level in levels
        ]
        return cls(torch.cat(padded), sizes, lengths)

    def iou(self, boxes: Tensor) -> Tensor:
        """IoU (G, P, K) of ``boxes`` (G, 4) with each anchor; zero for boxes without area."""
        boxes = boxes[:, None, None]
        sides = torch.minimum(self.anchors[..., 2:], boxes[..., 2:])
        sides = sides.sub_(torch.maximum(self.anchors[..., :2], boxes[..., :2])).clamp_(min=0)
        intersection = sides[..., 0] * sides[..., 1]
        union = (_areas(self.anchors) + _areas(boxes)).sub_(intersection)
        return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))

    def offsets(self, boxes: Tensor) -> Tensor:
        """(G, P, 2) cell centres from the centre of ``boxes`` (G, 4), in half sides of the box."""
        origin = boxes.new_zeros(1, 4)
        levels = [grid_anchors(origin, size, s, 0.5)[:, :2] for s, size in self.sizes.items()]
        start, end = boxes[:, None, :2], boxes[:, None, 2:]
        return (2 * torch.cat(levels) - start - end) / (end - start).clamp(min=1e-6)

    def best(self, of_position: Tensor) -> Tensor:
        """The largest value of each level: (G, P) -> (G, L)."""
        return torch.stack([level.amax(1) for level in of_position.split(self.lengths, 1)], 1)


def _areas(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), zero where a side is negative."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp_(min=0)
    return sides[..., 0] * sides[..., 1]


def _values(grid: _Grid, boxes: Tensor, rule: MaskRule) -> Tensor:
    """What each object gives each position, (G, P)."""
    iou = grid.iou(boxes)
    nearest = iou.amax(2)
    best = grid.best(nearest)
    # Whether the object takes part in the level.
    active = best > 0
    if rule.kind == "roi_level":
        own = assign_levels(boxes, best.shape[1], _FINEST_SIDE, margin=0)
        active &= torch.arange(best.shape[1], device=best.device) == own[:, None]
    else:
        active &= best >= rule.participation * best.amax(1, keepdim=True)
    if rule.kind == "gauss":
        offsets = grid.offsets(boxes)
        values = torch.exp(-0.5 * offsets.square().sum(2)) * (offsets.abs().amax(2) < 1)
        return values * repeat_each(active, grid.lengths)
    if rule.kind == "zones":
        distance = grid.offsets(boxes).abs().amax(2)
        values = (distance < 1).float() + (distance < _RING).float()
        return values * repeat_each(active, grid.lengths)
    # The comparison with the threshold is strict, so that best = 0 selects nothing.
    threshold = repeat_each((rule.iou_ratio * best).masked_fill(~active, torch.inf), grid.lengths)
    if rule.kind == "iou":
        share = nearest / repeat_each(best.clamp(min=torch.finfo(best.dtype).tiny), grid.lengths)
        return share * (nearest > threshold)
    return (iou > threshold[:, :, None]).sum(2, dtype=iou.dtype)
