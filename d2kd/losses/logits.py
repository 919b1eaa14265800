"""Distillation of a detector's outputs: classes, boxes and masks.

Classes follow Hinton et al., "Distilling the Knowledge in a Neural Network" (2015): KL divergence
between distributions softened by a temperature T, times T^2 so that gradients keep their size.
What differs between outputs is the distribution. A box head that is trained with softmax has one
over K + 1 classes. Dense heads and masks are trained with one sigmoid per class, so each logit is a
Bernoulli distribution of its own: a softmax over such logits would compare something that neither
detector predicts, and is blind to a shift of all logits of an anchor, which is what tells an object
from background.

Losses on RoIs and masks are divided as Detectron2 divides its own losses of these outputs, so that
a weight of 1 gives both the same standing. Dense ones are divided by the foreground anchors of the
step; Detectron2's dense detectors divide by a moving average of that number instead.

Shape legend, used throughout this file:
    R: sampled RoIs of the batch    F: foreground RoIs    K: classes, K also labels background
    B: images    A: anchors per position    L: positions of all levels    M: side of a mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..numerics import connected_zero, full_precision, on_device, softened_kl

_NO_UNITS = (1.0, 1.0, 1.0, 1.0)


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence between the Bernoulli distributions of two logits, element by element.

    KL(p || q) = p (t - s) + softplus(s) - softplus(t), with p = sigmoid(t), q = sigmoid(s) and both
    logits divided by the temperature; exact for saturated logits too. Not multiplied by T^2.
    """
    s, t = _softened(student, teacher.detach(), temperature)
    return torch.addcmul(F.softplus(s) - F.softplus(t), t.sigmoid(), t - s)


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both logits divided by the temperature."""
    if temperature == 1:
        return student, teacher
    return student / temperature, teacher / temperature


# --- two-stage detectors, on the student's RoIs ---------------------------------------------------


@full_precision
def roi_class_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, sigmoid: bool = False
) -> Tensor:
    """Class distillation on RoIs: T^2 KL(teacher || student), mean over RoIs (Hinton et al.).

    Args:
        student, teacher: (R, K + 1) logits, background last.
        temperature: T.
        sigmoid: the box heads are trained with a sigmoid per class (as for LVIS): sum over the K
            classes of :func:`binary_kl`; such heads do not use their background column.

    Returns:
        Scalar; zero without RoIs.
    """
    count = max(len(student), 1)
    if sigmoid:
        total = binary_kl(student[:, :-1], teacher[:, :-1], temperature).sum()
        return total * (temperature**2 / count)
    return softened_kl(student, teacher, temperature) / count


@full_precision
def roi_box_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_classes: int,
    student_weights: Sequence[float] = _NO_UNITS,
    teacher_weights: Sequence[float] = _NO_UNITS,
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
    column = labels.clamp(max=num_classes - 1)  # background takes any column: it does not count
    s, t = (_labelled(x.unflatten(1, (-1, 4)), column) for x in (student, teacher.detach()))
    t = _in_units(t, teacher_weights, student_weights, dim=1)
    background = (labels >= num_classes).unsqueeze(1)
    return _box_distance(s, t, background, beta) / max(len(labels), 1)


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
        size = s.shape[-2], s.shape[-1]
        t = F.interpolate(t[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return binary_kl(s, t, temperature).sum() * (temperature**2 / s.numel())


# --- dense detectors, on the student's anchors ----------------------------------------------------


@full_precision
def dense_class_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    num_foreground: Tensor,
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
        student, teacher: (B, A, K, L) logits before the sigmoid.
        valid: (B, A, L) bool, False for ignored anchors.
        num_foreground: scalar, anchors of the batch that are matched with an object.
        temperature: T.
        focus: 0, or at least 1 (between them the weight's gradient is infinite at p = q).

    Returns:
        Scalar, finite without foreground too (then divided by 1).
    """
    if not (focus == 0 or focus >= 1):
        raise ValueError(f"focus must be 0 or at least 1, got {focus}")
    if focus:
        softened = _softened(student, teacher.detach(), temperature)
        total = _FocusedDivergence.apply(*softened, valid.unsqueeze(2), focus)
    else:
        total = (binary_kl(student, teacher, temperature) * valid.unsqueeze(2)).sum()
    if temperature != 1:
        total = total * temperature**2
    loss: Tensor = total / num_foreground.clamp(min=1)
    return loss


class _FocusedDivergence(torch.autograd.Function):
    """sum over valid logits of |q - p|^focus BCE(q, p).

    There are millions of these logits: value and gradient in one pass over them; what that saves is
    in docs/performance.md.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, student: Tensor, teacher: Tensor, valid: Tensor, focus: float
    ) -> Tensor:
        """(B, A, K, L), (B, A, K, L), (B, A, 1, L) -> scalar."""
        p, q = teacher.sigmoid(), student.sigmoid()
        # Where there is no gap there is no loss and no gradient.
        gap = (q - p).mul_(valid)
        divergence = F.softplus(student).addcmul_(p, student, value=-1)
        size = gap.abs()
        weight = size if focus == 1 else size**focus
        # d/ds of |gap|^f BCE = f |gap|^(f - 1) sign(gap) q (1 - q) BCE + |gap|^f gap
        slope = gap.sign().mul_(divergence)
        if focus != 1:
            slope.mul_(size ** (focus - 1)).mul_(focus)
        gradient = torch.ops.aten.sigmoid_backward(slope, q).addcmul_(weight, gap)
        ctx.save_for_backward(gradient)
        return divergence.mul_(weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


@full_precision
def dense_box_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    num_foreground: Tensor,
    student_weights: Sequence[float] = _NO_UNITS,
    teacher_weights: Sequence[float] = _NO_UNITS,
    beta: float = 0.0,
) -> Tensor:
    """Smooth L1 between the box deltas of foreground anchors, mean over those.

    Args:
        student, teacher: (B, A, 4, L) deltas with respect to the same anchors.
        foreground: (B, A, L) bool, anchors that are matched with an object.
        num_foreground: scalar, their number.
        student_weights, teacher_weights, beta: as in :func:`roi_box_loss`.

    Returns:
        Scalar; zero without foreground.
    """
    teacher = _in_units(teacher.detach(), teacher_weights, student_weights, dim=2)
    total = _box_distance(student, teacher, ~foreground.unsqueeze(2), beta)
    return total / num_foreground.clamp(min=1)


# --- shared parts ---------------------------------------------------------------------------------


def _labelled(x: Tensor, labels: Tensor) -> Tensor:
    """(R, K or 1, ...) -> (R, ...): each row's entry of its label."""
    if x.shape[1] == 1:
        return x.squeeze(1)
    index = labels.view(-1, *[1] * (x.dim() - 1)).expand(-1, 1, *x.shape[2:])
    return x.gather(1, index).squeeze(1)


def _in_units(deltas: Tensor, own: Sequence[float], wanted: Sequence[float], dim: int) -> Tensor:
    """Deltas, along ``dim``, multiplied by the weights ``own``, as if it had been by ``wanted``."""
    factors = [new / old for new, old in zip(wanted, own, strict=True)]
    if factors == [1.0] * 4:
        return deltas
    row = on_device(factors, deltas.device, deltas.dtype)
    return deltas * row.view(-1, *[1] * (deltas.dim() - dim - 1))


def _box_distance(student: Tensor, teacher: Tensor, left_out: Tensor, beta: float) -> Tensor:
    """Sum of smooth L1 between deltas, all but those ``left_out``."""
    distance = F.smooth_l1_loss(student, teacher, reduction="none", beta=beta)
    return distance.masked_fill(left_out, 0).sum()
