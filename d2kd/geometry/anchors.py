"""Anchors of a regular grid, made on the device; A anchors per position of an H x W map."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..numerics import on_device

# Pseudo-anchors: square root of their area in strides, and height / width of those of a position.
_SCALE = 8.0
_RATIOS = (0.5, 1.0, 2.0)


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


def pseudo_anchors(sizes: Mapping[int, tuple[int, int]], device: torch.device) -> dict[int, Tensor]:
    """Anchors for detectors that have none: three of different shapes, centred on each cell.

    Args:
        sizes: stride -> (H, W).
        device: where the anchors are needed.

    Returns:
        stride -> (H W 3, 4), ordered y, x, anchor, in pixels.
    """
    half = [(_SCALE / 2 / math.sqrt(r), _SCALE / 2 * math.sqrt(r)) for r in _RATIOS]
    corners = on_device([(-w, -h, w, h) for w, h in half], device)
    return {s: grid_anchors(s * corners, size, s, 0.5) for s, size in sizes.items()}
