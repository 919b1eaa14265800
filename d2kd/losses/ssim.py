"""Structural distillation of a feature pyramid: min-max rescaling followed by local SSIM.

De Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022
(arXiv 2211.13133). Instead of a distance per element, student and teacher are compared on local
patches: their mean (luminance l), their contrast c and their correlation (structure k).

Shape legend, used throughout this file:
    B: images    C: channels    H, W: height and width of one pyramid level
    s, t: rescaled features of student and teacher
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import check_shapes, connected_zero, full_precision
from .gaussian import Blur
from .rescale import RESCALE_SCOPES, live_channels, min_max_rescale, rescale_pairs
from .ssim_fast import mean_dissimilarity

__all__ = [
    "RESCALE_SCOPES",
    "median_patch_std",
    "min_max_rescale",
    "patch_statistics",
    "pyramid_ssim_loss",
    "ssim_factors",
    "ssim_loss",
    "ssim_map",
]

_EPS = 1e-12


def ssim_map(
    s: Tensor,
    t: Tensor,
    exponents: tuple[int, ...] = (1, 1, 1),
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """l^alpha * c^beta * k^gamma of the patch around each position, (B, C, H, W) in [-1, 1].

    Args:
        s, t: (B, C, H, W) with values in [0, 1].
        exponents: (alpha, beta, gamma), each 0 or 1 (k may be negative, which leaves other powers
            undefined), not all 0.
        window_size: taps of the Gaussian patch along each axis, odd.
        sigma: standard deviation of the Gaussian, in positions.
        k1, k2: stabilisers, C1 = k1^2 and C2 = k2^2 for the dynamic range 1 of rescaled maps.

    Raises:
        ValueError: other exponents.
    """
    alpha, beta, gamma = exponents
    if set(exponents) - {0, 1} or not any(exponents):
        raise ValueError(f"SSIM exponents must be 0 or 1 and not all 0, got {tuple(exponents)}")
    if beta and gamma:
        # c * k without the standard deviations, whose gradient is steep where a patch is flat.
        mu_s, mu_t, var_s, var_t, cov = patch_statistics(s, t, window_size, sigma)
        merged = (2 * cov + k2**2) / (var_s + var_t + k2**2 + _EPS)
        return merged * _luminance(mu_s, mu_t, k1**2) if alpha else merged
    factors = ssim_factors(s, t, window_size, sigma, k1, k2)
    used = [factor for factor, exponent in zip(factors, exponents, strict=True) if exponent]
    return math.prod(used[1:], start=used[0])


def ssim_factors(
    s: Tensor,
    t: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's three factors of each patch, each (B, C, H, W); arguments as in
    :func:`ssim_map`::

        l = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1)
        c = (2 std_s std_t + C2) / (var_s + var_t + C2)
        k = (cov_st + C2 / 2) / (std_s std_t + C2 / 2)
    """
    mu_s, mu_t, var_s, var_t, cov = patch_statistics(s, t, window_size, sigma)
    c2 = k2**2
    std_product = (var_s + _EPS).sqrt() * (var_t + _EPS).sqrt()
    contrast = (2 * std_product + c2) / (var_s + var_t + c2 + _EPS)
    structure = (cov + c2 / 2) / (std_product + c2 / 2 + _EPS)
    return _luminance(mu_s, mu_t, k1**2), contrast, structure


def _luminance(mu_s: Tensor, mu_t: Tensor, c1: float) -> Tensor:
    return (2 * mu_s * mu_t + c1) / (mu_s * mu_s + mu_t * mu_t + c1 + _EPS)


def patch_statistics(
    s: Tensor, t: Tensor, window_size: int = 11, sigma: float = 1.5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gaussian-weighted mean, variance and covariance of the patch around each position.

    Args:
        s, t: (B, C, H, W).

    Returns:
        mu_s, mu_t, var_s, var_t, cov, each (B, C, H, W).
    """
    blur = Blur.like(s, window_size, sigma)
    mu_s, mu_t = blur(s), blur(t)
    var_s = (blur(s * s) - mu_s * mu_s).clamp(min=0)
    var_t = (blur(t * t) - mu_t * mu_t).clamp(min=0)
    return mu_s, mu_t, var_s, var_t, blur(s * t) - mu_s * mu_t


@full_precision
def pyramid_ssim_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    rescale: str | None = "image",
    detach_range: bool = False,
    exponents: tuple[int, ...] = (1, 1, 1),
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Sum over pyramid levels of :func:`ssim_loss`: each level counts the same, whatever its size.

    Args:
        students, teachers: (B, C, H_r, W_r) per level, in the same order; otherwise as in
            :func:`ssim_loss`.
    """
    check_shapes(students, teachers)
    if any(student.numel() == 0 for student in students):  # an empty batch
        return connected_zero(*students)
    s, t = list(students), [teacher.detach() for teacher in teachers]
    shares: list[Tensor | float] = [1.0] * len(s)
    if rescale is not None:
        s, t, shares = rescale_pairs(students, teachers, rescale, detach_range)
    patch = window_size, sigma, k1, k2
    if tuple(exponents) == (1, 1, 1):
        return mean_dissimilarity(s, t, [1 / share for share in shares], *patch)
    losses = [
        ((1 - ssim_map(a, b, exponents, *patch)) / 2).clamp(0, 1).mean() / share
        for a, b, share in zip(s, t, shares, strict=True)
    ]
    return torch.stack(losses).sum()


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    rescale: str | None = "image",
    detach_range: bool = False,
    exponents: tuple[int, ...] = (1, 1, 1),
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Mean of (1 - l^alpha * c^beta * k^gamma) / 2 over one pyramid level.

    Args:
        student: (B, C, H, W), any scale; after its adapter.
        teacher: (B, C, H, W), a constant.
        rescale: scope of the min-max rescaling, see :func:`~d2kd.losses.rescale.min_max_rescale`.
            Student and teacher are rescaled separately. With "channel", channels that are dead in
            either map are left out of the mean. None if both maps are in [0, 1] already.
        detach_range: no gradient through the student's minimum and maximum.
        exponents: see :func:`ssim_map`. Others than (1, 1, 1) are meant for ablations: they go
            through autograd and keep every intermediate map.
        window_size, sigma, k1, k2: see :func:`ssim_map`.

    Returns:
        Scalar in [0, 1]. Zero for an empty batch and where no channel is live.

    Raises:
        ValueError: shapes differ, or an unknown scope or exponent.
    """
    maps = [student], [teacher]
    return pyramid_ssim_loss(*maps, rescale, detach_range, exponents, window_size, sigma, k1, k2)


@torch.no_grad()
@full_precision
def median_patch_std(
    x: Tensor, rescale: str = "image", window_size: int = 11, sigma: float = 1.5
) -> Tensor:
    """Median over all patches of the standard deviation of the rescaled map (B, C, H, W); scalar.

    Below about sqrt(C2) = 0.03 the constant C2 masks the structure term. With scope "channel" only
    live channels count, as in the loss; nan where there is none.
    """
    planes = min_max_rescale(x, rescale).flatten(0, 1)
    if rescale == "channel":
        planes = planes[live_channels(x).flatten()]
    blur = Blur.like(planes, window_size, sigma)
    # In place, a plane at a time: the log must not need more memory than the loss.
    for plane in planes:
        plane.copy_(blur(plane * plane) - blur(plane).square())
    return planes.clamp_(min=0).median().sqrt()
