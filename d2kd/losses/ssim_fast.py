"""The SSIM loss with all three factors: value and gradient in one sweep, for all levels together.

It equals the formulas of :mod:`d2kd.losses.ssim`, against which it is tested. Autograd would keep
about ten maps per level for the backward pass and launch some two hundred kernels; this keeps one
map and, on a GPU, handles the levels of a pyramid in one kernel per operation
(``torch._foreach_*``). On a CPU it goes through blocks of planes that stay in the cache.

Shape legend: N planes of a level (B * C), H_r x W_r the size of level r, s and t the rescaled
features of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gaussian import Blur

_EPS = 1e-12

# Elements that are worked on at once. On a CPU the dozen temporaries of a block then stay in the
# cache; on a GPU blocks only bound the memory.
BLOCK_ELEMENTS_CPU = 2**17
BLOCK_ELEMENTS_GPU = 2**26


def _blurred(maps: Sequence[Sequence[Tensor]], blurs: Sequence[Blur]) -> list[list[Tensor]]:
    """Lists over levels of (n_r, H_r, W_r), blurred with one product per axis and level."""
    stacked = (torch.stack(level) for level in zip(*maps, strict=True))
    levels = (blur(x) for blur, x in zip(blurs, stacked, strict=True))
    return [list(one) for one in zip(*(x.unbind() for x in levels), strict=True)]


def _dissimilarity(
    s: list[Tensor],
    t: list[Tensor],
    blurs: list[Blur],
    c1: float,
    c2: float,
    with_gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Sums of (1 - l*c*k) / 2 over the planes of each level, and gradients with respect to ``s``.

    With d = s - t, both factors are one minus a fraction that vanishes with d, so equal maps give
    exactly zero, and four blurs do instead of five::

        1 - l   = mu_d^2 / (mu_s^2 + mu_t^2 + C1)
        1 - c*k = var_d  / (var_s + var_t + C2)

    Args:
        s, t: (n_r, H_r, W_r) per level.

    Returns:
        (levels,), and the gradients ([] without).
    """
    sub, mul = torch._foreach_sub, torch._foreach_mul
    d = sub(s, t)
    pp = mul(s, s)
    torch._foreach_addcmul_(pp, t, t)
    mu_d, mu_t, var_d, var_p = _blurred([d, t, mul(d, d), pp], blurs)
    mu_s = list(torch._foreach_add(mu_d, mu_t))
    mu_dd = mul(mu_d, mu_d)
    mu_pp = list(mul(mu_s, mu_s))
    torch._foreach_addcmul_(mu_pp, mu_t, mu_t)
    # Variances are clamped against rounding only; the gradient below need not know.
    torch._foreach_sub_(var_d, mu_dd)
    torch._foreach_clamp_min_(var_d, 0)
    torch._foreach_sub_(var_p, mu_pp)
    torch._foreach_clamp_min_(var_p, 0)
    torch._foreach_add_(var_p, c2 + _EPS)
    torch._foreach_add_(mu_pp, c1 + _EPS)
    not_l = list(torch._foreach_div(mu_dd, mu_pp))
    not_ck = list(torch._foreach_div(var_d, var_p))
    both = torch._foreach_add(not_l, not_ck)
    torch._foreach_addcmul_(both, not_l, not_ck, value=-1)
    total = torch.stack([x.sum() for x in both]) / 2
    if not with_gradient:
        return total, []

    towards_blurred = _gradients(mu_d, mu_s, not_l, not_ck, mu_pp, var_p)
    gradient, of_dd, of_pp = _blurred(towards_blurred, [blur.transposed for blur in blurs])
    torch._foreach_addcmul_(gradient, of_dd, d)
    torch._foreach_addcmul_(gradient, of_pp, s, value=-1)
    return total, gradient


def _gradients(
    mu_d: list[Tensor],
    mu_s: list[Tensor],
    not_l: list[Tensor],
    not_ck: list[Tensor],
    below_l: list[Tensor],
    below_ck: list[Tensor],
) -> list[list[Tensor]]:
    """Gradients towards the blurred maps of s itself, of d*d and of s*s.

    Args:
        mu_d, mu_s: means of d and s.
        not_l, not_ck: 1 - l and 1 - c*k, fractions with the denominators ``below_l`` and
            ``below_ck``.
    """
    is_l, is_ck = torch._foreach_neg(not_l), torch._foreach_neg(not_ck)
    torch._foreach_add_(is_l, 1)
    torch._foreach_add_(is_ck, 1)
    grad_dd = torch._foreach_div(is_l, below_ck)
    grad_mu = torch._foreach_addcmul(mu_d, not_l, mu_s, value=-1)
    torch._foreach_div_(grad_mu, below_l)
    torch._foreach_mul_(grad_mu, is_ck)
    grad_pp = torch._foreach_mul(grad_dd, not_ck)
    torch._foreach_addcmul_(grad_mu, grad_pp, mu_s)
    torch._foreach_addcmul_(grad_mu, grad_dd, mu_d, value=-1)
    return [list(grad_mu), list(grad_dd), list(grad_pp)]


def _blocks(s: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """What is worked on at once: (level, planes) pairs, whole levels where they are small."""
    limit = BLOCK_ELEMENTS_GPU if s[0].is_cuda else BLOCK_ELEMENTS_CPU
    together: list[tuple[int, slice]] = []
    held = 0
    for level, planes in enumerate(s):
        step = max(1, limit // planes[0].numel())
        for start in range(0, len(planes), step):
            count = min(step, len(planes) - start) * planes[0].numel()
            if together and held + count > limit:
                yield together
                together, held = [], 0
            together.append((level, slice(start, start + step)))
            held += count
    yield together


class _MeanDissimilarity(torch.autograd.Function):
    """Sum over levels of the mean of (1 - l*c*k) / 2; see :func:`_dissimilarity`."""

    @staticmethod
    def forward(
        ctx: Any, blurs: list[Blur], c1: float, c2: float, weights: Sequence[Any], *maps: Tensor
    ) -> Tensor:
        """maps: s_1 ... s_L, t_1 ... t_L, each (N, H_r, W_r); weights: a factor per level."""
        s, t = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        with_gradient = any(ctx.needs_input_grad)
        gradients: list[list[Tensor]] = [[] for _ in s]
        totals: list[list[Tensor]] = [[] for _ in s]
        for block in _blocks(s):
            total, gradient = _dissimilarity(
                [s[level][planes] for level, planes in block],
                [t[level][planes] for level, planes in block],
                [blurs[level] for level, _ in block],
                c1,
                c2,
                with_gradient,
            )
            for k, (level, _) in enumerate(block):
                totals[level].append(total[k])
                gradients[level] += gradient[k : k + 1]
        if with_gradient:
            ctx.save_for_backward(
                *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in gradients)
            )
            ctx.factors = [w / x.numel() for w, x in zip(weights, s, strict=True)]
        sums = (torch.stack(parts).sum() if len(parts) > 1 else parts[0] for parts in totals)
        means = (w / x.numel() * total for w, x, total in zip(weights, s, sums, strict=True))
        return torch.stack(list(means)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        students = [x * (grad * factor) for x, factor in zip(saved, ctx.factors, strict=True)]
        return None, None, None, None, *students, *[None] * len(saved)


def mean_dissimilarity(
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    weights: Sequence[Tensor | float],
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Weighted sum over levels of the mean of (1 - l * c * k) / 2.

    Args:
        s, t: (B, C, H_r, W_r) per level with values in [0, 1], not empty; ``t`` are constants.
        weights: a factor per level.
        window_size, sigma, k1, k2: see :func:`d2kd.losses.ssim.ssim_map`.

    Returns:
        A scalar.
    """
    blurs = [Blur.like(x, window_size, sigma) for x in s]
    planes = [x.flatten(0, 1) for x in (*s, *t)]
    return _MeanDissimilarity.apply(blurs, k1**2, k2**2, weights, *planes)
