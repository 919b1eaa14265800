"""Plain feature distillation, against loops over the elements."""

from __future__ import annotations

import pytest
import torch

from d2kd.losses.mimic import mimic_loss, pyramid_mimic_loss
from d2kd.losses.ssim import min_max_rescale


def random_maps(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random maps in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, dtype=torch.float64, generator=generator),
        torch.randn(*shape, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("distance, power", [("l1", 1), ("l2", 2)])
def test_equals_a_loop_over_the_elements(distance, power):
    """Mean over the elements of |s - t| or (s - t)^2."""
    student, teacher = random_maps(2, 3, 4, 5)
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        total += abs(s - t) ** power
    assert mimic_loss(student, teacher, distance).item() == pytest.approx(total / (2 * 3 * 4 * 5))


def test_levels_count_the_same():
    """The sum over levels of the mean inside a level: a large level does not outweigh a small."""
    large = (torch.zeros(1, 2, 16, 16), torch.full((1, 2, 16, 16), 2.0))
    small = (torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 2.0))
    both = pyramid_mimic_loss([large[0], small[0]], [large[1], small[1]])
    assert both == 8
    assert pyramid_mimic_loss([large[0]], [large[1]]) == 4
    assert pyramid_mimic_loss([small[0]], [small[1]], "l1") == 2


@pytest.mark.parametrize("scope", ["image", "tensor", "channel"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_rescaled_frame(scope, distance):
    """With a scope, both maps are rescaled apart first, so scale and offset do not matter."""
    student, teacher = random_maps(2, 3, 6, 5)
    s, t = min_max_rescale(student, scope), min_max_rescale(teacher, scope)
    loss = mimic_loss(student, teacher, distance, scope)
    assert loss.item() == pytest.approx(mimic_loss(s, t, distance).item(), abs=1e-15)
    moved = mimic_loss(5 * student - 3, teacher, distance, scope)
    assert moved.item() == pytest.approx(loss.item(), abs=1e-14)


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("rescale", [None, "image"])
def test_gradients(distance, rescale):
    """Gradients agree with finite differences; the teacher gets none."""
    student, teacher = (x.requires_grad_() for x in random_maps(2, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda x: mimic_loss(x, teacher, distance, rescale), student)
    mimic_loss(student, teacher, distance, rescale).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("rescale", [None, "image", "tensor", "channel"])
def test_degenerate_maps(rescale):
    """All-zero features, maps of 1x1 and an empty batch give finite values and gradients."""
    for shape in ((2, 3, 4, 4), (1, 1, 1, 1), (0, 3, 4, 4)):
        student = torch.zeros(shape, requires_grad=True)
        loss = mimic_loss(student, torch.zeros(shape), "l2", rescale)
        loss.backward()
        assert loss == 0
        assert student.grad.shape == shape and (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_half_precision(dtype, distance):
    """Summed in float32, with the gradient of full precision, rounded; also of large numbers."""
    for scale in (1.0, 100.0):  # squares of which float16 does not hold
        student, teacher = (
            (scale * x).to(dtype).requires_grad_() for x in random_maps(2, 16, 24, 24)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = 1e3 * mimic_loss(student, teacher, distance)
        (gradient,) = torch.autograd.grad(loss, student)
        wide = student.detach().double().requires_grad_()
        expected = 1e3 * mimic_loss(wide, teacher.detach().double(), distance)
        (expected_gradient,) = torch.autograd.grad(expected, wide)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=1e-2, atol=1e-6)


def test_precisions_that_differ():
    """A teacher in another precision than the student: compared in float32."""
    student, teacher = random_maps(1, 2, 8, 8)
    loss = mimic_loss(student.bfloat16(), teacher.float())
    expected = mimic_loss(student.bfloat16().double(), teacher.float().double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item())


def test_rescaled_levels_are_rescaled_apart():
    """Several levels in one call are each in a frame of its own."""
    pairs = [random_maps(2, 3, 6, 5), random_maps(2, 3, 3, 2, seed=1)]
    for scope in ("image", "channel"):
        together = pyramid_mimic_loss(*zip(*pairs, strict=True), "l2", scope)
        apart = sum(mimic_loss(s, t, "l2", scope) for s, t in pairs)
        torch.testing.assert_close(together, apart)


def test_errors_name_the_problem():
    """Different shapes and an unknown distance are refused in one line."""
    student, teacher = random_maps(1, 2, 4, 4)
    with pytest.raises(ValueError, match="differ in shape"):
        mimic_loss(student, teacher[:, :, :2])
    with pytest.raises(ValueError, match="valid: l1, l2"):
        mimic_loss(student, teacher, "l3")
