"""The mask branch, on the student's foreground RoIs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import image_index
from ..registry import DETECTOR_PART_REGISTRY
from .bundle import MaskView, lazy
from .part import DetectorPart, StudentStep, TeacherStep
from .spec import DetectorSpec, Facts, fields_on_student_boxes, strides_of
from .student_boxes import pool_for_own_head, pool_like_student, pooled_boxes, pooling_taps


@DETECTOR_PART_REGISTRY.register()
class MaskPart(DetectorPart):
    """``bundle.mask``."""

    name = "mask"
    optional = ("features", "logits")

    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        has_masks = getattr(getattr(model, "roi_heads", None), "mask_pooler", None) is not None
        own = _describe_mask_head(model) if has_masks else Facts()
        if student is None:
            return own
        fields = fields_on_student_boxes(self.name, own.fields, model, student.mask_strides)
        return own._replace(fields=fields)

    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        yield from ("roi_heads.mask_head", *pooling_taps(model, "mask"))
        if "mask.logits" in spec.fields:
            yield "roi_heads.mask_head.predictor"

    def student_view(self, step: StudentStep) -> MaskView:
        return _StudentMasks(step)

    def teacher_view(self, step: TeacherStep) -> MaskView:
        return _TeacherMasks(step)


def _describe_mask_head(model: Any) -> Facts:
    roi_heads = model.roi_heads
    fields = {"mask", "mask.features"}
    sizes = {
        "mask_resolution": roi_heads.mask_pooler.output_size[0],
        "mask_strides": strides_of(model, roi_heads.mask_in_features),
    }
    if hasattr(roi_heads.mask_head, "predictor"):
        # The only mask of a detector of one class is that class's.
        one_mask = roi_heads.mask_head.predictor.out_channels == 1
        sizes["class_agnostic_mask"] = one_mask and roi_heads.num_classes > 1
        fields.add("mask.logits")
    return Facts(fields, sizes)


class _StudentMasks(MaskView):
    def __init__(self, step: StudentStep):
        pooled = pooled_boxes(step, "mask")
        (_, self._instances), _ = step.calls("roi_heads.mask_head")[0]
        fields: dict[str, Any] = {"boxes": pooled.boxes, "features": pooled.features}
        if "mask.logits" in step.spec.fields:
            fields["logits"] = step.outputs("roi_heads.mask_head.predictor")[0]
        super().__init__("student", pooled=pooled, **fields)

    @lazy
    def labels(self) -> Tensor:
        return torch.cat([instances.gt_classes for instances in self._instances])

    @lazy
    def image_index(self) -> Tensor:
        return image_index(self.boxes)


class _TeacherMasks(MaskView):
    def __init__(self, step: TeacherStep):
        self._step, self._student = step, step.student.mask
        pooled = self._student.pooled
        super().__init__("teacher", pooled=pooled, boxes=pooled.boxes)

    @lazy
    def labels(self) -> Tensor:
        return self._student.labels

    @lazy
    def image_index(self) -> Tensor:
        return self._student.image_index

    @lazy
    def features(self) -> Tensor:
        return pool_like_student(self._step, "mask", self.pooled)

    @lazy
    def logits(self) -> Tensor:
        pooled = pool_for_own_head(self._step, "mask", self)
        logits: Tensor = self._step.model.roi_heads.mask_head.layers(pooled)
        shared = self._step.spec.class_map
        comparable = "mask.logits" in self._step.student.spec.fields
        if shared is None or not comparable:
            return logits
        return shared.masks(logits, self._student.logits)
