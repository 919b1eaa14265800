"""Losses of "Deep Structured Instance Graph for Distilling Object Detectors" (DSIG, ICCV 2021).

Each image has one complete graph for the student and one for the teacher, on the same boxes: nodes
are pooled RoI features, edges their cosine similarities. Here are the node and edge losses, and the
authors' class loss; their box and pyramid losses are those of :mod:`d2kd.losses.logits` and
:mod:`d2kd.losses.mimic`.

Shapes: B images, R nodes (RoIs of all images, in any order), D node dimension (channels x pooled
cells), M nodes of the largest graph, N predictions, C logits of each, K classes.

"reduction" is over images: the authors sum, "mean" makes the loss independent of the batch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import full_precision

IMAGE_REDUCTIONS = ("mean", "sum")


def _reduce_images(total: Tensor, num_images: int, reduction: str) -> Tensor:
    """Turn a sum over images into the asked reduction."""
    if reduction not in IMAGE_REDUCTIONS:
        valid = ", ".join(IMAGE_REDUCTIONS)
        raise ValueError(f"image reduction {reduction!r} is not one of {valid}")
    return total / max(num_images, 1) if reduction == "mean" else total


def _count_per_image(mask: Tensor, image_index: Tensor, num_images: int, dtype: torch.dtype):
    """Number of set entries of ``mask`` (R,) in each image: (B,)."""
    counts = torch.zeros(num_images, dtype=dtype, device=mask.device)
    return counts.index_add(0, image_index, mask.to(dtype))


def adaptive_background_weight(num_foreground: Tensor, num_background: Tensor, alpha: float):
    """omega = alpha * N_fg / N_bg of each image (the paper's adaptive background weight).

    Without background it is a finite number that multiplies nothing.
    """
    return alpha * num_foreground / num_background.clamp(min=1)


@full_precision
def node_losses(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    image_index: Tensor,
    num_images: int,
    *,
    alpha: float = 7.5,
    image_reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Mean squared error of foreground nodes and, adaptively weighted, of background nodes.

    For an image with N_fg and N_bg nodes the terms are MSE(foreground nodes) and
    omega * MSE(background nodes), omega = alpha * N_fg / N_bg a constant; an image without
    foreground adds nothing to either.

    Args:
        student, teacher: (R, D) or (R, C, P, P) pooled features of the same boxes.
        foreground: (R,) bool; what is not foreground is background.
        image_index: (R,) long, the image of each node.
        num_images: B, counting images without nodes.
        alpha: strength of the background; the authors' configs use 7.5.
        image_reduction: "mean" or "sum" (the authors' code) over images.

    Returns:
        The scalars (foreground loss, background loss).
    """
    difference = (student - teacher.detach()).flatten(1)
    # One fused reduction per direction: no squared copy of the (R, D) difference is made.
    error = torch.linalg.vector_norm(difference, dim=1).square() / difference.shape[1]

    background = ~foreground
    num_fg = _count_per_image(foreground, image_index, num_images, error.dtype)
    num_bg = _count_per_image(background, image_index, num_images, error.dtype)
    omega = adaptive_background_weight(num_fg, num_bg, alpha)
    fg_weight = foreground / num_fg.clamp(min=1)[image_index]
    bg_weight = background * (omega / num_bg.clamp(min=1))[image_index]
    return (
        _reduce_images((error * fg_weight).sum(), num_images, image_reduction),
        _reduce_images((error * bg_weight).sum(), num_images, image_reduction),
    )


@torch.no_grad()
def background_hardness(teacher_logits: Tensor) -> Tensor:
    """Teacher's cross-entropy with "background" of each RoI: (R, K + 1) logits -> (R,), >= 0."""
    return -F.log_softmax(teacher_logits.float(), dim=1)[:, -1]


def mine_background(teacher_logits: Tensor, foreground: Tensor, threshold: float) -> Tensor:
    """Background samples mining: background RoIs that the teacher finds hard to call background.

    Args:
        teacher_logits: (R, K + 1), background last.
        foreground: (R,) bool.
        threshold: a background RoI is kept when its hardness reaches it (0.6 in the authors'
            configs: the teacher's background probability is at most 0.55).

    Returns:
        (R,) bool, True on the kept background RoIs.
    """
    return (background_hardness(teacher_logits) >= threshold) & ~foreground


def pack_nodes(
    selected: Tensor, image_index: Tensor, num_images: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Give each selected node a slot of its image, so that graphs are batched matrix products.

    Args:
        selected: (R,) bool.
        image_index: (R,) long.
        num_images: B.
        capacity: M, slots an image; selected nodes beyond it are dropped, so the caller passes at
            least the largest count of an image.

    Returns:
        index: (B, M) long, the node in each slot; 0 in empty slots.
        valid: (B, M) bool, True where a slot holds a node.
    """
    images = torch.arange(num_images, device=selected.device)
    in_image = (image_index[:, None] == images) & selected[:, None]
    rank = in_image.long().cumsum(0).gather(1, image_index[:, None]).squeeze(1) - 1
    spare = num_images * capacity  # where everything without a slot is written, cut off below
    placed = selected & (rank < capacity)
    slot = torch.where(placed, image_index * capacity + rank, spare)
    index = slot.new_zeros(spare + 1).scatter(0, slot, torch.arange(len(slot), device=slot.device))
    valid = placed.new_zeros(spare + 1).scatter(0, slot, placed)
    return index[:-1].view(num_images, capacity), valid[:-1].view(num_images, capacity)


class _Gram(torch.autograd.Function):
    """X X^T for a batch of (M, D) matrices.

    Autograd would spend two products of this size on the gradient, one for each factor; by
    symmetry (G + G^T) X is the same with one, which is most of the cost of a large graph.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.transpose(-2, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad + grad.transpose(-2, -1)) @ x


def cosine_graph(nodes: Tensor, eps: float = 1e-12) -> Tensor:
    """Edges of complete graphs: cosine similarity of each pair of nodes, (B, M, D) -> (B, M, M).

    A node whose norm is at most ``eps`` has no direction: its edges, and its gradient, are zero.
    """
    # Scaling the Gram matrix by the norms on its diagonal saves normalised copies of the nodes.
    gram = _Gram.apply(nodes)
    squared_norm = gram.diagonal(dim1=-2, dim2=-1)
    defined = squared_norm > eps**2
    inverse_norm = torch.where(defined, squared_norm, 1.0).rsqrt() * defined
    return gram * inverse_norm[:, :, None] * inverse_norm[:, None, :]


@full_precision
def edge_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, *, image_reduction: str = "mean"
) -> Tensor:
    """Half the mean squared difference of the edges of student and teacher.

    For an image with M_b nodes: 1 / (2 M_b^2) * sum_pq (E^t_pq - E^s_pq)^2. The diagonal counts
    in the mean, as in the authors' code, and is an error of zero by definition.

    Args:
        student: (B, M, D) packed nodes.
        teacher: (B, M, D') packed nodes of the same boxes; D' may differ from D.
        valid: (B, M) bool, False on empty slots.
        image_reduction: "mean" or "sum" (the authors' code) over images.
    """
    with torch.no_grad():
        teacher_edges = cosine_graph(teacher)
        pairs = valid[:, :, None] & valid[:, None, :]
        pairs = pairs & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        num_entries = valid.sum(1).clamp(min=1).square()
        weight = 0.5 * pairs.to(student.dtype) / num_entries[:, None, None]
    error = (cosine_graph(student) - teacher_edges).square()
    return _reduce_images((error * weight).sum(), len(valid), image_reduction)


@full_precision
def class_logit_loss(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of softmax class probabilities, averaged over every logit.

    T^2 / (N C) * sum KL, with N the valid predictions and C the logits of each: the authors'
    element-wise mean, in which the weight 3 for 80 classes and background is 3 / 81 a prediction.

    Args:
        student, teacher: (N, C) logits.
        valid: (N,) bool, the predictions to compare; all if None.
        temperature: T.
    """
    if valid is None:
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    num_logits = valid.sum().clamp(min=1) * student.shape[1]
    divergence = _SoftmaxDivergence.apply(student, teacher.detach(), valid.to(student.dtype))
    return temperature**2 * divergence / num_logits


class _SoftmaxDivergence(torch.autograd.Function):
    """sum over predictions of ``counted`` x KL(softmax(teacher) || softmax(student)).

    A dense detector has millions of these logits: value and gradient in one go save passes.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        """(N, C), (N, C), (N,) -> scalar."""
        log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(dim=1)
        ctx.save_for_backward(log_q.exp_().sub_(p).mul_(counted[:, None]))
        return divergence @ counted

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
