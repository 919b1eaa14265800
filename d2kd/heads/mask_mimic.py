"""MaskMimic: distillation of the mask branch, to be added to any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import configurable
from torch import nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import NOT_NEGATIVE, POSITIVE, key
from ..losses.logits import mask_loss
from ..losses.mimic import mimic_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import build_roi_adapter
from .base import DistillHead, Terms
from .needs import Need


@dataclass(frozen=True)
class MaskMimicOptions(HeadOptions):
    """Keys of ``DISTILL.MASK_MIMIC``."""

    logits_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mask logits of the labelled class: the term that LOGITS.MASK_WEIGHT and "
        "DSIG.MASK_WEIGHT weigh too. 0 switches a term off.",
    )
    temperature: float = key(
        1.0,
        POSITIVE,
        "T, by which mask logits are divided; the term is multiplied by T^2.",
    )
    features_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mean squared error of the features that are pooled for the mask head (14 x 14 cells), "
        "through a 1x1 convolution where channels differ.",
    )


@DISTILL_HEAD_REGISTRY.register()
class MaskMimic(DistillHead):
    """On the student's foreground RoIs, its mask logits and the features that its mask head reads
    follow the teacher's. Without foreground both terms are zero.

    Args:
        options: the values of ``DISTILL.MASK_MIMIC``.
        student_spec, teacher_spec: of the pair.
    """

    Options = MaskMimicOptions
    term_options = {"logits": "logits_weight", "features": "features_weight"}

    @configurable
    def __init__(
        self, *, options: MaskMimicOptions, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ):
        super().__init__()
        self.temperature = options.temperature
        self.weights = self.term_weights(options)
        self.adapter: nn.Module = nn.Identity()
        if "features" in self.weights:
            stride = student_spec.mask_strides[0]
            self.adapter = build_roi_adapter(student_spec, teacher_spec, stride)

    @classmethod
    def needs(
        cls, options: MaskMimicOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> Sequence[Need]:
        # One mask for all classes answers for whichever class the student's label is.
        classes = () if teacher.class_agnostic_mask else ("num_classes",)
        terms = {
            "logits": Need("logits", both=("mask.logits",), same=classes),
            "features": Need("features", both=("mask.features",)),
        }
        return [Need("", student=("mask",)), *(terms[t] for t in cls.term_weights(options))]

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        mine, theirs = student.mask, teacher.mask
        terms = {}
        if "logits" in self.weights:
            terms["logits"] = mask_loss(mine.logits, theirs.logits, mine.labels, self.temperature)
        if "features" in self.weights:
            terms["features"] = mimic_loss(self.adapter(mine.features), theirs.features)
        return self.weigh(terms)
