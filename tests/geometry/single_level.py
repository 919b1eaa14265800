"""The functions of d2kd.geometry.boxes and their losses on a single level, as tests like them."""

from __future__ import annotations

from torch import Tensor

from d2kd.geometry import boxes as levels
from d2kd.losses.global_knowledge import decoupled_losses


def crop_means(feature: Tensor, boxes: Tensor, stride: float) -> Tensor:
    """(B, C, H, W) and (B, P, 4) -> (B, P, C)."""
    return levels.crop_means([[feature]], _cells(boxes, feature.shape[-2:], stride))[0, 0]


def box_mask(boxes: Tensor, weights: Tensor, size: tuple[int, int], stride: float) -> Tensor:
    """(B, P, 4) and (B, P) -> (B, H, W)."""
    return levels.box_masks(_cells(boxes, size, stride), weights[None])[0]


def box_cells(boxes: Tensor, size: tuple[int, int], stride: float, *, far_cell: bool) -> Tensor:
    """(B, P, 4) -> (B, P, H, W) bool, the cells that each box covers."""
    cells = _cells(boxes, size, stride)
    columns, rows = (cells.to_far if far_cell else cells.to_near)[0].unbind(dim=-2)
    return rows[..., : size[0], None] & columns[..., None, : size[1]]


def _cells(boxes: Tensor, size: tuple[int, int], stride: float) -> levels.BoxCells:
    return levels.BoxCells(boxes, [tuple(size)], [stride])


def decoupled_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background loss, scalars."""
    foreground, background = decoupled_losses([student], [teacher], [weights])
    return foreground[0], background[0]
