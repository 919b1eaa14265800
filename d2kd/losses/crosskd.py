"""CrossKD's distance of boxes. That of classes is :func:`d2kd.losses.logits.dense_class_loss`.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024:

    loss = 1 / |S| sum over positions of D(prediction of the student through the teacher's head,
                                           prediction of the teacher)

with GIoU for boxes that are regressed directly (Rezatofighi et al., CVPR 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import connected_zero, full_precision

# Keeps boxes without area finite. Small, as boxes may be given in units of their anchors.
_EPS = 1e-9


@full_precision
def giou_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - GIoU.

    With I the intersection, U the union and H the smallest box around both,
    1 - GIoU = 1 - I / U + (H - U) / H.

    Args:
        student, teacher: (N, 4) xyxy, x1 <= x2 and y1 <= y2; ``teacher`` are constants.

    Returns:
        Scalar, from 0 for equal boxes to 2; zero without boxes.
    """
    if len(student) == 0:
        return connected_zero(student)
    (s_low, s_high), (t_low, t_high) = (x.split(2, dim=1) for x in (student, teacher.detach()))
    common = (torch.minimum(s_high, t_high) - torch.maximum(s_low, t_low)).clamp(min=0)
    around = torch.maximum(s_high, t_high) - torch.minimum(s_low, t_low)
    intersection, hull = _area(common), _area(around)
    union = _area(s_high - s_low) + _area(t_high - t_low) - intersection
    distance = 1 - intersection / (union + _EPS) + (hull - union) / (hull + _EPS)
    return distance.mean()


def _area(extent: Tensor) -> Tensor:
    """(N, 2) -> (N,)."""
    width, height = extent.unbind(1)
    return width * height
