"""DRKD's losses against brute-force references, the spec's oracles and degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch

from d2kd.losses.drkd import (
    batch_size_factors,
    instance_loss,
    pixel_relation_loss,
    relation_matrix_loss,
)

TWO_PROFILES = pytest.mark.parametrize("profile", ["code", "paper"])


def brute_force_pixel_relation(gaps, profile):
    """L_PR with one Python loop over all elements of a level."""
    total = 0.0
    for gap in gaps:
        squares = [value * value for value in gap.flatten().tolist()]
        total += math.sqrt(sum(squares)) if profile == "code" else sum(squares) / len(squares)
    return total


def brute_force_instances(gaps, image_index, num_images, profile):
    """L_INS with loops over levels, images and instances."""
    total = 0.0
    for gap in gaps:
        squared = [sum(value * value for value in row.flatten().tolist()) for row in gap]
        if profile == "paper":
            total += sum(squared) / len(squared)
            continue
        for image in range(num_images):
            total += math.sqrt(
                sum(s for s, i in zip(squared, image_index.tolist(), strict=True) if i == image)
            )
    return total


def pixel_loss(gaps, profile="code"):
    """L_PR of gaps themselves."""
    squared = torch.stack([gap.square().sum() for gap in gaps])
    return pixel_relation_loss(squared, [gap.numel() for gap in gaps], profile)


def random_gaps(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@TWO_PROFILES
def test_pixel_relation_equals_brute_force(profile):
    """Levels of different size: sum of norms (code), sum of mean squares (paper)."""
    gaps = random_gaps((2, 3, 4, 5), (2, 3, 2, 3), (2, 3, 1, 1))
    expected = brute_force_pixel_relation(gaps, profile)
    assert pixel_loss(gaps, profile).item() == pytest.approx(expected, rel=1e-12)


@TWO_PROFILES
def test_instances_equal_brute_force(profile):
    """Images with 3, 0 and 2 instances on two levels."""
    image_index = torch.tensor([0, 0, 0, 2, 2])
    gaps = random_gaps((5, 3, 2, 2), (5, 3, 2, 2))
    expected = brute_force_instances(gaps, image_index, 3, profile)
    loss = instance_loss(gaps, image_index, 3, profile)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_relation_matrix_equals_brute_force():
    """Per image mean over its n_b^2 pairs, then mean over the images that have instances, then
    sum over levels."""
    counts = torch.tensor([3, 0, 1])
    student, teacher = torch.rand(2, 3, 3, 3, dtype=torch.float64)
    total = 0.0
    for image, n in ((0, 3), (2, 1)):
        student[image, n:], student[image, :, n:] = 0, 0
        teacher[image, n:], teacher[image, :, n:] = 0, 0
        for i in range(n):
            for j in range(n):
                total += (student[image, i, j] - teacher[image, i, j]).item() ** 2 / n**2
    student[1], teacher[1] = 0, 0
    loss = relation_matrix_loss([student], [teacher], counts)
    assert loss.item() == pytest.approx(total / 2, rel=1e-12)
    loss = relation_matrix_loss([student, teacher], [teacher, teacher], counts)
    assert loss.item() == pytest.approx(total / 2, rel=1e-12)


def test_gradcheck():
    """Analytic gradients of every loss and profile agree with finite differences."""
    image_index = torch.tensor([0, 0, 2])
    for profile in ("code", "paper"):
        assert torch.autograd.gradcheck(
            lambda *gaps, p=profile: pixel_loss(gaps, p),
            random_gaps((2, 2, 2, 3), (2, 2, 1, 1)),
        )
        assert torch.autograd.gradcheck(
            lambda *gaps, p=profile: instance_loss(gaps, image_index, 3, p),
            random_gaps((3, 2, 2), (3, 2, 2)),
        )
    relation = torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True)
    teacher, counts = torch.rand(2, 3, 3, dtype=torch.float64), torch.tensor([3, 2])
    assert torch.autograd.gradcheck(
        lambda r: relation_matrix_loss([r], [teacher], counts), relation
    )


def test_relation_matrices():
    """The squared differences of the two relation matrices sum to 0.266954."""
    student = torch.tensor([[[0.622459, 0.377541], [0.377541, 0.622459]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.880797, 0.119203], [0.119203, 0.880797]]], dtype=torch.float64)
    loss = relation_matrix_loss([student], [teacher], torch.tensor([2]))
    assert loss.item() * 2**2 == pytest.approx(0.266954, abs=2e-6)


def test_norm_has_unit_gradient():
    """The gradient's norm is 1 for any gap and 0, not NaN, for none."""
    for scale in (1e-6, 1.0, 1e6):
        gap = (torch.randn(2, 3, 4, 4) * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(pixel_loss([gap]), gap)
        assert gradient.norm().item() == pytest.approx(1, rel=1e-5)
        gap = (torch.randn(3, 8) * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(instance_loss([gap], torch.zeros(3).long(), 1), gap)
        assert gradient.norm().item() == pytest.approx(1, rel=1e-5)
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    pixel_loss([zero]).backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))
    zero = torch.zeros(3, 8, requires_grad=True)
    instance_loss([zero], torch.tensor([0, 0, 1]), 2).backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


@pytest.mark.parametrize(("profile", "factor"), [("code", 2), ("paper", 4)])
def test_doubled_gap(profile, factor):
    """Twice the gap is twice the loss, four times in profile paper."""
    gap, image_index = torch.randn(4, 3, 2, 2), torch.tensor([0, 0, 1, 1])
    assert pixel_loss([2 * gap], profile).item() == pytest.approx(
        factor * pixel_loss([gap], profile).item(), rel=1e-5
    )
    assert instance_loss([2 * gap], image_index, 2, profile).item() == pytest.approx(
        factor * instance_loss([gap], image_index, 2, profile).item(), rel=1e-5
    )


@TWO_PROFILES
def test_no_instances(profile):
    """Without any instance the loss is 0 and every gradient is zero, not None."""
    gaps = [torch.zeros(0, 3, 2, 2, requires_grad=True) for _ in range(2)]
    loss = instance_loss(gaps, torch.zeros(0, dtype=torch.long), 2, profile)
    loss.backward()
    assert loss.item() == 0
    assert all(gap.grad is not None for gap in gaps)
    relation = torch.zeros(2, 1, 1, requires_grad=True)
    loss = relation_matrix_loss([relation], [relation.detach()], torch.zeros(2, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and relation.grad.abs().sum() == 0


def test_batch_size_factors():
    """The factors are 1 at the reference batch and undo the growth of the norms otherwise."""
    assert batch_size_factors(2) == (1, 1)
    image = torch.randn(1, 3, 4, 4)
    instances = torch.randn(3, 3, 2, 2)
    losses = []
    for batch in (2, 8):
        pixel_factor, instance_factor = batch_size_factors(batch)
        image_index = torch.arange(batch).repeat_interleave(3)
        pixel = pixel_loss([image.expand(batch, -1, -1, -1)])
        instance = instance_loss([instances.repeat(batch, 1, 1, 1)], image_index, batch)
        losses.append((pixel_factor * pixel.item(), instance_factor * instance.item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_unknown_profile_is_named():
    """A wrong profile is an error that lists the valid ones."""
    with pytest.raises(ValueError, match="code"):
        pixel_loss([torch.zeros(1, 1, 1, 1)], "mean")
