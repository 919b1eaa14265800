"""psi of the SSIM paper: min-max rescaling of feature maps to [0, 1], all levels at once.

Shape legend: B images, C channels, H_r x W_r the size of level r, G groups of elements that share
one minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import full_precision

RESCALE_SCOPES = ("image", "tensor", "channel")

# Below this range a map counts as constant; also the fraction of a level's range below which one
# of its channels counts as dead.
_MIN_RANGE = 1e-6
_EPS = 1e-12


class _MinMaxRescale(torch.autograd.Function):
    """(x - min) / max(max - min, 1e-6) per row of each map, keeping only the maps for the backward.

    The minimum and the maximum route their gradient to one element each. A row whose range is
    below 1e-6 has no direction worth following, only a factor of 1e6 on it: its gradient is zero.
    What is known per row is computed for all maps together.
    """

    @staticmethod
    def forward(ctx: Any, detach_range: bool, *maps: Tensor) -> tuple[Tensor, ...]:
        """maps: (G_r, E_r) each -> the same shapes, in [0, 1]."""
        lows = [x.min(1, keepdim=True) for x in maps]
        highs = [x.max(1, keepdim=True) for x in maps]
        low = torch.cat([one.values for one in lows])
        spread = torch.cat([one.values for one in highs]) - low
        scale = spread.clamp(min=_MIN_RANGE).reciprocal()
        rows = [len(x) for x in maps]
        offsets, scales = (-low * scale).split(rows), scale.split(rows)
        ctx.save_for_backward(low, scale * (spread >= _MIN_RANGE), *maps)
        ctx.positions = [(a.indices, b.indices) for a, b in zip(lows, highs, strict=True)]
        ctx.detach_range = detach_range
        triples = zip(offsets, maps, scales, strict=True)
        # Rounding must not leave the interval.
        return tuple(torch.addcmul(o, x, s).clamp_(0, 1) for o, x, s in triples)

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low, scale, *maps = ctx.saved_tensors
        rows = [len(x) for x in maps]
        out = [grad * one for grad, one in zip(grads, scale.split(rows), strict=True)]
        if not ctx.detach_range:
            # With y = (x - low) * scale: dy/dlow = scale * (y - 1), dy/dhigh = -scale * y.
            sums = torch.cat([grad.sum(1, keepdim=True) for grad in out])
            products = torch.cat(
                [torch.linalg.vecdot(g, x)[:, None] for g, x in zip(out, maps, strict=True)]
            )
            grad_high = scale * (low * sums - products)
            grad_low = -grad_high - sums
            ends = zip(out, ctx.positions, grad_low.split(rows), grad_high.split(rows), strict=True)
            for grad, (lowest, highest), at_low, at_high in ends:
                grad.scatter_add_(1, highest, at_high).scatter_add_(1, lowest, at_low)
        return None, *out


def min_max_rescale_levels(
    maps: Sequence[Tensor], scope: str = "image", detach_range: bool = False
) -> list[Tensor]:
    """:func:`min_max_rescale` of each map of a pyramid."""
    if scope not in RESCALE_SCOPES:
        raise ValueError(f"unknown rescaling scope {scope!r}; valid: {', '.join(RESCALE_SCOPES)}")

    def as_rows(x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        groups = {"image": batch, "tensor": 1, "channel": batch * channels}[scope]
        return x.reshape(groups, -1)

    rescaled = _MinMaxRescale.apply(detach_range, *map(as_rows, maps))
    return [y.view(x.shape) for x, y in zip(maps, rescaled, strict=True)]


@full_precision
def min_max_rescale(x: Tensor, scope: str = "image", detach_range: bool = False) -> Tensor:
    """Rescale to [0, 1] by the minimum and maximum of each group of elements.

    Args:
        x: (B, C, H, W), not empty.
        scope: what shares one minimum and maximum: "image" (C, H, W of one image), "tensor" (the
            whole batch) or "channel" (H, W of one image and channel).
        detach_range: treat minimum and maximum as constants in the backward pass.

    Returns:
        (B, C, H, W). A map with max = min becomes 0, with zero gradient.

    Raises:
        ValueError: an unknown scope.
    """
    return min_max_rescale_levels([x], scope, detach_range)[0]


def live_channels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1) bool: channels whose range is not lost in that of their level.

    Rescaling a channel on its own would blow up the noise of a dead one to [0, 1].
    """
    low, high = x.detach().amin((2, 3), keepdim=True), x.detach().amax((2, 3), keepdim=True)
    level_range = high.amax(1, keepdim=True) - low.amin(1, keepdim=True)
    return high - low >= _MIN_RANGE * level_range


def rescale_pairs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    scope: str = "image",
    detach_range: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor | float]]:
    """:func:`min_max_rescale` of both maps (B, C, H_r, W_r) of each level.

    Returns:
        s, t with the shapes of the maps, and per level the share of the elements that count, by
        which a mean over all elements must be divided. It is 1 except for scope "channel", where
        channels that are dead in either map are 0 in both and do not count.
    """
    s = min_max_rescale_levels(students, scope, detach_range)
    t = min_max_rescale_levels([x.detach() for x in teachers], scope)
    if scope != "channel":
        return s, t, [1.0] * len(s)
    live = [live_channels(a) & live_channels(b) for a, b in zip(students, teachers, strict=True)]
    shares: list[Tensor | float] = [x.to(s[0].dtype).mean().clamp(min=_EPS) for x in live]
    s, t = ([x * on for x, on in zip(maps, live, strict=True)] for maps in (s, t))
    return s, t, shares
