"""The trainable modules of DRKD: the graph unit, which relates the pixels of a feature map, and the
relation unit with its relation filter, which relates the instances of an image.

Shapes: B images, C channels, N = H x W pixels of one pyramid level, M nodes of a graph; R instances
of the batch (image after image), n = the most instances that one image has, D = C x k x k features
of an instance, d the width inside a relation unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.functional import full_precision

RELATION_FILTERS = ("learned", "uniform", "random", "none")


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

    Written like this, a large map costs several (2M, N) tensors. But V depends on x only through
    the mean and the (C, C) scatter matrix of its pixels, and once V is known phi is one affine map
    A_b x + o_b for all pixels of image b. Batch normalisation is part of that map: the mean and
    variance of an affine map of x follow exactly from the mean and scatter of x. ``affine`` returns
    the map, so that a 1x1 convolution that comes next can be folded into it.

    Everything runs in float32: V sums over up to 67,200 pixels, too many for float16.

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
        self.normalize = normalize
        self.state = nn.Linear(channels, 2 * num_nodes)
        self.projection = nn.Linear(channels, num_nodes)
        self.mix_nodes = nn.Linear(num_nodes, num_nodes)
        self.mix_states = nn.Linear(2 * num_nodes, 2 * num_nodes, bias=False)
        self.extend = nn.Linear(2 * num_nodes, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)
        if zero_init_norm:
            nn.init.zeros_(self.norm.weight)

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pixels = x.flatten(2)
        if is_small_map(x):
            refined = self._refine_small_map(pixels)
        else:
            matrix, offset = self.affine(x)
            refined = torch.baddbmm(offset.unsqueeze(2), matrix, pixels)
        return refined.view_as(x)

    def _refine_small_map(self, pixels: Tensor) -> Tensor:
        """phi(x) by the definition, each product from the right: no (2M, M) x (M, M) product.

        Args:
            pixels: (B, C, N).

        Returns:
            (B, C, N).
        """
        by_pixel = pixels.transpose(1, 2)
        state, projection = self.state(by_pixel), self.projection(by_pixel)  # S^T, P^T
        mixed = projection + F.linear(projection, self.mix_nodes.weight)
        if self.normalize:
            mixed = mixed / pixels.shape[2]
        nodes = mixed.transpose(1, 2) @ state + self.mix_nodes.bias[:, None]  # U^T
        reprojected = projection @ nodes.relu()  # (B, N, 2M)
        extended = self.extend(self.mix_states(reprojected)).transpose(1, 2)
        scale, shift = self._batch_norm(
            extended.mean(2), extended.var(2, correction=0), pixels.shape[2]
        )
        return pixels + scale[:, None] * extended + shift[:, None]

    @full_precision
    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map that phi is for the pixels of each image: phi(x_b) = A_b x_b + o_b.

        Args:
            x: (B, C, H, W).

        Returns:
            A (B, C, C), o (B, C).
        """
        num_pixels = x.shape[2] * x.shape[3]
        mean, scatter = _MeanAndScatter.apply(x.flatten(2))
        # The mean of S over the pixels, and of P before and after the mixing over nodes.
        mean_state, mean_projection = self.state(mean), self.projection(mean)
        mean_mixed = mean_projection + F.linear(mean_projection, self.mix_nodes.weight)

        mix = self.projection.weight + self.mix_nodes.weight @ self.projection.weight  # (M, C)
        nodes = _left_multiply(self.state.weight, scatter @ mix.T)
        nodes = nodes + num_pixels * mean_state.unsqueeze(2) * mean_mixed.unsqueeze(1)
        if self.normalize:
            nodes = nodes / num_pixels
        nodes = nodes + self.mix_nodes.bias  # U

        # W_e W first: the cost of that product does not grow with the number of images.
        extend = self.extend.weight @ self.mix_states.weight
        extend_nodes = _left_multiply(extend, nodes.relu())  # (B, C, M)
        matrix = extend_nodes @ self.projection.weight
        extended_mean = _apply(extend_nodes, mean_projection)
        # The diagonal of matrix scatter matrix^T, which rounding must not make negative.
        extended_var = ((matrix @ scatter) * matrix).sum(2).clamp(min=0) / num_pixels

        scale, shift = self._batch_norm(extended_mean, extended_var, num_pixels)
        matrix = scale[:, None] * matrix
        offset = scale * extended_mean + shift - _apply(matrix, mean)
        return matrix + torch.eye(x.shape[1], dtype=x.dtype, device=x.device), offset

    def _batch_norm(self, mean: Tensor, variance: Tensor, num_pixels: int) -> tuple[Tensor, Tensor]:
        """What batch normalisation multiplies by and adds, from the moments of each image.

        Args:
            mean, variance: (B, C) over the N pixels of each image.
            num_pixels: N.

        Returns:
            scale (C,), shift (C,).
        """
        norm = self.norm
        if self.training:
            # Law of total variance: inside the images, and between their means.
            num_images = len(mean)
            variance = variance.mean(0) + mean.var(0, correction=0)
            mean = mean.mean(0)
            self._update_running_statistics(mean, variance, num_pixels * num_images)
        else:
            mean, variance = norm.running_mean, norm.running_var
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return scale, norm.bias - scale * mean

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """What ``nn.BatchNorm2d`` keeps: moving averages of the mean and the unbiased variance."""
        norm = self.norm
        unbiased = variance * (count / max(count - 1, 1))
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


class _MeanAndScatter(torch.autograd.Function):
    """Mean and scatter matrix sum_p (x_p - mean)(x_p - mean)^T of the pixels of each image.

    Autograd would differentiate the two factors of the product one after the other and keep the
    centred map; the backward pass here is a single product with the map that is there anyway.
    """

    @staticmethod
    def forward(ctx, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, N) -> (B, C), (B, C, C)."""
        mean = pixels.mean(2)
        centred = pixels - mean.unsqueeze(2)
        ctx.save_for_backward(pixels, mean)
        return mean, centred @ centred.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_scatter: Tensor) -> Tensor:
        pixels, mean = ctx.saved_tensors
        symmetric = grad_scatter + grad_scatter.transpose(1, 2)
        constant = grad_mean / pixels.shape[2] - _apply(symmetric, mean)
        return torch.baddbmm(constant.unsqueeze(2), symmetric, pixels)


def _left_multiply(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x for each image: (I, J), (B, J, K) -> (B, I, K).

    ``torch.matmul`` would transpose x to do it in one product, and leave a transposed result.
    """
    return torch.bmm(weight.expand(len(x), -1, -1), x)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Batched matrix times vector: (B, I, J), (B, J) -> (B, I)."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def is_small_map(x: Tensor) -> bool:
    """Whether a map has so few pixels that (C, C) matrices cost more than (C, N) tensors."""
    return x.shape[2] * x.shape[3] <= x.shape[1]


@full_precision
def pixel_relation_gap(
    student_unit: GraphUnit,
    teacher_unit: GraphUnit,
    adapter: nn.Conv2d,
    student: Tensor,
    teacher: Tensor,
) -> Tensor:
    """adapter(student_unit(student)) - teacher_unit(teacher), the gap that L_PR measures.

    On large maps both sides are affine maps of the pixels, and so is the adapter after them: folded
    into one, they cost a single product with each map.

    Args:
        adapter: 1x1 convolution C_s -> C_t.
        student: (B, C_s, H, W).
        teacher: (B, C_t, H, W).

    Returns:
        (B, C_t, H, W).
    """
    if is_small_map(student):
        return adapter(student_unit(student)) - teacher_unit(teacher)
    student_matrix, student_offset = student_unit.affine(student)
    teacher_matrix, teacher_offset = teacher_unit.affine(teacher)
    weight = adapter.weight.flatten(1)
    offset = F.linear(student_offset, weight, adapter.bias) - teacher_offset
    student_matrix = _left_multiply(weight, student_matrix)
    gap = torch.baddbmm(offset.unsqueeze(2), student_matrix, student.flatten(2))
    gap.baddbmm_(teacher_matrix, teacher.flatten(2), alpha=-1)
    return gap.view_as(teacher)


class InstanceLayout:
    """Where the instances of a batch, image after image, lie in a padded (B, n) grid.

    Built from numbers that are known on the host, so that using it waits for no device.

    Attributes:
        counts: (B,) instances of each image.
        mask: (B, n) bool, True for instances, False for padding.
        image_index: (R,) image of each instance.

    Args:
        counts: instances of each image.
        device: of the tensors that it is used with.
    """

    def __init__(self, counts: Sequence[int], device: torch.device | str = "cpu") -> None:
        lengths = torch.tensor(counts)
        # At least one column, so that a batch without instances is no special case.
        size = max([1, *counts])
        mask = torch.arange(size) < lengths.unsqueeze(1)
        image_index, column = mask.nonzero(as_tuple=True)
        self.counts = lengths.to(device, non_blocking=True)
        self.mask = mask.to(device, non_blocking=True)
        self.image_index = image_index.to(device, non_blocking=True)
        self._slots = (image_index * size + column).to(device, non_blocking=True)

    def pad(self, instances: Tensor) -> Tensor:
        """(R, D) -> (B, n, D), zero where no instance is."""
        batch, size = self.mask.shape
        padded = instances.new_zeros(batch * size, instances.shape[1])
        return padded.index_copy(0, self._slots, instances).view(batch, size, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, n, D) -> (R, D)."""
        return padded.flatten(0, 1).index_select(0, self._slots)

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the instances of the same image: (B, n, n) -> (B, n, n).

        Rows of instances sum to 1; rows and columns of padding are 0, and finite on the way there,
        so that an image without instances does not spoil the gradients of the others.
        """
        pairs = self.mask.unsqueeze(2) & self.mask.unsqueeze(1)
        return logits.masked_fill(~pairs, torch.finfo(logits.dtype).min).softmax(2) * pairs


class RelationFilter(nn.Module):
    """Relation filter F: a weight on the similarity of each pair of instances of an image.

    The released code draws a new random linear layer D -> n in each forward pass, which is never
    trained; in expectation its row softmax is 1/n. ``learned`` is a persistent form of it that does
    not depend on the order of the instances: F = softmax_rows((x U_q)(x U_k)^T / sqrt(e)), with U_k
    zero at first, so that F starts at exactly 1/n. ``uniform`` is 1/n, ``random`` is what the
    released code does, ``none`` is 1.

    Args:
        dim: D.
        kind: one of ``RELATION_FILTERS``.
        width: e, of the learned filter.
    """

    def __init__(self, dim: int, kind: str = "learned", width: int = 64) -> None:
        super().__init__()
        if kind not in RELATION_FILTERS:
            raise ValueError(f"relation filter must be one of {RELATION_FILTERS}, got {kind!r}")
        self.kind = kind
        if kind == "learned":
            self.query = nn.Linear(dim, width, bias=False)
            self.key = nn.Linear(dim, width, bias=False)
            nn.init.zeros_(self.key.weight)

    @full_precision
    def forward(self, x: Tensor, layout: InstanceLayout) -> Tensor:
        """(R, D) instances -> (B, n, n) weights, or a tensor that broadcasts to them."""
        if self.kind == "none":
            return x.new_ones(())
        if self.kind == "uniform":
            return 1 / layout.counts.clamp(min=1).to(x.dtype)[:, None, None]
        if self.kind == "random":
            return layout.softmax(_random_linear(layout.pad(x)))
        query, key = layout.pad(self.query(x)), layout.pad(self.key(x))
        return layout.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[2]))


def _random_linear(x: Tensor) -> Tensor:
    """A fresh ``nn.Linear(D, n)``, initialised as usual, for each image: (B, n, D) -> (B, n, n)."""
    batch, size, dim = x.shape
    bound = 1 / math.sqrt(dim)
    weight = x.new_empty(batch, dim, size).uniform_(-bound, bound)
    bias = x.new_empty(batch, 1, size).uniform_(-bound, bound)
    return torch.baddbmm(bias, x, weight)


class InstanceRelation(nn.Module):
    """Relation matrix psi of the instances of each image.

    psi = softmax_rows((W_q x + b_q)(W_k x + b_k)^T * F(x)), without a 1/sqrt(d), as in the code.

    Args:
        dim: D, features of an instance.
        width: d, of queries and keys; the default 0 means D/2.
        relation_filter: kind of the filter F, see ``RelationFilter``.
    """

    def __init__(self, dim: int, width: int = 0, relation_filter: str = "learned") -> None:
        super().__init__()
        self.width = width or max(dim // 2, 1)
        self.query = nn.Linear(dim, self.width)
        self.key = nn.Linear(dim, self.width)
        self.filter = RelationFilter(dim, relation_filter)

    @full_precision
    def forward(self, x: Tensor, layout: InstanceLayout) -> Tensor:
        """(R, D) instances -> (B, n, n): rows of instances sum to 1, padding is 0."""
        query, key = layout.pad(self.query(x)), layout.pad(self.key(x))
        return layout.softmax(query @ key.transpose(1, 2) * self.filter(x, layout))


class RelationUnit(nn.Module):
    """Instance-wise relation rho: each instance, refined by the instances of its image.

    rho(x) = x + W_o (psi(x) (W_v x + b_v)) + b_o.

    Args:
        dim: D, features of an instance.
        width: d, inside the unit; the default 0 means D/2.
        relation_filter: kind of the filter, see ``RelationFilter``.
    """

    def __init__(self, dim: int, width: int = 0, relation_filter: str = "learned") -> None:
        super().__init__()
        self.relation = InstanceRelation(dim, width, relation_filter)
        self.value = nn.Linear(dim, self.relation.width)
        self.output = nn.Linear(self.relation.width, dim)

    @full_precision
    def forward(self, x: Tensor, layout: InstanceLayout) -> Tensor:
        """(R, D) instances -> (R, D)."""
        mixed = self.relation(x, layout) @ layout.pad(self.value(x))
        return x + self.output(layout.unpad(mixed))
