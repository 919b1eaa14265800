"""DRKD's pixel-wise relation: graph units, and the gap between the maps that they refine.

A graph unit is one affine map for all pixels of an image, and that map depends on the pixels only
through their mean and their scatter matrix. So the gap of all levels, sides and images is computed
from those moments in a few batched products; the refined maps themselves are never made.

Shapes: L levels, B images, C channels (Cs of the student, Ct of the teacher), N = H x W pixels of a
level, M nodes of a graph, K graph units that are computed together.
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

    The module holds the parameters; :func:`affine_maps` evaluates many units at once.

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
    layers = [layer for unit in units for layer in (unit.state, unit.projection)]
    weight = torch.cat([layer.weight for layer in layers]).unflatten(0, (count, -1))
    bias = torch.cat([layer.bias for layer in layers]).unflatten(0, (count, 1, -1))
    mix = torch.stack([unit.mix_nodes.weight for unit in units])  # A
    mix_bias = torch.stack([unit.mix_nodes.bias for unit in units]).unsqueeze(1)

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
        _for_each_image(mix_bias, images),
        state_mean.reshape(-1, 2 * nodes, 1),
        mixed_mean.reshape(-1, 1, nodes),
    )
    right = (scatter.flatten(1, 2) @ mixed.mT).view(-1, channels, nodes)
    mixing = torch.baddbmm(mixing, _for_each_image(state, images), right)

    # W_e W first: the cost of that product does not grow with the number of images.
    extend = torch.stack([unit.extend.weight for unit in units])
    extend = extend @ torch.stack([unit.mix_states.weight for unit in units])
    extend_nodes = _for_each_image(extend, images) @ mixing.relu()  # (K B, C, M)
    matrix = extend_nodes.view(count, images * channels, nodes) @ projection
    value = extend_nodes @ projection_mean.reshape(-1, nodes, 1)
    return matrix.view_as(scatter), value.view_as(moments.mean)


def _for_each_image(weight: Tensor, images: int) -> Tensor:
    """(K, I, J) -> (K B, I, J), the same for each of the images."""
    return weight.unsqueeze(1).expand(-1, images, -1, -1).flatten(0, 1)


def _batch_norm(
    units: Sequence[GraphUnit], mean: Tensor, spread: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """What the units' batch norms multiply by and add.

    Args:
        mean: (K, B, C) over the pixels of each image.
        spread: (K, C), sum of squared distances from the mean of the image, over all images.
        size: (K,) N of each map.

    Returns:
        scale (K, C), shift (K, C).
    """
    norms = [unit.norm for unit in units]
    if units[0].training:
        count = (size * mean.shape[1])[:, None]
        # Law of total variance: between the means of the images, and inside them.
        variance, mean = torch.var_mean(mean, 1, correction=0)
        variance = (variance + spread / count).relu()  # rounding may leave it below 0
        _update_running_statistics(norms, mean, variance, count)
    else:
        mean = torch.stack([_present(norm.running_mean) for norm in norms])
        variance = torch.stack([_present(norm.running_var) for norm in norms])
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
    kept = [_present(norm.running_mean) for norm in norms]
    kept += [_present(norm.running_var) for norm in norms]
    new = torch.cat([mean, unbiased]).to(kept[0].dtype)
    momentum = norms[0].momentum
    assert momentum is not None
    torch._foreach_lerp_(kept, new.unbind(), momentum)
    torch._foreach_add_([_present(norm.num_batches_tracked) for norm in norms], 1)


def _present(tensor: Tensor | None) -> Tensor:
    """What PyTorch's modules may lack, and those here have."""
    assert tensor is not None
    return tensor


# --- the gap of both sides ------------------------------------------------------------------------


def squared_relation_gaps(
    student_units: Sequence[GraphUnit],
    teacher_units: Sequence[GraphUnit],
    adapters: Sequence[nn.Conv2d],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
) -> Tensor:
    """|| adapter(student_unit(student)) - teacher_unit(teacher) ||^2 of each level, for L_PR.

    Both sides, and the adapter, are affine maps of the pixels. The squared norm of their difference
    needs no map, only the means and scatter matrices of the pixels: three products with the pixels
    forward and two backward, against eight with the maps.

    It is a difference of large sums where the gap is small beside the features. Each of those is
    a sum over N pixels, which floating point gets wrong by about eps sqrt(N) times its size; a gap
    within that error counts as zero. In float32 that is, of a map of 200 x 336 positions, a gap of
    less than 0.8 % of the features.

    Args:
        student_units, teacher_units: of L levels.
        adapters: L 1x1 convolutions Cs -> Ct.
        students: (B, Cs, H, W) by level.
        teachers: (B, Ct, H, W) by level; constants.

    Returns:
        (L,), each the sum over all elements of (B, Ct, H, W).
    """
    with torch.autocast(students[0].device.type, enabled=False):
        levels = zip(student_units, teacher_units, adapters, students, teachers, strict=True)
        by_width = itertools.groupby(levels, lambda level: (level[0].channels, level[1].channels))
        gaps = [_gaps_of_equal_widths(*zip(*run, strict=True)) for _, run in by_width]
        return gaps[0] if len(gaps) == 1 else torch.cat(gaps)


def _gaps_of_equal_widths(
    student_units: Sequence[GraphUnit],
    teacher_units: Sequence[GraphUnit],
    adapters: Sequence[nn.Conv2d],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
) -> Tensor:
    """:func:`squared_relation_gaps` of levels that have Cs, and Ct, in common."""
    levels, pixels = len(students), [x.flatten(2) for x in (*students, *teachers)]
    num_pixels = [x.shape[2] for x in pixels[:levels]]
    dtype = torch.float64 if pixels[0].dtype == torch.float64 else torch.float32
    size = on_device(num_pixels, pixels[0].device, dtype)
    *stacks, cross = _Moments.apply(size, *pixels)
    means, scatters = stacks[: len(stacks) // 2], stacks[len(stacks) // 2 :]
    one_width = len(means) == 1
    if one_width:  # units of both sides together
        both = [u for pair in zip(student_units, teacher_units, strict=True) for u in pair]
        moments = Moments(size.repeat_interleave(2), means[0], scatters[0])
        (matrix_s, matrix_t), (offset_s, offset_t) = (
            x.unflatten(0, (levels, 2)).unbind(1) for x in affine_maps(both, moments)
        )
    else:
        matrix_s, offset_s = affine_maps(student_units, Moments(size, means[0], scatters[0]))
        matrix_t, offset_t = affine_maps(teacher_units, Moments(size, means[1], scatters[1]))
    matrix_s, offset_s = _adapt(adapters, matrix_s, offset_s)

    matrices = [matrix_s, matrix_t]
    if one_width:
        matrices = [torch.stack(matrices, 1).flatten(0, 1)]
    forms = [quadratic_forms(a, scatter) for a, scatter in zip(matrices, scatters, strict=True)]
    first, *others = [form.view(levels, -1).sum(1) for form in forms]
    power = sum(others, first)
    shared = (matrix_s.flatten(0, 1) @ cross.flatten(0, 1)).view_as(matrix_t) * matrix_t
    spread = torch.sub(power, shared.sum((1, 2, 3)), alpha=2)
    error = torch.finfo(dtype).eps * math.sqrt(max(num_pixels)) * power.detach()
    offset_gap = (offset_s - offset_t).square().sum((1, 2))
    return spread.masked_fill(spread <= error, 0) + size * offset_gap


def _adapt(adapters: Sequence[nn.Conv2d], matrix: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The affine maps (L, B, Cs, Cs), (L, B, Cs), followed by the adapters."""
    weight = torch.stack([adapter.weight.flatten(1) for adapter in adapters])
    bias = torch.stack([_present(adapter.bias) for adapter in adapters])
    # Matrix and offset side by side: one product.
    both = torch.cat([matrix, offset.unsqueeze(3)], 3)
    adapted = (_for_each_image(weight, both.shape[1]) @ both.flatten(0, 1)).unflatten(
        0, both.shape[:2]
    )
    matrix, offset = adapted.split([matrix.shape[3], 1], 3)
    return matrix, offset.squeeze(3) + bias.unsqueeze(1)


def quadratic_forms(matrix: Tensor, scatter: Tensor) -> Tensor:
    """a^T scatter a of each row a of a matrix.

    Args:
        matrix: (K, B, I, J).
        scatter: (K, B, J, J), symmetric.

    Returns:
        (K, B, I).
    """
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
