"""Structural distillation of a feature pyramid: min-max rescaling followed by local SSIM.

De Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022
(arXiv 2211.13133). Instead of a distance per element, student and teacher are compared on local
patches: their mean (luminance l), their contrast c and their correlation (structure k).

Shape legend, used throughout this file:
    B: images    C: channels    H, W: height and width of one pyramid level
    N: planes, that is B*C      G: groups of elements that share one minimum and maximum
    s, t: rescaled features of student and teacher
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import connected_zero, full_precision

RESCALE_SCOPES = ("image", "tensor", "channel")

# Below this range a map counts as constant; also the fraction of a level's range below which one
# of its channels counts as dead.
_MIN_RANGE = 1e-6
_EPS = 1e-12

# The fused loss works through the planes in blocks of about this many elements. On a CPU the
# dozen temporaries of a block then stay in the cache; on a GPU blocks only bound the memory.
_BLOCK_ELEMENTS_CPU = 2**17
_BLOCK_ELEMENTS_GPU = 2**22

# Side of the tiles of a banded matrix: small enough to skip its zeros, large enough for a fast
# product of each tile.
_TILE_CPU = 32
_TILE_GPU = 128


# ------------------------------------------------------------------------------------------------
# psi: min-max rescaling
# ------------------------------------------------------------------------------------------------


class _MinMaxRescale(torch.autograd.Function):
    """(x - min) / max(max - min, 1e-6) a row, keeping nothing but ``x`` for the backward pass.

    The minimum and the maximum route their gradient to one element each. A row whose range is
    below 1e-6 has no direction worth following, only a factor of 1e6 on it: its gradient is zero.
    """

    @staticmethod
    def forward(ctx, x: Tensor, detach_range: bool) -> Tensor:
        """x: (G, E) -> (G, E) in [0, 1]."""
        lowest, highest = x.argmin(1, keepdim=True), x.argmax(1, keepdim=True)
        low = x.gather(1, lowest)
        spread = x.gather(1, highest) - low
        scale = 1 / spread.clamp(min=_MIN_RANGE)
        ctx.save_for_backward(x, lowest, highest, low, scale * (spread >= _MIN_RANGE))
        ctx.detach_range = detach_range
        return (x - low).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, lowest, highest, low, scale = ctx.saved_tensors
        grad_x = grad * scale
        if not ctx.detach_range:
            # With y = (x - low) * scale: dy/dlow = scale * (y - 1), dy/dhigh = -scale * y.
            grad_sum = grad_x.sum(1, keepdim=True)
            grad_high = -scale * ((grad_x * x).sum(1, keepdim=True) - low * grad_sum)
            grad_x.scatter_add_(1, highest, grad_high)
            grad_x.scatter_add_(1, lowest, -grad_high - grad_sum)
        return grad_x, None


@full_precision
def min_max_rescale(x: Tensor, scope: str = "image", detach_range: bool = False) -> Tensor:
    """The paper's psi: rescale to [0, 1] by the minimum and maximum of each group of elements.

    Args:
        x: (B, C, H, W), not empty.
        scope: what shares one minimum and maximum: "image" (C, H, W of one image), "tensor" (the
            whole batch) or "channel" (H, W of one image and channel).
        detach_range: treat minimum and maximum as constants in the backward pass.

    Returns:
        (B, C, H, W). A map with max = min becomes 0, with zero gradient.
    """
    groups = {"image": x.shape[0], "tensor": 1, "channel": x.shape[0] * x.shape[1]}
    if scope not in groups:
        raise ValueError(f"unknown rescaling scope {scope!r}; valid: {', '.join(RESCALE_SCOPES)}")
    return _MinMaxRescale.apply(x.reshape(groups[scope], -1), detach_range).view(x.shape)


def live_channels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1) bool: channels whose range is not lost in that of their level.

    Rescaling a channel on its own would blow up the noise of a dead one to [0, 1].
    """
    low, high = x.detach().amin((2, 3), keepdim=True), x.detach().amax((2, 3), keepdim=True)
    level_range = high.amax(1, keepdim=True) - low.amin(1, keepdim=True)
    return high - low >= _MIN_RANGE * level_range


def rescale_pair(
    student: Tensor, teacher: Tensor, scope: str = "image", detach_range: bool = False
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Rescale both maps of a level, each by its own minima and maxima.

    Args:
        student, teacher: (B, C, H, W), not empty.
        scope, detach_range: see :func:`min_max_rescale`.

    Returns:
        s, t (B, C, H, W), and the share of the elements that count, by which a mean over all
        elements must be divided. It is 1 except for scope "channel", where channels that are dead
        in either map are 0 in both and do not count.
    """
    s = min_max_rescale(student, scope, detach_range)
    t = min_max_rescale(teacher.detach(), scope)
    if scope != "channel":
        return s, t, 1.0
    live = live_channels(student) & live_channels(teacher)
    return s * live, t * live, live.to(s.dtype).mean().clamp(min=_EPS)


# ------------------------------------------------------------------------------------------------
# Gaussian window
# ------------------------------------------------------------------------------------------------


def gaussian_window(window_size: int, sigma: float) -> Tensor:
    """One-dimensional Gaussian of ``window_size`` taps that sums to 1, in float64."""
    offsets = torch.arange(window_size, dtype=torch.float64) - (window_size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    return window / window.sum()


@functools.lru_cache(maxsize=128)
def blur_matrix(
    size: int,
    window_size: int,
    sigma: float,
    reflect: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The (size, size) banded matrix that blurs one axis, with its padding folded in.

    A blur with reflected or replicated borders is a linear map along each axis. It links a position
    to none that is more than ``window_size // 2`` away, borders included.
    """
    radius = window_size // 2
    # An inference-mode tensor in the cache would break the backward pass of a later step.
    with torch.inference_mode(False), torch.no_grad():
        outputs = torch.arange(size)[:, None]
        inputs = outputs + torch.arange(window_size) - radius
        if reflect:
            inputs = inputs.abs()
            inputs = (size - 1) - (size - 1 - inputs).abs()
        inputs = inputs.clamp(0, size - 1)
        taps = gaussian_window(window_size, sigma).expand(size, -1)
        matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, inputs, taps)
        return matrix.to(device=device, dtype=dtype)


def _banded_product(matrix: Tensor, x: Tensor, radius: int, dim: int) -> Tensor:
    """Apply a (size, size) matrix, zero beyond ``radius`` of its diagonal, along ``dim`` of ``x``.

    Args:
        x: (..., H, W).
        dim: -2 or -1.
    """
    size, tile = len(matrix), _TILE_GPU if x.is_cuda else _TILE_CPU

    def product(block: Tensor, part: Tensor) -> Tensor:
        return block @ part if dim == -2 else part @ block.T

    if size < 2 * tile:
        return product(matrix, x)
    parts = []
    for start in range(0, size, tile):
        low, high = max(start - radius, 0), min(start + tile + radius, size)
        block = matrix[start : start + tile, low:high]
        parts.append(product(block, x.narrow(dim, low, high - low)))
    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Blur:
    """The separable 2-D Gaussian blur of (..., H, W), as products with two banded matrices.

    On a CPU this is an order of magnitude faster than a depth-wise convolution, and each product
    costs the same for every position, however large the map.
    """

    rows: Tensor
    cols: Tensor
    radius: int

    @classmethod
    def like(cls, x: Tensor, window_size: int, sigma: float) -> Blur:
        """The blur of maps like ``x`` (..., H, W).

        Reflection needs more rows and columns than half a window; smaller levels replicate their
        border. (No padding by zeros: it would fabricate the same structure in both maps.)
        """
        height, width = x.shape[-2:]
        radius = window_size // 2
        reflect = min(height, width) > radius
        rows = blur_matrix(height, window_size, sigma, reflect, x.dtype, x.device)
        cols = blur_matrix(width, window_size, sigma, reflect, x.dtype, x.device)
        return cls(rows, cols, radius)

    def __call__(self, x: Tensor) -> Tensor:
        x = _banded_product(self.cols, x, self.radius, dim=-1)
        return _banded_product(self.rows, x, self.radius, dim=-2)

    @property
    def transposed(self) -> Blur:
        """The blur's transpose, which takes gradients back through it."""
        return Blur(self.rows.T, self.cols.T, self.radius)


# ------------------------------------------------------------------------------------------------
# SSIM map: the formulas as they are written, differentiated by autograd
# ------------------------------------------------------------------------------------------------


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


def _luminance(mu_s: Tensor, mu_t: Tensor, c1: float) -> Tensor:
    return (2 * mu_s * mu_t + c1) / (mu_s * mu_s + mu_t * mu_t + c1 + _EPS)


def ssim_factors(
    s: Tensor,
    t: Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> tuple[Tensor, Tensor, Tensor]:
    """Luminance l, contrast c and structure k of each patch, each (B, C, H, W).

    Contrast and structure apart need standard deviations, whose gradient is steep where a patch
    is flat. Their product does not; :func:`ssim_map` uses it wherever both take part.
    """
    mu_s, mu_t, var_s, var_t, cov = patch_statistics(s, t, window_size, sigma)
    c2 = k2**2
    std_product = (var_s + _EPS).sqrt() * (var_t + _EPS).sqrt()
    contrast = (2 * std_product + c2) / (var_s + var_t + c2 + _EPS)
    structure = (cov + c2 / 2) / (std_product + c2 / 2 + _EPS)
    return _luminance(mu_s, mu_t, k1**2), contrast, structure


def ssim_map(
    s: Tensor,
    t: Tensor,
    exponents: tuple[int, int, int] = (1, 1, 1),
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
    """
    alpha, beta, gamma = exponents
    if set(exponents) - {0, 1} or not any(exponents):
        raise ValueError(f"SSIM exponents must be 0 or 1 and not all 0, got {tuple(exponents)}")
    if beta and gamma:
        mu_s, mu_t, var_s, var_t, cov = patch_statistics(s, t, window_size, sigma)
        merged = (2 * cov + k2**2) / (var_s + var_t + k2**2 + _EPS)
        return merged * _luminance(mu_s, mu_t, k1**2) if alpha else merged
    factors = ssim_factors(s, t, window_size, sigma, k1, k2)
    return math.prod(factor for factor, used in zip(factors, exponents, strict=True) if used)


# ------------------------------------------------------------------------------------------------
# The loss: all three factors, value and gradient in one sweep over blocks of planes
# ------------------------------------------------------------------------------------------------


def _dissimilarity(
    s: Tensor, t: Tensor, blur: Blur, c1: float, c2: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of (1 - l*c*k) / 2 over a block of planes, and its gradient with respect to ``s``.

    With d = s - t, both factors are one minus a fraction that vanishes with d, so equal maps give
    exactly zero, and four blurs do instead of five::

        1 - l   = mu_d^2 / (mu_s^2 + mu_t^2 + C1)
        1 - c*k = var_d  / (var_s + var_t + C2)

    Args:
        s, t: (n, H, W).
    """
    d = s - t
    maps = torch.stack([d, t, d * d, (s * s).addcmul_(t, t)])
    mu_d, mu_t, mean_dd, mean_pp = blur(maps)
    mu_s = mu_d + mu_t
    mu_dd = mu_d * mu_d
    mu_pp = (mu_s * mu_s).addcmul_(mu_t, mu_t)
    # Variances are clamped against rounding only; the gradient below need not know.
    inverse_1 = (mu_pp + (c1 + _EPS)).reciprocal_()
    inverse_2 = mean_pp.sub_(mu_pp).clamp_(min=0).add_(c2 + _EPS).reciprocal_()
    not_l = mu_dd * inverse_1
    not_ck = mean_dd.sub_(mu_dd).clamp_(min=0).mul_(inverse_2)
    total = (not_l + not_ck).addcmul_(not_l, not_ck, value=-1).sum() / 2
    if not with_gradient:
        return total, None

    # Gradients towards the blurred maps of d*d, of s*s and of s itself; then back through the blur.
    grad_dd = (1 - not_l).mul_(inverse_2)
    grad_mu = torch.addcmul(mu_d, not_l, mu_s, value=-1).mul_(inverse_1).mul_(1 - not_ck)
    grad_mu.addcmul_(grad_dd, (not_ck * mu_s).sub_(mu_d))
    grad_pp = grad_dd * not_ck
    back = blur.transposed(torch.stack([grad_mu, grad_dd, grad_pp]))
    return total, back[0].addcmul_(back[1], d).addcmul_(back[2], s, value=-1)


class _MeanDissimilarity(torch.autograd.Function):
    """Mean of (1 - l*c*k) / 2; see :func:`_dissimilarity` for the mathematics.

    The gradient is computed together with the value, block by block, so one map is kept for the
    backward pass where autograd would keep about ten.
    """

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, blur: Blur, c1: float, c2: float) -> Tensor:
        """s, t: (N, H, W) -> scalar."""
        with_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(s) if with_gradient else None
        total = s.new_zeros(())
        block_elements = _BLOCK_ELEMENTS_GPU if s.is_cuda else _BLOCK_ELEMENTS_CPU
        block = max(1, block_elements // s[0].numel())
        for start in range(0, len(s), block):
            planes = slice(start, start + block)
            value, block_gradient = _dissimilarity(
                s[planes], t[planes], blur, c1, c2, with_gradient
            )
            total += value
            if with_gradient:
                gradient[planes] = block_gradient
        if with_gradient:
            ctx.save_for_backward(gradient)
        return total / s.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad / gradient.numel()), None, None, None, None


@full_precision
def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    rescale: str | None = "image",
    detach_range: bool = False,
    exponents: tuple[int, int, int] = (1, 1, 1),
    window_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Mean of (1 - l^alpha * c^beta * k^gamma) / 2 over one pyramid level.

    Args:
        student: (B, C, H, W), any scale; after its adapter.
        teacher: (B, C, H, W), a constant.
        rescale: scope of the min-max rescaling, see :func:`min_max_rescale`. Student and teacher
            are rescaled separately. With "channel", channels that are dead in either map are left
            out of the mean. None if both maps are in [0, 1] already.
        detach_range: no gradient through the student's minimum and maximum.
        exponents: (alpha, beta, gamma), each 0 or 1. Other choices than (1, 1, 1) are meant for
            ablations: they go through autograd and keep every intermediate map.
        window_size: taps of the Gaussian patch along each axis, odd.
        sigma: standard deviation of the Gaussian, in positions.
        k1, k2: stabilisers, C1 = k1^2 and C2 = k2^2 for the dynamic range 1 of rescaled maps.

    Returns:
        Scalar in [0, 1]. Zero for an empty batch and where no channel is live.

    Raises:
        ValueError: shapes differ, or an unknown scope or exponent.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape"
        )
    if student.numel() == 0:
        return connected_zero(student)
    s, t, share = student, teacher.detach(), 1.0
    if rescale is not None:
        s, t, share = rescale_pair(student, teacher, rescale, detach_range)
    if tuple(exponents) == (1, 1, 1):
        blur = Blur.like(s, window_size, sigma)
        loss = _MeanDissimilarity.apply(s.flatten(0, 1), t.flatten(0, 1), blur, k1**2, k2**2)
    else:
        ssim = ssim_map(s, t, exponents, window_size, sigma, k1, k2)
        loss = ((1 - ssim) / 2).clamp(0, 1).mean()
    return loss / share


def pyramid_ssim_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], **options) -> Tensor:
    """Sum over pyramid levels of :func:`ssim_loss`: each level counts the same, whatever its size.

    Args:
        students, teachers: one (B, C, H_r, W_r) a level, in the same order.
        options: passed to :func:`ssim_loss`.
    """
    return sum(ssim_loss(s, t, **options) for s, t in zip(students, teachers, strict=True))
