"""Anchors of a regular grid, made on the device; A anchors per position of an H x W map."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_anchors(cell: Tensor, size: tuple[int, int], stride: int, offset: float) -> Tensor:
    """The anchors of Detectron2's ``DefaultAnchorGenerator``, which copies its grid to the device.

    Args:
        cell: (A, 4) xyxy around the origin.
        size: (H, W) of the map.
        offset: of the first anchors' centre from the corner of the image, in strides.

    Returns:
        (H W A, 4), ordered y, x, anchor, in pixels.
    """
    y, x = (
        (torch.arange(length, dtype=cell.dtype, device=cell.device) + offset) * stride
        for length in size
    )
    y, x = torch.meshgrid(y, x, indexing="ij")
    centre = torch.stack([x, y, x, y], dim=-1)
    return (centre[:, :, None] + cell).flatten(0, 2)
