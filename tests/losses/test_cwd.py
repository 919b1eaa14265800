"""CWD's loss: values by hand, a loop over channels, gradients, and degenerate maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2kd.losses.cwd import cwd_loss, pyramid_cwd_loss

from .test_pkd import SHAPES, random_maps, row


def reference(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The formula, channel by channel and image by image, on Python's numbers."""
    total = 0.0
    rows = [x.flatten(2).flatten(0, 1).tolist() for x in (student, teacher)]
    for s, t in zip(*rows, strict=True):
        weights = [[math.exp(value / temperature) for value in values] for values in (s, t)]
        q, p = ([weight / sum(values) for weight in values] for values in weights)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return temperature**2 * total / len(rows[0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_by_hand(temperature):
    """Softmax of logarithms gives their numbers back: (1/4, 3/4) against (1/2, 1/2)."""
    student = row(0.0, 0.0)
    teacher = temperature * row(math.log(1), math.log(3))
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    loss = cwd_loss(student, teacher, temperature).item()
    assert loss == pytest.approx(temperature**2 * expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_a_loop_over_channels(temperature):
    """Each channel of each image is a distribution; mean over them, sum over levels."""
    students, teachers = random_maps(*SHAPES)
    expected = sum(reference(s, t, temperature) for s, t in zip(students, teachers, strict=True))
    loss = pyramid_cwd_loss(students, teachers, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_what_does_not_matter():
    """An offset of a channel; a map is at no distance from itself."""
    (student,), (teacher,) = random_maps(SHAPES[0])
    offset = torch.tensor([300.0, -2.0, 5.0]).view(1, 3, 1, 1)
    moved = cwd_loss(student + offset, teacher - 7)
    assert moved.item() == pytest.approx(cwd_loss(student, teacher).item(), rel=1e-12)
    assert cwd_loss(student, student) == 0


def test_high_temperature_is_half_a_squared_distance():
    """As T grows, the loss tends to half the mean squared distance of the centred rows (Hinton et
    al., section 2.1): what T^2 is for."""
    (student,), (teacher,) = random_maps(SHAPES[0])
    gap = (student - teacher).detach().flatten(2)
    expected = (gap - gap.mean(2, keepdim=True)).square().mean().item() / 2
    assert cwd_loss(student, teacher, 1e3).item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients(temperature):
    """Of all levels together they agree with finite differences; the teacher gets none."""
    students, teachers = random_maps(*SHAPES)
    teachers = [t.requires_grad_() for t in teachers]
    assert torch.autograd.gradcheck(lambda *s: pyramid_cwd_loss(s, teachers, temperature), students)
    pyramid_cwd_loss(students, teachers, temperature).backward()
    assert all(t.grad is None for t in teachers)


def test_degenerate_maps():
    """All-zero features, one position, and an empty batch give zero and zero gradients."""
    for shape in ((2, 3, 4, 4), (1, 1, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4)):
        student = torch.zeros(shape, requires_grad=True)
        loss = cwd_loss(student, torch.zeros(shape))
        loss.backward()
        assert loss == 0
        assert student.grad.shape == shape and (student.grad == 0).all()


def test_large_features_stay_finite():
    """Features of thousands leave probabilities of 0 and 1."""
    student = row(5e3, 0, -5e3).float().requires_grad_()
    loss = cwd_loss(student, row(-5e3, 0, 5e3).float())
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert student.grad.flatten().tolist() == [1, 0, -1]


def test_half_precision_is_widened():
    """bfloat16 features are compared in float32."""
    (student,), (teacher,) = ([x.bfloat16() for x in m] for m in random_maps(SHAPES[0]))
    loss = cwd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cwd_loss(student.double(), teacher.double()).item())


def test_different_shapes_are_refused():
    """In one line."""
    (student,), (teacher,) = random_maps((1, 2, 4, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        cwd_loss(student, teacher[:, :1])
