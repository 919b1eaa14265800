"""FeatureMimic: L1 or L2 between the pyramids, the plain baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..detectors.bundle import Batch
from ..keys import key, one_of
from ..losses.mimic import DISTANCES, pyramid_mimic_loss
from ..losses.rescale import RESCALE_SCOPES
from ..registry import DISTILL_HEAD_REGISTRY
from .pyramid import PyramidHead, PyramidOptions


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
class FeatureMimic(PyramidHead):
    """The student's pyramid mimics the teacher's, element by element."""

    Options = FeatureMimicOptions

    def compare(self, students: list[Tensor], teachers: list[Tensor], batch: Batch) -> Tensor:
        options = self.options
        rescale = None if options.rescale == "none" else options.rescale
        return pyramid_mimic_loss(students, teachers, options.distance, rescale)
