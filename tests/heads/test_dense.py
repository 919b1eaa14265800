"""Dense outputs of several levels in one tensor, and what is read of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from d2kd.detectors.bundle import DenseView
from d2kd.detectors.class_map import ClassMap
from d2kd.detectors.dense import flatten_maps
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.dense import DensePair, at_anchors, is_constant, join_levels

K, A = 3, 2
SIZES = {8: (2, 3), 16: (1, 2), 32: (1, 1)}
COUNTS = [A * h * w for h, w in SIZES.values()]


def maps(width: int, strides=tuple(SIZES)) -> dict[int, torch.Tensor]:
    """Random maps (2, A x width, H, W)."""
    return {s: torch.randn(2, A * width, *SIZES[s]) for s in strides}


def test_predictions_at_anchors():
    """The same numbers as from predictions by anchor, which lie y, x, anchor on each level."""
    torch.manual_seed(0)
    for width in (K, 4):
        levels = maps(width)
        by_anchor = torch.cat(list(flatten_maps(levels, width).values()), dim=1)
        joined = join_levels(levels, list(levels), width)
        assert joined.shape == (2, A, width, 6 + 2 + 1)
        numbers = torch.stack([torch.randperm(sum(COUNTS)) for _ in range(2)])
        expected = by_anchor.gather(1, numbers[..., None].expand(-1, -1, width))
        assert torch.equal(at_anchors(joined, numbers), expected)


def test_labels_lie_as_predictions_do():
    """Each anchor's label, and the levels that only one detector has left out."""
    torch.manual_seed(0)
    labels = torch.randint(-1, K + 1, (2, sum(COUNTS)))
    student = DenseView("student", labels=labels, logit_maps=maps(K), delta_maps=maps(4))
    strides = (16, 32)
    teacher = DenseView("teacher", logit_maps=maps(K, strides), delta_maps=maps(4, strides))
    pair = DensePair(student, teacher, K)
    assert pair.strides == [16, 32]
    # Labels as if they were predicted, one number an anchor.
    parts = zip(strides, labels.split(COUNTS, dim=1)[1:], strict=True)
    as_maps = {s: part.unflatten(1, (*SIZES[s], A)).permute(0, 3, 1, 2) for s, part in parts}
    assert torch.equal(pair.labels, join_levels(as_maps, strides, 1).squeeze(2))
    assert torch.equal(pair.foreground, (pair.labels >= 0) & (pair.labels < K))
    assert torch.equal(pair.valid, pair.labels >= 0)
    assert pair.num_foreground == pair.foreground.sum() > 0
    assert [x.shape for x in (*pair.logits, *pair.deltas)] == [(2, A, K, 3)] * 2 + [
        (2, A, 4, 3)
    ] * 2


def test_a_softmax_over_one_class_is_constant():
    """Of a one-stage student with one class, or with one that the teacher knows."""
    fields = frozenset({"dense.logits"})
    one, three = (DetectorSpec("student", "FCOS", {}, fields, num_classes=n) for n in (1, 3))
    shared = [replace(three, class_map=ClassMap(n, 4)) for n in ((-1, 2, -1), (-1, 2, 0))]
    assert [is_constant(three, teacher) for teacher in (three, *shared)] == [False, True, False]
    assert is_constant(one, one) and not is_constant(replace(one, num_stages=1), one)
