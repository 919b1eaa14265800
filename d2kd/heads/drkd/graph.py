"""DRKD's graph units: reasoning over the nodes of a map, for many units at once.

A graph unit is one affine map for all pixels of an image, and that map depends on the pixels only
through their mean and their scatter matrix: :func:`affine_maps` makes it from those, and no tensor
that has a column for each pixel. Small maps are refined as the formulas stand, by
:func:`refine_pixels`.

Shapes: B images, C channels, N = H x W pixels of a map, M nodes of a graph, K graph units that are
evaluated together, one on each map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...numerics import full_precision, on_device


class GraphUnit(nn.Module):
    """Graph-based pixel relation phi: global reasoning over M nodes, with an identity path.

    Pixels x (C, N) of an image are projected to nodes, the nodes exchange information, and the
    result is projected back (GloRe)::

        S = W_s x + b_s          (2M, N)  state
        P = W_p x + b_p          (M, N)   projection, used in both directions
        V = S P^T                (2M, M)  node features; divided by N if ``normalize``
        U = V + (A V^T + a)^T    (2M, M)  mixing over nodes
        Z = W ReLU(U)            (2M, M)  mixing over states
        phi(x) = x + BN(W_e Z P)

    The module holds the parameters; :func:`affine_maps` and :func:`refine_pixels` evaluate many
    units at once.

    Args:
        channels: C.
        num_nodes: M.
        normalize: divide V by the number of pixels. The released code does not.
        zero_init_norm: start with the scale of BN at zero, which makes phi the identity.
    """

    def __init__(
        self,
        channels: int,
        num_nodes: int,
        *,
        normalize: bool = False,
        zero_init_norm: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.num_nodes, self.normalize = channels, num_nodes, normalize
        self.state = nn.Linear(channels, 2 * num_nodes)
        self.projection = nn.Linear(channels, num_nodes)
        self.mix_nodes = nn.Linear(num_nodes, num_nodes)
        self.mix_states = nn.Linear(2 * num_nodes, 2 * num_nodes, bias=False)
        self.extend = nn.Linear(2 * num_nodes, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)
        if zero_init_norm:
            nn.init.zeros_(self.norm.weight)


class Moments(NamedTuple):
    """What graph units read of the pixels of K maps.

    Attributes:
        size: (K,) N of each map.
        mean: (K, B, C) over the pixels of an image.
        scatter: (K, B, C, C), sum over the pixels of (x - mean)(x - mean)^T.
    """

    size: Tensor
    mean: Tensor
    scatter: Tensor

    def split(self, lengths: Sequence[int]) -> list[Moments]:
        """Those of the first maps, of the next ones, and so on."""
        parts = zip(*(x.split(lengths) for x in self), strict=True)
        return [Moments(*part) for part in parts]


def affine_maps(units: Sequence[GraphUnit], moments: Moments) -> tuple[Tensor, Tensor]:
    """The affine map that each unit is for the pixels of an image: phi(x) = A (x - mean) + o.

    V depends on the pixels only through their mean and scatter matrix, and once V is known all that
    follows is linear in P. Batch normalisation is no exception: mean and variance of an affine map
    of x follow exactly from the mean and the scatter of x.

    Args:
        units: K units of equal width; those of equal node count should lie side by side.
        moments: of the K maps.

    Returns:
        A (K, B, C, C), o (K, B, C). o is the mean of phi over the pixels.
    """
    runs = [list(run) for _, run in itertools.groupby(units, lambda u: (u.num_nodes, u.normalize))]
    parts = moments.split([len(run) for run in runs])
    maps = [_extended_maps(run, part) for run, part in zip(runs, parts, strict=True)]
    extended, at_mean = (
        parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*maps, strict=True)
    )
    spread = quadratic_forms(extended, moments.scatter).sum(1)
    scale, shift = _batch_norm(units, at_mean, spread, moments.size)
    identity = torch.eye(extended.shape[-1], dtype=extended.dtype, device=extended.device)
    matrix = identity + scale[:, None, :, None] * extended
    return matrix, moments.mean + (scale[:, None] * at_mean + shift[:, None])


def _extended_maps(units: Sequence[GraphUnit], moments: Moments) -> tuple[Tensor, Tensor]:
    """W_e Z P, which batch norm reads, as an affine map of the pixels; of units of equal size.

    Returns:
        Its matrix (K, B, C, C), and its value at the mean pixel (K, B, C).
    """
    count, (images, channels), nodes = len(units), moments.mean.shape[1:], units[0].num_nodes
    weight, bias, mix, mix_bias, extend = _stack_weights(units)

    # W_s and W_p; S and P at the mean pixel; then P + A P there, and W_p + A W_p.
    state, projection = weight.split([2 * nodes, nodes], dim=1)
    at_mean = torch.baddbmm(bias, moments.mean, weight.mT)
    state_mean, projection_mean = at_mean.split([2 * nodes, nodes], dim=2)
    mixed_mean = torch.baddbmm(projection_mean, projection_mean, mix.mT)
    mixed = torch.baddbmm(projection, mix, projection)

    # U = W_s scatter mixed^T + N state_mean mixed_mean^T + a; without the N if normalised
    scatter, size = moments.scatter, moments.size[:, None, None]
    if units[0].normalize:
        scatter = scatter / size.unsqueeze(3)
    else:
        state_mean = state_mean * size
    mixing = torch.baddbmm(
        for_each_image(mix_bias, images),
        state_mean.reshape(-1, 2 * nodes, 1),
        mixed_mean.reshape(-1, 1, nodes),
    )
    right = (scatter.flatten(1, 2) @ mixed.mT).view(-1, channels, nodes)
    mixing = torch.baddbmm(mixing, for_each_image(state, images), right)

    extend_nodes = for_each_image(extend, images) @ mixing.relu()  # (K B, C, M)
    matrix = extend_nodes.view(count, images * channels, nodes) @ projection
    value = extend_nodes @ projection_mean.reshape(-1, nodes, 1)
    return matrix.view_as(scatter), value.view_as(moments.mean)


def _stack_weights(units: Sequence[GraphUnit]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Parameters of K units of equal size.

    Returns:
        (K, 3 M, C), W_s above W_p, and their biases (K, 1, 3 M); A (K, M, M) and a (K, 1, M);
        W_e W (K, C, 2 M), a product whose cost does not grow with the number of images.
    """
    layers = [layer for unit in units for layer in (unit.state, unit.projection)]
    extend = torch.stack([unit.extend.weight for unit in units])
    return (
        torch.cat([layer.weight for layer in layers]).unflatten(0, (len(units), -1)),
        torch.cat([layer.bias for layer in layers]).unflatten(0, (len(units), 1, -1)),
        torch.stack([unit.mix_nodes.weight for unit in units]),
        torch.stack([unit.mix_nodes.bias for unit in units]).unsqueeze(1),
        extend @ torch.stack([unit.mix_states.weight for unit in units]),
    )


class Pixels(NamedTuple):
    """The pixels of K maps in one tensor.

    Attributes:
        size: (K,) N of each map.
        values: (K, B, C, N), padded with zeros to the largest map.
        valid: (K, 1, 1, N), 1 for pixels and 0 for padding; None without padding.
    """

    size: Tensor
    values: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, maps: Sequence[Tensor], dtype: torch.dtype) -> Pixels:
        """Those of ``maps``, K of (B, C, H, W)."""
        pixels, device = [level.flatten(2) for level in maps], maps[0].device
        sizes = [level.shape[2] for level in pixels]
        longest = max(sizes)
        padded = [
            level if size == longest else F.pad(level, (0, longest - size))
            for level, size in zip(pixels, sizes, strict=True)
        ]
        valid = None
        if min(sizes) < longest:
            rows = [[1.0] * size + [0.0] * (longest - size) for size in sizes]
            valid = on_device(rows, device, dtype)[:, None, None]
        return cls(on_device(sizes, device, dtype), torch.stack(padded).to(dtype), valid)

    def mask(self, values: Tensor) -> Tensor:
        """(K, B, ..., N) with zeros for padding."""
        return values if self.valid is None else values * self.valid


def refine_pixels(units: Sequence[GraphUnit], pixels: Pixels) -> Tensor:
    """phi of K units of equal size, by the formulas of :class:`GraphUnit`: (K, B, C, N), undefined
    where padded."""
    values, images, nodes = pixels.values, pixels.values.shape[1], units[0].num_nodes
    weight, bias, mix, mix_bias, extend = (for_each_image(x, images) for x in _stack_weights(units))
    both = torch.baddbmm(bias.mT, weight, values.flatten(0, 1))
    state, projection = both.split([2 * nodes, nodes], dim=1)  # S, P
    projection = pixels.mask(projection.view(len(units), images, nodes, -1)).flatten(0, 1)
    if units[0].normalize:
        state = state / pixels.size.repeat_interleave(images)[:, None, None]
    # The order of the products avoids the expensive ones of (2 M, M) with (M, M).
    mixed = torch.baddbmm(projection, mix, projection)
    mixing = torch.baddbmm(mix_bias, state, mixed.mT)  # U
    extended = (extend @ (mixing.relu() @ projection)).view_as(values)

    mean = extended.sum(3) / pixels.size[:, None, None]
    spread = pixels.mask(extended - mean.unsqueeze(3)).square().sum((1, 3))
    scale, shift = _batch_norm(units, mean, spread, pixels.size)
    return values + (scale[:, None, :, None] * extended + shift[:, None, :, None])


def for_each_image(weight: Tensor, images: int) -> Tensor:
    """(K, I, J) -> (K B, I, J), the same for each of the images."""
    return weight.unsqueeze(1).expand(-1, images, -1, -1).flatten(0, 1)


def _batch_norm(
    units: Sequence[GraphUnit], mean: Tensor, spread: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """What the units' batch norms multiply by and add, (K, C) each.

    Args:
        mean: (K, B, C) over the pixels of each image.
        spread: (K, C), sum of squared distances from the mean of the image, over all images.
        size: (K,) N of each map.
    """
    norms = [unit.norm for unit in units]
    if units[0].training:
        count = (size * mean.shape[1])[:, None]
        # Law of total variance: between the means of the images, and inside them.
        variance, mean = torch.var_mean(mean, 1, correction=0)
        variance = (variance + spread / count).relu()  # rounding may leave it below 0
        _update_running_statistics(norms, mean, variance, count)
    else:
        mean = torch.stack([present(norm.running_mean) for norm in norms])
        variance = torch.stack([present(norm.running_var) for norm in norms])
    weight = torch.stack([norm.weight for norm in norms])
    scale = weight * (variance + norms[0].eps).rsqrt()
    bias = torch.stack([norm.bias for norm in norms])
    return scale, bias - scale * mean


@torch.no_grad()
def _update_running_statistics(
    norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor, count: Tensor
) -> None:
    """What ``nn.BatchNorm2d`` keeps: moving averages of the mean and the unbiased variance."""
    unbiased = torch.addcdiv(variance, variance, (count - 1).clamp(min=1))
    kept = [present(norm.running_mean) for norm in norms]
    kept += [present(norm.running_var) for norm in norms]
    new = torch.cat([mean, unbiased]).to(kept[0].dtype)
    momentum = norms[0].momentum
    assert momentum is not None
    torch._foreach_lerp_(kept, new.unbind(), momentum)
    torch._foreach_add_([present(norm.num_batches_tracked) for norm in norms], 1)


def present(tensor: Tensor | None) -> Tensor:
    """What PyTorch's modules may lack, and those here have."""
    assert tensor is not None
    return tensor


def quadratic_forms(matrix: Tensor, scatter: Tensor) -> Tensor:
    """a^T scatter a (K, B, I) of each row a of a matrix (K, B, I, J); scatter (K, B, J, J) is
    symmetric."""
    forms: Tensor = _QuadraticForms.apply(matrix.flatten(0, 1), scatter.flatten(0, 1))
    return forms.view(matrix.shape[:3])


class _QuadraticForms(torch.autograd.Function):
    """:func:`quadratic_forms` of (G, I, J) and (G, J, J). As the scatter is symmetric, its product
    with the matrix serves the backward pass too, where autograd would compute it once more."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, scatter: Tensor) -> Tensor:
        product = matrix @ scatter
        ctx.save_for_backward(matrix, product)
        return (product * matrix).sum(2)

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        matrix, product = ctx.saved_tensors
        grad = grad.unsqueeze(2)
        return (2 * grad) * product, matrix.mT @ (grad * matrix)
