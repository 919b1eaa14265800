"""Boxes on feature maps: which level a box belongs to, which cells it covers, and means over them.

Everything works on padded batches of boxes and without a loop over them, so that it costs one
launch a level and never waits for the device.

B: images, P: boxes an image (padded with boxes of weight zero), C: channels,
H, W: height and width of a feature map, s: its stride in pixels of the network's input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..numerics import full_precision


def pad_boxes(boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack boxes of several images.

    Args:
        boxes: B tensors (n_i, 4).

    Returns:
        boxes (B, P, 4) with P = max n_i, padded with zeros, and their validity (B, P), bool.
    """
    valid = pad_sequence([b.new_ones(len(b), dtype=torch.bool) for b in boxes], batch_first=True)
    return pad_sequence(boxes, batch_first=True), valid


def assign_levels(
    boxes: Tensor, num_levels: int, base_size: float = 56.0, margin: float = 1.0
) -> Tensor:
    """Pyramid level of each box by its size: ``floor(log2(sqrt((w + m)(h + m)) / base_size))``.

    A box of ``base_size`` to twice that (side, in input pixels) belongs to the finest level, each
    further octave to the next one (Global Knowledge, released code, with m = 1; with m = 0 and
    four levels from stride 4 it is FPN's rule).

    Args:
        boxes: (..., 4) xyxy in input pixels.
        num_levels: number of levels; sizes beyond the range are clamped.
        base_size: pixels.
        margin: m, pixels.

    Returns:
        (...,) long, 0 = finest level.
    """
    width, height = (boxes[..., 2:] - boxes[..., :2]).float().clamp(min=0).unbind(-1)
    size = ((width + margin) * (height + margin)).sqrt()
    octave = torch.log2(size / base_size + 1e-6)
    return octave.floor().clamp(0, num_levels - 1).long()


def _covered(start: Tensor, stop: Tensor, length: int) -> Tensor:
    """(..., length) bool: the cells start..stop of one axis, both inclusive, clamped to it."""
    cell = torch.arange(length, device=start.device)
    start, stop = (end.clamp(0, length - 1)[..., None] for end in (start, stop))
    return (cell >= start) & (cell <= stop)


def box_cells(boxes: Tensor, size: tuple[int, int], stride: float, *, far_cell: bool) -> Tensor:
    """The cells of a feature map that each box covers.

    The first cell of an axis is ``floor(x1 / s)``; the last one is ``floor(x2 / s)`` with
    ``far_cell``, else the one before it, but a box always covers at least one row and one column.
    Cells beyond the map are clamped onto its border.

    Args:
        boxes: (B, P, 4) xyxy in input pixels.
        size: (H, W) of the map.
        stride: s.
        far_cell: whether the cell that holds the box's far corner counts. Crop averages count
            it, masks do not (Global Knowledge, released code).

    Returns:
        (B, P, H, W) bool.
    """
    cells = (boxes / stride).floor()
    first, last = cells[..., :2], cells[..., 2:]
    last = torch.maximum(first, last if far_cell else last - 1)
    columns, rows = (
        _covered(first[..., axis], last[..., axis], length)
        for axis, length in ((0, size[1]), (1, size[0]))
    )
    return rows[..., :, None] & columns[..., None, :]


@full_precision
def crop_means(feature: Tensor, boxes: Tensor, stride: float) -> Tensor:
    """Mean of a feature map over the cells of each box, far cells included.

    The sums are one matrix product a map, boxes x cells times cells x channels. Unlike prefix
    sums it needs no second copy of the map, and no cancellation costs digits.

    Args:
        feature: (B, C, H, W).
        boxes: (B, P, 4) xyxy in input pixels, constants.
        stride: s.

    Returns:
        (B, P, C), differentiable with respect to ``feature``.
    """
    height, width = feature.shape[-2:]
    cells = box_cells(boxes.detach(), (height, width), stride, far_cell=True).flatten(2)
    cells = cells.to(feature.dtype)
    sums = cells @ feature.flatten(2).transpose(1, 2)
    return sums / cells.sum(dim=-1, keepdim=True)


def box_mask(boxes: Tensor, weights: Tensor, size: tuple[int, int], stride: float) -> Tensor:
    """Map of box weights: the largest weight of the boxes that cover a cell, 0 outside of boxes.

    Taking the largest makes the mask independent of the boxes' order (the released code of
    Global Knowledge lets the later box win).

    Args:
        boxes: (B, P, 4) xyxy in input pixels.
        weights: (B, P) >= 0; a box of weight 0 is not there.
        size: (H, W) of the map.
        stride: s.

    Returns:
        (B, H, W) in the dtype of ``weights``.
    """
    if boxes.shape[1] == 0:
        return weights.new_zeros(len(boxes), *size)
    cells = box_cells(boxes, size, stride, far_cell=False)
    return (cells * weights[..., None, None]).amax(dim=1)
