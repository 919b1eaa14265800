"""Distillation of a detector's outputs: classes, boxes and masks.

Classes follow Hinton et al., "Distilling the Knowledge in a Neural Network" (2015): KL divergence
between distributions softened by a temperature T, times T^2 so that gradients keep their size.
What differs between outputs is the distribution. A box head that is trained with softmax has one
over K + 1 classes. Dense heads and masks are trained with one sigmoid a class, so each logit is a
Bernoulli distribution of its own: a softmax over such logits would compare something that neither
detector predicts, and is blind to a shift of all logits of an anchor, which is what tells an object
from background.

Losses on RoIs and masks are divided as Detectron2 divides its own losses of these outputs, so that
a weight of 1 gives both the same standing. Dense ones are divided by the foreground anchors of the
step; Detectron2's dense detectors divide by a moving average of that number instead.

Shape legend, used throughout this file:
    R: sampled RoIs of the batch    F: foreground RoIs    K: classes, K also labels background
    B: images    N: anchors of an image over all levels    M: side of a mask
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import connected_zero, full_precision


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence between the Bernoulli distributions of two logits, element by element.

    KL(p || q) = p (t - s) + softplus(s) - softplus(t), with p = sigmoid(t), q = sigmoid(s) and both
    logits divided by the temperature; exact for saturated logits too. Not multiplied by T^2.
    """
    s, t = student / temperature, teacher.detach() / temperature
    return t.sigmoid() * (t - s) + F.softplus(s) - F.softplus(t)


# ------------------------------------------------------------------------------------------------
# Two-stage detectors, on the student's RoIs
# ------------------------------------------------------------------------------------------------


@full_precision
def roi_class_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, sigmoid: bool = False
) -> Tensor:
    """Class distillation on RoIs: T^2 KL(teacher || student), mean over RoIs (Hinton et al.).

    Args:
        student, teacher: (R, K + 1) logits, background last.
        temperature: T.
        sigmoid: the box heads are trained with a sigmoid a class (as for LVIS): sum over the K
            classes of :func:`binary_kl`; such heads do not use their background column.

    Returns:
        Scalar; zero without RoIs.
    """
    if len(student) == 0:
        return connected_zero(student)
    if sigmoid:
        total = binary_kl(student[:, :-1], teacher[:, :-1], temperature).sum()
    else:
        log_q = F.log_softmax(student / temperature, dim=1)
        log_p = F.log_softmax(teacher.detach() / temperature, dim=1)
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return temperature**2 * total / len(student)


@full_precision
def roi_box_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    student_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    teacher_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    beta: float = 0.0,
) -> Tensor:
    """Smooth L1 between the box deltas of the labelled class, summed over foreground RoIs, over R.

    Both detectors regress from the same RoI, so their deltas describe the same box once they are in
    the same units. The four coordinates are summed. The sum is divided by the number of all RoIs,
    as in Detectron2's Fast R-CNN: each foreground RoI counts the same, however many there are.

    Args:
        student, teacher: (R, 4 K), or (R, 4) from a class-agnostic predictor; each on its own.
        labels: (R,) long; K for background.
        num_classes: K.
        student_weights, teacher_weights: the ``weights`` of each detector's ``Box2BoxTransform``,
            by which its deltas are multiplied. The student's units are used.
        beta: where smooth L1 turns from quadratic to linear; 0 for plain L1.

    Returns:
        Scalar; zero without foreground.
    """
    s = _labelled(student.unflatten(1, (-1, 4)), labels)
    t = _labelled(teacher.detach().unflatten(1, (-1, 4)), labels)
    foreground = labels < num_classes
    total = _foreground_distance(s, t, foreground, student_weights, teacher_weights, beta)
    return total / max(len(labels), 1)


@full_precision
def mask_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mask distillation: T^2 :func:`binary_kl` of the labelled class, mean over pixels and RoIs.

    Args:
        student, teacher: (F, K, M, M), or (F, 1, M, M) from a class-agnostic mask head; each on its
            own. Sizes M may differ: the teacher's logits are resized (bilinear) to the student's.
        labels: (F,) long, in [0, K).
        temperature: T.

    Returns:
        Scalar; zero without foreground.
    """
    if len(student) == 0:
        return connected_zero(student)
    s, t = _labelled(student, labels), _labelled(teacher.detach(), labels)
    if s.shape != t.shape:
        t = F.interpolate(t[:, None], s.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    return temperature**2 * binary_kl(s, t, temperature).mean()


# ------------------------------------------------------------------------------------------------
# Dense detectors, on the student's anchors
# ------------------------------------------------------------------------------------------------


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), of float32's absolute precision, without gradient. PyTorch's own computes
    log1p element by element on a CPU, which took several times as long as all the rest."""
    return x.abs().neg_().exp_().add_(1).log_().add_(x.relu())


class _FocusedDivergence(torch.autograd.Function):
    """sum over anchors of ``counted`` x sum over classes of |q - p|^focus BCE(q, p).

    There are millions of these logits: value and gradient in one pass over them take half the time
    of autograd's.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, counted: Tensor, focus: float) -> Tensor:
        p, q = teacher.sigmoid(), student.sigmoid()
        divergence = _softplus(student).sub_(p * student)
        gap = q - p
        size = gap.abs()
        weight = size if focus == 1 else size**focus
        total = torch.einsum("bnk,bnk,bn->", weight, divergence, counted)
        if ctx.needs_input_grad[0]:
            slope = gap.sign() if focus == 1 else focus * gap.sign() * size ** (focus - 1)
            gradient = slope.mul_(divergence).mul_(q).mul_(1 - q).addcmul_(weight, gap)
            ctx.save_for_backward(gradient.mul_(counted[..., None]))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


@full_precision
def dense_class_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float = 1.0,
    focus: float = 1.0,
) -> Tensor:
    """Class distillation on anchors, a Bernoulli distribution a logit, per foreground anchor.

    T^2 sum |p - q|^focus BCE(q, p) / #foreground over all anchors that are not ignored, with p the
    teacher's and q the student's sigmoid at temperature T. The weight |p - q| is that of the
    quality focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020), with the teacher's
    probability as the quality; with focus 1 this is the binary classification distillation of
    Yang et al., "Bridging Cross-task Protocol Inconsistency", ICCV 2023. Without it the many easy
    background anchors outweigh the rest. For focus 0 the constant entropy of p is subtracted, which
    leaves the plain KL divergence.

    Args:
        student, teacher: (B, N, K) logits before the sigmoid.
        labels: (B, N) long; K for background, -1 for ignored anchors.
        num_classes: K.
        temperature: T.
        focus: 0, or at least 1 (between them the weight's gradient is infinite at p = q).

    Returns:
        Scalar, finite without foreground too (then divided by 1).
    """
    if not (focus == 0 or focus >= 1):
        raise ValueError(f"focus must be 0 or at least 1, got {focus}")
    counted = (labels >= 0).to(student.dtype)
    if focus:
        if temperature != 1:
            student, teacher = student / temperature, teacher / temperature
        total = _FocusedDivergence.apply(student, teacher.detach(), counted, focus)
    else:
        total = (binary_kl(student, teacher, temperature).sum(-1) * counted).sum()
    return temperature**2 * total / _foreground(labels, num_classes).sum().clamp(min=1)


@full_precision
def dense_box_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    student_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    teacher_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    beta: float = 0.0,
) -> Tensor:
    """Smooth L1 between the box deltas of foreground anchors, mean over those.

    Args:
        student, teacher: (B, N, 4) deltas with respect to the same anchors.
        labels: (B, N) long; K for background, -1 for ignored anchors.
        num_classes, student_weights, teacher_weights, beta: as in :func:`roi_box_loss`.

    Returns:
        Scalar; zero without foreground.
    """
    foreground = _foreground(labels, num_classes)
    total = _foreground_distance(
        student, teacher.detach(), foreground, student_weights, teacher_weights, beta
    )
    return total / foreground.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------
# Shared parts
# ------------------------------------------------------------------------------------------------


def _labelled(x: Tensor, labels: Tensor) -> Tensor:
    """(R, K or 1, ...) -> (R, ...): each row's entry of its label; background takes any entry."""
    index = labels.clamp(0, x.shape[1] - 1).view(-1, *[1] * (x.dim() - 1))
    return x.take_along_dim(index, dim=1).squeeze(1)


def _foreground(labels: Tensor, num_classes: int) -> Tensor:
    return (labels >= 0) & (labels < num_classes)


def _foreground_distance(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    student_weights: Sequence[float],
    teacher_weights: Sequence[float],
    beta: float,
) -> Tensor:
    """Sum of smooth L1 between deltas (..., 4) where ``foreground`` (...); student's units."""
    # Numbers, not a tensor of them: its copy to the device would wait for the device.
    parts = zip(teacher.unbind(-1), student_weights, teacher_weights, strict=True)
    teacher = torch.stack([delta * (own / other) for delta, own, other in parts], dim=-1)
    distance = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).sum(-1)
    return torch.where(foreground, distance, 0.0).sum()
