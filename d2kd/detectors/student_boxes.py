"""The student's boxes as its own poolers read them, and the teacher's pyramid pooled on them.

A branch of Detectron2's RoI heads ("box", "mask", "keypoint") has a ``<branch>_pooler`` and
``<branch>_in_features``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..geometry.pooling import PooledBoxes, place_boxes, pool_levels
from .part import StudentStep, TeacherStep
from .spec import strides_of


class PooledView(Protocol):
    """A view of boxes that the student pooled."""

    @property
    def pooled(self) -> PooledBoxes: ...

    @property
    def features(self) -> Tensor: ...


def pooling_taps(model: nn.Module, branch: str) -> list[str]:
    """What to tap for :func:`pooled_boxes`."""
    path = f"roi_heads.{branch}_pooler"
    pooler: Any = model.get_submodule(path)
    return [path, *(f"{path}.level_poolers.{level}" for level in range(len(pooler.level_poolers)))]


def pooled_boxes(step: StudentStep, branch: str, call: int = 0) -> PooledBoxes:
    """The call number ``call`` of the student's ``branch`` pooler in this step."""
    pooler = step.model.get_submodule(f"roi_heads.{branch}_pooler")
    path, *level_paths = pooling_taps(step.model, branch)
    (_, boxes), features = step.calls(path)[call]
    level_rois = [step.calls(level)[call].inputs[1] for level in level_paths]
    return PooledBoxes([b.tensor.detach() for b in boxes], features, level_rois, pooler)


def pool_like_student(step: TeacherStep, branch: str, pooled: PooledBoxes) -> Tensor:
    """Pool the boxes on the teacher's pyramid as the student's ``branch`` pooled its own.

    Returns:
        (sum n_i, C, P, P), P and the levels being the student's.
    """
    maps = [step.pyramid[s] for s in _branch_strides(step.student_model, branch)]
    # Pooling rounds the boxes to the precision of the maps: let it be the student's.
    dtype = next(iter(step.student.pyramid.values())).dtype
    is_half = dtype.itemsize == 2
    with torch.autocast(maps[0].device.type, dtype if is_half else None, is_half):
        same = pooled.pool(pooled.pooler.level_poolers, [m.to(dtype) for m in maps])
    return same.to(maps[0].dtype)


def pool_for_own_head(step: TeacherStep, branch: str, view: PooledView) -> Tensor:
    """Pool the boxes as the teacher's own ``branch`` expects; once where that is the same.

    Returns:
        (sum n_i, C, P, P), P and the levels being the teacher's.
    """
    own, students = (_pooler(model, branch) for model in (step.model, step.student_model))
    strides = _branch_strides(step.model, branch)
    same_levels = strides == _branch_strides(step.student_model, branch)
    if same_levels and _pooling(own) == _pooling(students):
        return view.features
    maps = [step.pyramid[s] for s in strides]
    if same_levels and _level_rule(own) == _level_rule(students):
        return view.pooled.pool(own.level_poolers, maps)
    # FPN's rule: a box of the canonical size belongs to the canonical level.
    base_size = own.canonical_box_size * strides[0] / 2**own.canonical_level
    placed = place_boxes(view.pooled.boxes, strides, base_size)
    return pool_levels(own.level_poolers, maps, placed.rois)


def _pooler(model: Any, branch: str) -> Any:
    return getattr(model.roi_heads, f"{branch}_pooler")


def _branch_strides(model: Any, branch: str) -> tuple[int, ...]:
    """The levels that a branch pools from."""
    return strides_of(model, getattr(model.roi_heads, f"{branch}_in_features"))


def _level_rule(pooler: Any) -> tuple[int, int]:
    """What decides which level a box is pooled from, apart from the levels that there are."""
    return pooler.canonical_box_size, pooler.canonical_level


def _pooling(pooler: Any) -> tuple[Any, ...]:
    """What decides a ROIPooler's output apart from its inputs."""
    levels = [
        (
            type(p).__name__,
            p.spatial_scale,
            getattr(p, "sampling_ratio", 0),
            getattr(p, "aligned", 0),
        )
        for p in pooler.level_poolers
    ]
    return (pooler.output_size, _level_rule(pooler), levels)
