"""DRKD's graph and relation units: brute force, the spec's oracles, degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2kd.detectors.bundle import FeatureBundle
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.drkd_units import (
    GraphUnit,
    InstanceLayout,
    InstanceRelation,
    RelationFilter,
    RelationUnit,
    squared_relation_gap,
)
from d2kd.losses.drkd import instance_loss, pixel_relation_loss, relation_matrix_loss


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- graph unit -----------------------------------------------------------------------------------


def brute_force_graph_unit(unit: GraphUnit, x: torch.Tensor) -> torch.Tensor:
    """phi by the letter: every node, state and pixel tensor written out, image by image."""
    batch, channels, height, width = x.shape
    num_pixels = height * width
    extended = []
    for b in range(batch):
        pixels = x[b].flatten(1)
        state = unit.state.weight @ pixels + unit.state.bias[:, None]
        projection = unit.projection.weight @ pixels + unit.projection.bias[:, None]
        nodes = torch.zeros(len(state), len(projection), dtype=x.dtype)
        for p in range(num_pixels):
            nodes += torch.outer(state[:, p], projection[:, p])
        if unit.normalize:
            nodes = nodes / num_pixels
        mixed = []
        for i, node in enumerate(nodes.T):
            weights = unit.mix_nodes.weight[i]
            others = sum(weights[j] * other for j, other in enumerate(nodes.T))
            mixed.append(node + others + unit.mix_nodes.bias[i])
        mixed = unit.mix_states.weight @ torch.stack(mixed, 1).clamp(min=0)
        extended.append(unit.extend.weight @ (mixed @ projection))
    refined = []
    for c in range(channels):
        values = torch.stack([image[c] for image in extended])
        if unit.training:
            mean, variance = values.mean(), values.var(correction=0)
        else:
            mean, variance = unit.norm.running_mean[c], unit.norm.running_var[c]
        normalised = (values - mean) / torch.sqrt(variance + 1e-4)
        refined.append(unit.norm.weight[c] * normalised + unit.norm.bias[c])
    return x + torch.stack(refined, 1).view_as(x)


def random_graph_unit(channels=3, nodes=2, **kwargs) -> GraphUnit:
    """A unit in float64 whose batch norm is not the default."""
    unit = GraphUnit(channels, nodes, **kwargs).double()
    nn.init.uniform_(unit.norm.weight, 0.5, 1.5)
    nn.init.normal_(unit.norm.bias)
    return unit


def example_graph_unit(mix: float = 0.0, normalize: bool = False) -> GraphUnit:
    """The unit of oracle 1: one channel, one node, weights one."""
    unit = GraphUnit(1, 1, normalize=normalize).double().eval()
    with torch.no_grad():
        for layer in (unit.state, unit.projection, unit.mix_nodes):
            layer.bias.zero_()
        unit.state.weight.fill_(1)
        unit.projection.weight.fill_(1)
        unit.mix_nodes.weight.fill_(mix)
        unit.mix_states.weight.copy_(torch.eye(2))
        unit.extend.weight.fill_(0.5)
    return unit


EXAMPLE_MAP = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)


def forward(unit: GraphUnit, x: torch.Tensor) -> torch.Tensor:
    return unit(x)


def from_moments(unit: GraphUnit, x: torch.Tensor) -> torch.Tensor:
    """phi(x) by the affine map that the unit makes of the moments of x."""
    pixels = x.flatten(2)
    mean = pixels.mean(2)
    centred = pixels - mean.unsqueeze(2)
    matrix, offset = unit.affine(mean, centred @ centred.mT, pixels.shape[2])
    return (matrix @ centred + offset.unsqueeze(2)).view_as(x)


def identity_adapter(channels: int) -> nn.Conv2d:
    adapter = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    return adapter


SMALL_AND_LARGE = pytest.mark.parametrize("size", [(1, 2), (4, 5)], ids=["small map", "large map"])
BOTH_EVALUATIONS = pytest.mark.parametrize("phi", [forward, from_moments])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("training", [False, True])
@BOTH_EVALUATIONS
def test_graph_unit_equals_brute_force(phi, training, normalize):
    """Both evaluations are the definition, in training and in evaluation."""
    unit = random_graph_unit(normalize=normalize).train(training)
    unit.norm.running_mean.normal_()
    unit.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = brute_force_graph_unit(unit, x)
    torch.testing.assert_close(phi(unit, x), expected, rtol=1e-10, atol=1e-10)


@BOTH_EVALUATIONS
def test_graph_unit_running_statistics_are_batch_norms(phi):
    """Running mean and variance move exactly as ``nn.BatchNorm2d`` moves them."""
    unit = random_graph_unit()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    reference = nn.BatchNorm2d(3, eps=1e-4).double()
    plain = random_graph_unit()
    plain.load_state_dict(unit.state_dict())
    with torch.no_grad():  # batch norm with mean 0, variance 1: shows the extended map itself
        plain.eval().norm.weight.fill_(math.sqrt(1 + 1e-4))
        plain.norm.bias.zero_()
        reference(plain(x) - x)
    phi(unit, x)
    torch.testing.assert_close(unit.norm.running_mean, reference.running_mean)
    torch.testing.assert_close(unit.norm.running_var, reference.running_var)
    assert unit.norm.num_batches_tracked == 1


@BOTH_EVALUATIONS
def test_graph_unit_gradients_equal_brute_force(phi):
    """Gradients of the map and of every parameter equal those of the definition."""
    unit = random_graph_unit()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *unit.parameters()]
    weight = torch.randn_like(x)
    actual = torch.autograd.grad((phi(unit, x) * weight).sum(), leaves)
    expected = torch.autograd.grad((brute_force_graph_unit(unit, x) * weight).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@SMALL_AND_LARGE
def test_squared_gap_equals_brute_force(size):
    """||adapter(phi_s(S)) - phi_t(T)||^2 for different widths, gradients included."""
    student_unit, teacher_unit = random_graph_unit(3, 2), random_graph_unit(4, 3)
    adapter = nn.Conv2d(3, 4, 1).double()
    student = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *size, dtype=torch.float64)
    leaves = [student, *student_unit.parameters(), *teacher_unit.parameters()]
    leaves += adapter.parameters()
    actual = squared_relation_gap(student_unit, teacher_unit, adapter, student, teacher)
    gap = adapter(brute_force_graph_unit(student_unit, student))
    gap = gap - brute_force_graph_unit(teacher_unit, teacher)
    expected = sum(value**2 for value in gap.flatten())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    for a, e in zip(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


@SMALL_AND_LARGE
def test_squared_gap_gradcheck(size):
    """The hand-written backward pass agrees with finite differences."""
    units = random_graph_unit(), random_graph_unit()
    adapter = nn.Conv2d(3, 3, 1).double()
    student, teacher = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: squared_relation_gap(*units, adapter, x, teacher), student.requires_grad_()
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01])
def test_squared_gap_in_float32(gap, memory_format):
    """Features with a large mean and a small gap: float32 stays close to float64."""
    unit, adapter = GraphUnit(32, 16), identity_adapter(32)
    teacher = 10 + torch.randn(2, 32, 40, 40)
    student = (teacher + gap * torch.randn_like(teacher)).contiguous(memory_format=memory_format)
    actual = squared_relation_gap(unit, unit, adapter, student, teacher)
    unit, adapter = unit.double(), adapter.double()
    expected = (unit(student.double()) - unit(teacher.double())).square().sum()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5 / gap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@SMALL_AND_LARGE
def test_gap_within_rounding_is_zero(size, dtype):
    """Equal sides: a loss of exactly zero with a zero gradient, not the root of rounding errors."""
    unit, adapter = GraphUnit(3, 2).to(dtype), identity_adapter(3).to(dtype)
    x = (5 + torch.randn(2, 3, *size, dtype=dtype)).requires_grad_()
    squared = squared_relation_gap(unit, unit, adapter, x, x.detach())
    pixel_relation_loss([squared], [x.numel()]).backward()
    assert squared == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@BOTH_EVALUATIONS
def test_oracle_1_graph_unit(phi):
    """Oracle 1: a unit small enough to compute by hand."""
    expected = torch.tensor([[[[5.99975, 11.9995]]]], dtype=torch.float64)
    torch.testing.assert_close(phi(example_graph_unit(), EXAMPLE_MAP), expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[[[3.499875, 6.99975]]]], dtype=torch.float64)
    actual = phi(example_graph_unit(normalize=True), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[[[8.0e-6, 2.999992]]]], dtype=torch.float64)
    actual = phi(example_graph_unit().train(), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@BOTH_EVALUATIONS
def test_oracle_2_node_mixing(phi):
    """Oracle 2: mixing over nodes with -1 cancels the nodes, with +0.2 it strengthens them."""
    assert torch.equal(phi(example_graph_unit(mix=-1), EXAMPLE_MAP), EXAMPLE_MAP)
    expected = torch.tensor([[[[6.9997, 13.9994]]]], dtype=torch.float64)
    actual = phi(example_graph_unit(mix=0.2), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@BOTH_EVALUATIONS
def test_oracle_3_zero_norm_is_identity(phi):
    """Oracle 3: without batch norm's scale and shift the unit is the identity."""
    unit = GraphUnit(3, 2, zero_init_norm=True).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(phi(unit, x), x, rtol=0, atol=1e-14)


@BOTH_EVALUATIONS
def test_oracle_4_permutation_of_pixels(phi):
    """Oracle 4: the order of the pixels does not matter, so neither do flips."""
    unit = random_graph_unit().eval()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    order = torch.randperm(20)

    def permute(y):
        return y.flatten(2)[:, :, order].view_as(y)

    assert (phi(unit, permute(x)) - permute(phi(unit, x))).abs().max() < 1e-12
    assert (phi(unit, x.flip(3)) - phi(unit, x).flip(3)).abs().max() < 1e-12


def test_parameter_counts():
    """The sizes that the spec counts: 103,168 with 64 nodes, 656,896 with 256."""
    assert sum(p.numel() for p in GraphUnit(256, 64).parameters()) == 103_168
    assert sum(p.numel() for p in GraphUnit(256, 256).parameters()) == 656_896
    with torch.device("meta"):
        for dim, count in ((2304, 10_622_592), (256, 131_712)):
            unit = RelationUnit(dim, relation_filter="uniform")
            assert sum(p.numel() for p in unit.parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (8, 8)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_are_finite(value, batch, size):
    """All-zero and constant maps, and maps of one pixel: finite output and gradients."""
    unit, adapter = GraphUnit(4, 2), nn.Conv2d(4, 4, 1)
    x = torch.full((batch, 4, *size), value, requires_grad=True)
    squared = squared_relation_gap(unit, GraphUnit(4, 2), adapter, x, torch.full_like(x, value))
    pixel_relation_loss([squared], [x.numel()]).backward()
    assert squared.isfinite() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graph_sums_do_not_overflow_half_precision(dtype):
    """Node features of an 800 x 1344 image's finest map are far beyond float16's range."""
    unit = GraphUnit(4, 2)
    with torch.no_grad():
        unit.state.weight.fill_(1)
        unit.projection.weight.fill_(1)
    x = (4 + torch.rand(1, 4, 200, 336)).to(dtype).requires_grad_()
    pixels = x.detach().double().flatten(2)
    nodes = unit.state.weight.double() @ pixels @ (unit.projection.weight.double() @ pixels).mT
    assert nodes.max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = unit(x)
        squared = squared_relation_gap(unit, GraphUnit(4, 2), nn.Conv2d(4, 4, 1), x, x.detach())
        pixel_relation_loss([squared], [x.numel()]).backward()
    assert refined.dtype == squared.dtype == torch.float32 and squared.isfinite()
    assert refined.isfinite().all() and x.grad.isfinite().all()


# --- relation unit --------------------------------------------------------------------------------


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
    """The unit of oracles 5, 6 and 8: two features, all weights the identity, no biases."""
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
    refined = unit(x, InstanceLayout(counts))
    expected = brute_force_relation_unit(unit, x, counts)
    torch.testing.assert_close(refined, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(refined)
    actual = torch.autograd.grad((refined * weight).sum(), leaves)
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_relation_unit_gradcheck():
    """Analytic gradients agree with finite differences, with padding in the batch."""
    unit, layout = random_relation_unit(), InstanceLayout([2, 0, 1])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit(x, layout), x)


def test_layout_pads_and_unpads():
    """Padding puts each instance into its image's row; unpadding undoes it."""
    layout = InstanceLayout([2, 0, 1])
    x = torch.arange(1.0, 4).unsqueeze(1)
    assert layout.pad(x).squeeze(2).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert torch.equal(layout.unpad(layout.pad(x)), x)
    assert layout.image_index.tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("relation_filter", "diagonal"), [("uniform", 0.622459), ("none", 0.731059)]
)
def test_oracle_5_relation_unit(relation_filter, diagonal):
    """Oracle 5: identity instances; with F = 1/2 and with F = 1."""
    unit, layout = identity_relation_unit(relation_filter), InstanceLayout([2])
    x = torch.eye(2, dtype=torch.float64)
    relation = torch.tensor([[diagonal, 1 - diagonal], [1 - diagonal, diagonal]]).double()
    torch.testing.assert_close(unit.relation(x, layout)[0], relation, rtol=0, atol=1e-6)
    torch.testing.assert_close(unit(x, layout), x + relation, rtol=0, atol=1e-6)


def test_oracle_6_matrix_and_feature_form():
    """Oracle 6: the loss between identity instances and twice those, in both forms."""
    unit, layout = identity_relation_unit("uniform"), InstanceLayout([2])
    one = torch.eye(2, dtype=torch.float64)
    student, teacher = unit.relation(one, layout), unit.relation(2 * one, layout)
    assert teacher[0, 0, 0].item() == pytest.approx(0.880797, abs=1e-6)
    matrix_form = relation_matrix_loss(student, teacher, layout.counts)
    assert matrix_form.item() * 2**2 == pytest.approx(0.266954, abs=1e-6)
    gap = unit(one, layout) - unit(2 * one, layout)
    feature_form = instance_loss([gap], layout.image_index, 1)
    assert feature_form.item() == pytest.approx(3.031586, abs=1e-6)


@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "none", "random"])
def test_oracle_7_rows_and_order(relation_filter):
    """Oracle 7: rows sum to 1; unless the filter is random, the order of instances is no matter."""
    counts, order = [3, 2], torch.tensor([2, 0, 1, 4, 3])
    student_unit = random_relation_unit(relation_filter=relation_filter)
    teacher_unit = random_relation_unit(relation_filter=relation_filter)
    layout = InstanceLayout(counts)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    rows = student_unit.relation(student, layout).sum(2)
    torch.testing.assert_close(rows, layout.mask.double())
    refined = student_unit(student, layout)
    permuted = student_unit(student[order], layout)
    loss = instance_loss([refined - teacher_unit(teacher, layout)], layout.image_index, 2)
    gap = permuted - teacher_unit(teacher[order], layout)
    permuted_loss = instance_loss([gap], layout.image_index, 2)
    invariant = relation_filter != "random"
    assert torch.allclose(permuted, refined[order], atol=1e-12) == invariant
    assert torch.allclose(loss, permuted_loss, atol=1e-12) == invariant


def test_oracle_8_one_instance():
    """Oracle 8: a lone instance relates to itself only; queries and keys get no gradient."""
    unit, layout = identity_relation_unit("learned"), InstanceLayout([1])
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert unit.relation(x, layout).tolist() == [[[1.0]]]
    refined = unit(x, layout)
    assert refined.tolist() == [[6.0, 8.0]]
    refined.sum().backward()
    for parameter in unit.relation.parameters():
        assert parameter.grad.abs().max() == 0
    assert unit.value.weight.grad.abs().max() > 0


@pytest.mark.parametrize("counts", [[0], [0, 0]])
@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "none", "random"])
def test_oracle_8_no_instances(relation_filter, counts):
    """Oracle 8: without instances the loss is 0 and every parameter gets a zero gradient."""
    unit, layout = RelationUnit(4, relation_filter=relation_filter), InstanceLayout(counts)
    x = torch.zeros(0, 4, requires_grad=True)
    loss = instance_loss([unit(x, layout)], layout.image_index, len(counts))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in unit.parameters())


def test_an_empty_image_does_not_spoil_the_others():
    """Images without instances leave no NaN in values or gradients."""
    unit, layout = RelationUnit(4), InstanceLayout([0, 2, 0])
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        unit(x, layout).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


def test_many_instances_of_large_features():
    """300 instances in one image, similarities far beyond exp's range: finite."""
    unit, layout = RelationUnit(36), InstanceLayout([300, 1])
    x = (1000 * torch.randn(301, 36)).requires_grad_()
    unit(x, layout).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in unit.parameters())


def test_learned_filter_starts_uniform_and_learns():
    """The persistent filter equals 1/n exactly at first, and its gradient is not zero."""
    layout = InstanceLayout([3, 1])
    relation_filter = RelationFilter(4)
    x = torch.randn(4, 4)
    weights = relation_filter(x, layout)
    assert torch.equal(weights[0], torch.full((3, 3), 1 / 3))
    assert weights[1].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    (weights * torch.randn(2, 3, 3)).sum().backward()
    assert relation_filter.key.weight.grad.abs().max() > 0


def test_random_filter_has_no_parameters_and_differs_each_time():
    """Parity with the released code: a new untrained projection in each call."""
    relation_filter, layout = RelationFilter(4, "random"), InstanceLayout([3])
    x = torch.randn(3, 4)
    first, second = relation_filter(x, layout), relation_filter(x, layout)
    assert not list(relation_filter.parameters())
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(2), torch.ones(1, 3))


def test_unknown_filter_is_named():
    """A wrong kind is an error that lists the valid ones."""
    with pytest.raises(ValueError, match="learned"):
        RelationFilter(4, "bilinear")


def test_oracle_9_roi_align():
    """Oracle 9: pooling without half-pixel shift, and with at least one cell per box."""
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


# --- together -------------------------------------------------------------------------------------


def test_oracle_11_equal_sides_have_no_loss():
    """Oracle 11: equal features, equal units and identity adapters: all three losses are 0."""
    channels, layout = 4, InstanceLayout([2, 1])
    adapter = identity_adapter(channels).double()
    for size in ((1, 2), (5, 5)):
        unit = random_graph_unit(channels)
        x = torch.randn(2, channels, *size, dtype=torch.float64)
        squared = squared_relation_gap(unit, unit, adapter, x, x)
        assert pixel_relation_loss([squared], [x.numel()]).item() == 0
    unit = random_relation_unit(channels * 9)
    pooled = torch.randn(3, channels, 3, 3, dtype=torch.float64)
    refined = unit(pooled.flatten(1), layout).view_as(pooled)
    assert instance_loss([adapter(refined) - refined], layout.image_index, 2).item() < 1e-12
    assert instance_loss([adapter(pooled) - pooled], layout.image_index, 2).item() < 1e-12


@SMALL_AND_LARGE
def test_oracle_12_where_gradients_go(size):
    """Oracle 12: to the student's map, the adapter and the units of both sides; not to T."""
    units = [GraphUnit(4, 16), GraphUnit(4, 16)]  # enough nodes that some pass the ReLU
    adapter = nn.Conv2d(4, 4, 1)
    student, teacher = (torch.randn(2, 4, *size, requires_grad=True) for _ in range(2))
    squared = squared_relation_gap(*units, adapter, student, teacher)
    pixel_relation_loss([squared], [teacher.numel()]).backward()
    assert teacher.grad is None
    for tensor in (student, *adapter.parameters(), *units[0].parameters()):
        assert tensor.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in units[1].parameters())
