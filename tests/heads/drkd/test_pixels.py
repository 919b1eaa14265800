"""The gap of DRKD's pixel-wise relation: brute force, oracles, degenerate inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2kd.heads.drkd.graph import GraphUnit
from d2kd.heads.drkd.pixels import Level, squared_relation_gaps
from d2kd.losses.drkd import pixel_relation_loss

from .test_graph import brute_force_graph_unit, random_graph_unit


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def squared_gap(student_unit, teacher_unit, adapter, student, teacher) -> torch.Tensor:
    """The gap of one level."""
    level = Level(student_unit, teacher_unit, adapter, student, teacher)
    return squared_relation_gaps([level])[0]


def identity_adapter(channels: int) -> nn.Conv2d:
    adapter = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(adapter.weight)
    nn.init.zeros_(adapter.bias)
    return adapter


SMALL_AND_LARGE = pytest.mark.parametrize("size", [(1, 2), (4, 5)], ids=["small map", "large map"])


@SMALL_AND_LARGE
def test_squared_gap_equals_brute_force(size):
    """||adapter(phi_s(S)) - phi_t(T)||^2 for different widths, gradients included."""
    student_unit, teacher_unit = random_graph_unit(3, 2), random_graph_unit(4, 3)
    adapter = nn.Conv2d(3, 4, 1).double()
    student = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *size, dtype=torch.float64)
    leaves = [student, *student_unit.parameters(), *teacher_unit.parameters()]
    leaves += adapter.parameters()
    actual = squared_gap(student_unit, teacher_unit, adapter, student, teacher)
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
        lambda x: squared_gap(*units, adapter, x, teacher), student.requires_grad_()
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("side", [12, 40])
def test_squared_gap_in_float32(side, gap, memory_format):
    """Features with a large mean and a small gap: the error is within what the docstring says.

    Each sum over N products is wrong by about eps sqrt(N) of the sum of their sizes, and the gap is
    a difference of sums that are 2 / gap^2 times as large.
    """
    unit, adapter = GraphUnit(32, 16), identity_adapter(32)
    teacher = 10 + torch.randn(2, 32, side, side)
    student = (teacher + gap * torch.randn_like(teacher)).contiguous(memory_format=memory_format)
    actual = squared_gap(unit, unit, adapter, student, teacher)
    unit, adapter = unit.double(), adapter.double()
    expected = squared_gap(unit, unit, adapter, student.double(), teacher.double())
    tolerance = torch.finfo(torch.float32).eps * side * 2 / gap**2
    assert actual.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@SMALL_AND_LARGE
def test_gap_within_rounding_is_zero(size, dtype):
    """Equal sides: a loss of exactly zero with a zero gradient, not the root of rounding errors."""
    unit, adapter = GraphUnit(3, 2).to(dtype), identity_adapter(3).to(dtype)
    x = (5 + torch.randn(2, 3, *size, dtype=dtype)).requires_grad_()
    squared = squared_gap(unit, unit, adapter, x, x.detach())
    pixel_relation_loss(squared[None], [x.numel()]).backward()
    assert squared == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (8, 8)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_are_finite(value, batch, size):
    """All-zero and constant maps, and maps of one pixel: finite output and gradients."""
    unit, adapter = GraphUnit(4, 2), nn.Conv2d(4, 4, 1)
    x = torch.full((batch, 4, *size), value, requires_grad=True)
    squared = squared_gap(unit, GraphUnit(4, 2), adapter, x, torch.full_like(x, value))
    pixel_relation_loss(squared[None], [x.numel()]).backward()
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
        squared = squared_gap(unit, GraphUnit(4, 2), nn.Conv2d(4, 4, 1), x, x.detach())
        pixel_relation_loss(squared[None], [x.numel()]).backward()
    assert squared.dtype == torch.float32 and squared.isfinite()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


# --- many units together --------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(3, 3), (3, 5)], ids=["equal widths", "other widths"])
def test_levels_together_equal_levels_alone(widths):
    """Levels with other sizes and node counts, both sides: as if each came alone, gradients too."""
    nodes, sizes = (2, 2, 4, 2), ((6, 5), (3, 4), (2, 2), (1, 1))
    sides = [[random_graph_unit(width, n) for n in nodes] for width in widths]
    adapters = [nn.Conv2d(*widths, 1).double() for _ in nodes]
    students = [torch.randn(2, widths[0], *s).double().requires_grad_() for s in sizes]
    teachers = [torch.randn(2, widths[1], *s).double() for s in sizes]
    modules = nn.ModuleList([*sides[0], *sides[1], *adapters])
    leaves = [*students, *modules.parameters()]
    zipped = zip(*sides, adapters, students, teachers, strict=True)
    levels = [Level(*level) for level in zipped]
    together = squared_relation_gaps(levels)
    alone = [squared_gap(*level) for level in levels]
    torch.testing.assert_close(together, torch.stack(alone))
    weights = torch.rand(len(nodes), dtype=torch.float64)
    actual = torch.autograd.grad(together @ weights, leaves)
    expected = torch.autograd.grad(torch.stack(alone) @ weights, leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_widths_that_change_between_levels():
    """Levels of different width follow one another in the order in which they came."""
    widths, units = ((3, 3), (3, 4), (3, 3)), ([], [])
    adapters, maps = [], ([], [])
    for pair in widths:
        adapters.append(nn.Conv2d(*pair, 1).double())
        for side, width in enumerate(pair):
            units[side].append(random_graph_unit(width))
            maps[side].append(torch.randn(2, width, 4, 4, dtype=torch.float64))
    levels = [Level(*level) for level in zip(*units, adapters, *maps, strict=True)]
    together = squared_relation_gaps(levels)
    alone = [squared_gap(*level) for level in levels]
    torch.testing.assert_close(together, torch.stack(alone))


def test_half_precision_gradients():
    """bfloat16 maps: the gap of their values, and a gradient that float32 agrees with."""
    units, adapter = (GraphUnit(8, 4), GraphUnit(8, 4)), nn.Conv2d(8, 8, 1)
    student = torch.randn(2, 8, 12, 12).bfloat16().requires_grad_()
    teacher = torch.randn(2, 8, 12, 12).bfloat16()
    wide = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = squared_gap(*units, adapter, student, teacher)
        half.backward()
    full = squared_gap(*units, adapter, wide, teacher.float())
    full.backward()
    torch.testing.assert_close(half, full)
    rounding = 2**-8 * wide.grad.abs().max().item()
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=0, atol=rounding)


# --- together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 2), (5, 5)])
def test_equal_sides_have_no_loss(size):
    """Equal features, equal units and identity adapters: the loss is 0."""
    unit, x = random_graph_unit(4), torch.randn(2, 4, *size, dtype=torch.float64)
    squared = squared_gap(unit, unit, identity_adapter(4).double(), x, x)
    assert pixel_relation_loss(squared[None], [x.numel()]).item() == 0


@SMALL_AND_LARGE
def test_where_gradients_go(size):
    """To the student's map, the adapter and the units of both sides; not to T."""
    units = [GraphUnit(4, 16), GraphUnit(4, 16)]  # enough nodes that some pass the ReLU
    adapter = nn.Conv2d(4, 4, 1)
    student, teacher = (torch.randn(2, 4, *size, requires_grad=True) for _ in range(2))
    squared = squared_gap(*units, adapter, student, teacher)
    pixel_relation_loss(squared[None], [teacher.numel()]).backward()
    assert teacher.grad is None
    for tensor in (student, *adapter.parameters(), *units[0].parameters()):
        assert tensor.grad.abs().max() > 0
    assert all(p.grad.abs().max() > 0 for p in units[1].parameters())
