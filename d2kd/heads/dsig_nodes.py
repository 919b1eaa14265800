"""The nodes of DSIG's graphs: the boxes on which student and teacher are compared.

A two-stage student brings its sampled RoIs; a dense one the best boxes that it currently predicts.

Shapes: B images, R nodes of all images, C channels, P pooled size, K classes, A anchors per
position; n candidates of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from ..detectors.bundle import DenseView
from ..numerics import Ragged, on_device
from .dense import at_anchors, join_levels

# Further than any sound box, in pixels; infinity, which is for the trainer to report, becomes it.
_FARTHEST = 1e5


@dataclass(frozen=True)
class Graph:
    """The boxes of a batch on which student and teacher are compared.

    Attributes:
        student, teacher: (R, C, P, P) pooled features.
        layout: the images of the nodes.
        foreground, has_edges: (R,) bool; None: all.
    """

    student: Tensor
    teacher: Tensor
    layout: Ragged
    foreground: Tensor | None = None
    has_edges: Tensor | None = None

    @property
    def looks_are_free(self) -> bool:
        """Whether numbers are read without waiting for the device."""
        return self.student.device.type == "cpu"

    def with_edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes by image: student's (B, M, C P P), teacher's, and which have edges (B, M).

        On a CPU nodes without edges are left out, as the work grows with the square of M. On a GPU
        it would take a wait for the device to know how many those are.
        """
        nodes, layout = [self.student.flatten(1), self.teacher.flatten(1)], self.layout
        if self.has_edges is None:
            has_edges = layout.valid
        else:
            has_edges = layout.pad(self.has_edges)
            if self.looks_are_free:
                rows = self.has_edges.nonzero().squeeze(1)
                layout = Ragged(has_edges.sum(1).tolist())
                nodes, has_edges = [x.index_select(0, rows) for x in nodes], layout.valid
        student, teacher = map(layout.pad, nodes)
        return student, teacher, has_edges


class _Candidates(NamedTuple):
    """Predictions of a dense detector, best first: each (B, n)."""

    scores: Tensor
    classes: Tensor
    anchors: Tensor  # their number among the anchors of all levels, ordered y, x, anchor


@dataclass(frozen=True)
class TopPredictions:
    """The best boxes that a dense detector currently predicts: the nodes of its graph.

    There is no score threshold, so a graph has its nodes from the first iteration on.

    Attributes:
        per_level: (position, class) pairs that a pyramid level may propose for an image.
        nms_threshold: IoU of the class-wise non-maximum suppression.
        per_image: boxes that are kept over all levels.
    """

    per_level: int = 1000
    nms_threshold: float = 0.5
    per_image: int = 100

    @torch.no_grad()
    def __call__(self, dense: DenseView, image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Per image (n_i, 4) xyxy boxes, best first, clipped to the image; constants.

        Waits for the device: how many boxes are left of an image decides shapes.
        """
        found = self._candidates(dense)
        count = found.scores.shape[1]
        # What is left of the first does not depend on the rest, and a suppression takes time with
        # the square of its boxes, on a GPU too.
        first = min(count, 10 * self.per_image)
        kept = self._suppress(dense, _Candidates(*(x[:, :first] for x in found)), image_sizes)
        if first == count or all(len(boxes) == self.per_image for boxes in kept):
            return kept
        return self._suppress(dense, found, image_sizes)

    def _candidates(self, dense: DenseView) -> _Candidates:
        """The best (position, class) pairs of each level."""
        scores, places, areas = [], [], []
        for logits in dense.logit_maps.values():
            pairs = logits.flatten(1)
            best, place = pairs.topk(min(self.per_level, pairs.shape[1]), dim=1)
            scores.append(best)
            places.append(place)
            areas.append(logits.shape[2] * logits.shape[3])
        # Where it lies in its map (A, K, H W), from where it lies in memory.
        counts = [best.shape[1] for best in scores]
        levels = np.stack([areas, np.cumsum(areas) - areas]).repeat(counts, axis=1)
        area, start = on_device(levels, scores[0].device)
        place = torch.cat(places, dim=1)
        channel, position = place // area, place % area + start
        stride, logits = next(iter(dense.logit_maps.items()))
        num_anchors = dense.delta_maps[stride].shape[1] // 4
        num_classes = logits.shape[1] // num_anchors
        anchors = position * num_anchors + channel // num_classes
        best, order = torch.cat(scores, dim=1).float().sort(dim=1, descending=True)
        return _Candidates(best, (channel % num_classes).gather(1, order), anchors.gather(1, order))

    def _suppress(
        self, dense: DenseView, found: _Candidates, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Decode candidates and keep the best that no better one of their class overlaps."""
        boxes = self._decode(dense, found.anchors)
        # Classes lie side by side, in float64, where moving a box costs no digit: so one call
        # serves all classes.
        moved = boxes.double() + (found.classes * (2 * _FARTHEST + 1))[..., None]
        scores = found.scores.double()
        limits = on_device([(w, h, w, h) for h, w in image_sizes], boxes.device, boxes.dtype)
        boxes = boxes.clamp(min=0).minimum(limits[:, None])
        kept = (nms(*image, self.nms_threshold) for image in zip(moved, scores, strict=True))
        return [b[k[: self.per_image]] for b, k in zip(boxes, kept, strict=True)]

    def _decode(self, dense: DenseView, anchors: Tensor) -> Tensor:
        """Boxes (B, n, 4) that are predicted at the anchors of these numbers (B, n)."""
        deltas = join_levels(dense.delta_maps, list(dense.delta_maps), 4)
        chosen = at_anchors(deltas, anchors).float()
        origins = torch.cat(list(dense.anchors.values()))[anchors]
        boxes = dense.decode(chosen.flatten(0, 1), origins.flatten(0, 1)).view_as(origins)
        return boxes.nan_to_num(0, _FARTHEST, -_FARTHEST)
