"""CWD: each channel of the student's pyramid looks where the teacher's looks.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import NOT_NEGATIVE, POSITIVE, key
from ..losses.cwd import pyramid_cwd_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import Adapters
from .base import DistillHead
from .pyramid import PyramidOptions, adapted_levels, build_pyramid_adapters


@dataclass(frozen=True)
class CWDOptions(PyramidOptions):
    """Keys of ``DISTILL.CWD``."""

    weight: float = key(
        10.0, NOT_NEGATIVE, "alpha, that of the authors' configs for pyramids of detectors."
    )
    temperature: float = key(
        1.0,
        POSITIVE,
        "T, by which features are divided; the loss is multiplied by T^2. The larger, the more "
        "positions of a channel count; it is in units of the teacher's features.",
    )


@DISTILL_HEAD_REGISTRY.register()
class CWD(DistillHead):
    """KL divergence of each channel's softmax over positions, mean over channels, sum over levels.

    Args:
        options: the values of ``DISTILL.CWD``.
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
    """

    reads = ("pyramid",)

    Options = CWDOptions

    @configurable
    def __init__(self, *, options: CWDOptions, strides: Sequence[int], adapters: Adapters):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters
        self.temperature = options.temperature

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        options = cls.read_options(cfg)
        strides, adapters = build_pyramid_adapters(options, student_spec, teacher_spec)
        return {"options": options, "strides": strides, "adapters": adapters}

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        students, teachers = adapted_levels(student, teacher, self.strides, self.adapters)
        return {"": pyramid_cwd_loss(students, teachers, self.temperature)}
