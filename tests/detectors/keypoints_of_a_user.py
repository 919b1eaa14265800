"""A user's file: keypoints as a part of detectors, and a head that distils them.

It stands for a file outside of d2kd; tests import it as ``--import`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from d2kd import DISTILL_HEAD_REGISTRY, DistillHead
from d2kd.config import HeadOptions
from d2kd.detectors.bundle import Batch, FeatureBundle, View, lazy
from d2kd.detectors.part import DetectorPart, StudentStep, TeacherStep
from d2kd.detectors.spec import DetectorSpec, Facts, fields_on_student_boxes, strides_of
from d2kd.detectors.student_boxes import (
    pool_for_own_head,
    pool_like_student,
    pooled_boxes,
    pooling_taps,
)
from d2kd.geometry.pooling import PooledBoxes
from d2kd.keys import POSITIVE, key
from d2kd.registry import DETECTOR_PART_REGISTRY


class KeypointView(View):
    """(F, J, M, M) heat maps of J joints for the student's F RoIs with keypoints."""

    pooled: PooledBoxes
    features: Tensor
    logits: Tensor


@DETECTOR_PART_REGISTRY.register()
class KeypointPart(DetectorPart):
    name = "keypoint"
    optional = ("features", "logits")

    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        own = Facts()
        roi_heads: Any = getattr(model, "roi_heads", None)
        if hasattr(roi_heads, "keypoint_head"):
            strides = strides_of(model, roi_heads.keypoint_in_features)
            fields = {"keypoint", "keypoint.features", "keypoint.logits"}
            joints = roi_heads.keypoint_head.num_keypoints
            own = Facts(fields, extra={"joints": joints, "strides": strides})
        if student is None:
            return own
        strides = student.extra.get("keypoint", {}).get("strides", ())
        return own._replace(fields=fields_on_student_boxes(self.name, own.fields, model, strides))

    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        return ("roi_heads.keypoint_head.layers", *pooling_taps(model, "keypoint"))

    def student_view(self, step: StudentStep) -> KeypointView:
        pooled = pooled_boxes(step, "keypoint")
        logits = step.outputs("roi_heads.keypoint_head.layers")[0]
        return KeypointView("student", pooled=pooled, features=pooled.features, logits=logits)

    def teacher_view(self, step: TeacherStep) -> KeypointView:
        return TeacherKeypoints(step)


class TeacherKeypoints(KeypointView):
    def __init__(self, step: TeacherStep):
        super().__init__("teacher", pooled=step.student.view(KeypointView).pooled)
        self._step = step

    @lazy
    def features(self) -> Tensor:
        return pool_like_student(self._step, "keypoint", self.pooled)

    @lazy
    def logits(self) -> Tensor:
        pooled = pool_for_own_head(self._step, "keypoint", self)
        return self._step.model.roi_heads.keypoint_head.layers(pooled)


@dataclass(frozen=True)
class KeypointOptions(HeadOptions):
    temperature: float = key(2.0, POSITIVE, "Logits are divided by it.")


@DISTILL_HEAD_REGISTRY.register()
class KeypointMimic(DistillHead):
    Options = KeypointOptions
    reads = ("keypoint.logits",)

    @configurable
    def __init__(self, *, temperature: float):
        super().__init__()
        self.temperature = temperature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        return {"temperature": cls.read_options(cfg).temperature}

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        mine, theirs = (bundle.view(KeypointView).logits for bundle in (student, teacher))
        return {"": ((mine - theirs).float() / self.temperature).square().mean()}
