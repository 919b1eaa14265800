"""Boxes on feature maps: which level a box belongs to, which cells it covers, and means over them.

Everything works on padded batches of boxes and without a loop over them, so that it costs one
launch a level and never waits for the device.

B: images, P: boxes per image (padded with boxes of weight zero), L: levels, C_r: channels,
H_r, W_r: height and width of level r, s: its stride in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import Ragged, full_precision, on_device, stack_channels


def pad_boxes(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack boxes of several images.

    Args:
        boxes: B tensors (n_i, 4).

    Returns:
        boxes (B, P, 4) with P = max n_i (at least 1), padded with zeros, and their validity
        (B, P), bool.
    """
    layout = Ragged.of(boxes)
    return layout.pad(torch.cat(boxes)), layout.valid


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
    octave = torch.log2((width * height).sqrt() / base_size + 1e-6)
    return octave.floor().clamp(0, num_levels - 1).long()


def _covered(
    boxes: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[float], far_cell: bool
) -> Tensor:
    """The columns and rows of each level that boxes cover.

    The first cell of an axis is ``floor(x1 / s)``; the last one is ``floor(x2 / s)`` with
    ``far_cell``, else the one before it, but a box always covers at least one row and one column.
    Cells beyond the map are clamped onto its border.

    Args:
        boxes: (B, P, 4) xyxy in input pixels.
        sizes: (H_r, W_r) per level.
        strides: s per level.
        far_cell: whether the cell that holds the box's far corner counts. Crop averages count
            it, masks do not (Global Knowledge, released code).

    Returns:
        (L, B, P, 2, max of all H_r and W_r) bool: columns, then rows.
    """
    scale, limit = (
        on_device(values, boxes.device)
        for values in (
            [float(stride) for stride in strides],
            [(float(width - 1), float(height - 1)) for height, width in sizes],
        )
    )
    cells = (boxes / scale[:, None, None, None]).floor()
    first, last = cells[..., :2], cells[..., 2:]
    last = torch.maximum(first, last if far_cell else last - 1)
    limit = limit[:, None, None, :]
    first, last = (torch.minimum(end.clamp(min=0), limit)[..., None] for end in (first, last))
    cell = torch.arange(max(map(max, sizes)), device=boxes.device)
    return (cell >= first) & (cell <= last)


@full_precision
def crop_means(
    pyramids: Sequence[Sequence[Tensor]], boxes: Tensor, strides: Sequence[float]
) -> list[Tensor]:
    """Means of feature maps over the cells of each box, far cells included.

    The sums are one matrix product per map, boxes x cells times cells x channels. Unlike prefix
    sums it needs no second copy of the map, and no cancellation costs digits.

    Args:
        pyramids: of each detector the maps (B, C_r, H_r, W_r) per level, of equal sizes.
        boxes: (B, P, 4) xyxy in input pixels, constants.
        strides: s per level.

    Returns:
        Per detector (L, B, P, max C_r), differentiable with respect to the maps; channels that a
        level does not have are 0.
    """
    sizes = [(x.shape[-2], x.shape[-1]) for x in pyramids[0]]
    inside = _covered(boxes.detach(), sizes, strides, far_cell=True)
    counts = inside.sum(dim=-1).prod(dim=-1)[..., None]
    return [_crop_sums(pyramid, inside, sizes) / counts for pyramid in pyramids]


def _crop_sums(
    pyramid: Sequence[Tensor], inside: Tensor, sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """(L, B, P, max C_r) sums of maps over the cells ``inside`` of :func:`_covered`."""
    lines = inside.to(pyramid[0].dtype)
    sums = []
    for level, feature, (height, width) in zip(lines, pyramid, sizes, strict=True):
        cells = level[..., 1, :height, None] * level[..., 0, None, :width]
        sums.append(cells.flatten(2) @ feature.flatten(2).transpose(1, 2))
    return stack_channels(sums)


def box_masks(
    boxes: Tensor,
    weights: Tensor,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[float],
) -> list[Tensor]:
    """Maps of box weights: the largest weight of the boxes that cover a cell, 0 outside of boxes.

    Taking the largest makes the mask independent of the boxes' order (the released code of
    Global Knowledge lets the later box win).

    Args:
        boxes: (B, P, 4) xyxy in input pixels.
        weights: (L, B, P) >= 0; a box of weight 0 is not there.
        sizes: (H_r, W_r) per level.
        strides: s per level.

    Returns:
        (B, H_r, W_r) per level in the dtype of ``weights``.
    """
    if boxes.shape[1] == 0:
        return [weights.new_zeros(len(boxes), *size) for size in sizes]
    columns, rows = _covered(boxes, sizes, strides, far_cell=False).unbind(dim=-2)
    rows = rows * weights[..., None]
    return [
        (across[..., None, :width] * down[..., :height, None]).amax(dim=1)
        for across, down, (height, width) in zip(columns, rows, sizes, strict=True)
    ]
