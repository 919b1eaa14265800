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

from ..numerics import full_precision

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

    ``forward`` computes this. For all pixels of an image it is one affine map, and ``affine``
    returns that map without making any of the tensors above that have N columns.

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
        num_pixels = x.shape[2] * x.shape[3]
        by_pixel = x.flatten(2).transpose(1, 2)
        state, projection = self.state(by_pixel), self.projection(by_pixel)  # S^T, P^T
        # The order of the products avoids the expensive ones of (2M, M) with (M, M).
        mixed = projection + F.linear(projection, self.mix_nodes.weight)
        if self.normalize:
            mixed = mixed / num_pixels
        nodes = mixed.transpose(1, 2) @ state + self.mix_nodes.bias[:, None]  # U^T
        reprojected = projection @ nodes.relu()  # (B, N, 2M)
        extended = self.extend(self.mix_states(reprojected)).transpose(1, 2)
        scale, shift = self._batch_norm(extended.mean(2), extended.var(2, correction=0), num_pixels)
        return x + (scale[:, None] * extended + shift[:, None]).view_as(x)

    @full_precision
    def affine(self, mean: Tensor, scatter: Tensor, num_pixels: int) -> tuple[Tensor, Tensor]:
        """The affine map that phi is for the pixels of each image: phi(x) = A (x - mean) + o.

        V depends on the pixels only through their mean and scatter matrix, and once V is known all
        that follows is linear in P. Batch normalisation is no exception: mean and variance of an
        affine map of x follow exactly from the mean and the scatter of x.

        Args:
            mean: (B, C), of the pixels of each image.
            scatter: (B, C, C), sum over the pixels of (x - mean)(x - mean)^T.
            num_pixels: N.

        Returns:
            A (B, C, C), o (B, C). o is the mean of phi over the pixels.
        """
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
        extended_mean = (extend_nodes @ mean_projection.unsqueeze(2)).squeeze(2)
        extended_var = _quadratic(matrix, scatter, matrix).clamp(min=0) / num_pixels

        scale, shift = self._batch_norm(extended_mean, extended_var, num_pixels)
        identity = torch.eye(len(scale), dtype=matrix.dtype, device=matrix.device)
        return identity + scale[:, None] * matrix, mean + scale * extended_mean + shift

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
            num_images = len(mean)
            # Law of total variance: inside the images, and between their means.
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


def _left_multiply(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x for each image: (I, J), (B, J, K) -> (B, I, K).

    ``torch.matmul`` would transpose x to do it in one product, and leave a transposed result.
    """
    return torch.bmm(weight.expand(len(x), -1, -1), x)


def _quadratic(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Diagonal of left matrix right^T: (B, I, J), (B, J, K), (B, I, K) -> (B, I)."""
    return ((left @ matrix) * right).sum(2)


@full_precision
def squared_relation_gap(
    student_unit: GraphUnit,
    teacher_unit: GraphUnit,
    adapter: nn.Conv2d,
    student: Tensor,
    teacher: Tensor,
) -> Tensor:
    """|| adapter(student_unit(student)) - teacher_unit(teacher) ||^2, what L_PR is made of.

    On large maps both sides, and the adapter, are affine maps of the pixels. The squared norm of
    their difference then needs no map at all, only the means and scatter matrices of the pixels:
    three products with the pixels forward and two backward, against eight with the maps.

    That sum of terms loses digits where the gap is small beside the features; one that is within
    the rounding error (in float32, 0.1 % of the features) counts as zero.

    Args:
        adapter: 1x1 convolution C_s -> C_t.
        student: (B, C_s, H, W).
        teacher: (B, C_t, H, W), a constant.

    Returns:
        Scalar, the sum over all elements of (B, C_t, H, W).
    """
    teacher = teacher.detach()
    num_pixels = student.shape[2] * student.shape[3]
    if num_pixels <= student.shape[1]:  # (C, C) matrices would cost more than the maps
        return (adapter(student_unit(student)) - teacher_unit(teacher)).square().sum()
    student_mean, teacher_mean, student_scatter, cross_scatter, teacher_scatter = _Moments.apply(
        student.flatten(2), teacher.flatten(2)
    )
    matrix_s, offset_s = student_unit.affine(student_mean, student_scatter, num_pixels)
    matrix_t, offset_t = teacher_unit.affine(teacher_mean, teacher_scatter, num_pixels)
    weight = adapter.weight.flatten(1)
    matrix_s, offset_s = _left_multiply(weight, matrix_s), F.linear(offset_s, weight, adapter.bias)

    size = (
        _quadratic(matrix_s, student_scatter, matrix_s)
        + _quadratic(matrix_t, teacher_scatter, matrix_t)
    ).sum()
    spread = size - 2 * _quadratic(matrix_s, cross_scatter, matrix_t).sum()
    unresolved = spread <= 8 * torch.finfo(spread.dtype).eps * size
    return torch.where(unresolved, 0.0, spread) + num_pixels * (offset_s - offset_t).square().sum()


class _Moments(torch.autograd.Function):
    """Means and scatter matrices of the pixels of two maps, and the scatter between them.

    Autograd would differentiate the factors of each product one after the other and keep centred
    copies of the maps; the backward pass here is two products with the maps that are there anyway.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        """(B, C_s, N), (B, C_t, N) -> means (B, C_s), (B, C_t); scatter matrices (B, C_s, C_s),
        (B, C_s, C_t), (B, C_t, C_t)."""
        means = student.mean(2), teacher.mean(2)
        ctx.save_for_backward(student, teacher, *means)
        student, teacher = student - means[0].unsqueeze(2), teacher - means[1].unsqueeze(2)
        scatter = teacher @ teacher.mT
        ctx.mark_non_differentiable(means[1], scatter)
        return *means, student @ student.mT, student @ teacher.mT, scatter

    @staticmethod
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx, grad_mean, _, grad_scatter, grad_cross, __) -> tuple[Tensor, None]:
        student, teacher, student_mean, teacher_mean = ctx.saved_tensors
        grad_scatter = grad_scatter + grad_scatter.mT
        centre = grad_scatter @ student_mean.unsqueeze(2) + grad_cross @ teacher_mean.unsqueeze(2)
        grad = torch.baddbmm(
            grad_mean.unsqueeze(2) / student.shape[2] - centre, grad_scatter, student
        )
        return grad.baddbmm_(grad_cross, teacher), None


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
