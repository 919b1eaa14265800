"""The losses of MAR (reconstruction): features near objects, and relations between pixels.

Zeng et al., "Distilling object detectors with mask-guided feature and relation-based knowledge",
IJCSE 27(2), 2024. Only its abstract is public; the formulas are this project's reconstruction,
explained in docs/methods/mar.md.

Shapes: B images, L levels, C channels (Cs of the student, Ct of the teacher), H x W positions of a
level, P of all levels; G groups of N pixels each, a group being the cells of one RoI or the RoIs of
one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import connected_zero, full_precision, inverse_lengths, on_device, repeat_each

PIXEL_WEIGHTS = ("balanced", "uniform")


# --- features near objects ------------------------------------------------------------------------


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
        student: one (B, C, H, W) per level, with the teacher's channels.
        teacher: one (B, C, H, W) per level; constant.
        masks: one (B, H, W) per level, not negative; constant.
        background_weight: eta in docs/methods/mar.md.

    Returns:
        A scalar.
    """
    totals = torch.stack([mask.sum() for mask in masks]).clamp(min=1)
    weights = list(masks)
    if background_weight:
        for i, mask in enumerate(masks):
            outside = (mask == 0).to(mask.dtype)
            # Both parts share the level's divisor, which is the mask's.
            scale = background_weight * totals[i] / outside.sum().clamp(min=1)
            weights[i] = mask + scale * outside
    sums: Tensor = _WeightedSquares.apply(*student, *teacher, *weights)
    factors = [0.5 / (len(student) * features.shape[1]) for features in student]
    # Not a product of vectors, which autocast would round.
    return (sums * (on_device(factors, sums.device, sums.dtype) / totals)).sum()


class _WeightedSquares(torch.autograd.Function):
    """Per level the sum of weight times squared difference, with one tensor kept for the backward
    pass, which reads it once; autograd's reads three times as much."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        """Of (B, C, H, W) of L levels of the student, of as many of the teacher, and L weights
        (B, H, W) -> (L,)."""
        levels = len(tensors) // 3
        students, teachers, weights = (tensors[i * levels : (i + 1) * levels] for i in range(3))
        ctx.dtypes = [x.dtype for x in students]
        dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
        sums, kept = weights[0].new_empty(levels, dtype=dtype), []
        for level, (x, y, weight) in enumerate(zip(students, teachers, weights, strict=True)):
            gap = x.to(dtype) - y
            kept.append(gap * weight.unsqueeze(1))
            torch.sum(gap.mul_(kept[-1]), dim=(0, 1, 2, 3), out=sums[level])
        ctx.save_for_backward(*kept)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scales = (2 * grad).unbind()
        levels = zip(ctx.saved_tensors, scales, ctx.dtypes, strict=True)
        grads = [(gap * scale).to(dtype) for gap, scale, dtype in levels]
        return *grads, *[None] * (2 * len(grads))


# --- relations between pixels ---------------------------------------------------------------------


@full_precision
def relation_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Squared difference of the pixels' cosine similarity matrices, averaged over groups.

    For a group with pixel weights q and similarity matrices A that is
    sum_ij q_i q_j (A_student_ij - A_teacher_ij)^2, between 0 and 4. The matrices (N x N) are built:
    for the many pixels of a map there is :func:`map_relation_loss`.

    Args:
        student: (G, Cs, N).
        teacher: (G, Ct, N); constant. The widths may differ.
        weights: (G, N), not negative, of sum one in each group; by default each pixel weighs 1/N.
        groups: (G,), 1 for groups that count and 0 for others; by default all count.

    Returns:
        A scalar; zero, connected to ``student``, without groups or pixels.
    """
    if student.numel() == 0:
        return connected_zero(student)
    scale = student.shape[2] ** -0.5 if weights is None else weights.sqrt().unsqueeze(1)
    distances = direct_distances(
        _scaled_units(student, scale), _scaled_units(teacher.detach(), scale)
    )
    if groups is None:
        return distances.mean()
    groups = groups.to(distances.dtype)
    return distances @ (groups / groups.sum().clamp(min=1))


@full_precision
def map_relation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor
) -> Tensor:
    """:func:`relation_loss` of the positions of each level of each image, averaged over both.

    The matrices of positions are never built, see :func:`gram_distances`.

    Args:
        student: (B, Cs, H, W) per level.
        teacher: (B, Ct, H, W) per level; constant.
        weights: (B, P) of the positions of all levels, of sum one in each level of each image.

    Returns:
        A scalar.
    """
    lengths = [level[0, 0].numel() for level in student]
    scale = weights.sqrt().unsqueeze(1)
    units = [
        _scaled_units(torch.cat([level.flatten(2) for level in levels], 2), scale)
        for levels in (student, [level.detach() for level in teacher])
    ]
    return gram_distances(units[0], units[1], lengths).mean()


def _scaled_units(features: Tensor, scale: Tensor | float) -> Tensor:
    """Pixels (G, C, N) of length ``scale``; those without a direction become zero.

    With the root of its weight on each pixel the sum over i, j is a plain Frobenius norm.
    """
    return features * (inverse_lengths(features.square().sum(1, keepdim=True)) * scale)


def direct_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """|S'S - T'T|^2 (G,) from the pixels' matrices of S (G, Cs, N) and T (G, Ct, N): memory N^2."""
    # Two products in the same order: the rounding of similar maps is similar, and cancels.
    difference = student.mT @ student - teacher.mT @ teacher
    return difference.square().sum((1, 2))


def gram_distances(student: Tensor, teacher: Tensor, lengths: Sequence[int]) -> Tensor:
    """|S'S - T'T|^2 = |SS'|^2 + |TT'|^2 - 2 |ST'|^2 from the channels' matrices: memory C^2.

    The N x N matrix of a dense level would take gigabytes. It has rank C, so nothing is lost.

    Args:
        student: S of L levels side by side, (G, Cs, P).
        teacher: T, (G, Ct, P); constant.
        lengths: N of each level, P in all.

    Returns:
        (G, L) squared Frobenius norms, which rounding cannot make negative.
    """
    distances: Tensor = _GramDistances.apply(student, teacher, lengths)
    return distances


class _GramDistances(torch.autograd.Function):
    """:func:`gram_distances`. As SS' is symmetric its gradient is one product, where autograd
    computes two, and the gradients of all levels land in one tensor."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, lengths: Sequence[int]) -> Tensor:
        lengths = list(lengths)
        groups, width, other = len(student), student.shape[1], teacher.shape[1]
        own = student.new_empty(len(lengths), groups, width, width)
        target = student.new_empty(len(lengths), groups, other, other)
        cross = student.new_empty(len(lengths), groups, width, other)
        levels = zip(student.split(lengths, 2), teacher.split(lengths, 2), strict=True)
        for level, (s, t) in enumerate(levels):
            torch.bmm(s, s.mT, out=own[level])
            torch.bmm(t, t.mT, out=target[level])
            torch.bmm(s, t.mT, out=cross[level])
        power = own.square().sum((2, 3)) + target.square().sum((2, 3))
        distances = torch.sub(power, cross.square().sum((2, 3)), alpha=2).clamp_(min=0)
        ctx.save_for_backward(student, teacher, own, cross, distances)
        ctx.lengths = lengths
        return distances.mT

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, own, cross, distances = ctx.saved_tensors
        # A distance that is 0, perhaps because it was clamped, has no gradient.
        grad = (4 * grad.mT * (distances > 0))[:, :, None, None]
        grad_own, grad_cross = own * grad, cross * -grad
        result = torch.empty_like(student)
        parts = (x.split(ctx.lengths, 2) for x in (result, student, teacher))
        for level, (part, s, t) in enumerate(zip(*parts, strict=True)):
            torch.bmm(grad_own[level], s, out=part)
            part.baddbmm_(grad_cross[level], t)
        return result, None, None


def pixel_weights(masks: Tensor, lengths: Sequence[int], mode: str = "balanced") -> Tensor:
    """Weights of the positions of each level of each image in the relation loss.

    ``balanced`` gives half of the mass to the pixels inside the mask and half to those outside,
    without which pairs of object pixels hardly count on a fine level; where one of the two sets
    is empty, and for ``uniform``, each pixel weighs as much as any other.

    Args:
        masks: (B, P) of all levels, positive near objects.
        lengths: positions of each level, P in all.
        mode: one of ``PIXEL_WEIGHTS``.

    Returns:
        (B, P) of sum one in each level of each image.
    """
    size = on_device(lengths, masks.device, masks.dtype)
    if mode == "uniform":
        return repeat_each((1 / size).expand(len(masks), -1), lengths)
    near = masks > 0
    near_count = torch.stack([level.sum(1) for level in near.split(list(lengths), 1)], 1)
    counts = torch.stack([near_count, size - near_count])
    # The pixels of a set share all of the mass where the other set is empty, else half of it. What
    # comes out infinite for an empty set is read by no pixel.
    shares = 1 / (counts * (1 + (counts.flip(0) > 0)))
    inside, outside = repeat_each(shares, lengths)
    return torch.where(near, inside, outside)
