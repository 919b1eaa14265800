"""MAR's losses against the numeric oracles of the reconstruction and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2kd.losses import mar
from d2kd.losses.mar import (
    direct_distances,
    gram_distances,
    map_relation_loss,
    mask_guided_loss,
    pixel_weights,
    relation_loss,
)


def relation_of_map(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The form for maps, of a level whose positions (G, C, N) stand in one row."""
    return map_relation_loss([student.unsqueeze(2)], [teacher.unsqueeze(2)], weights)


FORMS = (relation_loss, relation_of_map)
EACH_FORM = pytest.mark.parametrize("loss_of", FORMS, ids=["direct", "gram"])

CROSS = torch.tensor([[[0.0, 1, 0], [1, 2, 1], [0, 1, 0]]])  # (1, 3, 3), a mask


def mask_loss_by_loops(student, teacher, masks, background_weight) -> float:
    """Mask-guided loss written from its formula, one position at a time."""
    total = 0.0
    for features, target, mask in zip(student, teacher, masks, strict=True):
        images, channels, height, width = features.shape
        near, near_mass, far, far_count = 0.0, 0.0, 0.0, 0
        for b in range(images):
            for y in range(height):
                for x in range(width):
                    gap = features[b, :, y, x] - target[b, :, y, x]
                    error = sum(float(g) ** 2 for g in gap) / channels
                    weight = float(mask[b, y, x])
                    near, near_mass = near + weight * error, near_mass + weight
                    if weight == 0:
                        far, far_count = far + error, far_count + 1
        total += near / (2 * max(1, near_mass))
        total += background_weight * far / (2 * max(1, far_count))
    return total / len(student)


def relation_by_loops(student: Tensor, teacher: Tensor, weights: Tensor) -> float:
    """Relation loss written from its formula, one pair of pixels at a time."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b) / (max(float(a.norm()), 1e-6) * max(float(b.norm()), 1e-6))

    total = 0.0
    for s, t, q in zip(student, teacher, weights, strict=True):
        for i in range(s.shape[1]):
            for j in range(s.shape[1]):
                gap = cosine(s[:, i], s[:, j]) - cosine(t[:, i], t[:, j])
                total += float(q[i] * q[j]) * gap**2
    return total / len(student)


def random_groups(groups: int, channels: int, pixels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, channels, pixels, generator=generator, dtype=torch.float64)


def random_weights(groups: int, pixels: int) -> Tensor:
    weights = random_groups(groups, 1, pixels, seed=7).squeeze(1).abs()
    return weights / weights.sum(1, keepdim=True)


def pixels_at(*degrees: float) -> Tensor:
    """One group of 2-D pixels (1, 2, N) in the given directions."""
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()])[None]


def test_constant_gap():
    """A constant gap of 2 costs 2, whatever the mask's values."""
    gap = torch.full((1, 1, 3, 3), 2.0)
    assert mask_guided_loss([gap], [torch.zeros_like(gap)], [CROSS]).item() == pytest.approx(2.0)


def test_gap_in_the_centre():
    """A gap of 3 at the centre only costs 2 * 9 / (2 * 6) = 1.5."""
    gap = torch.zeros(1, 1, 3, 3)
    gap[..., 1, 1] = 3
    assert mask_guided_loss([gap], [torch.zeros_like(gap)], [CROSS]).item() == pytest.approx(1.5)


def test_gap_outside_the_mask():
    """A gap outside the mask costs nothing without the background term."""
    gap = torch.zeros(1, 1, 3, 3)
    gap[..., 0, 0] = 5
    zeros = torch.zeros_like(gap)
    assert mask_guided_loss([gap], [zeros], [CROSS]).item() == 0
    # With eta = 4: 4 * 25 / (2 * 4 positions).
    assert mask_guided_loss([gap], [zeros], [CROSS], 4.0).item() == pytest.approx(12.5)


def test_doubled_mask():
    """A mask twice as large gives the same loss."""
    features, target = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    mask = CROSS.expand(2, -1, -1)
    once = mask_guided_loss([features], [target], [mask])
    assert mask_guided_loss([features], [target], [2 * mask]).item() == pytest.approx(once.item())


@pytest.mark.parametrize("background_weight", [0.0, 1.0, 4.0])
def test_mask_loss_by_loops(background_weight):
    """The mask-guided loss equals plain loops on random maps, one of them without objects."""
    generator = torch.Generator().manual_seed(3)

    def maps(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shapes = [(2, 3, 5, 4), (2, 3, 2, 2), (2, 3, 1, 1)]
    student, teacher = [maps(*s) for s in shapes], [maps(*s) for s in shapes]
    masks = [(3 * maps(s[0], *s[2:])).floor() for s in shapes[:2]] + [maps(2, 1, 1) * 0]
    expected = mask_loss_by_loops(student, teacher, masks, background_weight)
    loss = mask_guided_loss(student, teacher, masks, background_weight)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_no_objects():
    """Empty masks give a loss of zero and gradients of zero, not None."""
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = mask_guided_loss([features], [torch.randn(2, 3, 4, 4)], [torch.zeros(2, 4, 4)])
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().sum() == 0


def test_two_pixels():
    """Orthogonal against equal costs 0.5, opposite against equal costs 2."""
    equal = pixels_at(0, 0)
    assert relation_loss(pixels_at(0, 90), equal).item() == pytest.approx(0.5)
    assert relation_loss(pixels_at(0, 180), equal).item() == pytest.approx(2.0)


def test_three_pixels():
    """Pixels at 0, 60 and 90 degrees against equal ones cost 0.2817665."""
    loss = relation_loss(pixels_at(0, 60, 90), pixels_at(0, 0, 0))
    assert loss.item() == pytest.approx(0.2817665, abs=1e-7)
    expected = (2 * 0.25 + 2 * 1 + 2 * (1 - math.sqrt(0.75)) ** 2) / 9
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mode, expected", [("balanced", 0.5), ("uniform", 0.375)])
def test_balanced_weights(mode, expected):
    """One object pixel of four counts half when balanced, a quarter when uniform."""
    weights = pixel_weights(torch.tensor([[3.0, 0, 0, 0]], dtype=torch.float64), [4], mode)
    if mode == "balanced":
        torch.testing.assert_close(weights, torch.tensor([[3.0, 1, 1, 1]]).double() / 6)
    loss = relation_loss(pixels_at(90, 0, 0, 0), pixels_at(0, 0, 0, 0), weights)
    assert loss.item() == pytest.approx(expected)


def test_weights_without_one_side():
    """Balanced weights are uniform where no pixel, or each pixel, is near an object."""
    weights = pixel_weights(torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 1]]), [4])
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))


def test_gram_equals_direct():
    """Both forms agree, in value and gradient, for Cs = 16, Ct = 24 and N = 50."""
    student, teacher = random_groups(3, 16, 50, 1), random_groups(3, 24, 50, 2)
    scale = random_weights(3, 50).sqrt().unsqueeze(1)
    gradients = []
    for distance in (direct_distances, lambda s, t: gram_distances(s, t, [50])[:, 0]):
        leaf = student.clone().requires_grad_()
        unit = leaf / leaf.norm(dim=1, keepdim=True) * scale
        value = distance(unit, teacher / teacher.norm(dim=1, keepdim=True) * scale)
        gradients.append((value, *torch.autograd.grad(value.sum(), leaf)))
    for direct, gram in zip(*gradients, strict=True):
        assert (direct - gram).abs().max() < 1e-12


@pytest.mark.parametrize("pixels", [1, 5, 30])
def test_relation_by_loops(pixels):
    """Both forms of the relation loss equal plain loops, with fewer and more pixels than C."""
    student, teacher = random_groups(2, 6, pixels, 4), random_groups(2, 9, pixels, 5)
    weights = random_weights(2, pixels)
    expected = relation_by_loops(student, teacher, weights)
    for loss in FORMS:
        assert loss(student, teacher, weights).item() == pytest.approx(expected, abs=1e-12)


def test_no_pixel_matrix_on_a_dense_level(monkeypatch):
    """The pixels of maps never meet the form that builds a matrix of them."""
    monkeypatch.setattr(mar, "direct_distances", None)
    weights = torch.full((1, 16800), 1 / 16800)
    assert relation_of_map(torch.randn(1, 4, 16800), torch.randn(1, 8, 16800), weights).isfinite()
    with pytest.raises(TypeError):
        relation_loss(torch.randn(1, 4, 8), torch.randn(1, 8, 8))


def test_gram_in_float32():
    """A small difference between maps survives the Gram form's subtraction in float32."""
    student = random_groups(1, 64, 900, 6)
    teacher = student + 0.03 * random_groups(1, 64, 900, 8)
    weights = torch.full((1, 900), 1 / 900)
    exact = relation_loss(student, teacher).item()
    assert exact < 1e-4
    actual = relation_of_map(student.float(), teacher.float(), weights).item()
    assert actual == pytest.approx(exact, rel=0.02)


@EACH_FORM
@pytest.mark.parametrize("pixels", [5, 40])
def test_invariances(pixels, loss_of):
    """Channel rotation and pixel scale change nothing; student and teacher commute."""
    student, teacher = random_groups(2, 8, pixels, 1), random_groups(2, 8, pixels, 2)
    weights = random_weights(2, pixels)
    value = loss_of(student, teacher, weights)
    rotation = torch.linalg.qr(random_groups(1, 8, 8, 3)[0]).Q
    torch.testing.assert_close(loss_of(rotation @ student, teacher, weights), value)
    scale = random_groups(2, 1, pixels, 4).abs() + 0.1
    torch.testing.assert_close(loss_of(student * scale, teacher, weights), value)
    torch.testing.assert_close(loss_of(teacher, student, weights), value)


@EACH_FORM
@pytest.mark.parametrize("pixels", [5, 40])
def test_gradient_is_tangential(pixels, loss_of):
    """The gradient of a pixel is orthogonal to it; identical maps have none."""
    student = random_groups(2, 8, pixels, 1).requires_grad_()
    teacher, weights = random_groups(2, 8, pixels, 2), random_weights(2, pixels)
    (gradient,) = torch.autograd.grad(loss_of(student, teacher, weights), student)
    assert gradient.abs().max() > 1e-4
    assert (gradient * student).sum(1).abs().max() < 1e-12
    loss = loss_of(student, student.detach().clone(), weights)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient.abs().max() < 1e-14


@EACH_FORM
@pytest.mark.parametrize("pixels", [5, 40])
def test_zero_features(pixels, loss_of):
    """All-zero, or partly zero, student maps have finite losses and gradients."""
    for keep in (0, 1):
        student = torch.randn(2, 8, pixels)
        student[:, :, keep:] = 0
        student.requires_grad_()
        loss = loss_of(student, torch.randn(2, 8, pixels), torch.full((2, pixels), 1 / pixels))
        loss.backward()
        assert torch.isfinite(loss)
        assert student.grad.abs().max() < 100


def test_groups_that_do_not_count():
    """The mean is over the groups that count, whatever the others hold; without any it is zero."""
    student, teacher = random_groups(5, 8, 4, 1).requires_grad_(), random_groups(5, 8, 4, 2)
    groups = torch.tensor([1.0, 0, 0, 1, 0]).double()
    loss = relation_loss(student, teacher, groups=groups)
    torch.testing.assert_close(loss, relation_loss(student[[0, 3]], teacher[[0, 3]]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False, True, False]
    none = relation_loss(student, teacher, groups=torch.zeros(5).double())
    (gradient,) = torch.autograd.grad(none, student)
    assert none == 0 and gradient.abs().sum() == 0


LEVELS = ((5, 4), (2, 3), (1, 1))


def random_levels(channels: int, seed: int) -> list[Tensor]:
    """Maps of two images on three levels, the last a single position."""
    positions = sum(height * width for height, width in LEVELS)
    flat = random_groups(2, channels, positions, seed).split([h * w for h, w in LEVELS], 2)
    return [part.unflatten(2, size).contiguous() for part, size in zip(flat, LEVELS, strict=True)]


@pytest.mark.parametrize("mode", ["balanced", "uniform"])
def test_maps_by_loops(mode):
    """All levels together equal plain loops over levels, images and pairs of pixels."""
    student, teacher = random_levels(6, 4), random_levels(9, 5)
    lengths = [h * w for h, w in LEVELS]
    masks = (random_groups(2, 1, sum(lengths), 6)[:, 0] - 0.4).clamp(min=0)
    masks[0, : lengths[0]] = 0  # an image without objects on the first level
    weights = pixel_weights(masks, lengths, mode)
    expected = [
        relation_by_loops(s.flatten(2), t.flatten(2), q)
        for s, t, q in zip(student, teacher, weights.split(lengths, 1), strict=True)
    ]
    loss = map_relation_loss(student, teacher, weights)
    assert loss.item() == pytest.approx(sum(expected) / len(LEVELS), abs=1e-12)


def test_pixel_weights_by_loops():
    """Each level of each image has a mass of one, half of it inside where both sets have pixels."""
    masks = torch.tensor([[1.0, 0, 0, 2, 3], [0, 0, 0, 0, 1]], dtype=torch.float64)
    weights = pixel_weights(masks, [3, 2])
    expected = [[1 / 2, 1 / 4, 1 / 4, 1 / 2, 1 / 2], [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]]
    torch.testing.assert_close(weights, torch.tensor(expected).double())


def test_maps_gradcheck():
    """The hand-written backward pass of the channels' matrices agrees with finite differences."""
    student, teacher = random_levels(4, 1), random_levels(6, 2)
    weights = random_weights(2, sum(h * w for h, w in LEVELS))
    assert torch.autograd.gradcheck(
        lambda *levels: map_relation_loss(levels, teacher, weights),
        [level.requires_grad_() for level in student],
    )


def test_no_groups():
    """Without RoIs, or without pixels, the loss is a zero connected to the student."""
    for shape in [(0, 8, 49), (2, 8, 0)]:
        student = torch.zeros(shape, requires_grad=True)
        loss = relation_loss(student, torch.zeros(shape))
        loss.backward()
        assert loss.item() == 0
        assert student.grad.shape == shape


def test_teacher_is_constant():
    """Neither loss sends a gradient to the teacher; both reach the student."""
    student, teacher = (torch.randn(1, 4, 3, 3, requires_grad=True) for _ in range(2))
    loss = mask_guided_loss([student], [teacher], [CROSS])
    loss = loss + relation_loss(student.flatten(2), teacher.flatten(2))
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_gradcheck():
    """Numeric gradients of both losses and both forms in float64."""
    student = [random_groups(2, 3, 6, s).view(2, 3, 2, 3).requires_grad_() for s in (1, 2)]
    teacher = [random_groups(2, 3, 6, s).view(2, 3, 2, 3) for s in (3, 4)]
    masks = [torch.tensor([[[0.0, 1, 2], [3, 0, 1]]] * 2).double(), torch.zeros(2, 2, 3).double()]
    assert torch.autograd.gradcheck(
        lambda *levels: mask_guided_loss(levels, teacher, masks, 1.0), student
    )
    for pixels in (3, 9):
        features = random_groups(2, 4, pixels, 5).requires_grad_()
        target, weights = random_groups(2, 6, pixels, 6), random_weights(2, pixels)
        assert torch.autograd.gradcheck(lambda f: relation_loss(f, target, weights), features)  # noqa: B023


def test_bfloat16():
    """Both losses widen half precision and ignore autocast."""
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    mask = torch.ones(2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mask_guided_loss([student], [teacher], [mask])
        relation = relation_loss(student.flatten(2), teacher.flatten(2))
    expected = mask_guided_loss([student.float()], [teacher.float()], [mask])
    torch.testing.assert_close(loss, expected)
    expected = relation_loss(student.float().flatten(2), teacher.float().flatten(2))
    torch.testing.assert_close(relation, expected)
