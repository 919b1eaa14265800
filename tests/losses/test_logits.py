"""Distillation of class, box and mask outputs, against loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from d2kd.losses import logits as losses
from d2kd.losses.logits import binary_kl, mask_loss, roi_box_loss, roi_class_loss

K = 3


def by_anchor(x: torch.Tensor) -> torch.Tensor:
    """(B, N, ...) -> (B, A, ..., L): anchors in the order of maps; two a location where it fits."""
    anchors = 2 if x.shape[1] % 2 == 0 else 1
    return x.unflatten(1, (x.shape[1] // anchors, anchors)).movedim(1, -1)


def dense_class_loss(student, teacher, labels, num_classes, temperature=1.0, focus=1.0):
    """Of logits (B, N, K) and labels (B, N)."""
    count = ((labels >= 0) & (labels < num_classes)).sum()
    valid = by_anchor(labels >= 0)
    student, teacher = by_anchor(student), by_anchor(teacher)
    return losses.dense_class_loss(student, teacher, valid, count, temperature, focus)


def dense_box_loss(student, teacher, labels, num_classes, *units):
    """Of deltas (B, N, 4) and labels (B, N)."""
    foreground = by_anchor((labels >= 0) & (labels < num_classes))
    student, teacher = by_anchor(student), by_anchor(teacher)
    return losses.dense_box_loss(student, teacher, foreground, foreground.sum(), *units)


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    """Random float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


def bernoulli_kl(s: float, t: float) -> float:
    p, q = sigmoid(t), sigmoid(s)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def smooth_l1(x: float, beta: float) -> float:
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


# ---------------------------------------------------------------- classes on RoIs


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_roi_class_loss_equals_loops(temperature):
    """T^2 times the batch mean of KL(teacher || student) of softened distributions."""
    student, teacher = randn(5, K + 1), randn(5, K + 1, seed=1)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q = softmax([x / temperature for x in s])
        p = softmax([x / temperature for x in t])
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = roi_class_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / 5)


def test_roi_class_loss_of_one_roi_by_hand():
    """Teacher 3:1 against student 1:1 gives 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812."""
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    loss = roi_class_loss(torch.zeros(1, 2, dtype=torch.float64), teacher)
    assert loss.item() == pytest.approx(0.130812, abs=1e-6)


def test_roi_class_loss_of_a_sigmoid_box_head():
    """Sigmoid box heads: Bernoulli divergences of the K classes, background column unused."""
    student, teacher = randn(4, K + 1), randn(4, K + 1, seed=1)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total += sum(bernoulli_kl(s[k] / 2, t[k] / 2) for k in range(K))
    loss = roi_class_loss(student, teacher, 2.0, sigmoid=True)
    assert loss.item() == pytest.approx(4 * total / 4)


def test_gradient_does_not_shrink_with_the_temperature():
    """T^2 keeps the gradient of slightly different logits of the same order (Hinton et al.)."""
    teacher = randn(64, K + 1, scale=0.1)
    norms = []
    for temperature in (1.0, 10.0):
        student = randn(64, K + 1, seed=1, scale=0.1).requires_grad_()
        roi_class_loss(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


# ---------------------------------------------------------------- boxes on RoIs


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("student_agnostic", [False, True])
@pytest.mark.parametrize("teacher_agnostic", [False, True])
def test_roi_box_loss_equals_loops(beta, student_agnostic, teacher_agnostic):
    """Smooth L1 of the labelled class's deltas, foreground RoIs only, over all RoIs."""
    labels = torch.tensor([0, K, 2, 1, K])
    own, other = (10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0)
    student = randn(5, 4 if student_agnostic else 4 * K)
    teacher = randn(5, 4 if teacher_agnostic else 4 * K, seed=1)
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        if label == K:
            continue
        for c in range(4):
            s = student[i, c if student_agnostic else 4 * label + c].item()
            t = teacher[i, c if teacher_agnostic else 4 * label + c].item()
            difference = s - t / other[c] * own[c]
            total += smooth_l1(difference, beta) if beta else abs(difference)
    loss = roi_box_loss(student, teacher, labels, K, own, other, beta)
    assert loss.item() == pytest.approx(total / 5)


def test_same_box_in_other_units_has_no_loss():
    """Deltas of one box, coded with different transform weights, do not differ."""
    proposals = torch.tensor([[10.0, 10.0, 50.0, 40.0], [0.0, 5.0, 20.0, 60.0]])
    targets = torch.tensor([[12.0, 8.0, 55.0, 44.0], [1.0, 2.0, 30.0, 50.0]])
    weights = (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)
    student, teacher = (Box2BoxTransform(w).get_deltas(proposals, targets) for w in weights)
    loss = roi_box_loss(student, teacher, torch.tensor([0, 1]), K, *weights)
    assert loss.item() == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mask_loss_equals_loops(temperature):
    """T^2 times the mean over pixels and RoIs of Bernoulli divergences of the labelled class."""
    labels = torch.tensor([2, 0])
    student, teacher = randn(2, K, 4, 4), randn(2, 1, 4, 4, seed=1)
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        for y in range(4):
            for x in range(4):
                s = student[i, label, y, x].item() / temperature
                total += bernoulli_kl(s, teacher[i, 0, y, x].item() / temperature)
    loss = mask_loss(student, teacher, labels, temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / (2 * 16))


def test_masks_of_different_sizes():
    """The teacher's mask is resized to the student's; a constant mask stays what it is."""
    labels = torch.tensor([1])
    student = torch.full((1, K, 14, 14), 0.3)
    assert mask_loss(student, torch.full((1, K, 28, 28), 0.3), labels).item() == pytest.approx(
        0, abs=1e-7
    )
    expected = bernoulli_kl(0.3, -1.0)
    loss = mask_loss(student, torch.full((1, K, 28, 28), -1.0), labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- anchors


@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_class_loss_equals_loops(focus, temperature):
    """Sum over all anchors that are not ignored and all classes, divided by the foreground."""
    labels = torch.tensor([[0, K, -1, 2], [K, K, 1, -1]])
    student, teacher = randn(2, 4, K), randn(2, 4, K, seed=1)
    total = 0.0
    for b in range(2):
        for n in range(4):
            if labels[b, n] < 0:
                continue
            for k in range(K):
                s, t = (x[b, n, k].item() / temperature for x in (student, teacher))
                p, q = sigmoid(t), sigmoid(s)
                if focus:
                    cross_entropy = -p * math.log(q) - (1 - p) * math.log(1 - q)
                    total += abs(p - q) ** focus * cross_entropy
                else:
                    total += bernoulli_kl(s, t)
    loss = dense_class_loss(student, teacher, labels, K, temperature, focus)
    assert loss.item() == pytest.approx(temperature**2 * total / 3)


def test_dense_class_loss_sees_a_shift_of_all_logits():
    """What a softmax over sigmoid logits would miss: the same ranking, another confidence."""
    student, labels = randn(1, 5, K), torch.zeros(1, 5, dtype=torch.long)
    assert roi_class_loss(student[0], student[0] - 4).item() == pytest.approx(0, abs=1e-12)
    assert dense_class_loss(student, student - 4, labels, K) > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_dense_box_loss_equals_loops(beta):
    """Smooth L1 over foreground anchors only, mean over those, in the student's units."""
    labels = torch.tensor([[0, K, -1, 2]])
    student, teacher = randn(1, 4, 4), randn(1, 4, 4, seed=1)
    own, other = (1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 4.0, 4.0)
    total = 0.0
    for n in (0, 3):
        for c in range(4):
            difference = (student[0, n, c] - teacher[0, n, c] / other[c]).item()
            total += smooth_l1(difference, beta) if beta else abs(difference)
    loss = dense_box_loss(student, teacher, labels, K, own, other, beta)
    assert loss.item() == pytest.approx(total / 2)


# ---------------------------------------------------------------- what all have in common


def all_losses() -> dict:
    """Name -> (loss of the student's tensor, student, teacher)."""
    roi_labels, dense_labels = torch.tensor([0, K, 2]), torch.tensor([[0, K, -1, 2]])
    return {
        "roi_class": (roi_class_loss, (3, K + 1)),
        "roi_class_sigmoid": (lambda s, t: roi_class_loss(s, t, 2.0, True), (3, K + 1)),
        "roi_box": (lambda s, t: roi_box_loss(s, t, roi_labels, K, beta=0.3), (3, 4 * K)),
        "mask": (lambda s, t: mask_loss(s, t, roi_labels.clamp(max=K - 1), 2.0), (3, K, 4, 4)),
        "dense_class": (lambda s, t: dense_class_loss(s, t, dense_labels, K), (1, 4, K)),
        "dense_class_kl": (
            lambda s, t: dense_class_loss(s, t, dense_labels, K, 2.0, 0),
            (1, 4, K),
        ),
        "dense_box": (lambda s, t: dense_box_loss(s, t, dense_labels, K), (1, 4, 4)),
    }


LOSSES = list(all_losses())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    """Gradients agree with finite differences; the teacher gets none."""
    loss, shape = all_losses()[name]
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_equal_outputs_have_neither_loss_nor_gradient(name):
    """A student that equals its teacher is left alone."""
    loss, shape = all_losses()[name]
    student = randn(*shape).requires_grad_()
    value = loss(student, student.detach().clone())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    """Saturated outputs give finite values and gradients in float32."""
    loss, shape = all_losses()[name]
    teacher = 80 * randn(*shape).sign().float()
    student = (-teacher).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_widened(name):
    """bfloat16 outputs under autocast are compared in float32."""
    loss, shape = all_losses()[name]
    student, teacher = randn(*shape).bfloat16(), randn(*shape, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student.double(), teacher.double()).item(), rel=1e-4)


def test_nothing_to_distil_is_a_connected_zero():
    """No RoI, no foreground, no anchor: zero, with a zero gradient instead of none."""
    none = torch.zeros(0, dtype=torch.long)
    background = torch.full((1, 4), K)
    cases = [
        ((0, K + 1), lambda s, t: roi_class_loss(s, t)),
        ((0, K + 1), lambda s, t: roi_class_loss(s, t, sigmoid=True)),
        ((0, 4 * K), lambda s, t: roi_box_loss(s, t, none, K)),
        ((4, 4 * K), lambda s, t: roi_box_loss(s, t, background[0], K)),
        ((0, K, 28, 28), lambda s, t: mask_loss(s, t, none)),
        ((1, 4, 4), lambda s, t: dense_box_loss(s, t, background, K)),
        ((1, 4, K), lambda s, t: dense_class_loss(s, t, background * 0 - 1, K)),
        ((1, 0, K), lambda s, t: dense_class_loss(s, t, background[:, :0], K)),
    ]
    for shape, loss in cases:
        student = torch.ones(shape, requires_grad=True)
        value = loss(student, torch.zeros(shape))
        value.backward()
        assert value == 0
        assert student.grad.shape == shape and (student.grad == 0).all()


def test_dense_class_loss_without_foreground():
    """Background anchors are distilled too; without foreground the sum is divided by one."""
    student, teacher = randn(1, 4, K), randn(1, 4, K, seed=1)
    background = torch.full((1, 4), K)
    one = background.clone()
    one[0, 0] = 1
    alone = dense_class_loss(student, teacher, background, K)
    assert alone.item() == pytest.approx(dense_class_loss(student, teacher, one, K).item())
    assert alone > 0


def test_binary_kl_of_saturated_logits():
    """A certain teacher costs the student's logit: log(1 + e^40) = 40, not infinity."""
    student, teacher = torch.tensor([-40.0, 40.0, 40.0]), torch.tensor([40.0, -40.0, 40.0])
    assert binary_kl(student, teacher).tolist() == pytest.approx([40.0, 40.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("s, t", [(-120.0, 120.0), (120.0, -120.0), (-90.0, -90.0), (-20.0, -9.0)])
def test_dense_class_loss_of_saturated_logits(s, t):
    """|p - q| BCE(q, p) far from zero, where log(1 + e^x) is x or nothing."""
    student = torch.full((1, 1, 1), s, requires_grad=True)
    loss = dense_class_loss(student, torch.full((1, 1, 1), t), torch.zeros(1, 1).long(), 1)
    loss.backward()
    p, q = sigmoid(t), sigmoid(s)
    cross_entropy = max(s, 0) + math.log1p(math.exp(-abs(s))) - p * s
    assert loss.item() == pytest.approx(abs(p - q) * cross_entropy, rel=1e-5, abs=1e-9)
    assert student.grad.isfinite().all()


def test_focus_between_zero_and_one_is_refused():
    """There the gradient of the weight is infinite where student and teacher agree."""
    with pytest.raises(ValueError, match="focus must be 0 or at least 1"):
        dense_class_loss(randn(1, 1, K), randn(1, 1, K), torch.zeros(1, 1).long(), K, focus=0.5)
