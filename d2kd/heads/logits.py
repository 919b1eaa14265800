"""Logits: the student's class, box and mask outputs follow the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import configurable
from torch import Tensor

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..keys import NOT_NEGATIVE, POSITIVE, Rule, key
from ..losses.logits import (
    dense_box_loss,
    dense_class_loss,
    mask_loss,
    roi_box_loss,
    roi_class_loss,
)
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import pair_levels
from .base import DistillHead
from .dense import DensePair, check_anchors

# What a pair can do whose outputs do not correspond.
_PYRAMID_HEADS = "heads on the pyramid (SSIM, FeatureMimic, DRKD) work for such pairs"
# Term -> the config key of its weight.
WEIGHT_KEYS = {"cls": "CLASS_WEIGHT", "box": "BOX_WEIGHT", "mask": "MASK_WEIGHT"}


@dataclass(frozen=True)
class LogitsOptions(HeadOptions):
    """Keys of ``DISTILL.LOGITS``."""

    class_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Class outputs: KL divergence of softmax outputs on the student's RoIs (Hinton et "
        "al., 2015), or a binary divergence for each sigmoid output of a dense detector; "
        "0 switches a term off.",
    )
    box_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Box deltas of foreground RoIs or anchors: smooth L1, plain L1 for BOX_BETA 0.",
    )
    box_beta: float = key(
        0.0, NOT_NEGATIVE, "Where smooth L1 of box deltas turns linear; 0: plain L1."
    )
    mask_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mask logits of the labelled class on foreground RoIs; ignored by students without masks.",
    )
    temperature: float = key(
        1.0,
        POSITIVE,
        "T, by which class and mask logits are divided; terms are multiplied by T^2. 1: "
        "the probabilities as the detectors predict them.",
    )
    dense_focus: float = key(
        1.0,
        Rule(lambda value: value == 0 or value >= 1, "it must be 0 or at least 1"),
        "Exponent of |p - q|, the weight of a dense class logit, from the quality focal "
        "loss (Li et al., 2020; with exponent 1 as a distillation loss in Yang et al., "
        "ICCV 2023). 0: plain divergence, in which easy background anchors dominate.",
    )


@DISTILL_HEAD_REGISTRY.register()
class Logits(DistillHead):
    """Distillation of outputs, on the student's RoIs (two-stage) or anchors (dense).

    Args:
        weights: term -> weight, of "cls", "box" and "mask"; what is absent is not computed.
        two_stage: the pair has box heads on RoIs; else it is dense.
        num_classes: K, of both.
        temperature: T of the class and mask terms.
        box_beta: where smooth L1 of box deltas turns linear; 0 for L1.
        focus: exponent of the weight |p - q| of a dense class logit.
        sigmoid_classes: the box heads are trained with a sigmoid a class instead of softmax.
    """

    Options = LogitsOptions

    @configurable
    def __init__(
        self,
        *,
        weights: dict[str, float],
        two_stage: bool,
        num_classes: int,
        temperature: float = 1.0,
        box_beta: float = 0.0,
        focus: float = 1.0,
        sigmoid_classes: bool = False,
    ):
        super().__init__()
        self.weights = weights
        self.two_stage = two_stage
        self.num_classes = num_classes
        self.temperature = temperature
        self.box_beta = box_beta
        self.focus = focus
        self.sigmoid_classes = sigmoid_classes
        self.reads = _fields(weights, two_stage)
        self.student_reads = ("roi",) if two_stage else ("dense.labels", "dense.anchors")
        self.teacher_reads = () if two_stage else ("dense.anchors",)

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.LOGITS
        weights = {term: node[key] for term, key in WEIGHT_KEYS.items() if node[key]}
        if student_spec.mask_resolution is None:
            weights.pop("mask", None)
        if not weights:
            keys = " and ".join(f"DISTILL.LOGITS.{key}" for key in WEIGHT_KEYS.values())
            raise ConfigError(f"{keys} leave a {student_spec.meta_arch} nothing to distil")
        _check_pair(weights, student_spec, teacher_spec)
        return {
            "weights": weights,
            "two_stage": student_spec.two_stage,
            "num_classes": student_spec.num_classes,
            "temperature": node.TEMPERATURE,
            "box_beta": node.BOX_BETA,
            "focus": node.DENSE_FOCUS,
            "sigmoid_classes": student_spec.sigmoid_classes,
        }

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        compare = self._compare_rois if self.two_stage else self._compare_anchors
        terms = compare(student, teacher)
        if "mask" in self.weights:
            labels = student.mask.labels
            terms["mask"] = mask_loss(
                student.mask.logits, teacher.mask.logits, labels, self.temperature
            )
        return {term: self.weights[term] * loss for term, loss in terms.items()}

    def _compare_rois(self, student: FeatureBundle, teacher: FeatureBundle) -> dict[str, Tensor]:
        """Class and box terms, summed over the stages of a cascade as its own losses are."""
        terms: dict[str, Tensor] = {}
        for mine, theirs in zip(student.rois, teacher.rois, strict=True):
            if "cls" in self.weights:
                loss = roi_class_loss(
                    mine.logits, theirs.logits, self.temperature, self.sigmoid_classes
                )
                terms["cls"] = terms.get("cls", 0) + loss
            if "box" in self.weights:
                loss = roi_box_loss(
                    mine.deltas,
                    theirs.deltas,
                    mine.labels,
                    self.num_classes,
                    mine.delta_weights,
                    theirs.delta_weights,
                    self.box_beta,
                )
                terms["box"] = terms.get("box", 0) + loss
        return terms

    def _compare_anchors(self, student: FeatureBundle, teacher: FeatureBundle) -> dict[str, Tensor]:
        """Class and box terms on the anchors of the levels that both detectors have."""
        pair = DensePair(student.dense, teacher.dense)
        labels, terms = pair.labels, {}
        if "cls" in self.weights:
            terms["cls"] = dense_class_loss(
                *pair.logits, labels, self.num_classes, self.temperature, self.focus
            )
        if "box" in self.weights:
            terms["box"] = dense_box_loss(
                *pair.deltas, labels, self.num_classes, *pair.delta_weights, self.box_beta
            )
        return terms


def _fields(weights: dict[str, float], two_stage: bool) -> tuple[str, ...]:
    """The bundle fields that the terms in use read of both detectors."""
    outputs = "roi" if two_stage else "dense"
    fields = {"cls": f"{outputs}.logits", "box": f"{outputs}.deltas", "mask": "mask.logits"}
    return tuple(field for term, field in fields.items() if term in weights)


def _check_pair(weights: dict[str, float], student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse a pair whose outputs do not mean the same.

    Raises:
        ConfigError: says what differs.
    """
    if student.two_stage != teacher.two_stage:
        raise ConfigError(
            f"outputs of a {student.meta_arch} student and a {teacher.meta_arch} teacher cannot be "
            f"compared: both must be two-stage or both dense; {_PYRAMID_HEADS}"
        )
    if not student.two_stage:
        pair_levels(student, teacher)
        if student.anchors_per_location != teacher.anchors_per_location:
            raise ConfigError(
                f"the student has {student.anchors_per_location} anchors a location, the teacher "
                f"{teacher.anchors_per_location}, and outputs are compared anchor by anchor; "
                f"{_PYRAMID_HEADS}"
            )
        check_anchors(student, teacher)
    if student.num_classes != teacher.num_classes:
        raise ConfigError(
            f"the student has {student.num_classes} classes, the teacher {teacher.num_classes}: "
            "class outputs can only be compared for the same classes"
        )
    if "cls" in weights and student.sigmoid_classes != teacher.sigmoid_classes:
        kinds = {True: "a sigmoid a class", False: "softmax"}
        raise ConfigError(
            f"the student's box head is trained with {kinds[student.sigmoid_classes]}, the "
            f"teacher's with {kinds[teacher.sigmoid_classes]} (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE): "
            "set DISTILL.LOGITS.CLASS_WEIGHT 0"
        )
    if "mask" in weights and "mask.logits" not in teacher.fields:
        raise ConfigError(
            f"the student has a mask branch, the teacher, a {teacher.meta_arch}, no mask logits: "
            "set DISTILL.LOGITS.MASK_WEIGHT 0"
        )
    if "box" in weights and student.box_coding != teacher.box_coding:
        raise ConfigError(
            f"the student codes boxes with {student.box_coding}, the teacher with "
            f"{teacher.box_coding}: set DISTILL.LOGITS.BOX_WEIGHT 0"
        )
