"""DRKD's pixel-wise relation: the gap between the maps that graph units refine, level by level.

The refined maps of large levels are never made: the gap of all levels, sides and images is computed
from the moments of the pixels in a few batched products.

Shapes: L levels, B images, C channels (Cs of the student, Ct of the teacher), N = H x W pixels of a
level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...numerics import full_precision, on_device
from .graph import (
    GraphUnit,
    Moments,
    Pixels,
    affine_maps,
    for_each_image,
    present,
    quadratic_forms,
    refine_pixels,
)


class Level(NamedTuple):
    """One level of both sides.

    Attributes:
        student_unit, teacher_unit: graph units.
        adapter: 1x1 convolution Cs -> Ct.
        student, teacher: maps (B, Cs, H, W) and (B, Ct, H, W); the teacher's is a constant.
    """

    student_unit: GraphUnit
    teacher_unit: GraphUnit
    adapter: nn.Conv2d
    student: Tensor
    teacher: Tensor


def squared_relation_gaps(levels: Sequence[Level]) -> Tensor:
    """|| adapter(student_unit(student)) - teacher_unit(teacher) ||^2 of each level, for L_PR.

    Returns:
        (L,), each the sum over all elements of (B, Ct, H, W).
    """
    gaps = []
    with torch.autocast(levels[0].student.device.type, enabled=False):
        by_size = (list(run) for _, run in itertools.groupby(levels, _unit_sizes))
        for (*_, nodes), runs in itertools.groupby(by_size, _together):
            equal = list(itertools.chain.from_iterable(runs))
            gaps.append(_gaps_of_maps(equal) if nodes else _gaps_from_moments(equal))
    return gaps[0] if len(gaps) == 1 else torch.cat(gaps)


def _unit_sizes(level: Level) -> tuple[tuple[int, int], tuple[int, int]]:
    """C and M of both units."""
    mine, theirs = level.student_unit, level.teacher_unit
    return (mine.channels, mine.num_nodes), (theirs.channels, theirs.num_nodes)


def _together(levels: Sequence[Level]) -> tuple[int, int, Any]:
    """What levels that are evaluated together have in common, from some with units of equal size:
    Cs, Ct, and the node counts where the maps are so small that (C, C) matrices would cost more."""
    (width, nodes), (other, other_nodes) = _unit_sizes(levels[0])
    small = all(level.student[0, 0].numel() <= width for level in levels)
    return width, other, (nodes, other_nodes) if small else None


def _wide(tensor: Tensor) -> torch.dtype:
    """The precision to compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _side_by_side(levels: Sequence[Level]) -> tuple[list[GraphUnit], list[Tensor]]:
    """Units and maps of both sides, level after level, the student first."""
    units = [unit for level in levels for unit in level[:2]]
    return units, [maps for level in levels for maps in (level.student, level.teacher.detach())]


def _stack_adapters(levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
    """The adapters' weights (L, Ct, Cs) and biases (L, Ct)."""
    weights = torch.stack([level.adapter.weight.flatten(1) for level in levels])
    return weights, torch.stack([present(level.adapter.bias) for level in levels])


# --- from the refined maps ------------------------------------------------------------------------


def _gaps_of_maps(levels: Sequence[Level]) -> Tensor:
    """:func:`squared_relation_gaps` of levels whose units are of equal size."""
    dtype = _wide(levels[0].student)
    (units, maps), count = _side_by_side(levels), len(levels)
    mine, theirs = _unit_sizes(levels[0])
    if mine == theirs:  # units of both sides together
        pixels = Pixels.of(maps, dtype)
        student, teacher = refine_pixels(units, pixels).unflatten(0, (count, 2)).unbind(1)
        valid = None if pixels.valid is None else pixels.valid[::2]
    else:
        pixels = Pixels.of(maps[::2], dtype)
        student = refine_pixels(units[::2], pixels)
        teacher = refine_pixels(units[1::2], Pixels.of(maps[1::2], dtype))
        valid = pixels.valid
    weight, bias = _stack_adapters(levels)
    images = student.shape[1]
    adapted = torch.baddbmm(
        for_each_image(bias.unsqueeze(2), images),
        for_each_image(weight, images),
        student.flatten(0, 1),
    )
    gap = adapted.view_as(teacher) - teacher
    if valid is not None:
        gap = gap * valid
    return gap.square().sum((1, 2, 3))


# --- from the moments of the pixels ---------------------------------------------------------------


def _gaps_from_moments(levels: Sequence[Level]) -> Tensor:
    """:func:`squared_relation_gaps` of levels that have Cs, and Ct, in common.

    Both sides, and the adapter, are affine maps of the pixels. The squared norm of their difference
    needs no map, only the means and scatter matrices of the pixels: three products with the pixels
    forward and two backward, against eight with the maps.

    It is a difference of large sums where the gap is small compared with the features. Each of
    those is a sum over N pixels, which floating point gets wrong by about eps sqrt(N) times its
    size; a gap within that error counts as zero. In float32 that is, of a map of 200 x 336
    positions, a gap of less than 0.8 % of the features.
    """
    (units, maps), count = _side_by_side(levels), len(levels)
    pixels = [x.flatten(2) for x in (*maps[::2], *maps[1::2])]
    num_pixels, dtype = [x.shape[2] for x in pixels[:count]], _wide(pixels[0])
    size = on_device(num_pixels, pixels[0].device, dtype)
    *stacks, cross = _Moments.apply(size, *pixels)
    means, scatters = stacks[: len(stacks) // 2], stacks[len(stacks) // 2 :]
    one_width = len(means) == 1
    if one_width:  # units of both sides together
        moments = Moments(size.repeat_interleave(2), means[0], scatters[0])
        (matrix_s, matrix_t), (offset_s, offset_t) = (
            x.unflatten(0, (count, 2)).unbind(1) for x in affine_maps(units, moments)
        )
    else:
        matrix_s, offset_s = affine_maps(units[::2], Moments(size, means[0], scatters[0]))
        matrix_t, offset_t = affine_maps(units[1::2], Moments(size, means[1], scatters[1]))
    matrix_s, offset_s = _adapt(levels, matrix_s, offset_s)

    matrices = [matrix_s, matrix_t]
    if one_width:
        matrices = [torch.stack(matrices, 1).flatten(0, 1)]
    forms = [quadratic_forms(a, scatter) for a, scatter in zip(matrices, scatters, strict=True)]
    first, *others = [form.view(count, -1).sum(1) for form in forms]
    power = sum(others, first)
    shared = (matrix_s.flatten(0, 1) @ cross.flatten(0, 1)).view_as(matrix_t) * matrix_t
    spread = torch.sub(power, shared.sum((1, 2, 3)), alpha=2)
    error = torch.finfo(dtype).eps * math.sqrt(max(num_pixels)) * power.detach()
    offset_gap = (offset_s - offset_t).square().sum((1, 2))
    return spread.masked_fill(spread <= error, 0) + size * offset_gap


def _adapt(levels: Sequence[Level], matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The affine maps (L, B, Cs, Cs), (L, B, Cs), followed by the adapters."""
    weight, bias = _stack_adapters(levels)
    # Matrix and offset side by side: one product.
    both = torch.cat([matrix, offset.unsqueeze(3)], 3)
    adapted = for_each_image(weight, both.shape[1]) @ both.flatten(0, 1)
    matrix, offset = adapted.unflatten(0, both.shape[:2]).split([matrix.shape[3], 1], 3)
    return matrix, offset.squeeze(3) + bias.unsqueeze(1)


class _Moments(torch.autograd.Function):
    """Means and scatter matrices of the pixels of each level, and those between both sides.

    Autograd would differentiate the factors of each product one after the other and keep centred
    copies of the maps; the backward pass here is two products with the maps that are there anyway.
    """

    @staticmethod
    def forward(ctx: Any, size: Tensor, *pixels: Tensor) -> tuple[Tensor, ...]:
        """Of (B, Cs, N) of L levels of the student and (B, Ct, N) of as many of the teacher.

        Args:
            size: (L,) N.

        Returns:
            Means (L, B, Cs) and (L, B, Ct), scatter matrices (L, B, Cs, Cs) and (L, B, Ct, Ct), and
            those between both sides (L, B, Cs, Ct). Where Cs = Ct, one tensor of means and one of
            scatter matrices, each (2 L, B, ...), level after level, the student first.
        """
        levels = len(size)
        images, width = pixels[0].shape[:2]
        other = pixels[-1].shape[1]
        if width == other:
            means = [size.new_empty(levels, 2, images, width)]
            scatters = [size.new_empty(levels, 2, images, width, width)]
            mean_of, scatter_of = means[0].unbind(1), scatters[0].unbind(1)
        else:
            means = [size.new_empty(levels, images, w) for w in (width, other)]
            scatters = [size.new_empty(levels, images, w, w) for w in (width, other)]
            mean_of, scatter_of = tuple(means), tuple(scatters)
        cross = size.new_empty(levels, images, width, other)
        for level, maps in enumerate(zip(pixels[:levels], pixels[levels:], strict=True)):
            centred = []
            for x, mean, scatter in zip(maps, mean_of, scatter_of, strict=True):
                torch.mean(x, 2, dtype=size.dtype, out=mean[level])
                centred.append(x - mean[level].unsqueeze(2))
                torch.bmm(centred[-1], centred[-1].mT, out=scatter[level])
            torch.bmm(centred[0], centred[1].mT, out=cross[level])
        ctx.save_for_backward(size, *pixels, *mean_of)
        ctx.one_width = width == other
        outputs = [*means, *scatters]
        if ctx.one_width:
            return *(x.flatten(0, 1) for x in outputs), cross
        ctx.mark_non_differentiable(means[1], scatters[1])
        return *outputs, cross

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size, *pixels, mean_s, mean_t = ctx.saved_tensors
        levels = len(size)
        grad_mean, grad_scatter, grad_cross = grads[0], grads[len(grads) // 2], grads[-1]
        if ctx.one_width:  # of the student's half
            grad_mean = grad_mean.unflatten(0, (levels, 2))[:, 0]
            grad_scatter = grad_scatter.unflatten(0, (levels, 2))[:, 0]
        grad_scatter = grad_scatter + grad_scatter.mT
        # What all pixels of an image get; the products below are with maps that are not centred.
        shared = (grad_mean / size[:, None, None]).flatten(0, 1).unsqueeze(2)
        for grad, mean in ((grad_scatter, mean_s), (grad_cross, mean_t)):
            shared = torch.baddbmm(
                shared, grad.flatten(0, 1), mean.flatten(0, 1).unsqueeze(2), alpha=-1
            )
        shared = shared.unflatten(0, (levels, -1))
        grad_pixels = []
        for level, (x, y) in enumerate(zip(pixels[:levels], pixels[levels:], strict=True)):
            grad = torch.baddbmm(shared[level], grad_scatter[level], x.to(size.dtype))
            grad.baddbmm_(grad_cross[level], y.to(size.dtype))
            grad_pixels.append(grad.to(x.dtype))
        return None, *grad_pixels, *[None] * levels
