"""Plain feature distillation of a pyramid, the baseline of every comparison: L1 or L2.

Shape legend: B images, C channels, H_r x W_r the size of pyramid level r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..numerics import HALF, check_shapes, connected_zero, full_precision
from .rescale import rescale_pairs

DISTANCES = {"l1": full_precision(F.l1_loss), "l2": full_precision(F.mse_loss)}


def mimic_loss(
    student: Tensor, teacher: Tensor, distance: str = "l2", rescale: str | None = None
) -> Tensor:
    """Mean distance of the elements of one pyramid level: :func:`pyramid_mimic_loss` of it."""
    return pyramid_mimic_loss([student], [teacher], distance, rescale)


def pyramid_mimic_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    distance: str = "l2",
    rescale: str | None = None,
) -> Tensor:
    """Sum over pyramid levels of the mean distance of their elements: each level counts the same,
    whatever its size.

    Args:
        students: one (B, C, H_r, W_r) per level, after its adapter.
        teachers: the same of the teacher, constants.
        distance: "l1", |s - t|, or "l2", (s - t)^2 (FitNets; Romero et al., ICLR 2015).
        rescale: None compares the features as they are. A scope of
            :func:`~d2kd.losses.rescale.min_max_rescale` brings both maps to [0, 1] first, which is
            the frame in which de Rijk et al. (NeurIPS 2022) compare L1 and L2 with their SSIM
            loss.

    Returns:
        Scalar in float32 (float64 for float64 maps); zero for an empty batch.

    Raises:
        ValueError: shapes differ, or an unknown distance.
    """
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; valid: {', '.join(DISTANCES)}")
    check_shapes(students, teachers)
    if not all(student.numel() for student in students):
        return connected_zero(*students)
    if rescale is None:
        losses = [_distance(s, t, distance) for s, t in zip(students, teachers, strict=True)]
    else:
        losses = _rescaled_distances(students, teachers, distance, rescale)
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


@full_precision
def _rescaled_distances(
    students: Sequence[Tensor], teachers: Sequence[Tensor], distance: str, scope: str
) -> list[Tensor]:
    """Mean distance of each level's live elements in [0, 1]."""
    levels = zip(*rescale_pairs(students, teachers, scope), strict=True)
    return [DISTANCES[distance](s, t) / share for s, t, share in levels]


def _distance(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Mean distance of two maps of equal shape."""
    if student.dtype == teacher.dtype and student.dtype in HALF:
        loss: Tensor = _HalfDistance.apply(student, teacher.detach(), distance)
        return loss
    return DISTANCES[distance](student, teacher.detach())


class _HalfDistance(torch.autograd.Function):
    """The mean distance of two maps in half precision, summed in float32.

    A difference of two such numbers is nearly as exact as they are, and the gradient towards the
    student is rounded to their precision in any case. So only the difference is kept: a quarter of
    the memory of both maps in float32, see docs/performance.md.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, distance: str) -> Tensor:
        gap = student - teacher
        ctx.save_for_backward(gap)
        ctx.distance = distance  # type: ignore[attr-defined]
        if gap.is_cuda:  # in one pass; on a CPU it would sum one after the other, in float32
            order = 1 if distance == "l1" else 2
            total = torch.linalg.vector_norm(gap, order, dtype=torch.float32) ** order
            return total / gap.numel()
        wide = gap.float()
        return (wide.abs() if distance == "l1" else wide.square()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gap,) = ctx.saved_tensors
        if ctx.distance == "l1":
            return gap.sign() * (grad / gap.numel()), None, None
        return gap * (grad * (2 / gap.numel())), None, None
