"""Global Knowledge: losses on responses to prototypes, and local losses weighted by reliability.

From "Distilling Object Detectors with Global Knowledge" (Tang et al., ECCV 2022). A prototype is
one training object, stored as a feature of the teacher and a feature of the student. Each
detector describes a box by the responses of its own feature to its own prototypes, so the two
descriptions can be compared although the features cannot.

Legend of shapes
    N: boxes, padded; ``valid`` (N,) bool tells the real ones, ``labels`` (N,) are in [0, K)
    K: classes, M: prototypes per class, padded; ``present`` (K, M) bool tells the real ones
    C: channels (they may differ between teacher and student)
    B, H_r, W_r: images, height and width of level r
    ``student``, ``teacher``: responses (N, K, M), cosines or projection coefficients
    ``reliability``: r (N,), a constant
    Responses, reliability, validity and presence may have a leading dimension L of levels; losses
    then are (L,), else scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import full_precision, on_device, softened_kl, unit_vectors


@full_precision
def cosine_responses(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines of features (N, C) to prototypes (K, M, C): (N, K, M). Gradient to the features."""
    return _products(unit_vectors(features), unit_vectors(prototypes.detach()))


def _products(features: Tensor, rows: Tensor) -> Tensor:
    """Products of (..., N, C) with each row of (..., K, M, C): (..., N, K, M)."""
    return (features @ rows.flatten(-3, -2).mT).unflatten(-1, rows.shape[-3:-1])


@full_precision
def projection_responses(features: Tensor, prototypes: Tensor, ridge: float = 0.05) -> Tensor:
    """Coefficients of features projected on the prototypes of each class (RDM-proj).

    ``a = (G G^T + ridge I)^-1 G f`` with unit rows G of one class and the unit feature f. The
    ridge is mandatory: two nearly parallel prototypes make G G^T singular. Features (N, C) and
    prototypes (K, M, C), zero where padded: (N, K, M), with gradient to the features.
    """
    bank = unit_vectors(prototypes.detach())
    gram = bank @ bank.mT
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # cholesky_ex with its default check_errors=False does not wait for the device.
    projector = torch.cholesky_solve(bank, torch.linalg.cholesky_ex(gram).L)
    return _products(unit_vectors(features), projector)


def own_class(responses: Tensor, labels: Tensor) -> Tensor:
    """Responses (N, K, M) to the prototypes of the boxes' own classes ``labels`` (N,): (N, M)."""
    index = labels[:, None, None].expand(*responses.shape[:-2], 1, responses.shape[-1])
    return responses.gather(-2, index).squeeze(-2)


@full_precision
@torch.no_grad()
def cosine_reliability(student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """How far both detectors agree on the typicality of each box (section 2.1 of the method).

    ``r = 1 - |max_m cos_student - max_m cos_teacher|`` over the prototypes m of the box's class,
    clamped to [0, 1]; 1 for a class without prototypes.
    """
    here = present.index_select(-2, labels)
    peak = [
        own_class(cosines, labels).masked_fill(~here, -1.0).amax(dim=-1)
        for cosines in (student, teacher)
    ]
    return (1 - (peak[0] - peak[1]).abs()).clamp(0, 1)


@full_precision
@torch.no_grad()
def projection_reliability(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """``r = 1 - clamp(||a_student - a_teacher||, 0, 1)`` over the box's own class (RDM-proj)."""
    gap = own_class(student, labels) - own_class(teacher, labels)
    return 1 - gap.norm(dim=-1).clamp(0, 1)


@full_precision
def cosine_global_loss(
    student: Tensor, teacher: Tensor, reliability: Tensor, valid: Tensor, present: Tensor
) -> Tensor:
    """Global knowledge loss of one level: smooth-L1 between reliability-weighted responses.

    ``1 / (N M_all) sum_im h(r_i C^s_im - r_i C^t_im)`` over the prototypes of all classes
    (section 2.2; the released code's mean over the N x M_all matrix). Zero without boxes or
    without prototypes.
    """
    weight = (reliability * valid).detach()[..., None, None]
    terms = F.smooth_l1_loss(weight * student, weight * teacher.detach(), reduction="none")
    total = (terms * present[..., None, :, :]).sum(dim=(-3, -2, -1))
    return total / (valid.sum(dim=-1) * present.sum(dim=(-2, -1))).clamp(min=1)


@full_precision
def projection_global_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, reliability: Tensor, valid: Tensor
) -> Tensor:
    """Global knowledge loss of one level on projection coefficients of the boxes' own classes.

    ``1 / (2N) sum_i r_i^2 ||a^s_i - a^t_i||^2`` (RDM-proj); zero without boxes.
    """
    gap = own_class(student, labels) - own_class(teacher, labels).detach()
    weight = (reliability * valid).detach().square()
    total = (weight * gap.square().sum(dim=-1)).sum(dim=-1)
    return total / (2 * valid.sum(dim=-1)).clamp(min=1)


class _MaskedErrors(torch.autograd.Function):
    """Sums of the squared error of each level under two masks, and the sums of the masks.

    Autograd would keep the squared error of each level and launch its backward pass per level.
    """

    @staticmethod
    def forward(ctx: Any, masks: Tensor, *maps: Tensor) -> Tensor:
        """masks: (2, N), the positions of all levels; maps: s_1 ... s_L, t_1 ... t_L, each
        (B, C, H_r, W_r). Returns (L, 4): two sums of errors, two sums of masks."""
        half = len(maps) // 2
        gaps = torch._foreach_sub(maps[:half], maps[half:])
        squares = torch._foreach_mul(gaps, gaps)
        errors = torch.cat([x.sum(dim=1).flatten() for x in squares])
        counts = [x.numel() // x.shape[1] for x in gaps]
        products = torch.cat([masks * errors, masks])
        ctx.save_for_backward(masks, *gaps)
        return torch.stack([x.sum(dim=1) for x in products.split(counts, dim=1)])

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        masks, *gaps = ctx.saved_tensors
        counts = [x.numel() // x.shape[1] for x in gaps]
        per_position = (
            (weight[:2] @ mask).view(len(gap), 1, *gap.shape[-2:])
            for weight, mask, gap in zip(2 * grad, masks.split(counts, dim=1), gaps, strict=True)
        )
        return None, *torch._foreach_mul(gaps, list(per_position)), *[None] * len(gaps)


@full_precision
def decoupled_losses(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error of each level, inside and outside of the boxes separately.

    ``sum(W D) / max(1, 2 C sum W)`` with the squared error D, and the same with the background
    mask Z = [W = 0] in place of W (section 2.3). Scaling all weights does not matter, as long as
    their sum is not tiny: the loss compares boxes.

    Args:
        students: (B, C, H_r, W_r) per level, adapted to the teacher's channels.
        teachers: (B, C, H_r, W_r) per level.
        weights: W (B, H_r, W_r) >= 0 per level, positive inside of boxes.

    Returns:
        foreground and background loss, both (L,).
    """
    masks = torch.cat([w.flatten() for w in weights]).detach().to(students[0].dtype)
    masks = torch.stack([masks, (masks == 0).to(masks.dtype)])
    sums = _MaskedErrors.apply(masks, *students, *(t.detach() for t in teachers))
    doubled = on_device([[2.0 * s.shape[1]] for s in students], masks.device)
    losses = sums[:, :2] / (doubled * sums[:, 2:].detach()).clamp(min=1)
    return losses[:, 0], losses[:, 1]


@full_precision
def soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    reliability: Tensor,
    valid: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    """Reliability-weighted KL divergence of class distributions, ``tau^2`` times the class mean.

    ``1/N sum_i r_i tau^2 / n sum_c p^t log(p^t / p^s)`` with n logits per box (section 2.4). Logits
    of a sigmoid classifier are soft-maxed over the classes all the same, as the released code
    does: on positive boxes it compares which class, not how sure.

    Args:
        student, teacher: (N, n) raw class logits.

    Returns:
        Scalar; zero without boxes.
    """
    weight = (reliability * valid).detach() / student.shape[1]
    return softened_kl(student, teacher, temperature, weight) / valid.sum().clamp(min=1)


def attenuation(iteration: int, max_iter: int) -> float:
    """Linear decay of the global and local losses, ``1 - e / E`` (section 2.5), here per step."""
    return 1 - iteration / max_iter
