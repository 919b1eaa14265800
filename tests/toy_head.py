"""The simplest useful head: mean squared error of the pyramids, through adapters."""

from __future__ import annotations

from detectron2.config import configurable

from d2kd import DISTILL_HEAD_REGISTRY, DistillHead, build_adapters, pair_levels


@DISTILL_HEAD_REGISTRY.register()
class ToyMimic(DistillHead):
    """Mean squared error a level, summed over the levels."""

    @configurable
    def __init__(self, *, adapters, strides):
        super().__init__()
        self.adapters = adapters
        self.strides = strides

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec):
        strides = pair_levels(student_spec, teacher_spec)
        return {
            "adapters": build_adapters(student_spec, teacher_spec, strides),
            "strides": strides,
        }

    def forward(self, student, teacher, batch):
        gaps = [
            (self.adapters(s, student.pyramid[s]).float() - teacher.pyramid[s].float()).square()
            for s in self.strides
        ]
        return {"": sum(gap.mean() for gap in gaps)}
