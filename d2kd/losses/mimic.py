"""Plain feature distillation of a pyramid, the baseline of every comparison: L1 or L2.

Shape legend: B images, C channels, H_r x W_r the size of pyramid level r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import connected_zero, full_precision
from .rescale import rescale_pairs

DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}


@full_precision
def mimic_loss(
    student: Tensor, teacher: Tensor, distance: str = "l2", rescale: str | None = None
) -> Tensor:
    """Mean distance of the elements of one pyramid level.

    Args:
        student: (B, C, H, W), after its adapter.
        teacher: (B, C, H, W), a constant.
        distance: "l1", |s - t|, or "l2", (s - t)^2 (FitNets; Romero et al., ICLR 2015).
        rescale: None compares the features as they are. A scope of
            :func:`~d2kd.losses.rescale.min_max_rescale` brings both maps to [0, 1] first, which is
            the frame in which de Rijk et al. (NeurIPS 2022) compare L1 and L2 with their SSIM
            loss.

    Returns:
        Scalar; zero for an empty batch.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; valid: {', '.join(DISTANCES)}")
    if student.numel() == 0:
        return connected_zero(student)
    if rescale is None:
        return DISTANCES[distance](student, teacher.detach())
    (s,), (t,), (share,) = rescale_pairs([student], [teacher], rescale)
    return DISTANCES[distance](s, t) / share


def pyramid_mimic_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    distance: str = "l2",
    rescale: str | None = None,
) -> Tensor:
    """Sum over pyramid levels of :func:`mimic_loss`: each level counts the same, whatever its size.

    Args:
        students, teachers: one (B, C, H_r, W_r) a level, in the same order.
        distance, rescale: see :func:`mimic_loss`.
    """
    pairs = zip(students, teachers, strict=True)
    return torch.stack([mimic_loss(s, t, distance, rescale) for s, t in pairs]).sum()
