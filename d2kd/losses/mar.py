"""The losses of MAR (reconstruction): features near objects, and relations between pixels.

Zeng et al., "Distilling object detectors with mask-guided feature and relation-based knowledge",
IJCSE 27(2), 2024. Only its abstract is public; the formulas are this project's reconstruction,
explained in docs/methods/mar.md.

Shapes: B images, C channels (Cs of the student, Ct of the teacher), H x W positions; G groups of N
pixels each, a group being one level of one image, the cells of one RoI or the RoIs of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import connected_zero, full_precision

PIXEL_WEIGHTS = ("balanced", "uniform")

_MIN_NORM = 1e-6  # a shorter feature vector has no direction, hence no relation and no gradient


@full_precision
def mask_guided_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor],
    background_weight: float = 0.0,
) -> Tensor:
    """Squared error of the pyramid, weighted by masks that tell how near objects are.

    On each level, half the channel mean of the squared error is averaged over all positions of
    the batch with the mask as weight; ``background_weight`` times the same with equal weights
    outside the mask is added. The levels are averaged. Of a mask only relative values matter; one
    without weight (no objects) gives zero.

    Args:
        student: one (B, C, H, W) a level, with the teacher's channels.
        teacher: one (B, C, H, W) a level; constant.
        masks: one (B, H, W) a level, not negative; constant.
        background_weight: eta in docs/methods/mar.md.

    Returns:
        A scalar.
    """
    losses = []
    for features, target, mask in zip(student, teacher, masks, strict=True):
        weight = mask / mask.sum().clamp(min=1)
        if background_weight:
            outside = (mask == 0).to(mask.dtype)
            weight = weight + background_weight * outside / outside.sum().clamp(min=1)
        error = (features - target.detach()).square().mean(dim=1)
        losses.append(0.5 * (weight * error).sum())
    return torch.stack(losses).mean()


@full_precision
def relation_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared difference of the pixels' cosine similarity matrices, averaged over groups.

    For a group with pixel weights q and similarity matrices A that is
    sum_ij q_i q_j (A_student_ij - A_teacher_ij)^2, between 0 and 4. The pixels' matrices (N x N)
    are built only where N is at most the number of channels; elsewhere the same value comes from
    matrices of channels (see ``gram_distance``).

    Args:
        student: (G, Cs, N).
        teacher: (G, Ct, N); constant. The widths may differ.
        weights: (G, N), not negative, of sum one in each group; all pixels alike by default.

    Returns:
        A scalar; zero, connected to ``student``, without groups or pixels.
    """
    if student.numel() == 0:
        return connected_zero(student)
    pixels = student.shape[-1]
    scale = (1 / pixels) ** 0.5 if weights is None else weights.sqrt().unsqueeze(1)
    # With the root of its weight on each pixel the sum over i, j is a plain Frobenius norm.
    student, teacher = _unit(student) * scale, _unit(teacher.detach()) * scale
    direct = pixels <= max(student.shape[1], teacher.shape[1])
    return (direct_distance if direct else gram_distance)(student, teacher).mean()


def direct_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|S'S - T'T|^2 from the pixels' matrices: memory N^2.

    Args:
        student: S, (G, Cs, N).
        teacher: T, (G, Ct, N).

    Returns:
        (G,) squared Frobenius norms.
    """
    difference = student.mT @ student - teacher.mT @ teacher
    return difference.square().sum((1, 2))


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|S'S - T'T|^2 = |SS'|^2 + |TT'|^2 - 2 |ST'|^2 from the channels' matrices: memory C^2.

    The N x N matrix of a dense level would take gigabytes. It has rank C, so nothing is lost.

    Args:
        student: S, (G, Cs, N).
        teacher: T, (G, Ct, N).

    Returns:
        (G,) squared Frobenius norms, which rounding cannot make negative.
    """
    own = (student @ student.mT).square().sum((1, 2))
    target = (teacher @ teacher.mT).square().sum((1, 2))
    cross = (student @ teacher.mT).square().sum((1, 2))
    return (own + target - 2 * cross).clamp(min=0)


def pixel_weights(masks: Tensor, mode: str = "balanced") -> Tensor:
    """Weights of the pixels of each image in the relation loss.

    ``balanced`` gives half of the mass to the pixels inside the mask and half to those outside,
    without which pairs of object pixels hardly count on a fine level; where one of the two sets
    is empty, and for ``uniform``, all pixels weigh alike.

    Args:
        masks: (B, N), positive near objects.
        mode: one of ``PIXEL_WEIGHTS``.

    Returns:
        (B, N) of sum one in each image.
    """
    uniform = torch.full_like(masks, 1 / masks.shape[1])
    if mode == "uniform":
        return uniform
    near = (masks > 0).to(masks.dtype)
    far = 1 - near
    near_count, far_count = near.sum(1, keepdim=True), far.sum(1, keepdim=True)
    balanced = 0.5 * near / near_count.clamp(min=1) + 0.5 * far / far_count.clamp(min=1)
    return torch.where((near_count > 0) & (far_count > 0), balanced, uniform)


def _unit(features: Tensor) -> Tensor:
    """Pixels (G, C, N) at unit length over channels; those without a direction become zero."""
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features * ((norm > _MIN_NORM) / norm.clamp(min=_MIN_NORM))
