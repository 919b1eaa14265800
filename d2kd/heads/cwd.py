"""CWD: each channel of the student's pyramid looks where the teacher's looks.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..detectors.bundle import Batch
from ..keys import NOT_NEGATIVE, POSITIVE, key
from ..losses.cwd import pyramid_cwd_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .pyramid import PyramidHead, PyramidOptions


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
class CWD(PyramidHead):
    """KL divergence of channels' softmax over positions: mean over channels, sum over levels."""

    Options = CWDOptions

    def compare(self, students: list[Tensor], teachers: list[Tensor], batch: Batch) -> Tensor:
        return pyramid_cwd_loss(students, teachers, self.options.temperature)
