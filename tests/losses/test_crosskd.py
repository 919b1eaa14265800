"""CrossKD's distance of boxes: values by hand, a loop over boxes, gradients, degenerate boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from d2kd.losses.crosskd import giou_loss


def box(*corners: float) -> Tensor:
    return torch.tensor([corners], dtype=torch.float64)


def random_boxes(count: int = 50) -> tuple[Tensor, Tensor]:
    """Boxes that overlap, touch or lie apart."""
    generator = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(2, 2, count, 2, dtype=torch.float64, generator=generator)
    student, teacher = torch.cat([3 * corner, 3 * corner + extent + 0.1], dim=2)
    return student.requires_grad_(), teacher


def reference(student: Tensor, teacher: Tensor) -> float:
    """1 - I / U + (H - U) / H of each pair, on Python's numbers."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        extent = [min(s[i + 2], t[i + 2]) - max(s[i], t[i]) for i in (0, 1)]
        around = [max(s[i + 2], t[i + 2]) - min(s[i], t[i]) for i in (0, 1)]
        intersection = max(extent[0], 0) * max(extent[1], 0)
        hull = around[0] * around[1]
        union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (s, t)) - intersection
        total += 1 - intersection / union + (hull - union) / hull
    return total / len(student)


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        (box(0, 0, 2, 2), box(0, 0, 2, 2), 0),
        (box(0, 0, 2, 2), box(1, 1, 3, 3), 1 - 1 / 7 + 2 / 9),  # I 1, U 7, H 9
        (box(0, 0, 1, 1), box(2, 0, 3, 1), 1 + 1 / 3),  # apart: I 0, U 2, H 3
        (box(0, 0, 4, 4), box(1, 1, 3, 3), 0.75),  # one in the other: I 4, U 16, H 16
        (box(0, 0, 1, 1), box(1, 0, 2, 1), 1),  # they touch
    ],
)
def test_values_by_hand(student, teacher, expected):
    """One box each."""
    assert giou_loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_equals_a_loop_over_boxes():
    """The mean of the formula; and of torchvision's own."""
    student, teacher = random_boxes()
    loss = giou_loss(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher), rel=1e-5)
    expected = generalized_box_iou_loss(student, teacher, reduction="mean")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    gradient, student.grad = student.grad, None
    loss.backward()
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


def test_moving_and_stretching_both_changes_nothing():
    """What lets the head compare boxes relative to their anchors."""
    student, teacher = random_boxes()
    factor, offset = torch.tensor([3.0, 0.5]).repeat(2), torch.tensor([-7.0, 40.0]).repeat(2)
    moved = giou_loss(factor * student + offset, factor * teacher + offset)
    assert moved.item() == pytest.approx(giou_loss(student, teacher).item(), rel=1e-6)


def test_gradients():
    """They agree with finite differences; the teacher gets none."""
    student, teacher = random_boxes(6)
    assert torch.autograd.gradcheck(lambda x: giou_loss(x, teacher), student)
    teacher.requires_grad_()
    giou_loss(student, teacher).backward()
    assert teacher.grad is None


def test_degenerate_boxes():
    """No boxes, and boxes without area, give finite values and gradients."""
    for boxes in (torch.zeros(0, 4), torch.zeros(3, 4), torch.ones(3, 4)):
        student = boxes.clone().requires_grad_()
        loss = giou_loss(student, boxes)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
    assert giou_loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
