"""MaskMimic: distillation of the mask branch, to be switched on beside any method."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import configurable
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..keys import NOT_NEGATIVE, POSITIVE, key
from ..losses.logits import mask_loss
from ..losses.mimic import mimic_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import build_roi_adapter
from .base import DistillHead

# Terms: the key of the weight, and the field that the term reads of both detectors.
TERMS = {
    "logits": ("LOGITS_WEIGHT", "mask.logits"),
    "features": ("FEATURES_WEIGHT", "mask.features"),
}


@dataclass(frozen=True)
class MaskMimicOptions(HeadOptions):
    """Keys of ``DISTILL.MASK_MIMIC``."""

    logits_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mask logits of the labelled class: the term that LOGITS.MASK_WEIGHT and "
        "DSIG.MASK_WEIGHT weigh too; 0 switches a term off.",
    )
    temperature: float = key(
        1.0,
        POSITIVE,
        "T, by which mask logits are divided; the term is multiplied by T^2.",
    )
    features_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mean squared error of the features that are pooled for the mask head (14x14 "
        "cells), through a 1x1 convolution where channels differ.",
    )


@DISTILL_HEAD_REGISTRY.register()
class MaskMimic(DistillHead):
    """On the student's foreground RoIs, its mask logits and the features that its mask head reads
    follow the teacher's. Without foreground both terms are zero.

    Args:
        weights: term -> weight, of "logits" and "features"; what is absent is not computed.
        adapter: student's to teacher's channels of pooled features (F, C, P, P).
        temperature: T of the mask logits.
    """

    Options = MaskMimicOptions

    @configurable
    def __init__(self, *, weights: dict[str, float], adapter: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.weights = weights
        self.adapter = adapter
        self.temperature = temperature
        self.reads = tuple(TERMS[term][1] for term in weights)

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.MASK_MIMIC
        weights = {term: node[key] for term, (key, _) in TERMS.items() if node[key]}
        _check_pair(weights, student_spec, teacher_spec)
        adapter = nn.Identity()
        if "features" in weights:
            adapter = build_roi_adapter(student_spec, teacher_spec, student_spec.mask_strides[0])
        return {"weights": weights, "adapter": adapter, "temperature": node.TEMPERATURE}

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        mine, theirs = student.mask, teacher.mask
        terms = {}
        if "logits" in self.weights:
            terms["logits"] = mask_loss(mine.logits, theirs.logits, mine.labels, self.temperature)
        if "features" in self.weights:
            terms["features"] = mimic_loss(self.adapter(mine.features), theirs.features)
        return {term: self.weights[term] * loss for term, loss in terms.items()}


def _check_pair(weights: dict[str, float], student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse a pair that has no masks to compare, or whose masks do not mean the same.

    Raises:
        ConfigError: says what is missing, and which key makes do without it.
    """
    if not weights:
        raise ConfigError(
            "DISTILL.MASK_MIMIC: LOGITS_WEIGHT and FEATURES_WEIGHT are both 0: nothing to distil"
        )
    if not student.mask_strides:
        raise ConfigError(
            f"MaskMimic: the student, a {student.meta_arch}, has no mask branch: set MODEL.MASK_ON "
            "True, or take MaskMimic out of DISTILL.HEADS"
        )
    for term in weights:
        key, field = TERMS[term]
        for spec in (student, teacher):
            if field not in spec.fields:
                raise ConfigError(
                    f"MaskMimic reads {field} of the {spec.role}, a {spec.meta_arch} that has none "
                    f"for the student's RoIs: set DISTILL.MASK_MIMIC.{key} 0"
                )
    # One mask for all classes answers for whichever class the student's label is.
    same_classes = teacher.class_agnostic_mask or student.num_classes == teacher.num_classes
    if "logits" in weights and not same_classes:
        raise ConfigError(
            f"MaskMimic: the student has {student.num_classes} classes, the teacher a mask for "
            f"each of its {teacher.num_classes}: set DISTILL.MASK_MIMIC.LOGITS_WEIGHT 0"
        )
