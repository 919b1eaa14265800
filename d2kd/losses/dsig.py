"""Losses of "Deep Structured Instance Graph for Distilling Object Detectors" (DSIG, ICCV 2021).

Each image has one complete graph for the student and one for the teacher, on the same boxes: nodes
are pooled RoI features, edges their cosine similarities. Here are the node and edge losses, and the
authors' class loss; their box and pyramid losses are those of :mod:`d2kd.losses.logits` and
:mod:`d2kd.losses.mimic`.

Shapes: B images, R nodes (RoIs of all images, image after image), D node dimension (channels x
pooled cells), M nodes of the largest graph, N predictions, C logits of each, K classes.

"reduction" is over images: the authors sum, "mean" makes the loss independent of the batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..numerics import Ragged, full_precision, inverse_lengths, on_device, softened_kl

IMAGE_REDUCTIONS = ("mean", "sum")


def _image_share(num_images: int, reduction: str) -> float:
    """What turns a sum over images into the asked reduction."""
    if reduction not in IMAGE_REDUCTIONS:
        valid = ", ".join(IMAGE_REDUCTIONS)
        raise ValueError(f"image reduction {reduction!r} is not one of {valid}")
    return 1 / max(num_images, 1) if reduction == "mean" else 1.0


# --- nodes ----------------------------------------------------------------------------------------


def adaptive_background_weight(
    num_foreground: Tensor, num_background: Tensor, alpha: float
) -> Tensor:
    """omega = alpha * N_fg / N_bg of each image (the paper's adaptive background weight).

    Without background it is a finite number that multiplies nothing.
    """
    return alpha * num_foreground / num_background.clamp(min=1)


@full_precision
def node_losses(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    layout: Ragged,
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
        layout: the images of the nodes.
        alpha: strength of the background; the authors' configs use 7.5.
        image_reduction: "mean" or "sum" (the authors' code) over images.

    Returns:
        The scalars (foreground loss, background loss).
    """
    squares, size = _squares(student, teacher)
    share = _image_share(len(layout.counts), image_reduction) / size
    weights = _node_weights(foreground, layout, alpha, share, squares.dtype)
    # Not a product of matrices: those sum a thousand numbers one after the other.
    foreground_loss, background_loss = (squares[:, None] * weights).sum(0).unbind()
    return foreground_loss, background_loss


@full_precision
def foreground_node_loss(
    student: Tensor, teacher: Tensor, layout: Ragged, *, image_reduction: str = "mean"
) -> Tensor:
    """The first of :func:`node_losses` where all nodes are foreground."""
    squares, size = _squares(student, teacher)
    share = _image_share(len(layout.counts), image_reduction) / size
    weights = [share / count for count in layout.counts for _ in range(count)]
    return (squares * on_device(weights, squares.device, squares.dtype)).sum()


def _squares(student: Tensor, teacher: Tensor) -> tuple[Tensor, int]:
    """(R,) squared distance of each pair of nodes, and the number D of squares in it."""
    difference = (student - teacher.detach()).flatten(1)
    # One fused reduction per direction: no squared copy of the (R, D) difference is made.
    return torch.linalg.vector_norm(difference, dim=1).square(), difference.shape[1]


@torch.no_grad()
def _node_weights(
    foreground: Tensor, layout: Ragged, alpha: float, share: float, dtype: torch.dtype
) -> Tensor:
    """(R, 2) weight of each node's squares in the foreground and in the background loss."""
    foreground = layout.pad(foreground)
    background = ~foreground if layout.is_full else ~foreground & layout.valid
    kinds = torch.stack([foreground, background], dim=-1).to(dtype)  # (B, n, 2)
    counts = kinds.sum(1, keepdim=True)
    weights = kinds / (counts.clamp(min=1) / share)
    omega = adaptive_background_weight(counts[..., 0], counts[..., 1], alpha)
    weights[..., 1].mul_(omega)
    return layout.unpad(weights)


# --- edges ----------------------------------------------------------------------------------------


@torch.no_grad()
def background_hardness(teacher_logits: Tensor) -> Tensor:
    """Teacher's cross-entropy with "background" of each RoI: (R, K + 1) logits -> (R,), >= 0."""
    return -F.log_softmax(teacher_logits.float(), dim=1)[:, -1]


def nodes_with_edges(teacher_logits: Tensor, foreground: Tensor, threshold: float) -> Tensor:
    """Background samples mining: foreground, and background that the teacher finds hard to call so.

    Args:
        teacher_logits: (R, K + 1), background last.
        foreground: (R,) bool.
        threshold: a background RoI is kept when its hardness reaches it (0.6 in the authors'
            configs: the teacher's background probability is at most 0.55).

    Returns:
        (R,) bool.
    """
    return foreground | (background_hardness(teacher_logits) >= threshold)


def cosine_graph(nodes: Tensor, scale: Tensor | None = None) -> Tensor:
    """Edges of complete graphs: cosine similarity of each pair of nodes, (B, M, D) -> (B, M, M).

    A node has no edge with itself, and none with a node that has no direction (see
    :data:`~d2kd.numerics.MIN_LENGTH`), whose gradient is zero: there the matrix is 0.

    Args:
        scale: (B, M), constants; the edge of p and q is multiplied by both of theirs.
    """
    edges: Tensor = _CosineGraph.apply(nodes, scale)
    return edges


class _CosineGraph(torch.autograd.Function):
    """E = N X X^T N without its diagonal, N being the scaled inverse lengths of the rows of X.

    The lengths are on the diagonal of X X^T, so no normalised copy of the nodes is made. Autograd
    would spend two products of this size on the gradient, one for each factor of X X^T; as the
    matrix is symmetric, one does. What that saves is in docs/performance.md.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, nodes: Tensor, scale: Tensor | None) -> Tensor:
        edges = nodes @ nodes.mT
        inverse = inverse_lengths(edges.diagonal(dim1=-2, dim2=-1))
        scaled = inverse if scale is None else inverse * scale
        edges.mul_(scaled[:, :, None]).mul_(scaled[:, None, :])
        edges.diagonal(dim1=-2, dim2=-1).zero_()
        ctx.save_for_backward(nodes, edges, inverse, scaled)
        return edges

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """With the symmetric S = G + G^T, without diagonal: dX = (N S N - diag(n)) X, where n_p =
        sum_q S_pq E_pq / |x_p|^2 is what the length of x_p takes away."""
        nodes, edges, inverse, scaled = ctx.saved_tensors
        both = grad + grad.mT
        along = (both * edges).sum(-1) * inverse.square()
        both.mul_(scaled[:, :, None]).mul_(scaled[:, None, :])
        both.diagonal(dim1=-2, dim2=-1).copy_(-along)
        return both @ nodes, None


@full_precision
def edge_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, *, image_reduction: str = "mean"
) -> Tensor:
    """Half the mean squared difference of the edges of student and teacher.

    For an image with M_b nodes: 1 / (2 M_b^2) * sum_pq (E^t_pq - E^s_pq)^2. The diagonal counts
    in the mean, as in the authors' code, and is an error of zero by definition.

    Args:
        student: (B, M, D) nodes.
        teacher: (B, M, D') nodes of the same boxes; D' may differ from D.
        valid: (B, M) bool, False where there is no node.
        image_reduction: "mean" or "sum" (the authors' code) over images.
    """
    with torch.no_grad():
        # 1 / sqrt(M_b) for each node, so edges over M_b: the sum of their squares is the mean.
        scale = F.normalize(valid.to(student.dtype), dim=1)
        teacher_edges = cosine_graph(teacher, scale)
    total = F.mse_loss(cosine_graph(student, scale), teacher_edges, reduction="sum")
    return total * (0.5 * _image_share(len(valid), image_reduction))


# --- class outputs --------------------------------------------------------------------------------


@full_precision
def class_logit_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 1.0,
    dim: int = 1,
) -> Tensor:
    """KL(teacher || student) of softmax class probabilities, averaged over every logit.

    T^2 / (N C) * sum KL, with N the valid predictions and C the logits of each: the authors'
    element-wise mean, in which the weight 3 for 80 classes and background is 3 / 81 a prediction.

    Args:
        student, teacher: (N, C) logits, or more dimensions of which ``dim`` is C.
        valid: the shape of the logits without C, bool: the predictions to compare; all if None.
        temperature: T.
    """
    num_logits = student.shape[dim]
    if valid is None:
        count = max(student.numel() // num_logits, 1)
        return softened_kl(student, teacher, temperature, dim=dim) / (count * num_logits)
    counted = valid.to(student.dtype)
    total = softened_kl(student, teacher, temperature, counted, dim)
    return total / (counted.sum() * num_logits).clamp(min=1)
