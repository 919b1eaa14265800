"""Boxes on feature maps: which level a box belongs to, which cells it covers, and means over them.

Everything works on padded batches of boxes and without a loop over them, so that it costs one
launch per level and never waits for the device.

B: images, P: boxes per image (padded with boxes of weight zero), L: levels, C_r: channels,
H_r, W_r: height and width of level r, s: its stride in pixels of the network's input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import full_precision, on_device, stack_channels


def assign_levels(
    boxes: Tensor, num_levels: int, base_size: float = 56.0, margin: float = 1.0
) -> Tensor:
    """Pyramid level of each box by its size: ``floor(log2(sqrt((w + m)(h + m)) / base_size))``.

    A box of ``base_size`` to twice that (side, in input pixels) belongs to the finest level, each
    further octave to the next one. With m = 1 it is the rule of Global Knowledge's released code,
    with m = 0 and 14 strides of the finest level as ``base_size`` FPN's (224 px to stride 16).

    Args:
        boxes: (..., 4) xyxy in input pixels.
        num_levels: number of levels; sizes beyond the range are clamped.
        base_size: pixels.
        margin: m, pixels.

    Returns:
        (...,) long, 0 = finest level.
    """
    width, height = (boxes[..., 2:] - boxes[..., :2]).float().clamp(min=0).unbind(-1)
    if margin:
        width, height = width + margin, height + margin
    # The areas at which octaves begin, instead of logarithms: exact where a box has just that size.
    octaves = [float(base_size * 2**octave) ** 2 for octave in range(1, num_levels)]
    return torch.bucketize(width * height, on_device(octaves, boxes.device), right=True)


class BoxCells:
    """The cells of each level that boxes cover, as columns and rows.

    The first cell of an axis is ``floor(x1 / s)``; the last one is ``floor(x2 / s)``, or the one
    before it, but a box always covers at least one row and one column. Cells beyond the map are
    clamped onto its border. Computed once for both kinds of last cell, when one is read.

    Args:
        boxes: (B, P, 4) xyxy in input pixels, constants.
        sizes: (H_r, W_r) per level.
        strides: s per level.
    """

    def __init__(self, boxes: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[float]):
        self.boxes = boxes.detach()
        self.sizes, self.strides = tuple(sizes), tuple(strides)

    @property
    def to_near(self) -> Tensor:
        """(L, B, P, 2, max of all H_r and W_r) bool: columns, then rows, without the cell that
        holds the box's far corner. So masks have it (Global Knowledge, released code)."""
        return self._covered[0]

    @property
    def to_far(self) -> Tensor:
        """The same, with that cell. So averages of crops have it (ditto)."""
        return self._covered[1]

    @functools.cached_property
    @torch.no_grad()
    def _covered(self) -> Tensor:
        boxes = self.boxes
        scale, limit = (
            on_device(values, boxes.device)
            for values in (
                [float(stride) for stride in self.strides],
                [(float(width - 1), float(height - 1)) for height, width in self.sizes],
            )
        )
        limit = limit[:, None, None, :]
        cells = (boxes / scale[:, None, None, None]).floor()
        first = cells[..., :2].clamp(torch.zeros_like(limit), limit)
        last = torch.stack([cells[..., 2:] - 1, cells[..., 2:]]).clamp(first, limit)
        cell = torch.arange(max(map(max, self.sizes)), device=boxes.device)
        return (cell >= first[..., None]) & (cell <= last[..., None])


@full_precision
def crop_means(pyramids: Sequence[Sequence[Tensor]], cells: BoxCells) -> Tensor:
    """Means of feature maps over the cells of each box, far cells included.

    The sums are one matrix product per map, boxes x cells times cells x channels. Unlike prefix
    sums it needs no second copy of the map, and no cancellation costs digits.

    Args:
        pyramids: of each of D detectors the maps (B, C_r, H_r, W_r) per level, of equal sizes.
        cells: of the boxes (B, P, 4).

    Returns:
        (D, L, B, P, max C_r), differentiable with respect to the maps; channels that a level does
        not have are 0.
    """
    inside = cells.to_far
    lines = inside.to(pyramids[0][0].dtype)
    masks = [
        (level[..., 1, :height, None] * level[..., 0, None, :width]).flatten(2)
        for level, (height, width) in zip(lines, cells.sizes, strict=True)
    ]
    sums = [
        mask @ feature.flatten(2).mT
        for pyramid in pyramids
        for mask, feature in zip(masks, pyramid, strict=True)
    ]
    counts = inside.sum(dim=-1).prod(dim=-1)[..., None]
    return stack_channels(sums).unflatten(0, (len(pyramids), -1)) / counts


def box_masks(cells: BoxCells, weights: Tensor) -> list[Tensor]:
    """Maps of box weights: the largest weight of the boxes that cover a cell, 0 outside of boxes.

    Taking the largest makes the mask independent of the boxes' order (the released code of
    Global Knowledge lets the later box win). Weights (L, B, P) >= 0; a box of weight 0 is not
    there. Returns (B, H_r, W_r) per level in their dtype.
    """
    if weights.shape[-1] == 0:
        return [weights.new_zeros(weights.shape[1], *size) for size in cells.sizes]
    columns, rows = cells.to_near.unbind(dim=-2)
    rows = rows * weights[..., None]
    return [
        (across[..., None, :width] * down[..., :height, None]).amax(dim=1)
        for across, down, (height, width) in zip(columns, rows, cells.sizes, strict=True)
    ]
