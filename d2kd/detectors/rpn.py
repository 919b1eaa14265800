"""The region proposal network's maps, before any proposal is chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..registry import DETECTOR_PART_REGISTRY
from .bundle import RPNView, lazy
from .part import DetectorPart, StudentStep, TeacherStep, by_stride
from .spec import DetectorSpec, Facts, strides_of


@DETECTOR_PART_REGISTRY.register()
class RPNPart(DetectorPart):
    """``bundle.rpn``."""

    name = "rpn"
    optional = ("features", "logits", "deltas")

    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        rpn: Any = getattr(model, "proposal_generator", None)
        head = getattr(rpn, "rpn_head", None)
        if head is None:
            return Facts()
        fields = {"rpn.anchors"}
        sizes = {
            "anchors_per_location": rpn.anchor_generator.num_anchors[0],
            "head_strides": strides_of(model, rpn.in_features),
        }
        if hasattr(head, "conv") and hasattr(head, "objectness_logits"):
            sizes["rpn_channels"] = head.objectness_logits.in_channels
            fields |= {"rpn.features", "rpn.logits", "rpn.deltas"}
        return Facts(fields, sizes)

    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        yield "proposal_generator.anchor_generator"
        if "rpn.features" in spec.fields:
            yield from ("proposal_generator.rpn_head", "proposal_generator.rpn_head.conv")

    def student_view(self, step: StudentStep) -> RPNView:
        strides = step.spec.head_strides
        anchors = step.outputs("proposal_generator.anchor_generator")[0]
        fields = {"anchors": by_stride(strides, [a.tensor for a in anchors])}
        if "rpn.features" in step.spec.fields:
            logits, deltas = step.outputs("proposal_generator.rpn_head")[0]
            features = step.outputs("proposal_generator.rpn_head.conv")
            for name, maps in (("logits", logits), ("deltas", deltas), ("features", features)):
                fields[name] = by_stride(strides, maps)
        return RPNView("student", **fields)

    def teacher_view(self, step: TeacherStep) -> RPNView:
        return _TeacherRPN(step)


class _TeacherRPN(RPNView):
    def __init__(self, step: TeacherStep):
        super().__init__("teacher")
        self._step, self._rpn = step, step.model.proposal_generator

    @lazy
    def features(self) -> dict[int, Tensor]:
        strides = self._step.spec.head_strides
        return {s: self._rpn.rpn_head.conv(self._step.pyramid[s]) for s in strides}

    @lazy
    def logits(self) -> dict[int, Tensor]:
        head = self._rpn.rpn_head
        return {s: head.objectness_logits(m) for s, m in self.features.items()}

    @lazy
    def deltas(self) -> dict[int, Tensor]:
        head = self._rpn.rpn_head
        return {s: head.anchor_deltas(m) for s, m in self.features.items()}

    @lazy
    def anchors(self) -> dict[int, Tensor]:
        return self._step.anchors(self._rpn.anchor_generator, self._rpn.in_features)
