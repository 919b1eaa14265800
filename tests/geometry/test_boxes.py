"""Boxes on feature maps, against loops over boxes and cells written from the definitions."""

import math

import pytest
import torch

from d2kd.geometry import boxes as levels
from d2kd.geometry.boxes import assign_levels

from .single_level import box_cells, box_mask, crop_means


def random_boxes(images: int, boxes: int, extent: float) -> torch.Tensor:
    """(images, boxes, 4) with random corners, some of them beyond ``extent``."""
    first = torch.rand(images, boxes, 2) * extent * 1.2 - 0.1 * extent
    return torch.cat([first, first + torch.rand(images, boxes, 2) * extent / 2], dim=-1)


def loop_cells(box, size, stride, far_cell):
    """Rows and columns that a box covers, one axis after the other."""
    axes = []
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        start = math.floor(low / stride)
        stop = max(start, math.floor(high / stride) - (not far_cell))
        axes.append((min(max(start, 0), length - 1), min(max(stop, 0), length - 1)))
    return axes


def test_crop_mean():
    """The crop average takes the far cells, the mask does not."""
    feature = torch.arange(16.0).view(1, 1, 4, 4)
    box = torch.tensor([[[4.0, 4.0, 20.0, 12.0]]])
    assert crop_means(feature, box, 8).item() == 3.0
    mask = box_mask(box, torch.ones(1, 1), (4, 4), 8)
    expected = torch.zeros(1, 4, 4)
    expected[0, 0, :2] = 1
    assert torch.equal(mask, expected)


def test_level_rule():
    """Sizes in pixels and their level of five."""
    sides = torch.tensor([110.0, 111.0, 223.0, 895.0])
    boxes = torch.stack([sides * 0 + 7, sides * 0 + 3, sides + 7, sides + 3], dim=1)
    assert assign_levels(boxes, 5).tolist() == [0, 1, 2, 4]


def test_levels_are_clamped():
    """Tiny, empty and huge boxes stay in range."""
    boxes = torch.tensor([[0, 0, 0, 0], [5, 5, 4, 4], [0, 0, 1, 1], [0, 0, 1e5, 1e5]])
    assert assign_levels(boxes.float(), 3).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("size, stride", [((7, 11), 8), ((1, 1), 64), ((5, 3), 4)])
def test_crop_means_match_loop(size, stride):
    """The matrix product equals slicing and averaging, boxes beyond the map included."""
    torch.manual_seed(0)
    feature = torch.randn(2, 3, *size, dtype=torch.float64)
    boxes = random_boxes(2, 9, max(size) * stride).double()
    means = crop_means(feature, boxes, stride)
    for image in range(2):
        for index in range(9):
            (y1, y2), (x1, x2) = loop_cells(boxes[image, index].tolist(), size, stride, True)
            expected = feature[image, :, y1 : y2 + 1, x1 : x2 + 1].mean(dim=(1, 2))
            torch.testing.assert_close(means[image, index], expected)


def test_crop_means_are_exact_on_grid_lines():
    """Corners on cell borders: the far border's cell counts, and integer sums have no error."""
    feature = torch.randint(-9, 9, (1, 4, 16, 16)).float()
    boxes = torch.tensor([[[0.0, 0, 16, 8], [32, 32, 64, 64], [56, 0, 128, 128]]])
    means = crop_means(feature, boxes, 8)
    assert torch.equal(means[0, 0], feature[0, :, :2, :3].sum((1, 2)) / 6)
    assert torch.equal(means[0, 1], feature[0, :, 4:9, 4:9].sum((1, 2)) / 25)
    assert torch.equal(means[0, 2], feature[0, :, :, 7:].sum((1, 2)) / 144)


def test_crop_means_of_a_box_outside():
    """A box beyond the map takes the nearest border cells."""
    feature = torch.arange(6.0).view(1, 1, 2, 3)
    boxes = torch.tensor([[[-50.0, -50, -20, -20], [90.0, 90, 99, 99], [-9.0, 0, -1, 99]]])
    assert crop_means(feature, boxes, 4).flatten().tolist() == [0.0, 5.0, 1.5]


def test_crop_means_gradient():
    """Gradients in float64; none without boxes, but connected."""
    feature = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(2, 3, 40).double()
    assert torch.autograd.gradcheck(lambda f: crop_means(f, boxes, 8), feature)
    crop_means(feature, boxes[:, :0], 8).sum().backward()
    assert torch.equal(feature.grad, torch.zeros_like(feature))


def test_crop_means_in_half_precision():
    """Half-precision maps are averaged in float32."""
    feature = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    mean = crop_means(feature, torch.tensor([[[0.0, 0, 256, 256]]]), 4)
    assert mean.dtype == torch.float32 and mean.item() == 1.0


@pytest.mark.parametrize("far_cell", [False, True])
def test_box_cells_match_loop(far_cell):
    """The cells of each box, one after the other."""
    torch.manual_seed(1)
    size, stride = (6, 9), 16
    boxes = random_boxes(2, 12, 120)
    cells = box_cells(boxes, size, stride, far_cell=far_cell)
    for image in range(2):
        for index in range(12):
            expected = torch.zeros(size, dtype=torch.bool)
            axes = loop_cells(boxes[image, index].tolist(), size, stride, far_cell)
            (y1, y2), (x1, x2) = axes
            expected[y1 : y2 + 1, x1 : x2 + 1] = True
            assert torch.equal(cells[image, index], expected)


def test_mask_takes_the_largest_weight():
    """Overlapping boxes: the larger weight, whatever the order; weight zero is no box."""
    boxes = torch.tensor([[[0.0, 0, 16, 16], [8, 8, 24, 24], [0, 0, 32, 32]]])
    weights = torch.tensor([[0.9, 0.4, 0.0]])
    mask = box_mask(boxes, weights, (4, 4), 8)
    expected = torch.zeros(1, 4, 4)
    expected[0, 1:3, 1:3] = 0.4
    expected[0, :2, :2] = 0.9
    assert torch.equal(mask, expected)
    assert torch.equal(mask, box_mask(boxes.flip(1), weights.flip(1), (4, 4), 8))


def test_mask_of_a_small_box_is_one_cell():
    """A box inside one cell, and one between the lines of the grid, mark a single cell."""
    boxes = torch.tensor([[[9.0, 9, 12, 12]], [[5.0, 5, 11, 11]]])
    mask = box_mask(boxes, torch.ones(2, 1), (3, 3), 8)
    assert mask.flatten(1).argmax(1).tolist() == [4, 0]
    assert mask.sum().item() == 2


def test_mask_without_boxes():
    """No boxes at all: an empty mask."""
    mask = box_mask(torch.zeros(2, 0, 4), torch.zeros(2, 0), (3, 2), 8)
    assert torch.equal(mask, torch.zeros(2, 3, 2))


def test_levels_together_are_levels_apart():
    """Maps of different sizes and channels, two detectors, one call: as level by level."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[[3.0, 5, 40, 30], [0, 0, 9, 9]], [[10.0, 2, 60, 61], [30, 30, 31, 44]]])
    sizes, strides = [(8, 7), (4, 4)], [8, 16]
    pyramids = [
        [
            torch.randn(2, c, *size, generator=generator)
            for c, size in zip(channels, sizes, strict=True)
        ]
        for channels in ((3, 3), (4, 2))
    ]
    cells = levels.BoxCells(boxes, sizes, strides)
    means = levels.crop_means(pyramids, cells)
    weights = torch.rand(2, 2, 2, generator=generator)
    masks = levels.box_masks(cells, weights)
    for n, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        for pyramid, mean in zip(pyramids, means, strict=True):
            channels = pyramid[n].shape[1]
            torch.testing.assert_close(
                mean[n, ..., :channels], crop_means(pyramid[n], boxes, stride)
            )
            assert not mean[n, ..., channels:].any()
        torch.testing.assert_close(masks[n], box_mask(boxes, weights[n], size, stride))
