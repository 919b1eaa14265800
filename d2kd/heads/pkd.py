"""PKD: the student's pyramid follows the teacher's in correlation, channel by channel.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import NOT_NEGATIVE, key
from ..losses.pkd import pyramid_pkd_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import Adapters
from .base import DistillHead
from .pyramid import PyramidOptions, adapted_levels, build_pyramid_adapters


@dataclass(frozen=True)
class PKDOptions(PyramidOptions):
    """Keys of ``DISTILL.PKD``."""

    weight: float = key(
        6.0,
        NOT_NEGATIVE,
        "alpha. The authors' configs take 6, and 10 for RetinaNet students of RetinaNet and FCOS.",
    )


@DISTILL_HEAD_REGISTRY.register()
class PKD(DistillHead):
    """1 - Pearson's r of each channel, mean over the channels of a level, sum over levels.

    Args:
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
    """

    reads = ("pyramid",)

    Options = PKDOptions

    @configurable
    def __init__(self, *, strides: Sequence[int], adapters: Adapters):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        options = cls.read_options(cfg)
        strides, adapters = build_pyramid_adapters(options, student_spec, teacher_spec)
        return {"strides": strides, "adapters": adapters}

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        students, teachers = adapted_levels(student, teacher, self.strides, self.adapters)
        return {"": pyramid_pkd_loss(students, teachers)}
