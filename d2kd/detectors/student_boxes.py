"""The teacher's pyramid, pooled on the student's boxes; for every branch of Detectron2's RoI heads.

A branch ("box", "mask", "keypoint") has a ``<branch>_pooler`` and ``<branch>_in_features`` in
``roi_heads``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from detectron2.structures import Boxes
from torch import Tensor

from .part import TeacherStep
from .spec import strides_of


class PooledView(Protocol):
    """A view of boxes whose features were, or can be, pooled as the student pools them."""

    boxes: list[Tensor]

    @property
    def features(self) -> Tensor: ...


def pool_like_student(step: TeacherStep, branch: str, boxes: list[Tensor]) -> Tensor:
    """Pool ``boxes`` on the teacher's pyramid as the student's ``branch`` pools its own.

    Args:
        boxes: per image (n_i, 4) xyxy in pixels of the resized image.

    Returns:
        (sum n_i, C, P, P), P and the levels being the student's.
    """
    pooler = _pooler(step.student_model, branch)
    maps = [step.pyramid[s] for s in _branch_strides(step.student_model, branch)]
    # Pooling rounds the boxes to the precision of the maps: let it be the student's.
    like = next(iter(step.student.pyramid.values()))
    is_half = like.dtype.itemsize == 2
    with torch.autocast(like.device.type, like.dtype if is_half else None, is_half):
        # forward() and not a call: a call would fire the student's taps.
        pooled = pooler.forward([m.to(like.dtype) for m in maps], [Boxes(b) for b in boxes])
    same: Tensor = pooled.to(maps[0].dtype)
    return same


def pool_for_own_head(step: TeacherStep, branch: str, view: PooledView) -> Tensor:
    """Pool a view's boxes as the teacher's own ``branch`` expects; once where that is the same.

    Returns:
        (sum n_i, C, P, P), P and the levels being the teacher's.
    """
    own, students = _pooler(step.model, branch), _pooler(step.student_model, branch)
    strides = _branch_strides(step.model, branch)
    same_levels = strides == _branch_strides(step.student_model, branch)
    if same_levels and _pooling(own) == _pooling(students):
        return view.features
    pooled: Tensor = own([step.pyramid[s] for s in strides], [Boxes(b) for b in view.boxes])
    return pooled


def _pooler(model: Any, branch: str) -> Any:
    return getattr(model.roi_heads, f"{branch}_pooler")


def _branch_strides(model: Any, branch: str) -> tuple[int, ...]:
    """The levels that a branch pools from."""
    return strides_of(model, getattr(model.roi_heads, f"{branch}_in_features"))


def _pooling(pooler: Any) -> tuple[Any, ...]:
    """What decides a ROIPooler's output beside its inputs."""
    levels = [
        (
            type(p).__name__,
            p.spatial_scale,
            getattr(p, "sampling_ratio", 0),
            getattr(p, "aligned", 0),
        )
        for p in pooler.level_poolers
    ]
    return (pooler.output_size, pooler.canonical_level, pooler.canonical_box_size, levels)
