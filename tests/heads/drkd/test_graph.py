"""DRKD's graph units: brute force, oracles, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2kd.heads.drkd.graph import (
    GraphUnit,
    Moments,
    Pixels,
    affine_maps,
    quadratic_forms,
    refine_pixels,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    """A unit to compute by hand: one channel, one node, weights one."""
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


def moments_of(x: torch.Tensor) -> Moments:
    """What units read of one map."""
    pixels = x.flatten(2)
    mean = pixels.mean(2)
    centred = pixels - mean.unsqueeze(2)
    size = torch.tensor([float(pixels.shape[2])], dtype=x.dtype)
    return Moments(size, mean[None], (centred @ centred.mT)[None])


def from_moments(unit: GraphUnit, x: torch.Tensor) -> torch.Tensor:
    """phi(x) by the affine map that the unit makes of the moments of x."""
    moments = moments_of(x)
    (matrix,), (offset,) = affine_maps([unit], moments)
    centred = x.flatten(2) - moments.mean[0].unsqueeze(2)
    return (matrix @ centred + offset.unsqueeze(2)).view_as(x)


def from_pixels(unit: GraphUnit, x: torch.Tensor) -> torch.Tensor:
    """phi(x) by the formulas."""
    return refine_pixels([unit], Pixels.of([x], x.dtype))[0].view_as(x)


BOTH_EVALUATIONS = pytest.mark.parametrize("phi", [from_moments, from_pixels])


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
        reference(phi(plain, x) - x)
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


@BOTH_EVALUATIONS
def test_graph_unit(phi):
    """A unit small enough to compute by hand."""
    expected = torch.tensor([[[[5.99975, 11.9995]]]], dtype=torch.float64)
    torch.testing.assert_close(phi(example_graph_unit(), EXAMPLE_MAP), expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[[[3.499875, 6.99975]]]], dtype=torch.float64)
    actual = phi(example_graph_unit(normalize=True), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[[[8.0e-6, 2.999992]]]], dtype=torch.float64)
    actual = phi(example_graph_unit().train(), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@BOTH_EVALUATIONS
def test_node_mixing(phi):
    """Mixing over nodes with -1 cancels the nodes, with +0.2 it strengthens them."""
    assert torch.equal(phi(example_graph_unit(mix=-1), EXAMPLE_MAP), EXAMPLE_MAP)
    expected = torch.tensor([[[[6.9997, 13.9994]]]], dtype=torch.float64)
    actual = phi(example_graph_unit(mix=0.2), EXAMPLE_MAP)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@BOTH_EVALUATIONS
def test_zero_norm_is_identity(phi):
    """Without batch norm's scale and shift the unit is the identity."""
    unit = GraphUnit(3, 2, zero_init_norm=True).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(phi(unit, x), x, rtol=0, atol=1e-14)


@BOTH_EVALUATIONS
def test_permutation_of_pixels(phi):
    """The order of the pixels does not matter, so neither do flips."""
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


def test_quadratic_forms_gradcheck():
    """The backward pass that relies on symmetry agrees with finite differences."""
    matrix = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    root = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, r: quadratic_forms(a, r @ r.mT), (matrix, root))


SIZES = ((6, 5), (3, 4), (1, 1))


def three_maps(gradients: bool = False) -> list[torch.Tensor]:
    """Maps of two images, of different sizes."""
    return [torch.randn(2, 3, *s, dtype=torch.float64, requires_grad=gradients) for s in SIZES]


def assert_equal_gradients(actual, expected, leaves) -> None:
    """The sums have equal gradients with respect to all of ``leaves``."""
    found = torch.autograd.grad(actual, leaves)
    for a, e in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_padded_maps_equal_maps_alone():
    """Maps of different sizes, padded to one tensor: as if each came alone, gradients too."""
    units, maps = nn.ModuleList(random_graph_unit() for _ in SIZES), three_maps(gradients=True)
    pixels = Pixels.of(maps, torch.float64)
    together = pixels.mask(refine_pixels(units, pixels))
    alone = [from_pixels(unit, x).flatten(2) for unit, x in zip(units, maps, strict=True)]
    for refined, own in zip(together, alone, strict=True):
        torch.testing.assert_close(refined[:, :, : own.shape[2]], own)
    leaves = [*maps, *units.parameters()]
    squares = sum(own.square().sum() for own in alone)
    assert_equal_gradients(together.square().sum(), squares, leaves)


def test_runs_of_units_equal_units_alone():
    """Units with other node counts between them: as if each came alone, running statistics too."""
    units = [random_graph_unit(nodes=n) for n in (2, 4, 2)]
    each = [moments_of(x) for x in three_maps()]
    copies = [random_graph_unit(nodes=n) for n in (2, 4, 2)]
    for copy, unit in zip(copies, units, strict=True):
        copy.load_state_dict(unit.state_dict())
    matrices, offsets = affine_maps(units, Moments(*map(torch.cat, zip(*each, strict=True))))
    for k, (copy, moments) in enumerate(zip(copies, each, strict=True)):
        (matrix,), (offset,) = affine_maps([copy], moments)
        torch.testing.assert_close(matrices[k], matrix)
        torch.testing.assert_close(offsets[k], offset)
        for name, value in copy.state_dict().items():
            torch.testing.assert_close(units[k].state_dict()[name], value)
