"""CrossKD: the student's maps go through the teacher's head, whose predictions are the target.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024. Written
from the paper's formulas; the authors' code was not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, DenseView, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..keys import NOT_NEGATIVE, Rule, key
from ..losses.crosskd import giou_loss
from ..losses.logits import dense_class_loss
from ..numerics import full_precision
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import build_tower_adapter
from .base import DistillHead, Terms
from .dense import join_levels
from .needs import SHARED, Need
from .pyramid import resized_like


@dataclass(frozen=True)
class CrossKDOptions(HeadOptions):
    """Keys of ``DISTILL.CROSS_KD``."""

    class_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Class predictions: binary cross-entropy weighted by |p - q|^FOCUS, over the student's "
        "foreground anchors. 0 switches a term off.",
    )
    box_weight: float = key(
        1.0, NOT_NEGATIVE, "Predicted boxes: 1 - GIoU, mean over all anchors of the teacher."
    )
    teacher_convs: int = key(
        1,
        NOT_NEGATIVE,
        "How many of the teacher's last tower convolutions, before the one that predicts, the "
        "student's map passes; the student's own last ones are left out. Paper: i = 3 of 4, which "
        "leaves 1. 0: the teacher's prediction alone; as many as its towers have: the pyramid "
        "through the whole head.",
    )
    focus: float = key(
        1.0,
        Rule(lambda value: value == 0 or value >= 1, "it must be 0 or at least 1"),
        "Exponent of |p - q|, p being the teacher's and q the cross-head probability (quality "
        "focal loss, where it is 2). 0: plain divergence, in which easy background dominates.",
    )


@DISTILL_HEAD_REGISTRY.register()
class CrossKD(DistillHead):
    """Between one-stage detectors: the teacher's head predicts from the student's maps what it
    predicts from its own. The student's own last layers are left to the labels.

    Both predictions are the teacher's, so classes, anchors and box coding of the student may
    differ.

    Args:
        options: the values of ``DISTILL.CROSS_KD``.
        student_spec, teacher_spec: of the pair.
    """

    Options = CrossKDOptions
    term_options = {"cls": "class_weight", "box": "box_weight"}

    @configurable
    def __init__(
        self, *, options: CrossKDOptions, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ):
        super().__init__()
        pair = student_spec, teacher_spec
        self.options = options
        self.weights = self.term_weights(options)
        self.strides = _common_strides(*pair)
        self.num_classes = [spec.num_classes or 0 for spec in pair]
        self.adapters = nn.ModuleDict(
            {term: build_tower_adapter(*pair, options.teacher_convs) for term in self.weights}
        )

    @classmethod
    def needs(
        cls, options: CrossKDOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> Sequence[Need]:
        _check_one_stage(options, student, teacher)
        terms = {
            "cls": Need("cls", student=("dense.labels",), teacher=("dense.logits",)),
            "box": Need("box", teacher=("dense.deltas",)),
        }
        towers = Need("", student=("dense.tower_maps",), teacher=("dense.finish_tower",))
        return [towers, *(terms[term] for term in cls.term_weights(options))]

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        mine, theirs, terms = student.dense, teacher.dense, {}
        if "cls" in self.weights:
            own, width = self.num_classes
            pair = self._cross("cls", student, teacher), theirs.own_logit_maps
            s, t = (join_levels(maps, self.strides, width) for maps in pair)
            count = ((mine.labels >= 0) & (mine.labels < own)).sum()
            everywhere = torch.ones(1, 1, 1, dtype=torch.bool, device=count.device)
            terms["cls"] = dense_class_loss(s, t, everywhere, count, focus=self.options.focus)
        if "box" in self.weights:
            pair = self._cross("box", student, teacher), theirs.delta_maps
            s, t = (self._boxes(maps, theirs) for maps in pair)
            terms["box"] = giou_loss(s, t)
        return self.weigh(terms)

    def _cross(
        self, term: str, student: FeatureBundle, teacher: FeatureBundle
    ) -> dict[int, Tensor]:
        """The teacher's predictions from the student's maps, stride -> (B, A x width, H, W)."""
        convolutions, adapter = self.options.teacher_convs, self.adapters[term]
        tower = student.dense.tower_maps[term]
        maps = {
            s: adapter(resized_like(tower[s][-1 - convolutions], teacher.pyramid[s]))
            for s in self.strides
        }
        return teacher.dense.finish_tower(term, maps, convolutions)

    @full_precision
    def _boxes(self, maps: Mapping[int, Tensor], teacher: DenseView) -> Tensor:
        """Boxes of all anchors, (B A L, 4), each relative to its anchor: GIoU does not change when
        two boxes are moved or stretched together."""
        rows = join_levels(maps, self.strides, 4).transpose(2, 3).reshape(-1, 4)
        anchor = rows.new_zeros(1, 4)
        anchor[:, 2:] = 1
        return teacher.decode(rows, anchor.expand_as(rows))


def _common_strides(student: DetectorSpec, teacher: DetectorSpec) -> tuple[int, ...]:
    """Levels that both heads read; there must be one."""
    common = tuple(s for s in student.head_strides if s in teacher.head_strides)
    if not common:
        raise ConfigError(
            f"no level is read by both heads: student at strides {list(student.head_strides)}, "
            f"teacher at {list(teacher.head_strides)}"
        )
    return common


def _check_one_stage(options: CrossKDOptions, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse detectors without towers that go on to predictions, or with too short ones."""
    for spec in (student, teacher):
        if spec.two_stage:
            raise ConfigError(
                f"CrossKD is for one-stage detectors, but the {spec.role}, a {spec.meta_arch}, has "
                f"two stages; {SHARED['kind'].advice}"
            )
        there = len(spec.tower_channels) - 1
        if 0 <= there < options.teacher_convs:
            raise ConfigError(
                f"DISTILL.CROSS_KD.TEACHER_CONVS is {options.teacher_convs}, but the towers of the "
                f"{spec.role} have {there} convolutions"
            )
