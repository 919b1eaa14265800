"""DRKD's relation units: brute force, oracles, degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2kd.detectors.bundle import FeatureBundle
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.drkd.instances import (
    InstanceRelation,
    RelationFilter,
    RelationUnit,
    apply_layers,
    refine_instances,
    relation_matrices,
)
from d2kd.losses.drkd import instance_loss, relation_matrix_loss
from d2kd.numerics import Ragged


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def refine(unit: RelationUnit, x: torch.Tensor, rows: Ragged) -> torch.Tensor:
    """rho(x) of one unit."""
    return refine_instances([unit], [x], rows)[0]


def relate(unit: RelationUnit, x: torch.Tensor, rows: Ragged) -> torch.Tensor:
    """psi(x) of one unit."""
    return relation_matrices([unit.relation], [x], rows)[0]


def brute_force_relation(relation: InstanceRelation, x: torch.Tensor) -> torch.Tensor:
    """psi of one image's instances (n, D), pair by pair."""
    n = len(x)
    similarity = torch.zeros(n, n, dtype=x.dtype)
    weights = torch.ones(n, n, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            similarity[i, j] = relation.query(x[i]) @ relation.key(x[j])
            if relation.filter.kind == "learned":
                query, key = relation.filter.query(x[i]), relation.filter.key(x[j])
                weights[i, j] = query @ key / math.sqrt(len(query))
            elif relation.filter.kind == "uniform":
                weights[i, j] = 1 / n
    if relation.filter.kind == "learned":
        weights = weights.exp() / weights.exp().sum(1, keepdim=True)
    numerator = (similarity * weights).exp()
    return numerator / numerator.sum(1, keepdim=True)


def brute_force_relation_unit(unit: RelationUnit, x: torch.Tensor, counts) -> torch.Tensor:
    """rho, image after image, instance after instance."""
    refined = []
    for instances in x.split(counts):
        relation = brute_force_relation(unit.relation, instances)
        for i in range(len(instances)):
            mixed = sum(relation[i, j] * unit.value(instances[j]) for j in range(len(instances)))
            refined.append(instances[i] + unit.output(mixed))
    return torch.stack(refined)


def random_relation_unit(dim=4, relation_filter="learned") -> RelationUnit:
    """A unit in float64 whose filter is not uniform."""
    unit = RelationUnit(dim, relation_filter=relation_filter).double()
    if relation_filter == "learned":
        nn.init.normal_(unit.relation.filter.key.weight)
    return unit


def identity_relation_unit(relation_filter: str) -> RelationUnit:
    """A unit to compute by hand: two features, all weights the identity, no biases."""
    unit = RelationUnit(2, width=2, relation_filter=relation_filter).double()
    with torch.no_grad():
        for layer in (unit.relation.query, unit.relation.key, unit.value, unit.output):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    return unit


@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "none"])
def test_relation_unit_equals_brute_force(relation_filter):
    """One batched computation over images with 3, 0, 1 and 2 instances; gradients included."""
    counts = [3, 0, 1, 2]
    unit = random_relation_unit(relation_filter=relation_filter)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *unit.parameters()]
    refined = refine(unit, x, Ragged(counts))
    expected = brute_force_relation_unit(unit, x, counts)
    torch.testing.assert_close(refined, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(refined)
    actual = torch.autograd.grad((refined * weight).sum(), leaves)
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_relation_unit_gradcheck():
    """Analytic gradients agree with finite differences, with padding in the batch."""
    unit, rows = random_relation_unit(), Ragged([2, 0, 1])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: refine(unit, x, rows), x)


@pytest.mark.parametrize(
    ("relation_filter", "diagonal"), [("uniform", 0.622459), ("none", 0.731059)]
)
def test_relation_unit(relation_filter, diagonal):
    """Identity instances; with F = 1/2 and with F = 1."""
    unit, rows = identity_relation_unit(relation_filter), Ragged([2])
    x = torch.eye(2, dtype=torch.float64)
    relation = torch.tensor([[diagonal, 1 - diagonal], [1 - diagonal, diagonal]]).double()
    torch.testing.assert_close(relate(unit, x, rows)[0], relation, rtol=0, atol=1e-6)
    torch.testing.assert_close(refine(unit, x, rows), x + relation, rtol=0, atol=1e-6)


def test_matrix_and_feature_form():
    """The loss between identity instances and twice those, in both forms."""
    unit, rows = identity_relation_unit("uniform"), Ragged([2])
    one = torch.eye(2, dtype=torch.float64)
    student, teacher = relate(unit, one, rows), relate(unit, 2 * one, rows)
    assert teacher[0, 0, 0].item() == pytest.approx(0.880797, abs=1e-6)
    matrix_form = relation_matrix_loss([student], [teacher], rows.lengths)
    assert matrix_form.item() * 2**2 == pytest.approx(0.266954, abs=1e-6)
    gap = refine(unit, one, rows) - refine(unit, 2 * one, rows)
    feature_form = instance_loss([gap], rows.image_index, 1)
    assert feature_form.item() == pytest.approx(3.031586, abs=1e-6)


@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "none", "random"])
def test_rows_and_order(relation_filter):
    """Rows sum to 1; unless the filter is random, the order of instances is no matter."""
    counts, order = [3, 2], torch.tensor([2, 0, 1, 4, 3])
    student_unit = random_relation_unit(relation_filter=relation_filter)
    teacher_unit = random_relation_unit(relation_filter=relation_filter)
    rows = Ragged(counts)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    sums = relate(student_unit, student, rows).sum(2)
    torch.testing.assert_close(sums, rows.valid.double())
    refined = refine(student_unit, student, rows)
    permuted = refine(student_unit, student[order], rows)
    loss = instance_loss([refined - refine(teacher_unit, teacher, rows)], rows.image_index, 2)
    gap = permuted - refine(teacher_unit, teacher[order], rows)
    permuted_loss = instance_loss([gap], rows.image_index, 2)
    invariant = relation_filter != "random"
    assert torch.allclose(permuted, refined[order], atol=1e-12) == invariant
    assert torch.allclose(loss, permuted_loss, atol=1e-12) == invariant


def test_one_instance():
    """A lone instance relates to itself only; queries and keys get no gradient."""
    unit, rows = identity_relation_unit("learned"), Ragged([1])
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relate(unit, x, rows).tolist() == [[[1.0]]]
    refined = refine(unit, x, rows)
    assert refined.tolist() == [[6.0, 8.0]]
    refined.sum().backward()
    for parameter in unit.relation.parameters():
        assert parameter.grad.abs().max() == 0
    assert unit.value.weight.grad.abs().max() > 0


@pytest.mark.parametrize("counts", [[0], [0, 0]])
@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "none", "random"])
def test_no_instances(relation_filter, counts):
    """Without instances the loss is 0 and every parameter gets a zero gradient."""
    unit, rows = RelationUnit(4, relation_filter=relation_filter), Ragged(counts)
    x = torch.zeros(0, 4, requires_grad=True)
    loss = instance_loss([refine(unit, x, rows)], rows.image_index, len(counts))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in unit.parameters())


def test_an_empty_image_does_not_spoil_the_others():
    """Images without instances leave no NaN in values or gradients."""
    unit, rows = RelationUnit(4), Ragged([0, 2, 0])
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        refine(unit, x, rows).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


def test_many_instances_of_large_features():
    """300 instances in one image, similarities far beyond exp's range: finite."""
    unit, rows = RelationUnit(36), Ragged([300, 1])
    x = (1000 * torch.randn(301, 36)).requires_grad_()
    refine(unit, x, rows).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


def test_learned_filter_starts_uniform_and_learns():
    """The persistent filter is 1/n at first, as ``uniform``, and its gradient is not zero."""
    rows, x = Ragged([3, 1]), torch.randn(4, 4)
    learned, uniform = RelationUnit(4), RelationUnit(4, relation_filter="uniform")
    uniform.load_state_dict(learned.state_dict(), strict=False)
    weights = relate(learned, x, rows)
    torch.testing.assert_close(weights, relate(uniform, x, rows))
    assert weights[1].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    (weights * torch.randn(2, 3, 3)).sum().backward()
    assert learned.relation.filter.key.weight.grad.abs().max() > 0


def test_random_filter_has_no_parameters_and_differs_each_time():
    """Parity with the released code: a new untrained projection in each call."""
    unit, rows, x = RelationUnit(4, relation_filter="random"), Ragged([3]), torch.randn(3, 4)
    assert not list(unit.relation.filter.parameters())
    assert not torch.equal(relate(unit, x, rows), relate(unit, x, rows))


def test_unknown_filter_is_named():
    """A wrong kind is an error that lists the valid ones."""
    with pytest.raises(ValueError, match="learned"):
        RelationFilter(4, "bilinear")


@pytest.mark.parametrize("counts", [[2, 2], [3, 0, 1]], ids=["full grid", "padded grid"])
def test_units_together_equal_units_alone(counts):
    """Units of other widths and inputs: as if each came alone, gradients too."""
    dims = (4, 4, 6, 9)
    units = nn.ModuleList(random_relation_unit(dim) for dim in dims)
    inputs = [torch.randn(sum(counts), d, dtype=torch.float64, requires_grad=True) for d in dims]
    rows, leaves = Ragged(counts), [*inputs, *units.parameters()]
    together = refine_instances(units, inputs, rows)
    alone = [refine(unit, x, rows) for unit, x in zip(units, inputs, strict=True)]
    matrices = relation_matrices([unit.relation for unit in units], inputs, rows)
    for k, (unit, x) in enumerate(zip(units, inputs, strict=True)):
        torch.testing.assert_close(together[k], alone[k])
        torch.testing.assert_close(matrices[k], relate(unit, x, rows))
    actual = torch.autograd.grad(sum(y.square().sum() for y in together), leaves)
    expected = torch.autograd.grad(sum(y.square().sum() for y in alone), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_layers_of_units():
    """Layers side by side equal each on its own; the hand-written gradients finite differences."""
    units = [nn.ModuleList([nn.Linear(d, 3), nn.Linear(d, 2, bias=False)]) for d in (4, 5)]
    units = nn.ModuleList(units).double()
    inputs = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (4, 5)]
    both = apply_layers(units, inputs)
    for own, x, y in zip(units, inputs, both, strict=True):
        torch.testing.assert_close(y, torch.cat([layer(x) for layer in own], 1))
    parameters = list(units.parameters())

    def call(*tensors):
        values = dict(zip(dict(units.named_parameters()), tensors[2:], strict=True))
        return torch.func.functional_call(_Together(units), _prefixed(values), tensors[:2])

    assert torch.autograd.gradcheck(call, (*inputs, *parameters))
    inputs[1].requires_grad_(False)
    units[0].requires_grad_(False)
    apply_layers(units, inputs).sum().backward()
    assert all(p.grad is None for p in units[0].parameters())
    assert all(p.grad is not None for p in units[1].parameters())


class _Together(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.units = units

    def forward(self, *inputs):
        return apply_layers(self.units, inputs)


def _prefixed(values: dict) -> dict:
    return {f"units.{name}": value for name, value in values.items()}


def test_parameter_counts():
    """The sizes that the spec counts, with instances of 3 x 3 cells and of one."""
    with torch.device("meta"):
        for dim, count in ((2304, 10_622_592), (256, 131_712)):
            unit = RelationUnit(dim, relation_filter="uniform")
            assert sum(p.numel() for p in unit.parameters()) == count


def test_equal_sides_have_no_loss():
    """Equal instances and equal units: the loss is 0."""
    unit, rows = random_relation_unit(9), Ragged([2, 1])
    x = torch.randn(3, 9, dtype=torch.float64)
    mine, theirs = refine_instances([unit, unit], [x, x], rows)
    assert instance_loss([mine - theirs], rows.image_index, 2).item() < 1e-12


def test_roi_align():
    """Pooling without half-pixel shift, and with at least one cell per box."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    spec = DetectorSpec("student", "GeneralizedRCNN", {4: 1}, frozenset({"pyramid"}))
    bundle = FeatureBundle(spec, pyramid={4: ramp})

    def pool(box, aligned):
        boxes = [torch.tensor([box], dtype=torch.float32)]
        return bundle.pool(boxes, 3, strides=(4,), sampling_ratio=0, aligned=aligned)[0, 0]

    for row in pool((8, 8, 32, 32), aligned=False):
        torch.testing.assert_close(row, torch.tensor([3.0, 5, 7]))
    for row in pool((8, 8, 32, 32), aligned=True):
        torch.testing.assert_close(row, torch.tensor([2.5, 4.5, 6.5]))
    for row in pool((20, 20, 22, 22), aligned=False):
        torch.testing.assert_close(row, torch.tensor([5.1667, 5.5, 5.8333]), rtol=0, atol=1e-4)
