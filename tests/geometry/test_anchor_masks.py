"""Multi-value masks against the reconstruction's oracles and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2kd.geometry.anchor_masks import MASK_KINDS, MaskRule, multi_value_masks
from d2kd.geometry.anchors import pseudo_anchors

IMAGE = (800, 1344)

# Section 3.1 of the reconstruction: detector, box, (positions > 0, largest value, sum) per level.
TABLE = [
    (
        "retinanet",
        (400, 300, 500, 380),
        [(100, 6, 452), (22, 9, 107), (18, 6, 60), (30, 6, 100), (0, 0, 0)],
    ),
    (
        "retinanet",
        (400, 300, 424, 316),
        [(24, 6, 72), (30, 6, 103), (0, 0, 0), (0, 0, 0), (0, 0, 0)],
    ),
    (
        "retinanet",
        (200, 100, 700, 600),
        [(0, 0, 0), (0, 0, 0), (215, 6, 1090), (30, 6, 126), (16, 9, 79)],
    ),
    (
        "rpn",
        (400, 300, 500, 380),
        [(444, 3, 1324), (74, 3, 214), (57, 3, 123), (88, 3, 170), (0, 0, 0)],
    ),
    (
        "rpn",
        (400, 300, 424, 316),
        [(69, 3, 139), (100, 3, 196), (0, 0, 0), (0, 0, 0), (0, 0, 0)],
    ),
    (
        "rpn",
        (200, 100, 700, 600),
        [(0, 0, 0), (0, 0, 0), (0, 0, 0), (209, 3, 603), (26, 3, 58)],
    ),
]


def grid(shapes, height: int, width: int, stride: float, offset: float) -> Tensor:
    """Anchors (H * W * K, 4) of ``shapes`` (w, h) centred at ((x + offset) * stride, ...)."""
    boxes = []
    for y in range(height):
        for x in range(width):
            cx, cy = (x + offset) * stride, (y + offset) * stride
            boxes += [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for w, h in shapes]
    return torch.tensor(boxes)


def mmdetection_levels(detector: str, image: tuple[int, int] = IMAGE):
    """Anchors and sizes by mmdetection's convention: centres at (x * s, y * s), ratios h / w."""
    strides = (4, 8, 16, 32, 64) if detector == "rpn" else (8, 16, 32, 64, 128)
    scales = (8.0,) if detector == "rpn" else tuple(4 * 2 ** (i / 3) for i in range(3))
    anchors, sizes = {}, {}
    for s in strides:
        sizes[s] = math.ceil(image[0] / s), math.ceil(image[1] / s)
        shapes = [
            (s * scale / math.sqrt(ratio), s * scale * math.sqrt(ratio))
            for ratio in (0.5, 1.0, 2.0)
            for scale in scales
        ]
        anchors[s] = grid(shapes, *sizes[s], stride=s, offset=0)
    return anchors, sizes


def iou(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height) if width * height else 0.0


def masks_by_loops(anchors, sizes, gt_boxes, kind, psi, kappa) -> dict[int, Tensor]:
    """Masks written from the formulas, one object, level, position and anchor at a time."""
    strides = list(sizes)
    masks = {s: torch.zeros(len(gt_boxes), *sizes[s]) for s in strides}
    per_position = {s: len(anchors[s]) // math.prod(sizes[s]) for s in strides}
    for b, boxes in enumerate(gt_boxes):
        for g in boxes.tolist():
            overlaps = {s: [iou(a, g) for a in anchors[s].tolist()] for s in strides}
            best = {s: max(overlaps[s]) for s in strides}
            if max(best.values()) == 0:
                continue
            side = math.sqrt((g[2] - g[0]) * (g[3] - g[1]))
            home = strides[min(max(math.floor(math.log2(side / 56)), 0), len(strides) - 1)]
            for s in strides:
                takes_part = best[s] > 0 and best[s] >= kappa * max(best.values())
                if not (s == home and best[s] > 0 if kind == "roi_level" else takes_part):
                    continue
                for y in range(sizes[s][0]):
                    for x in range(sizes[s][1]):
                        first = (y * sizes[s][1] + x) * per_position[s]
                        here = overlaps[s][first : first + per_position[s]]
                        near = [v for v in here if v > psi * best[s]]
                        u = ((x + 0.5) * s - (g[0] + g[2]) / 2) / ((g[2] - g[0]) / 2)
                        v = ((y + 0.5) * s - (g[1] + g[3]) / 2) / ((g[3] - g[1]) / 2)
                        reach = max(abs(u), abs(v))
                        cell = masks[s][b, y, x]
                        if kind in ("count", "roi_level"):
                            cell += len(near)
                        elif kind == "binary":
                            cell.fill_(max(float(cell), float(bool(near))))
                        elif kind == "iou":
                            cell.fill_(max(float(cell), max(near, default=0) / best[s]))
                        elif kind == "gauss" and reach < 1:
                            cell.fill_(max(float(cell), math.exp(-(u * u + v * v) / 2)))
                        elif kind == "zones":
                            cell.fill_(max(float(cell), (reach < 1) + (reach < 1.5)))
    return masks


def random_boxes(count: int, seed: int, size: float = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = size * torch.rand(count, 2, generator=generator)
    half = size / 40 * torch.exp(2.5 * torch.rand(count, 2, generator=generator))
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, size)


TWO_SHAPES = {10: grid([(10, 10), (20, 20)], 3, 3, 10, 0.5)}
THREE_BY_THREE = {10: (3, 3)}
CENTRE = torch.tensor([[10.0, 10, 20, 20]])
CROSS = torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    "psi, expected",
    [(0.5, [[0, 0, 0], [0, 1, 0], [0, 0, 0]]), (0.2, [[0, 0, 0], [0, 2, 0], [0, 0, 0]])]
    + [(0.1, CROSS.tolist())],
)
def test_small_grid(psi, expected):
    """Counts of two anchor shapes on a 3 x 3 grid at three thresholds."""
    masks = multi_value_masks(TWO_SHAPES, THREE_BY_THREE, [CENTRE], MaskRule(iou_ratio=psi))
    assert masks[10].tolist() == [expected]


def test_duplicated_object():
    """An object given twice doubles the mask, unless it is capped at K."""
    boxes = CENTRE.repeat(2, 1)
    masks = multi_value_masks(TWO_SHAPES, THREE_BY_THREE, [boxes], MaskRule(iou_ratio=0.1))
    assert masks[10][0].tolist() == (2 * CROSS).tolist()
    masks = multi_value_masks(
        TWO_SHAPES, THREE_BY_THREE, [boxes], MaskRule(iou_ratio=0.1, cap=True)
    )
    assert masks[10][0].tolist() == (2 * CROSS).clamp(max=2).tolist()


def test_object_between_anchors():
    """Two anchors that share an object half and half are both near it."""
    anchors = {10: grid([(10, 10)], 3, 3, 10, 0.5)}
    masks = multi_value_masks(anchors, THREE_BY_THREE, [torch.tensor([[5.0, 10, 15, 20]])])
    assert masks[10][0].tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_iou_values():
    """The ``iou`` kind gives 1 at the centre and 1/9 at its four neighbours."""
    masks = multi_value_masks(TWO_SHAPES, THREE_BY_THREE, [CENTRE], MaskRule("iou", 0.1))
    expected = torch.tensor([[0, 1 / 9, 0], [1 / 9, 1, 1 / 9], [0, 1 / 9, 0]])
    torch.testing.assert_close(masks[10][0], expected)


@pytest.mark.parametrize("detector, box, expected", TABLE)
def test_reference_table(detector, box, expected):
    """The six boxes of section 3.1 on an 800 x 1344 image, exactly."""
    anchors, sizes = mmdetection_levels(detector)
    masks = multi_value_masks(anchors, sizes, [torch.tensor([box], dtype=torch.float32)])
    found = [(int((m > 0).sum()), int(m.max()), int(m.sum())) for m in masks.values()]
    assert found == expected


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("anchors_are", ["regular", "perturbed", "fewer on a level"])
def test_masks_by_loops(kind, anchors_are):
    """Each kind equals plain loops on random boxes and several sorts of anchors."""
    sizes = {8: (8, 8), 16: (4, 4), 32: (2, 2)}
    anchors = {
        s: grid([(2 * s, 2 * s), (3 * s, 1.5 * s)], *size, stride=s, offset=0)
        for s, size in sizes.items()
    }
    if anchors_are == "fewer on a level":
        anchors[16] = grid([(32, 40)], *sizes[16], stride=16, offset=0.5)
    if anchors_are == "perturbed":
        generator = torch.Generator().manual_seed(1)
        anchors = {s: a + torch.rand(a.shape, generator=generator) for s, a in anchors.items()}
    boxes = [random_boxes(7, 1), random_boxes(0, 2), random_boxes(3, 3)]
    masks = multi_value_masks(anchors, sizes, boxes, MaskRule(kind, 0.4, 0.3), max_pairs=500)
    expected = masks_by_loops(anchors, sizes, boxes, kind, 0.4, 0.3)
    for stride in sizes:
        torch.testing.assert_close(masks[stride], expected[stride], atol=1e-5, rtol=1e-5)
    assert sum(int((mask > 0).sum()) for mask in masks.values()) > 10


def test_chunks_do_not_matter():
    """The masks are the same however few object-anchor pairs are held at a time."""
    anchors, sizes = mmdetection_levels("retinanet", (128, 128))
    boxes = [random_boxes(9, 1, size=128), random_boxes(4, 2, size=128)]
    for kind in MASK_KINDS:
        whole = multi_value_masks(anchors, sizes, boxes, MaskRule(kind))
        chunked = multi_value_masks(anchors, sizes, boxes, MaskRule(kind), max_pairs=1)
        for stride in sizes:
            assert torch.equal(whole[stride], chunked[stride])


def test_full_threshold_selects_nothing():
    """With psi = 1 no anchor exceeds the best one."""
    masks = multi_value_masks(TWO_SHAPES, THREE_BY_THREE, [CENTRE], MaskRule(iou_ratio=1.0))
    assert masks[10].sum() == 0


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_degenerate_boxes(kind):
    """No objects, objects without area, inside out or far outside leave finite, empty masks."""
    anchors, sizes = mmdetection_levels("rpn", (64, 96))
    degenerate = torch.tensor(
        [[10.0, 10, 10, 30], [10, 10, 30, 10], [5, 5, 5, 5], [30, 30, 10, 10]]
        + [[9000.0, 9000, 9100, 9100]]
    )
    for boxes in ([torch.zeros(0, 4), torch.zeros(0, 4)], [degenerate, torch.zeros(0, 4)]):
        masks = multi_value_masks(anchors, sizes, boxes, MaskRule(kind))
        assert [tuple(m.shape) for m in masks.values()] == [(2, *size) for size in sizes.values()]
        assert all(mask.sum() == 0 for mask in masks.values())


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_crowd_of_objects(kind):
    """300 objects give finite masks, and each object's level knows it."""
    anchors, sizes = mmdetection_levels("rpn", (256, 256))
    masks = multi_value_masks(anchors, sizes, [random_boxes(300, 5, size=256)], MaskRule(kind))
    assert all(torch.isfinite(mask).all() for mask in masks.values())
    assert masks[4].sum() > 0


def test_batch_equals_single_images():
    """Images of a batch do not mix."""
    anchors, sizes = mmdetection_levels("rpn", (128, 128))
    boxes = [random_boxes(5, 1, size=128), random_boxes(0, 2), random_boxes(2, 3, size=128)]
    masks = multi_value_masks(anchors, sizes, boxes)
    for i, one in enumerate(boxes):
        alone = multi_value_masks(anchors, sizes, [one])
        assert all(torch.equal(masks[s][i], alone[s][0]) for s in sizes)


def test_pseudo_anchors():
    """Pseudo-anchors sit on the cell centres, eight strides wide, in the order (y, x, anchor)."""
    anchors = pseudo_anchors({8: (2, 3), 16: (1, 2)}, torch.device("cpu"))
    assert {s: tuple(a.shape) for s, a in anchors.items()} == {8: (18, 4), 16: (6, 4)}
    shapes = [(64 / math.sqrt(r), 64 * math.sqrt(r)) for r in (0.5, 1.0, 2.0)]
    torch.testing.assert_close(anchors[8], grid(shapes, 2, 3, 8, 0.5))
    masks = multi_value_masks(anchors, {8: (2, 3), 16: (1, 2)}, [torch.tensor([[0.0, 0, 20, 16]])])
    assert masks[8].max() == 3


def test_unknown_kind():
    """An unknown kind is an error that names the valid ones."""
    with pytest.raises(ValueError, match="count, binary, iou"):
        multi_value_masks(TWO_SHAPES, THREE_BY_THREE, [CENTRE], MaskRule("counts"))
