"""PKD: Pearson correlation of feature maps, channel by channel, all levels of a pyramid together.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022. With s^ and t^ a channel's features over the batch, brought to mean 0
and standard deviation 1, and r their correlation,

    mean of (s^ - t^)^2 / 2 = 1 - r

Shape legend: B images, C channels, H_r x W_r the size of level r, m = B H_r W_r features of a
channel, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import check_shapes, connected_zero, full_precision, on_device, stack_channels

# A channel whose deviation is below this fraction of its level's strongest channel is constant but
# for rounding; brought to deviation 1, its noise would count as much as any feature.
_CONSTANT = 1e-6


class _MeanDissimilarity(torch.autograd.Function):
    """Sum over levels of the mean over channels of 1 - r.

    Autograd would keep both standardised maps of each level. The gradient (r s^ - t^) / (m sd(s))
    is, in a channel, s and t times numbers; so the maps that are there anyway and a few numbers per
    channel are kept. Those are computed for all levels together, (L, C).
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        """maps: s_1 ... s_L, t_1 ... t_L, each (B, C_r, H_r, W_r)."""
        half = len(maps) // 2
        sizes = [[[x.numel() // x.shape[1]] for x in maps], [[x.shape[1]] for x in maps]]
        count, channels = on_device(sizes, maps[0].device)  # m and C of each map, (2 L, 1)
        mean, scale, product = _moments(maps, count)
        count, channels = count[:half], channels[:half]
        s_scale, t_scale = scale.split(half)
        # Rounding must not make equal maps better than equal.
        correlation = (product / count * s_scale * t_scale).clamp_(max=1)

        if any(ctx.needs_input_grad):
            common = s_scale / (count * channels)
            s_slope, t_slope = correlation * s_scale * common, -t_scale * common
            s_mean, t_mean = mean.split(half)
            constant = -s_mean * s_slope - t_mean * t_slope
            ctx.save_for_backward(s_slope, t_slope, constant, *maps)
        # (s^ - t^)^2 / 2 is 1 / 2 where one of the two is constant, 0 where both are.
        live = (scale > 0).to(scale.dtype)
        dissimilarity = (live[:half] + live[half:]) / 2 - correlation
        return (dissimilarity / channels).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        s_slope, t_slope, constant, *maps = ctx.saved_tensors
        half = len(maps) // 2
        numbers = torch.stack([s_slope, t_slope, constant]) * grad
        gradients = []
        for level, (s, t) in enumerate(zip(maps[:half], maps[half:], strict=True)):
            of_s, of_t, rest = (_row(one, level, s) for one in numbers)
            gradients.append(torch.addcmul(rest, s, of_s).addcmul_(t, of_t))
        return *gradients, *[None] * half


def _moments(maps: Sequence[Tensor], count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is known of each channel.

    Args:
        maps: s_1 ... s_L, t_1 ... t_L. count: (2 L, 1) m.

    Returns:
        Means and inverse standard deviations, (2 L, C) each, 0 for a channel that is constant or
        has fewer than three values; sums of the products of s and t without their means, (L, C).
    """
    half = len(maps) // 2
    means = [x.mean((0, 2, 3), keepdim=True) for x in maps]
    # torch.var_mean would be one call; on a CPU it takes ten times as long as all of this.
    centred = [x - mean for x, mean in zip(maps, means, strict=True)]
    together = torch._foreach_mul(centred[:half], centred[half:])
    torch._foreach_mul_(centred, centred)
    squares, products = (
        stack_channels([x.sum((0, 2, 3)) for x in levels]) for levels in (centred, together)
    )
    mean, var = stack_channels([x.flatten() for x in means]), squares / count
    strongest = torch.addcmul(var, mean, mean).amax(1, keepdim=True)
    # Of two values r is 1 or -1, whatever they are: that is no correlation, and has no gradient.
    left_out = (var <= _CONSTANT**2 * strongest).logical_or_(count < 3)
    return mean, var.masked_fill(left_out, torch.inf).rsqrt(), products


def _row(numbers: Tensor, level: int, like: Tensor) -> Tensor:
    """A level's row of (L, C) as (1, C_r, 1, 1), to be combined with a map ``like`` it."""
    return numbers[level, : like.shape[1]].view(1, -1, 1, 1)


@full_precision
def pyramid_pkd_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Sum over pyramid levels of the mean over channels of 1 - r.

    A channel that is constant (deviation below a millionth of its level's strongest channel)
    becomes 0 and gets no gradient: two constant channels cost 0, one of two costs 1 / 2. So does a
    level of fewer than three positions in the batch.

    Args:
        students: one (B, C_r, H_r, W_r) per level, after its adapter.
        teachers: as many, of the same shapes; constants.

    Returns:
        Scalar: 0 for equal maps, and for maps that differ by a positive factor and an offset in
        each channel; at most 2 per level; 0 for an empty batch.

    Raises:
        ValueError: shapes differ.
    """
    check_shapes(students, teachers)
    if not all(x.numel() for x in students):
        return connected_zero(*students)
    loss: Tensor = _MeanDissimilarity.apply(*students, *(x.detach() for x in teachers))
    return loss


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`pyramid_pkd_loss` of one level, (B, C, H, W) each."""
    return pyramid_pkd_loss([student], [teacher])
