"""The box head: its stages on the student's sampled RoIs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import image_index
from ..registry import DETECTOR_PART_REGISTRY
from .bundle import RoIView, lazy
from .part import DetectorPart, StudentStep, TeacherStep
from .spec import DetectorSpec, Facts, fields_on_student_boxes, has_all, strides_of
from .student_boxes import pool_for_own_head, pool_like_student, pooled_boxes, pooling_taps


def box_stages(roi_heads: nn.Module) -> list[tuple[str, Any, Any]]:
    """(suffix, box head, box predictor) of each stage; a cascade keeps its stages in lists."""
    head, predictor = roi_heads.box_head, roi_heads.box_predictor
    if isinstance(head, nn.ModuleList) and isinstance(predictor, nn.ModuleList):
        pairs = enumerate(zip(head, predictor, strict=True))
        return [(f".{k}", h, p) for k, (h, p) in pairs]
    return [("", head, predictor)]


@DETECTOR_PART_REGISTRY.register()
class RoIPart(DetectorPart):
    """``bundle.rois``: a :class:`RoIView` for each box-head stage of the student."""

    name = "roi"
    attribute = "rois"
    optional = ("features", "hidden", "logits", "deltas")

    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        own = _describe_roi_heads(model) if hasattr(model, "roi_heads") else Facts()
        if student is None:
            return own
        fields = fields_on_student_boxes(self.name, own.fields, model, student.roi_strides)
        return own._replace(fields=fields | {"roi"} if student.two_stage else ())

    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        yield from ("roi_heads", *pooling_taps(model, "box"))
        for suffix, _, _ in box_stages(model.get_submodule("roi_heads")):
            yield from (f"roi_heads.box_head{suffix}", f"roi_heads.box_predictor{suffix}")
        if spec.num_stages > 1:  # a cascade labels the RoIs of its later stages inside its forward
            yield "roi_heads._match_and_label_boxes"

    def student_view(self, step: StudentStep) -> list[RoIView]:
        return [_StudentRoIs(step, stage) for stage in range(step.spec.num_stages)]

    def teacher_view(self, step: TeacherStep) -> list[RoIView]:
        return [_TeacherRoIs(step, stage) for stage in range(step.student.spec.num_stages)]


def _describe_roi_heads(model: Any) -> Facts:
    roi_heads = model.roi_heads
    classes = {"num_classes": getattr(roi_heads, "num_classes", None)}
    if not has_all(roi_heads, "box_pooler", "box_in_features", "box_head", "box_predictor"):
        return Facts((), classes)  # a C4 detector, whose RoIs go through a stage of its backbone
    stages = box_stages(roi_heads)
    predictor = stages[0][2]
    if not has_all(predictor, "cls_score.in_features", "box2box_transform.weights"):
        return Facts((), classes)
    sizes = {
        **classes,
        "roi_strides": strides_of(model, roi_heads.box_in_features),
        "roi_resolution": roi_heads.box_pooler.output_size[0],
        "num_stages": len(stages),
        "box_hidden_dim": predictor.cls_score.in_features,
        "box_coding": type(predictor.box2box_transform).__name__,
        "sigmoid_classes": getattr(predictor, "use_sigmoid_ce", False),
    }
    return Facts({"roi", "roi.features", "roi.hidden", "roi.logits", "roi.deltas"}, sizes)


class _StudentRoIs(RoIView):
    # Boxes come from the pooler's inputs: with TRAIN_ON_PRED_BOXES the proposals that roi_heads
    # returns are overwritten after pooling.
    def __init__(self, step: StudentStep, stage: int):
        pooled = pooled_boxes(step, "box", stage)
        suffix, _, predictor = box_stages(step.model.roi_heads)[stage]
        logits, deltas = step.outputs(f"roi_heads.box_predictor{suffix}")[0]
        super().__init__(
            "student",
            pooled=pooled,
            boxes=pooled.boxes,
            features=pooled.features,
            hidden=step.outputs(f"roi_heads.box_head{suffix}")[0],
            logits=logits,
            deltas=deltas,
            delta_weights=tuple(predictor.box2box_transform.weights),
        )
        if stage == 0:
            self._proposals, _ = step.outputs("roi_heads")[0]
        else:
            self._proposals = step.outputs("roi_heads._match_and_label_boxes")[stage - 1]

    @lazy
    def labels(self) -> Tensor:
        return torch.cat([proposals.gt_classes for proposals in self._proposals])

    @lazy
    def image_index(self) -> Tensor:
        return image_index(self.boxes)


class _TeacherRoIs(RoIView):
    def __init__(self, step: TeacherStep, stage: int):
        self._step, self._student = step, step.student.rois[stage]
        pooled = self._student.pooled
        fields: dict[str, Any] = {"pooled": pooled, "boxes": pooled.boxes}
        if "roi.logits" in step.spec.fields:
            stages = box_stages(step.model.roi_heads)
            _, self._head, self._predictor = stages[min(stage, len(stages) - 1)]
            self._weights = tuple(self._predictor.box2box_transform.weights)
            in_students = step.spec.class_map is not None
            fields["delta_weights"] = self._student.delta_weights if in_students else self._weights
        super().__init__("teacher", **fields)

    @lazy
    def labels(self) -> Tensor:
        return self._student.labels

    @lazy
    def image_index(self) -> Tensor:
        return self._student.image_index

    @lazy
    def features(self) -> Tensor:
        return pool_like_student(self._step, "box", self.pooled)

    @lazy
    def hidden(self) -> Tensor:
        pooled = pool_for_own_head(self._step, "box", self)
        hidden: Tensor = self._head(pooled)
        return hidden

    @lazy
    def _outputs(self) -> tuple[Tensor, Tensor]:
        logits, deltas = self._predictor(self.hidden)
        return logits, deltas

    @lazy
    def logits(self) -> Tensor:
        spec, logits = self._step.spec, self._outputs[0]
        if spec.class_map is None:
            return logits
        return spec.class_map.roi_logits(logits, self._student.logits, spec.sigmoid_classes)

    @lazy
    def deltas(self) -> Tensor:
        shared, deltas = self._step.spec.class_map, self._outputs[1]
        if shared is None:
            return deltas
        return shared.roi_deltas(deltas, self._student.deltas, self.delta_weights, self._weights)
