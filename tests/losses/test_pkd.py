"""PKD's loss: values by hand, a loop over channels, gradients, and maps without deviation."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from d2kd.losses.pkd import pkd_loss, pyramid_pkd_loss

SHAPES = ((2, 3, 6, 5), (2, 3, 3, 3), (2, 4, 1, 2))  # the last: four values a channel


def random_maps(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Related maps in float64; the student's require gradients."""
    generator = torch.Generator().manual_seed(seed)
    teachers = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    noise = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    students = [(2 * t + n + 3).requires_grad_() for t, n in zip(teachers, noise, strict=True)]
    return students, teachers


def reference(student: Tensor, teacher: Tensor) -> float:
    """The formula, channel by channel, on Python's numbers."""
    losses = []
    for s, t in zip(student.transpose(0, 1), teacher.transpose(0, 1), strict=True):
        normalised = []
        for values in (s.flatten().tolist(), t.flatten().tolist()):
            mean, deviation = statistics.fmean(values), statistics.pstdev(values)
            normalised.append([(value - mean) / deviation for value in values])
        losses.append(statistics.fmean((a - b) ** 2 / 2 for a, b in zip(*normalised, strict=True)))
    return statistics.fmean(losses)


def row(*values: float) -> Tensor:
    """A map of one channel and one row."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        (row(1, 2, 3), row(1, 2, 3), 0.0),
        (row(1, 2, 3), row(-70, -50, -30), 0.0),  # a positive factor and an offset
        (row(1, 2, 3), row(3, 2, 1), 2.0),  # opposite
        (row(1, 0, -1, 0), row(0, 1, 0, -1), 1.0),  # unrelated
        # Deviations from the means: (-1, 0, 1) and (-5, 1, 4) / 3: r = 3 / sqrt(2 * 42 / 9).
        (row(1, 2, 3), row(0, 2, 3), 1 - 3 / math.sqrt(2 * 42 / 9)),
    ],
)
def test_values_by_hand(student, teacher, expected):
    """1 - r of small rows."""
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, abs=1e-12)


def test_equals_a_loop_over_channels():
    """Channels run over the batch; mean over channels, sum over levels of any width."""
    students, teachers = random_maps(*SHAPES)
    expected = sum(reference(s, t) for s, t in zip(students, teachers, strict=True))
    assert pyramid_pkd_loss(students, teachers).item() == pytest.approx(expected, rel=1e-12)


def test_scale_and_offset_of_a_channel_do_not_matter():
    """Of neither map; in float32 and far from zero too."""
    (student,), (teacher,) = ([x.detach().float() for x in maps] for maps in random_maps(SHAPES[0]))
    factor, offset = (torch.tensor(x).view(1, 3, 1, 1) for x in ([0.01, 5.0, 40.0], [7.0, -9, 0]))
    moved = pkd_loss(student * factor + offset, teacher * 100 - 2000)
    assert moved.item() == pytest.approx(pkd_loss(student, teacher).item(), abs=1e-4)
    assert pkd_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    assert pkd_loss(teacher, teacher).item() >= 0


def test_gradients():
    """Of all levels together they agree with finite differences, and with autograd through the
    standardised maps; the teacher gets none."""
    students, teachers = random_maps(*SHAPES)
    teachers = [t.requires_grad_() for t in teachers]
    assert torch.autograd.gradcheck(lambda *s: pyramid_pkd_loss(s, teachers), students)
    pyramid_pkd_loss(students, teachers).backward()
    assert all(t.grad is None for t in teachers)
    (s, *_), (t, *_) = students, teachers
    dims = {"dim": (0, 2, 3), "keepdim": True}
    a, b = ((x - x.mean(**dims)) / x.std(**dims, correction=0) for x in (s, t.detach()))
    (expected,) = torch.autograd.grad((a - b).square().mean() / 2, s)
    torch.testing.assert_close(s.grad, expected)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_channels(value):
    """A channel without deviation becomes 0: it costs 1/2 beside one with deviation, 0 beside one
    without, and its gradient is 0; the other channels do not notice."""
    (student,), (teacher,) = random_maps((2, 4, 5, 5))
    student, teacher = student.detach().float(), teacher.float()
    expected = pkd_loss(student[:, 3:], teacher[:, 3:]).item()
    student[:, :2], teacher[:, 1:3] = value, value
    student.requires_grad_()
    loss = pkd_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 0 + 0.5 + expected) / 4, abs=1e-6)
    assert (student.grad[:, :3] == 0).all() and (student.grad[:, 3] != 0).all()


def test_noise_of_rounding_is_no_feature():
    """A channel whose deviation is far below its level's features counts as constant."""
    (student,), (teacher,) = random_maps((2, 2, 5, 5))
    student = student.detach()
    student[:, 0] *= 1e-8
    student.requires_grad_()
    pkd_loss(student, teacher).backward()
    assert (student.grad[:, 0] == 0).all()


def test_degenerate_maps():
    """All-zero features, one position, and an empty batch give zero and zero gradients."""
    for shape in ((2, 3, 4, 4), (1, 3, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4)):
        student = torch.zeros(shape, requires_grad=True)
        loss = pkd_loss(student, torch.zeros(shape))
        loss.backward()
        assert loss == 0
        assert student.grad.shape == shape and (student.grad == 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 1, 2)])
def test_two_values_have_no_correlation(shape):
    """They would lie on a line, up or down: r is 1 or -1. Of three it is a number."""
    (student,), (teacher,) = random_maps(shape)
    loss = pkd_loss(student, teacher)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()
    (student,), (teacher,) = random_maps((3, 3, 1, 1))
    assert pkd_loss(student, teacher).item() == pytest.approx(reference(student, teacher))


def test_nan_stays_nan():
    """A student that diverged is not taken for a constant one."""
    (student,), (teacher,) = random_maps(SHAPES[0])
    student = student.detach()
    student[0, 0, 0, 0] = math.nan
    assert pkd_loss(student, teacher).isnan()


def test_half_precision_is_widened():
    """bfloat16 features are compared in float32."""
    (student,), (teacher,) = ([x.bfloat16() for x in m] for m in random_maps(SHAPES[0]))
    loss = pkd_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pkd_loss(student.double(), teacher.double()).item())


def test_different_shapes_are_refused():
    """In one line."""
    (student,), (teacher,) = random_maps((1, 2, 4, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        pkd_loss(student, teacher[:, :1])
