"""Helpers of losses: softened divergence, unit vectors, rows of several images in a grid."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.utils.rnn import pad_sequence

from d2kd.numerics import (
    MIN_LENGTH,
    Ragged,
    connected_zero,
    full_precision,
    image_index,
    repeat_each,
    softened_kl,
    unit_vectors,
)

# --- precision ------------------------------------------------------------------------------------


def test_full_precision_widens_what_is_half():
    """Half-precision tensors, also inside of other values, come as float32, the rest as it is."""

    class Options(NamedTuple):
        scale: Tensor
        size: int

    @full_precision
    def dtypes(x, maps, options, *, by_name):
        assert not torch.is_autocast_enabled("cpu")
        return x.dtype, maps[0].dtype, options.scale.dtype, options.size, by_name["y"].dtype

    half, double = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dtypes(half, [double], Options(half, 3), by_name={"y": half.to(torch.float16)})
    assert found == (torch.float32, torch.float64, torch.float32, 3, torch.float32)


def test_connected_zero():
    """Zero, with a gradient of zeros towards each tensor, also of a scalar and an empty one."""
    tensors = [
        torch.full((2, 3), math.inf, requires_grad=True),
        torch.tensor(2.0, requires_grad=True),
        torch.zeros(0, 4, requires_grad=True),
    ]
    zero = connected_zero(*tensors)
    assert zero.shape == () and zero == 0
    zero.backward()
    assert all(t.grad is not None and not t.grad.any() for t in tensors)


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_softened_kl_equals_the_formula(temperature, weighted):
    """T^2 sum w p log(p / q), written out."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator).double()
    weights = torch.rand(5, generator=generator).double() if weighted else None
    total = 0.0
    for i in range(5):
        p, q = ((row[i] / temperature).exp().tolist() for row in (teacher, student))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += temperature**2 * kl * (weights[i].item() if weighted else 1)
    loss = softened_kl(student, teacher, temperature, weights)
    assert loss.item() == pytest.approx(total, rel=1e-10)


def test_softened_kl_gradient():
    """Against finite differences, over another dimension too; the teacher has none."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 4, 2, generator=generator).double()
    student.requires_grad_()
    teacher.requires_grad_()
    weights = torch.rand(3, 2, generator=generator).double()
    assert gradcheck(lambda s: softened_kl(s, teacher.detach(), 2.0, weights, dim=1), student)
    softened_kl(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_softened_kl_limits():
    """Equal and saturated logits give zero; no prediction gives a connected zero."""
    logits = torch.tensor([[90.0, -90.0], [0.0, 0.0]], requires_grad=True)
    loss = softened_kl(logits, logits.detach())
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    nothing = torch.zeros(0, 3, requires_grad=True)
    loss = softened_kl(nothing, torch.zeros(0, 3))
    loss.backward()
    assert loss == 0 and nothing.grad is not None


# --- unit vectors ---------------------------------------------------------------------------------


def test_unit_vectors():
    """Length one along the dimension; the gradient agrees with finite differences."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    for dim in (-1, 1):
        assert torch.allclose(unit_vectors(x, dim).norm(dim=dim), torch.ones(()).double())
        assert gradcheck(lambda v, dim=dim: unit_vectors(v, dim), x)


def test_vectors_without_direction():
    """At most MIN_LENGTH: zero, and so is the gradient; NaN stays NaN."""
    rows = [[0.0, 0.0], [MIN_LENGTH / 2, 0.0], [3.0, 4.0], [math.nan, 1.0]]
    x = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    unit = unit_vectors(x)
    assert not unit[:2].any() and unit[2].tolist() == pytest.approx([0.6, 0.8])
    assert unit[3].isnan().all()
    unit[:3].sum().backward()
    assert not x.grad[:2].any() and x.grad[2].any()


# --- rows of several images -----------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[2, 2], [3, 0, 1], [1], [0, 0], [2, 5]])
def test_rows_in_a_grid(counts):
    """Padded as ``pad_sequence`` does it, and back; places and images of rows."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 2, generator=generator) for n in counts]
    rows, layout = torch.cat(parts), Ragged.of(parts)
    grid = layout.pad(rows, fill=7.0)
    expected = pad_sequence([*parts, torch.zeros(1, 2)], batch_first=True, padding_value=7.0)[:-1]
    torch.testing.assert_close(grid, expected)
    torch.testing.assert_close(layout.unpad(grid), rows)
    assert layout.lengths.tolist() == layout.valid.sum(1).tolist() == counts
    assert torch.equal(grid.flatten(0, 1)[layout.slots], rows)
    images = [i for i, n in enumerate(counts) for _ in range(n)]
    assert layout.image_index.tolist() == image_index(parts).tolist() == images
    assert layout.image_index.dtype == torch.long


def test_equal_counts_copy_nothing():
    """Equally many rows an image: the grid is a view."""
    rows = torch.randn(6, 2)
    layout = Ragged([3, 3])
    assert layout.pad(rows).data_ptr() == layout.unpad(layout.pad(rows)).data_ptr()
    assert layout.pad(rows).data_ptr() == rows.data_ptr()


def test_gradients_through_the_grid():
    """Each row gets the gradient of its place."""
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    layout = Ragged([1, 3])
    assert gradcheck(lambda x: layout.pad(x).square(), rows)
    assert gradcheck(lambda x: layout.unpad(layout.pad(x)).square(), rows)


def test_repeat_each():
    """Each value of the last dimension as often as asked; not at all where that is 0."""
    values = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    repeated = repeat_each(values, [2, 0, 1])
    assert repeated.tolist() == [[1, 1, 3], [4, 4, 6]]
