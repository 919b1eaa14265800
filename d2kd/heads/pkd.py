"""PKD: the student's pyramid follows the teacher's in correlation, channel by channel.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..detectors.bundle import Batch
from ..keys import NOT_NEGATIVE, key
from ..losses.pkd import pyramid_pkd_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .pyramid import PyramidHead, PyramidOptions


@dataclass(frozen=True)
class PKDOptions(PyramidOptions):
    """Keys of ``DISTILL.PKD``."""

    weight: float = key(
        6.0,
        NOT_NEGATIVE,
        "alpha. The authors' configs take 6, and 10 for RetinaNet students of RetinaNet and FCOS.",
    )


@DISTILL_HEAD_REGISTRY.register()
class PKD(PyramidHead):
    """1 - Pearson's r of each channel, mean over the channels of a level, sum over levels."""

    Options = PKDOptions

    def compare(self, students: list[Tensor], teachers: list[Tensor], batch: Batch) -> Tensor:
        return pyramid_pkd_loss(students, teachers)
