"""FeatureMimic: L1 or L2 between the pyramids, the plain baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import key, one_of
from ..losses.mimic import DISTANCES, pyramid_mimic_loss
from ..losses.rescale import RESCALE_SCOPES
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import Adapters
from .base import DistillHead
from .pyramid import PyramidOptions, adapted_levels, build_pyramid_adapters


@dataclass(frozen=True)
class FeatureMimicOptions(PyramidOptions):
    """Keys of ``DISTILL.FEATURE_MIMIC``."""

    distance: str = key(
        "l2",
        one_of(DISTANCES),
        '"l1" or "l2": |s - t| or (s - t)^2, mean over a level, sum over levels.',
    )
    rescale: str = key(
        "none",
        one_of(("none", *RESCALE_SCOPES)),
        '"none": features as they are (FitNets). "image", "tensor" or "channel": both '
        "maps rescaled to [0, 1] first, the frame in which the SSIM paper compares L1 and "
        "L2; raise WEIGHT accordingly.",
    )


@DISTILL_HEAD_REGISTRY.register()
class FeatureMimic(DistillHead):
    """The student's pyramid mimics the teacher's, element by element.

    Args:
        options: the values of ``DISTILL.FEATURE_MIMIC``.
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
    """

    reads = ("pyramid",)

    Options = FeatureMimicOptions

    @configurable
    def __init__(self, *, options: FeatureMimicOptions, strides: Sequence[int], adapters: Adapters):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters
        self.distance = options.distance
        self.rescale = None if options.rescale == "none" else options.rescale

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
        return {"": pyramid_mimic_loss(students, teachers, self.distance, self.rescale)}
