"""FeatureMimic: L1 or L2 between the pyramids, the plain baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import configurable
from torch import Tensor

from ..adapters import Adapters
from ..bundle import Batch, DetectorSpec, FeatureBundle
from ..config import check_values, one_of
from ..losses.mimic import DISTANCES, pyramid_mimic_loss
from ..losses.ssim import RESCALE_SCOPES
from .base import DISTILL_HEAD_REGISTRY, DistillHead
from .pyramid import PYRAMID_RULES, adapted_levels, build_pyramid_adapters

# Keys of DISTILL.FEATURE_MIMIC and what their values must be.
RULES = {
    **PYRAMID_RULES,
    "DISTANCE": one_of(DISTANCES),
    "RESCALE": one_of(("none", *RESCALE_SCOPES)),
}


@DISTILL_HEAD_REGISTRY.register()
class FeatureMimic(DistillHead):
    """The student's pyramid mimics the teacher's, element by element.

    Args:
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
        distance: "l1" or "l2".
        rescale: scope of a min-max rescaling of both maps; None for features as they are.
    """

    reads = ("pyramid",)

    @configurable
    def __init__(
        self,
        *,
        strides: Sequence[int],
        adapters: Adapters,
        distance: str = "l2",
        rescale: str | None = None,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters
        self.distance = distance
        self.rescale = rescale

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.FEATURE_MIMIC
        check_values("DISTILL.FEATURE_MIMIC", node, RULES)
        strides, adapters = build_pyramid_adapters(node, student_spec, teacher_spec)
        return {
            "strides": strides,
            "adapters": adapters,
            "distance": node.DISTANCE,
            "rescale": None if node.RESCALE == "none" else node.RESCALE,
        }

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        students, teachers = adapted_levels(student, teacher, self.strides, self.adapters)
        return {"": pyramid_mimic_loss(students, teachers, self.distance, self.rescale)}
