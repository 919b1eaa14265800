"""Global Knowledge: losses on responses to prototypes, and local losses weighted by reliability.

From "Distilling Object Detectors with Global Knowledge" (Tang et al., ECCV 2022). A prototype is
one training object, stored as a feature of the teacher and a feature of the student. Each
detector describes a box by the responses of its own feature to its own prototypes, so the two
descriptions can be compared although the features cannot.

Legend of shapes
    N: boxes, padded; ``valid`` (N,) tells the real ones
    K: classes, M: prototypes a class, padded; ``present`` (K, M) tells the real ones
    C: channels (they may differ between teacher and student)
    B, H, W: images, height and width of a pyramid level
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import full_precision

# A feature shorter than this has no direction worth comparing, and the gradient of its cosine,
# which grows as 1 / length, would swamp the rest.
_SHORTEST = 1e-6


def unit_vectors(vectors: Tensor) -> Tensor:
    """(..., C) scaled to length one. A zero vector becomes zero, and so does its gradient."""
    square = vectors.square().sum(dim=-1, keepdim=True)
    nonzero = square > _SHORTEST**2
    return vectors * (torch.where(nonzero, square, 1.0).rsqrt() * nonzero)


@full_precision
def cosine_responses(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines of features (N, C) to prototypes (K, M, C): (N, K, M). Gradient to the features."""
    return torch.einsum("nc,kmc->nkm", unit_vectors(features), unit_vectors(prototypes.detach()))


@full_precision
def projection_responses(features: Tensor, prototypes: Tensor, ridge: float = 0.05) -> Tensor:
    """Coefficients of features projected on the prototypes of each class (RDM-proj).

    ``a = (G G^T + ridge I)^-1 G f`` with unit rows G of one class and the unit feature f. The
    ridge is mandatory: two nearly parallel prototypes make G G^T singular.

    Args:
        features: (N, C).
        prototypes: (K, M, C); padding rows are zero and get coefficient zero.

    Returns:
        (N, K, M), with gradient to the features.
    """
    bank = unit_vectors(prototypes.detach())
    gram = bank @ bank.transpose(1, 2)
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # cholesky_ex with its default check_errors=False does not wait for the device.
    projector = torch.cholesky_solve(bank, torch.linalg.cholesky_ex(gram).L)
    return torch.einsum("nc,kmc->nkm", unit_vectors(features), projector)


def own_class(responses: Tensor, labels: Tensor) -> Tensor:
    """Responses (N, K, M) to the prototypes of the boxes' own classes ``labels`` (N,): (N, M)."""
    index = labels[:, None, None].expand(-1, 1, responses.shape[2])
    return responses.gather(1, index).squeeze(1)


@full_precision
@torch.no_grad()
def cosine_reliability(student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """How far both detectors agree on the typicality of each box (section 2.1 of the method).

    ``r = 1 - |max_m cos_student - max_m cos_teacher|`` over the prototypes m of the box's class,
    clamped to [0, 1]; 1 for a class without prototypes.

    Args:
        student, teacher: (N, K, M) cosines.
        labels: (N,) in [0, K).
        present: (K, M) bool.

    Returns:
        r (N,), a constant.
    """
    here = present[labels]
    peak = [
        own_class(cosines, labels).masked_fill(~here, -1.0).amax(dim=1)
        for cosines in (student, teacher)
    ]
    return (1 - (peak[0] - peak[1]).abs()).clamp(0, 1)


@full_precision
@torch.no_grad()
def projection_reliability(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """``r = 1 - clamp(||a_student - a_teacher||, 0, 1)`` over the box's own class (RDM-proj).

    Args:
        student, teacher: (N, K, M) projection coefficients.
        labels: (N,) in [0, K).

    Returns:
        r (N,), a constant.
    """
    gap = own_class(student, labels) - own_class(teacher, labels)
    return 1 - gap.norm(dim=1).clamp(0, 1)


@full_precision
def cosine_global_loss(
    student: Tensor, teacher: Tensor, reliability: Tensor, valid: Tensor, present: Tensor
) -> Tensor:
    """Global knowledge loss of one level: smooth-L1 between reliability-weighted responses.

    ``1 / (N M_all) sum_im h(r_i C^s_im - r_i C^t_im)`` over the prototypes of all classes
    (section 2.2; the released code's mean over the N x M_all matrix).

    Args:
        student, teacher: (N, K, M) cosines.
        reliability: (N,).
        valid: (N,) bool.
        present: (K, M) bool.

    Returns:
        scalar; zero without boxes or without prototypes.
    """
    weight = (reliability * valid).detach()[:, None, None]
    terms = F.smooth_l1_loss(weight * student, weight * teacher.detach(), reduction="none")
    return (terms * present).sum() / (valid.sum() * present.sum()).clamp(min=1)


@full_precision
def projection_global_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, reliability: Tensor, valid: Tensor
) -> Tensor:
    """Global knowledge loss of one level on projection coefficients of the boxes' own classes.

    ``1 / (2N) sum_i r_i^2 ||a^s_i - a^t_i||^2`` (RDM-proj).

    Args:
        student, teacher: (N, K, M) projection coefficients.
        labels: (N,) in [0, K).
        reliability: (N,).
        valid: (N,) bool.

    Returns:
        scalar; zero without boxes.
    """
    gap = own_class(student, labels) - own_class(teacher, labels).detach()
    weight = (reliability * valid).detach().square()
    return (weight * gap.square().sum(dim=1)).sum() / (2 * valid.sum()).clamp(min=1)


@full_precision
def decoupled_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Half the mean squared error of one level, inside and outside of the boxes separately.

    ``sum(W D) / max(1, 2 C sum W)`` with the squared error D, and the same with the background
    mask Z = [W = 0] in place of W (section 2.3). Scaling all weights does not matter, as long as
    their sum is not tiny: the loss compares boxes.

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W).
        weights: W (B, H, W) >= 0, positive inside of boxes.

    Returns:
        foreground and background loss, both scalars.
    """
    # Fused, and summed over channels at once: no full-size tensor is kept for the backward pass.
    error = F.mse_loss(student, teacher.detach(), reduction="none").sum(dim=1)
    weights = weights.detach().to(error.dtype)
    background = (weights == 0).to(error.dtype)
    doubled = 2 * student.shape[1]
    foreground_loss, background_loss = (
        (mask * error).sum() / (doubled * mask.sum()).clamp(min=1) for mask in (weights, background)
    )
    return foreground_loss, background_loss


@full_precision
def soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    reliability: Tensor,
    valid: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    """Reliability-weighted KL divergence of class distributions, ``tau^2`` times the class mean.

    ``1/N sum_i r_i tau^2 / n sum_c p^t log(p^t / p^s)`` with n logits a box (section 2.4). Logits
    of a sigmoid classifier are soft-maxed over the classes all the same, as the released code
    does: on positive boxes it compares which class, not how sure.

    Args:
        student, teacher: (N, n) raw class logits.
        reliability: (N,).
        valid: (N,) bool.

    Returns:
        scalar; zero without boxes.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    prediction = F.log_softmax(student / temperature, dim=1)
    divergence = F.kl_div(prediction, target, reduction="none", log_target=True).mean(dim=1)
    weight = (reliability * valid).detach() * temperature**2
    return (weight * divergence).sum() / valid.sum().clamp(min=1)


def attenuation(iteration: int, max_iter: int) -> float:
    """Linear decay of the global and local losses, ``1 - e / E`` (section 2.5), here per step."""
    return 1 - iteration / max_iter
