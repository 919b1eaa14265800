"""Boxes on the levels that their sizes ask for: Detectron2's pooler, with a threaded backward."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from d2kd.benchmark.counts import count_operators
from d2kd.geometry.pooling import PooledBoxes, place_boxes, pool_boxes

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


def pool(maps, boxes, strides=STRIDES, **options):
    return pool_boxes(maps, place_boxes(boxes, strides), **options)


def gradients(out, maps):
    """Of a weighted sum of what was pooled."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return torch.autograd.grad((out * weights).sum(), maps)


def graph_of(tensor):
    """The functions that ``tensor`` was computed by."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            seen.add(function)
            waiting += [other for other, _ in function.next_functions]
    return seen


def random_boxes(count=30):
    """Two images of boxes between one and hundreds of pixels, on all levels."""
    torch.manual_seed(1)
    corners = torch.rand(2, count, 2) * 130
    extents = torch.rand(2, count, 2) ** 2 * 900
    return list(torch.cat([corners, corners + extents], dim=2))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("channels", [1, 5])
def test_equal_to_detectron2(two_threads, aligned, sampling_ratio, channels):
    """Values and gradients are those of Detectron2's pooler, fewer channels than threads too."""
    boxes, maps = random_boxes(), pyramid(torch.float64, channels)
    scales = [1 / s for s in STRIDES]
    theirs = ROIPooler(7, scales, sampling_ratio, "ROIAlignV2" if aligned else "ROIAlign")
    expected = theirs(maps, [Boxes(b) for b in boxes])
    found = pool(maps, boxes, sampling_ratio=sampling_ratio, aligned=aligned)
    used = [(rois[:, 1] >= 0).any() for rois in place_boxes(boxes, STRIDES).rois]
    assert all(used)
    torch.testing.assert_close(found, expected)
    for ours, other in zip(gradients(found, maps), gradients(expected, maps), strict=True):
        torch.testing.assert_close(ours, other)
    functions = [str(fn) for fn in graph_of(found)]
    assert sum("ROIAlignOnCPU" in name for name in functions) == len(STRIDES)


def test_one_level():
    """A single level takes all boxes, in order."""
    boxes, maps = random_boxes(), pyramid(torch.float64)[1:2]
    expected = ROIPooler(3, [1 / 16], 0, "ROIAlignV2")(maps, [Boxes(b) for b in boxes])
    torch.testing.assert_close(pool(maps, boxes, (16,), output_size=3), expected)


def test_placed_once_for_two_pyramids():
    """Where boxes lie does not depend on the pyramid; images without boxes and levels without."""
    boxes = [torch.tensor([[0.0, 0.0, 20.0, 30.0]]), torch.zeros(0, 4)]
    placed = place_boxes(boxes, STRIDES)
    assert [int((rois[:, 1] >= 0).sum()) for rois in placed.rois] == [1, 0, 0]
    for maps in (pyramid(torch.float32), pyramid(torch.float32, channels=2)):
        expected = ROIPooler(7, [1 / s for s in STRIDES], 0, "ROIAlignV2")(
            maps, [Boxes(b) for b in boxes]
        )
        torch.testing.assert_close(pool_boxes(maps, placed), expected)


def test_no_boxes(two_threads):
    """Without boxes there is nothing to pool, and all gradients are zero, not None."""
    maps = pyramid(torch.float32)
    out = pool(maps, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert out.shape == (0, 5, 7, 7)
    assert all((g == 0).all() for g in gradients(out, maps))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("differentiable", [True, False])
def test_bf16(two_threads, autocast, differentiable):
    """Maps in bf16 are pooled in fp32 and keep their type: boxes are not rounded to 8 bits."""
    boxes = [torch.tensor([[3.3, 5.7, 131.3, 133.4]]), torch.zeros(0, 4)]
    maps = [m.detach().bfloat16().requires_grad_(differentiable) for m in pyramid(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = pool(maps, boxes)
    expected = pool([m.float() for m in maps], boxes)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16())
    if differentiable:
        assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(out.sum(), maps))


def test_boxes_at_the_edge_of_a_level_and_beyond_the_image():
    """They are where Detectron2 puts them."""
    sides = [112.0 * octave * f for octave in (1, 2, 4) for f in (0.999, 1, 1.001)]
    boxes = [torch.tensor([[0, 0, s, s] for s in sides]), torch.tensor([[-90.0, 80, 300, 400]])]
    maps = pyramid(torch.float32)
    theirs = ROIPooler(7, [1 / s for s in STRIDES], 0, "ROIAlignV2")
    expected = theirs(maps, [Boxes(b) for b in boxes])
    torch.testing.assert_close(pool(maps, boxes), expected, rtol=0, atol=1e-6)


def test_nothing_waits():
    """Neither the levels of boxes nor their number are asked of the device."""
    boxes, maps = random_boxes(), pyramid(torch.float32)
    counts = count_operators(lambda: pool(maps, boxes).sum().backward(), torch.nn.Identity())
    assert counts.operators > 10 and not counts.waits


def test_pooled_like_a_recorded_call():
    """Boxes that a pooler of Detectron2's laid out are pooled on other maps, and by other layers,
    as that pooler would pool them: equal to the last bit, without a wait."""
    boxes, maps = random_boxes(), [m.detach() for m in pyramid(torch.float32)]
    pooler, larger = (ROIPooler(p, [1 / s for s in STRIDES], 0, "ROIAlignV2") for p in (7, 9))
    level_rois = []
    for layer in pooler.level_poolers:
        layer.register_forward_pre_hook(lambda _, inputs: level_rois.append(inputs[1]))
    features = pooler(maps, [Boxes(b) for b in boxes])
    recorded = PooledBoxes(boxes, features, list(level_rois), pooler)
    other = [m.square() for m in maps]
    found = []
    counts = count_operators(
        lambda: found.extend(recorded.pool(p.level_poolers, other) for p in (pooler, larger)),
        torch.nn.Identity(),
    )
    assert not counts.waits
    for pooled, by in zip(found, (pooler, larger), strict=True):
        assert torch.equal(pooled, by(other, [Boxes(b) for b in boxes]))
