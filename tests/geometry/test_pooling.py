"""RoIAlign with a threaded backward pass is Detectron2's RoIAlign."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from d2kd.geometry.pooling import build_pooler

STRIDES = (8, 16, 32)


@pytest.fixture
def two_threads():
    """PyTorch may use two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pyramid(dtype, channels=5):
    torch.manual_seed(0)
    maps = [torch.randn(2, channels, 160 // s, 160 // s, dtype=dtype) for s in STRIDES]
    return [m.requires_grad_() for m in maps]


def pooled(pooler, maps, boxes):
    """Values and gradients of a weighted sum of what ``pooler`` makes of ``boxes``."""
    out = pooler(maps, [Boxes(b) for b in boxes])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), maps)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("channels", [1, 5])
def test_equal_to_detectron2(two_threads, aligned, sampling_ratio, channels):
    """Values and gradients are those of Detectron2's pooler, fewer channels than threads too."""
    corners = torch.rand(2, 30, 2, dtype=torch.float64) * 130
    extents = torch.rand(2, 30, 2, dtype=torch.float64) ** 2 * 500
    boxes = list(torch.cat([corners, corners + extents], dim=2))
    maps = pyramid(torch.float64, channels)
    scales = [1 / s for s in STRIDES]
    theirs = ROIPooler(7, scales, sampling_ratio, "ROIAlignV2" if aligned else "ROIAlign")
    ours = build_pooler(7, STRIDES, sampling_ratio, aligned)
    for a, b in zip(*(pooled(p, maps, boxes) for p in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    assert "ROIAlignOnCPU" in str(ours(maps, [Boxes(b) for b in boxes]).grad_fn.next_functions)


def test_no_boxes(two_threads):
    """Without boxes there is nothing to pool, and all gradients are zero, not None."""
    boxes = [torch.zeros(0, 4), torch.zeros(0, 4)]
    out, gradients = pooled(build_pooler(7, STRIDES, 0, True), pyramid(torch.float32), boxes)
    assert out.shape == (0, 5, 7, 7)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("differentiable", [True, False])
def test_bf16(two_threads, autocast, differentiable):
    """Maps in bf16 are pooled in fp32 and keep their type: boxes are not rounded to 8 bits."""
    boxes = [torch.tensor([[3.3, 5.7, 131.3, 133.4]]), torch.zeros(0, 4)]
    pooler = build_pooler(7, STRIDES, 0, True)
    maps = [m.detach().bfloat16().requires_grad_(differentiable) for m in pyramid(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = pooler(maps, [Boxes(b) for b in boxes])
    expected = pooler([m.float() for m in maps], [Boxes(b) for b in boxes])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16())
    if differentiable:
        assert torch.autograd.grad(out.sum(), maps)[0].dtype == torch.bfloat16
