"""Logits: the student's class, box and mask outputs follow the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from torch import Tensor

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle, RoIView
from ..detectors.spec import DetectorSpec
from ..keys import NOT_NEGATIVE, POSITIVE, Rule, key
from ..losses.logits import (
    dense_box_loss,
    dense_class_loss,
    mask_loss,
    roi_box_loss,
    roi_class_loss,
)
from ..registry import DISTILL_HEAD_REGISTRY
from .base import DistillHead, Terms
from .dense import DensePair
from .needs import Need


@dataclass(frozen=True)
class LogitsOptions(HeadOptions):
    """Keys of ``DISTILL.LOGITS``."""

    class_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Class outputs: KL divergence of softmax outputs on the student's RoIs (Hinton et al., "
        "2015), or of each sigmoid output of a dense detector. 0 switches a term off.",
    )
    box_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Box deltas of foreground RoIs or anchors: smooth L1 distance, see BOX_BETA.",
    )
    box_beta: float = key(
        0.0, NOT_NEGATIVE, "Distance at which smooth L1 of box deltas turns linear; 0: plain L1."
    )
    mask_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mask logits of the labelled class on foreground RoIs; ignored by students without masks.",
    )
    temperature: float = key(
        1.0,
        POSITIVE,
        "T, by which class and mask logits are divided; their terms are multiplied by T^2. 1: the "
        "probabilities as the detectors predict them.",
    )
    dense_focus: float = key(
        1.0,
        Rule(lambda value: value == 0 or value >= 1, "it must be 0 or at least 1"),
        "Exponent of |p - q|, the weight of a dense class logit with probability p of the teacher "
        "and q of the student, from the quality focal loss (Li et al., 2020; with exponent 1 as a "
        "distillation loss in Yang et al., ICCV 2023). 0: plain divergence, in which easy "
        "background anchors dominate.",
    )


@DISTILL_HEAD_REGISTRY.register()
class Logits(DistillHead):
    """Distillation of outputs, on the student's RoIs (two-stage) or anchors (dense).

    Args:
        options: the values of ``DISTILL.LOGITS``.
        student_spec, teacher_spec: of the pair.
    """

    Options = LogitsOptions
    term_options = {"cls": "class_weight", "box": "box_weight", "mask": "mask_weight"}

    @configurable
    def __init__(
        self, *, options: LogitsOptions, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ):
        super().__init__()
        self.options = options
        self.weights = self._weights(options, student_spec)
        self.two_stage = student_spec.two_stage
        self.num_classes = student_spec.num_classes or 0
        self.sigmoid_classes = student_spec.sigmoid_classes

    @classmethod
    def _weights(cls, options: LogitsOptions, student: DetectorSpec) -> dict[str, float]:
        return cls.term_weights(options, () if student.mask_resolution else ("mask",))

    @classmethod
    def needs(
        cls, options: LogitsOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> Sequence[Need]:
        outputs = labels = "roi"
        same = ["kind", "num_classes"]
        if not student.two_stage:
            outputs, labels = "dense", "dense.labels"
            same += ["anchors_per_location", "anchors"]
        terms = {
            "cls": Need("cls", both=(f"{outputs}.logits",), same=("sigmoid_classes",)),
            "box": Need("box", both=(f"{outputs}.deltas",), same=("box_coding",)),
            "mask": Need("mask", both=("mask.logits",)),
        }
        pair = Need("", student=(labels,), same=same)
        return [pair, *(terms[term] for term in cls._weights(options, student))]

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        if self.two_stage:
            # Summed over the stages of a cascade, as its own losses are.
            stages = [
                self._compare_rois(mine, theirs)
                for mine, theirs in zip(student.rois, teacher.rois, strict=True)
            ]
            terms = {name: _sum([stage[name] for stage in stages]) for name in stages[0]}
        else:
            terms = self._compare_anchors(DensePair(student.dense, teacher.dense, self.num_classes))
        if "mask" in self.weights:
            mine, theirs = student.mask, teacher.mask
            terms["mask"] = mask_loss(
                mine.logits, theirs.logits, mine.labels, self.options.temperature
            )
        return self.weigh(terms)

    def _compare_rois(self, mine: RoIView, theirs: RoIView) -> Terms:
        """Class and box terms of one stage of the box head."""
        terms = {}
        if "cls" in self.weights:
            terms["cls"] = roi_class_loss(
                mine.logits, theirs.logits, self.options.temperature, self.sigmoid_classes
            )
        if "box" in self.weights:
            deltas, units = (mine.deltas, theirs.deltas), (mine.delta_weights, theirs.delta_weights)
            terms["box"] = roi_box_loss(
                *deltas, mine.labels, self.num_classes, *units, self.options.box_beta
            )
        return terms

    def _compare_anchors(self, pair: DensePair) -> Terms:
        """Class and box terms on the anchors of the levels that both detectors have."""
        options, terms = self.options, {}
        if "cls" in self.weights:
            softness = options.temperature, options.dense_focus
            terms["cls"] = dense_class_loss(
                *pair.logits, pair.valid, pair.num_foreground, *softness
            )
        if "box" in self.weights:
            units = pair.student.delta_weights, pair.teacher.delta_weights
            terms["box"] = dense_box_loss(
                *pair.deltas, pair.foreground, pair.num_foreground, *units, options.box_beta
            )
        return terms


def _sum(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
