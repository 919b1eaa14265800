"""Losses of DRKD, "Dual Relation Knowledge Distillation for Object Detection" (IJCAI 2023).

They measure *gaps*: adapted student tensor minus teacher tensor. How the compared tensors arise
(graph units, relation units, RoIAlign) is the business of ``d2kd.heads.drkd``.

Shapes: B images, C channels of the teacher, H x W pixels of one pyramid level, R instances of the
batch (all images concatenated), n_b instances of image b, n = max n_b.

Two profiles. ``code`` follows the authors' released code: un-squared, un-averaged L2 norms.
``paper`` follows the formulas of the paper: squared and averaged distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import full_precision, on_device, stack_channels

PROFILES = ("code", "paper")
REFERENCE_BATCH_SIZE = 2  # images per GPU for which the published weights were chosen


@full_precision
def pixel_relation_loss(
    squared_gaps: Tensor, sizes: Sequence[int], profile: str = "code"
) -> Tensor:
    """Pixel-wise relation distillation, L_PR.

    ``code``: sum over levels of ||gap||_2, one norm over the whole (B, C, H, W) tensor.
    ``paper``: sum over levels of the mean of gap^2.

    Args:
        squared_gaps: (L,) ||gap||_2^2, where gap is the adapted output of the student's graph unit
            minus the output of the teacher-side graph unit.
        sizes: per level the number of elements of the gap.
        profile: one of ``PROFILES``.

    Returns:
        Scalar >= 0. The gradient at a zero gap is zero.
    """
    _check_profile(profile)
    if profile == "paper":
        inverse = [1 / size for size in sizes]
        return squared_gaps @ on_device(inverse, squared_gaps.device, squared_gaps.dtype)
    return _sqrt_with_zero_gradient_at_zero(squared_gaps).sum()


@full_precision
def instance_loss(
    gaps: Sequence[Tensor], image_index: Tensor, num_images: int, profile: str = "code"
) -> Tensor:
    """Distance between instance features: L_INS, and L_IR on relation-refined features.

    ``code``: sum over levels and images of the norm of all gaps of an image, ||gap_b||_2.
    ``paper``: sum over levels of (1/R) sum_i ||gap_i||_2^2.

    Args:
        gaps: per level (R, ...): adapted student instance minus teacher instance.
        image_index: (R,) long, the image of each instance.
        num_images: B.
        profile: one of ``PROFILES``.

    Returns:
        Scalar >= 0. The gradient at a zero gap is zero; without instances the result is a zero
        that is connected to ``gaps``.
    """
    _check_profile(profile)
    # (L, R): squared length of each instance's gap.
    squared = stack_channels([gap.flatten(1) for gap in gaps]).square().sum(2)
    if profile == "paper":
        return squared.sum() / max(len(image_index), 1)
    per_image = squared.new_zeros(len(gaps), num_images).index_add(1, image_index, squared)
    return _sqrt_with_zero_gradient_at_zero(per_image).sum()


@full_precision
def relation_matrix_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], counts: Tensor
) -> Tensor:
    """Instance-wise relation distillation on the relation matrices themselves (profile ``paper``).

    Sum over levels of the mean over the images that have instances of
    (1/n_b^2) sum_ij (student_ij - teacher_ij)^2; the paper's sum is divided by n_b^2 so that its
    size does not depend on the number of instances.

    Args:
        students, teachers: per level (B, n, n) relation matrices psi, zero in padded rows and
            columns.
        counts: (B,) the number of instances n_b of each image.

    Returns:
        Scalar >= 0, a connected zero where no image has an instance.
    """
    gaps = torch.stack(list(students)) - torch.stack(list(teachers))
    counts = counts.to(gaps.dtype)
    per_image = gaps.square().sum((0, 2, 3)) / counts.square().clamp(min=1)
    return per_image.sum() / (counts > 0).sum().clamp(min=1)


def batch_size_factors(num_images: int) -> tuple[float, float]:
    """Factors that keep the published weights' meaning for a batch of another size.

    The norms of profile ``code`` grow with the images per GPU B: L_PR like sqrt(B), L_IR and
    L_INS like B. The published weights are for B = 2.

    Returns:
        (factor of L_PR, factor of L_IR and of L_INS).
    """
    ratio = REFERENCE_BATCH_SIZE / num_images
    return math.sqrt(ratio), ratio


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ValueError(f"DRKD profile must be one of {PROFILES}, got {profile!r}")


def _sqrt_with_zero_gradient_at_zero(squared: Tensor) -> Tensor:
    # The root of the smallest number is subtracted again, so that nothing is exactly nothing; it
    # changes no other root, and what is not a number stays so.
    tiny = torch.finfo(squared.dtype).tiny
    return F.threshold(squared, tiny, tiny).sqrt() - math.sqrt(tiny)
