"""Losses of Global Knowledge against the oracles of the method and loops over boxes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from d2kd.geometry.boxes import assign_levels
from d2kd.losses.global_knowledge import (
    attenuation,
    cosine_global_loss,
    cosine_reliability,
    cosine_responses,
    own_class,
    projection_global_loss,
    projection_reliability,
    projection_responses,
    soft_label_loss,
)
from tests.geometry.single_level import box_mask, crop_means, decoupled_loss

N, K, M = 6, 4, 3


def random_case(seed: int = 0, c_s: int = 5, c_t: int = 7):
    """Features, labels, validity, prototypes (class 2 has none) and their presence, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5

    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    valid = torch.tensor([True, True, True, True, False, True])
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    student, teacher = draw(N, c_s), draw(N, c_t)
    banks = [draw(K, M, c) * present[..., None] for c in (c_s, c_t)]
    return student, teacher, labels, valid, *banks, present


def loop_reliability(student, teacher, labels, student_bank, teacher_bank, present):
    """Section 2.1, one box after the other."""
    result = []
    for i, c in enumerate(labels.tolist()):
        rows = present[c].nonzero().flatten().tolist()
        if not rows:
            result.append(1.0)
            continue
        peaks = [
            max(F.cosine_similarity(f[i], bank[c, m], dim=0).item() for m in rows)
            for f, bank in ((student, student_bank), (teacher, teacher_bank))
        ]
        result.append(min(max(1 - abs(peaks[0] - peaks[1]), 0.0), 1.0))
    return torch.tensor(result, dtype=torch.float64)


def loop_global_loss(student, teacher, r, valid, student_bank, teacher_bank, present):
    """Section 2.2, one box and one prototype after the other."""
    terms = []
    for i in valid.nonzero().flatten().tolist():
        for c, m in present.nonzero().tolist():
            gap = r[i] * (
                F.cosine_similarity(student[i], student_bank[c, m], dim=0)
                - F.cosine_similarity(teacher[i], teacher_bank[c, m], dim=0)
            )
            terms.append(0.5 * gap**2 if gap.abs() < 1 else gap.abs() - 0.5)
    return sum(terms) / len(terms)


def global_term(student, teacher, labels, valid, student_bank, teacher_bank, present):
    """Responses, reliability and loss of one level, as a head chains them."""
    responses = (
        cosine_responses(student, student_bank),
        cosine_responses(teacher, teacher_bank),
    )
    r = cosine_reliability(*responses, labels, present)
    return cosine_global_loss(*responses, r, valid, present), r


def test_reliability_and_global_loss():
    """One box, two prototypes of its class."""
    teacher_bank = torch.tensor([[[1.0, 0], [0, 1]]])
    student_bank = torch.tensor([[[1.0, 0], [1, 1]]])
    teacher, student = torch.tensor([[3.0, 4]]), torch.tensor([[2.0, 0]])
    teacher_responses = cosine_responses(teacher, teacher_bank)
    student_responses = cosine_responses(student, student_bank)
    assert teacher_responses.flatten().tolist() == pytest.approx([0.6, 0.8])
    assert student_responses.flatten().tolist() == pytest.approx([1, 0.7071068])
    present, label = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0])
    r = cosine_reliability(student_responses, teacher_responses, label, present)
    assert r.item() == pytest.approx(0.8)
    valid = torch.tensor([True])
    loss = cosine_global_loss(student_responses, teacher_responses, r, valid, present)
    assert loss.item() == pytest.approx(0.0269807, abs=1e-7)
    assert 5 * attenuation(0, 24) * loss.item() == pytest.approx(0.1349033, abs=1e-6)


def test_fixed_point():
    """A rotated and rescaled student is perfect: r = 1, no loss and no gradient."""
    _, teacher, labels, valid, _, teacher_bank, present = random_case()
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    student = (3 * teacher @ turn).requires_grad_()
    loss, r = global_term(
        student, teacher, labels, valid, 0.2 * teacher_bank @ turn, teacher_bank, present
    )
    loss.backward()
    torch.testing.assert_close(r, torch.ones_like(r))
    assert loss.item() == pytest.approx(0, abs=1e-25)
    assert student.grad.abs().max().item() < 1e-12


def test_gradients():
    """The loss ignores the length of features, and only the student gets a gradient."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    for tensor in (student, teacher, student_bank, teacher_bank):
        tensor.requires_grad_()
    loss, r = global_term(student, teacher, labels, valid, student_bank, teacher_bank, present)
    assert not r.requires_grad
    loss.backward()
    assert (student.grad * student).sum(1).abs().max().item() < 1e-12
    assert student.grad[valid].abs().sum(1).min() > 0
    assert not student.grad[~valid].any()
    assert teacher.grad is None and student_bank.grad is None and teacher_bank.grad is None


def test_decoupled_loss():
    """Foreground and background of one row; scaling all weights changes nothing."""
    student = torch.zeros(1, 1, 1, 4)
    teacher = torch.tensor([1.0, 1, 2, 2]).view(1, 1, 1, 4)

    def losses(*weights):
        return decoupled_loss(student, teacher, torch.tensor(weights).view(1, 1, 4))

    foreground, background = losses(1.0, 1.0, 0.0, 0.0)
    assert foreground.item() == 0.5 and 4 * background.item() == 8
    assert losses(0.5, 1.0, 0.0, 0.0)[0].item() == pytest.approx(0.5)
    for scale in (0.25, 0.7, 3.0):
        assert losses(scale, scale, 0.0, 0.0)[0].item() == pytest.approx(0.5)


def test_soft_label():
    """Three logits, temperature 2, with and without a reliability of 0.8."""
    student, teacher = torch.zeros(1, 3), torch.tensor([[2 * math.log(2), 0, 0]])
    valid = torch.tensor([True])
    loss = soft_label_loss(student, teacher, torch.ones(1), valid, 2.0)
    assert loss.item() == pytest.approx(0.0785220, abs=1e-6)
    assert loss.item() == pytest.approx(0.0588915 / 3 * 4, abs=1e-6)
    weighted = soft_label_loss(student, teacher, torch.tensor([0.8]), valid, 2.0)
    assert weighted.item() == pytest.approx(0.0628176, abs=1e-6)


def test_attenuation():
    """Linear from one to nearly zero."""
    values = [attenuation(epoch, 24) for epoch in (0, 12, 23)]
    assert values == pytest.approx([1, 0.5, 0.0416667], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_global_loss_matches_loop(seed):
    """Reliability and global loss equal the loops, with padding and a class without prototypes."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case(seed)
    loss, r = global_term(student, teacher, labels, valid, student_bank, teacher_bank, present)
    banks = (student_bank, teacher_bank, present)
    torch.testing.assert_close(r, loop_reliability(student, teacher, labels, *banks))
    assert r[2].item() == 1.0
    torch.testing.assert_close(loss, loop_global_loss(student, teacher, r, valid, *banks))


def test_large_gaps_are_linear():
    """Smooth-L1 beyond one: opposite responses."""
    present, valid = torch.ones(1, 1, dtype=torch.bool), torch.tensor([True])
    loss = cosine_global_loss(
        torch.full((1, 1, 1), 1.0), torch.full((1, 1, 1), -0.9), torch.ones(1), valid, present
    )
    assert loss.item() == pytest.approx(1.4)


def test_reliability_is_clamped():
    """Signed features can disagree by more than one; the weight stays in [0, 1]."""
    present, label = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0])
    r = cosine_reliability(torch.ones(1, 1, 1), -torch.ones(1, 1, 1), label, present)
    assert r.item() == 0.0


def test_projection_matches_solve():
    """Projection coefficients, reliability and loss equal a solve for each box."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    ridge = 0.05
    projected = [
        projection_responses(student, student_bank, ridge),
        projection_responses(teacher, teacher_bank, ridge),
    ]
    r = projection_reliability(*projected, labels)
    loss = projection_global_loss(*projected, labels, r, valid)
    total = 0.0
    for i, c in enumerate(labels.tolist()):
        coefficients = []
        for f, bank in ((student, student_bank), (teacher, teacher_bank)):
            rows = F.normalize(bank[c][present[c]], dim=1)
            gram = rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype)
            coefficients.append(torch.linalg.solve(gram, rows @ F.normalize(f[i], dim=0)))
        gap = (coefficients[0] - coefficients[1]).norm()
        assert r[i].item() == pytest.approx(1 - min(gap.item(), 1.0), abs=1e-9)
        total += valid[i].item() * r[i].item() ** 2 * gap.item() ** 2
    assert loss.item() == pytest.approx(total / (2 * valid.sum().item()), abs=1e-9)


def test_projection_with_equal_prototypes():
    """Identical prototypes make the Gram matrix singular; the ridge keeps it solvable."""
    bank = torch.ones(1, 3, 4)
    responses = projection_responses(torch.ones(1, 4), bank, 0.01)
    assert responses.flatten().tolist() == pytest.approx([1 / 3.01] * 3, abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 1)])
def test_decoupled_loss_matches_loop(shape):
    """Masked losses equal a sum over images, channels and cells."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    batch, channels, height, width = shape
    weights = torch.rand(batch, height, width, dtype=torch.float64)
    weights *= weights > 0.5
    error = torch.zeros(2, dtype=torch.float64)
    area = torch.zeros(2, dtype=torch.float64)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                w = weights[b, y, x]
                pair = torch.stack([w, (w == 0).double()])
                area += pair
                for c in range(channels):
                    error += pair * (student[b, c, y, x] - teacher[b, c, y, x]) ** 2
    expected = error / (2 * channels * area).clamp(min=1)
    torch.testing.assert_close(torch.stack(decoupled_loss(student, teacher, weights)), expected)


def test_soft_label_matches_loop():
    """Soft labels equal the mean of the definition over the real boxes."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64) * 3
    r = torch.rand(5, dtype=torch.float64)
    valid = torch.tensor([True, False, True, True, False])
    expected = 0.0
    for i in (0, 2, 3):
        p_t, p_s = ((z[i] / 3).softmax(0) for z in (teacher, student))
        expected += r[i] * 9 / 4 * (p_t * (p_t / p_s).log()).sum() / 3
    torch.testing.assert_close(soft_label_loss(student, teacher, r, valid, 3.0), expected)


def test_gradcheck():
    """Numerical gradients of all losses in float64."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    student.requires_grad_()
    r = torch.rand(N, dtype=torch.float64)
    fixed = cosine_responses(teacher, teacher_bank)
    projected = projection_responses(teacher, teacher_bank)
    maps = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64)
    weights = torch.rand(2, 3, 2, dtype=torch.float64).round()
    logits = torch.randn(N, 3, dtype=torch.float64)
    check = torch.autograd.gradcheck

    assert check(
        lambda f: cosine_global_loss(cosine_responses(f, student_bank), fixed, r, valid, present),
        student,
    )
    assert check(
        lambda f: projection_global_loss(
            projection_responses(f, student_bank), projected, labels, r, valid
        ),
        student,
    )
    assert check(lambda f: decoupled_loss(f, maps[1], weights), maps[0].clone().requires_grad_())
    assert check(
        lambda z: soft_label_loss(z, logits, r, valid), logits.flip(0).clone().requires_grad_()
    )


def finite_zero(loss: torch.Tensor, leaf: torch.Tensor) -> None:
    """The loss is zero, and its gradient is zero and not None."""
    leaf.grad = None
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("boxes", ["none", "padding only"])
@pytest.mark.parametrize("prototypes", ["some", "none"])
def test_nothing_to_distil(boxes, prototypes):
    """No boxes or no prototypes: connected zeros."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    if boxes == "none":
        student, teacher, labels, valid = (x[:0] for x in (student, teacher, labels, valid))
    else:
        valid = torch.zeros_like(valid)
    if prototypes == "none":
        present = torch.zeros_like(present)
        student_bank, teacher_bank = student_bank * 0, teacher_bank * 0
    student.requires_grad_()
    loss, r = global_term(student, teacher, labels, valid, student_bank, teacher_bank, present)
    finite_zero(loss, student)
    responses = projection_responses(student, student_bank)
    constants = projection_responses(teacher, teacher_bank)
    finite_zero(projection_global_loss(responses, constants, labels, r, valid), student)
    logits = torch.randn(len(labels), 3, requires_grad=True)
    finite_zero(soft_label_loss(logits, logits.detach() + 1, r, valid), logits)


def test_boxes_without_prototypes_count_fully():
    """Without any prototypes every box is reliable."""
    student, teacher, labels, _, student_bank, teacher_bank, present = random_case()
    responses = [
        cosine_responses(f, b) for f, b in ((student, student_bank), (teacher, teacher_bank))
    ]
    assert torch.equal(
        cosine_reliability(*responses, labels, torch.zeros_like(present)),
        torch.ones(N, dtype=torch.float64),
    )


def test_all_zero_features():
    """Dead maps: finite values and gradients everywhere."""
    _, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    student = torch.zeros(N, 5, dtype=torch.float64, requires_grad=True)
    loss, _ = global_term(student, teacher * 0, labels, valid, student_bank, teacher_bank, present)
    loss.backward()
    assert loss.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))
    projection_responses(student, student_bank).sum().backward()
    assert student.grad.isfinite().all()
    zeros = torch.zeros(1, 2, 1, 1, requires_grad=True)
    for weight in (0.0, 1.0):
        sum(
            decoupled_loss(zeros, torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1), weight))
        ).backward()
    assert torch.equal(zeros.grad, torch.zeros_like(zeros))


def test_no_foreground_and_no_background():
    """A level without boxes has no foreground loss, a level covered by one no background loss."""
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4)
    foreground, background = decoupled_loss(student, teacher, torch.zeros(2, 4, 4))
    assert background.item() == pytest.approx((student - teacher).square().mean().item() / 2)
    finite_zero(foreground, student)
    finite_zero(decoupled_loss(student, teacher, torch.ones(2, 4, 4))[1], student)


def test_half_precision_is_widened():
    """bfloat16 inputs, autocast on: float32 inside."""
    student, teacher, labels, valid, student_bank, teacher_bank, present = random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        responses = cosine_responses(student.bfloat16(), student_bank.float())
        loss, _ = global_term(
            student.bfloat16(),
            teacher.bfloat16(),
            labels,
            valid,
            student_bank.float(),
            teacher_bank.float(),
            present,
        )
    assert responses.dtype == loss.dtype == torch.float32


def test_nothing_waits_for_the_device():
    """All of it runs forward and backward on tensors that have shapes but no data."""
    with FakeTensorMode():
        feature = torch.randn(2, 5, 8, 8, requires_grad=True)
        boxes, labels = torch.rand(2, 3, 4), torch.zeros(6, dtype=torch.long)
        valid, present = torch.ones(6).bool(), torch.ones(K, M).bool()
        student = crop_means(feature, boxes, 8).flatten(0, 1)
        bank, other = torch.randn(K, M, 5), torch.randn(2, 5, 8, 8)
        cosines = [cosine_responses(f, bank) for f in (student, student.detach())]
        r = cosine_reliability(*cosines, labels, present)
        projections = [projection_responses(f, bank) for f in (student, student.detach())]
        mask = box_mask(boxes, r.view(2, 3) * (assign_levels(boxes, 5) == 0), (8, 8), 8)
        total = (
            cosine_global_loss(*cosines, r, valid, present)
            + projection_global_loss(*projections, labels, r, valid)
            + projection_reliability(*projections, labels).sum()
            + sum(decoupled_loss(feature, other, mask))
            + soft_label_loss(student, student.detach(), r, valid)
        )
        total.backward()
        assert feature.grad.shape == feature.shape


def test_own_class():
    """own_class picks each box's class."""
    responses = torch.arange(24.0).view(2, 4, 3)
    picked = own_class(responses, torch.tensor([3, 0]))
    assert torch.equal(picked, torch.stack([responses[0, 3], responses[1, 0]]))
