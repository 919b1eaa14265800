"""The boxes that Global Knowledge distils on, picked at fixed sizes without asking the device.

Shape legend: B images, P boxes per image (padded), N anchors or RoIs of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...detectors.bundle import FeatureBundle
from ...geometry.boxes import BoxCells
from ...numerics import Ragged


@dataclass(frozen=True)
class PickedBoxes:
    """Boxes to distil on.

    Attributes:
        boxes: (B, P, 4) xyxy in pixels of the resized image.
        labels: (B, P) classes; 0 where padded.
        valid: (B, P) bool.
        index: (B, P) positions among what they were picked from.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    index: Tensor


@dataclass(frozen=True)
class BoxesOnLevels:
    """Picked boxes, and where they lie on the levels of the pyramid.

    Attributes:
        level: (B, P) position of the level that the size of each box assigns it to.
        cells: what the boxes cover on each level.
    """

    picked: PickedBoxes
    level: Tensor
    cells: BoxCells

    def on_level(self, count: int) -> Tensor:
        """(count, B, P) bool: whether each of ``count`` levels is the one of the box's size."""
        levels = torch.arange(count, device=self.level.device)
        return self.level == levels[:, None, None]


def most_positives(cfg: CfgNode) -> int:
    """How many positive RoIs of an image Detectron2 samples at most."""
    rois = cfg.MODEL.ROI_HEADS
    return int(rois.BATCH_SIZE_PER_IMAGE * rois.POSITIVE_FRACTION)


def pick_foreground(labels: Tensor, num_classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions of at most ``count`` foreground labels per row, evenly spread over those there are.

    Of labels (B, N), foreground being 0 to num_classes - 1, index (B, P) and validity (B, P) with
    P = min(count, N), found without waiting for the device. On the CPU, where looking costs nothing
    and padding does, P is what is needed.
    """
    number = ((labels >= 0) & (labels < num_classes)).cumsum(dim=1)  # 1 at the first, 2 ...
    count = min(count, labels.shape[1])
    total = number[:, -1:]
    if labels.device.type == "cpu" and total.numel():
        count = min(count, int(total.max()))
    steps = torch.arange(count, device=labels.device)
    wanted = steps * total.clamp(min=count) // max(count, 1) + 1
    index = torch.searchsorted(number, wanted).clamp(max=max(labels.shape[1] - 1, 0))
    return index, wanted <= total


def pick_objects(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, count: int
) -> PickedBoxes:
    """Of per-image lists, (n_i, 4) and (n_i,)."""
    return _pick(Ragged.of(boxes), boxes, torch.cat(list(labels)), num_classes, count)


def pick_rois(student: FeatureBundle, num_classes: int, count: int) -> PickedBoxes:
    """Positive RoIs of the student; ``index`` are positions among all RoIs of the batch."""
    roi = student.roi
    layout = Ragged.of(roi.boxes)
    picked = _pick(layout, roi.boxes, roi.labels, num_classes, count)
    rows = layout.pad(torch.arange(len(roi.labels), device=roi.labels.device))
    return replace(picked, index=rows.gather(1, picked.index))


def _pick(
    layout: Ragged, boxes: Sequence[Tensor], labels: Tensor, num_classes: int, count: int
) -> PickedBoxes:
    """Foreground of boxes that lie image after image."""
    padded = layout.pad(labels, fill=num_classes)
    index, valid = pick_foreground(padded, num_classes, count)
    corners = layout.pad(torch.cat(list(boxes)))
    picked = corners.gather(1, index[..., None].expand(-1, -1, 4))
    return PickedBoxes(picked, padded.gather(1, index) * valid, valid, index)


def pick_anchors(
    student: FeatureBundle, num_classes: int, count: int, anchor_free: bool
) -> PickedBoxes:
    """Positive anchors of the student; of an anchor-free one the boxes that they matched."""
    dense = student.dense
    index, valid = pick_foreground(dense.labels, num_classes, count)
    if anchor_free:
        boxes = dense.matched_boxes.gather(1, index[..., None].expand(-1, -1, 4))
    else:
        boxes = torch.cat(list(dense.anchors.values()))[index]
    return PickedBoxes(boxes, dense.labels.gather(1, index) * valid, valid, index)
