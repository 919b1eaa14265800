"""The boxes that Global Knowledge distils on, picked at fixed sizes without asking the device.

Shape legend: B images, P boxes per image (padded), N anchors or RoIs of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...detectors.bundle import FeatureBundle


@dataclass(frozen=True)
class PickedBoxes:
    """Boxes to distil on: B images, P boxes per image, padded.

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


def pick_foreground(labels: Tensor, num_classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions of at most ``count`` foreground labels per row, evenly spread over those there are.

    Args:
        labels: (B, N); foreground are 0 to num_classes - 1.

    Returns:
        index (B, P) and validity (B, P) with P = min(count, N), found without waiting for the
        device. On the CPU, where looking costs nothing and padding does, P is what is needed.
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


def gather_levels(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows ``index`` (B, P) of the concatenation of ``levels`` (B, N_l, K), without making it."""
    start, found = 0, []
    for level in levels:
        local = index - start
        inside = (local >= 0) & (local < level.shape[1])
        local = local.clamp(0, level.shape[1] - 1)[..., None].expand(-1, -1, level.shape[2])
        found.append(level.gather(1, local) * inside[..., None])
        start += level.shape[1]
    return torch.stack(found).sum(dim=0)


def pick(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], num_classes: int, count: int
) -> PickedBoxes:
    """Foreground of per-image lists, (n_i, 4) and (n_i,)."""
    padded = pad_sequence(list(labels), batch_first=True, padding_value=num_classes)
    index, valid = pick_foreground(padded, num_classes, count)
    picked = pad_sequence(list(boxes), batch_first=True)
    picked = picked.gather(1, index[..., None].expand(-1, -1, 4))
    return PickedBoxes(picked, padded.gather(1, index) * valid, valid, index)


def pick_rois(student: FeatureBundle, num_classes: int, count: int) -> PickedBoxes:
    """Positive RoIs of the student; ``index`` are positions among all RoIs of the batch."""
    roi = student.roi
    counts = [len(boxes) for boxes in roi.boxes]
    picked = pick(roi.boxes, roi.labels.split(counts), num_classes, count)
    rows = torch.arange(len(roi.labels), device=roi.labels.device).split(counts)
    index = pad_sequence(list(rows), batch_first=True).gather(1, picked.index)
    return PickedBoxes(picked.boxes, picked.labels, picked.valid, index)


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
