"""MAR (reconstruction): features near objects, and relations between pixels of the class head."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import Tensor

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle, RoIView
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..geometry.anchor_masks import MASK_KINDS, MaskRule, multi_value_masks
from ..geometry.anchors import pseudo_anchors
from ..keys import NOT_NEGATIVE, Options, Rule, group, key, one_of, or_none
from ..losses.mar import (
    PIXEL_WEIGHTS,
    map_relation_loss,
    mask_guided_loss,
    pixel_weights,
    relation_loss,
)
from ..numerics import Ragged
from ..registry import DISTILL_HEAD_REGISTRY
from ..schedules import ScheduleOptions
from .adapters import INITS, MODES, build_adapters, pair_levels
from .base import DistillHead, Terms
from .global_knowledge.boxes import most_positives, pick_foreground
from .needs import Need
from .pyramid import adapted_levels
from .sketch import Sketch

logger = logging.getLogger(__name__)

# Relation site -> the field that it reads and the default of its weight.
SITES = {
    "class_tower": ("dense.class_tower", 10.0),
    "rpn_dense": ("rpn.features", 10.0),
    "roi_pixels": ("roi.features", 1.0),
    "roi_vectors": ("roi.hidden", 1.0),
}
MAP_SITES = ("class_tower", "rpn_dense")

# Shares of the detection loss that the weighted terms should have: this reconstruction's own rule.
_RANGES = {"mask": (0.10, 0.40), "relation": (0.05, 0.20)}


@dataclass(frozen=True)
class MaskOptions(Options):
    """Keys of ``DISTILL.MAR.MASK``."""

    weight: float = key(3.0, NOT_NEGATIVE, "w_m, weight of the mask-guided term; 0 turns it off.")
    kind: str = key(
        "count",
        one_of(MASK_KINDS),
        'What a position is worth: "count" (its anchors near objects), "binary" (1 where there is '
        'one), "iou" (how well the nearest overlaps), "gauss" or "zones" (where in the box it '
        'lies), "roi_level" (as "count", each object on one level only).',
    )
    iou_ratio: float = key(
        0.5,
        Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1"),
        "psi: an anchor is near an object if its IoU exceeds this share of the level's best IoU.",
    )
    participation: float = key(
        0.1,
        Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1"),
        "kappa: an object takes part in the levels whose best IoU is at least this share of its "
        "best.",
    )
    anchors: str = key(
        "auto",
        one_of(("auto", "detector", "pseudo")),
        'Whose anchors: "detector" (the student\'s own); "pseudo" (three of side 8 strides on each '
        'cell); "auto": pseudo for anchor-free students and those with a single anchor per '
        "position, which is how Detectron2 represents the points of FCOS.",
    )
    cap: bool = key(
        False,
        comment="Keep the values at the number of anchors per position, however many objects "
        "overlap.",
    )
    background: float = key(
        0.0,
        NOT_NEGATIVE,
        "eta, weight of the features outside the mask relative to those inside.",
    )


@dataclass(frozen=True)
class RelationOptions(Options):
    """Keys of ``DISTILL.MAR.RELATION``."""

    site: str = key(
        "auto",
        one_of(("auto", *SITES)),
        'Where pixels are related. Dense students: "class_tower". Two-stage ones: "roi_pixels" '
        '(the cells of each positive RoI), "rpn_dense" (the RPN\'s hidden map) or "roi_vectors" '
        "(the box head's outputs of an image's RoIs). \"auto\": class_tower or roi_pixels.",
    )
    weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "w_r, weight of the relation term; 0 turns it off. None: 10 for maps (class_tower, "
        "rpn_dense) and 1 for RoIs (roi_pixels, roi_vectors).",
    )
    pixel_weights: str = key(
        "balanced",
        one_of(PIXEL_WEIGHTS),
        'Weights of the pixels of a map: "balanced" (half of the mass near objects) or "uniform".',
    )


@dataclass(frozen=True)
class MAROptions(HeadOptions):
    """Keys of ``DISTILL.MAR``."""

    schedule: ScheduleOptions = group(
        ScheduleOptions(warmup_iters=500),
        "FGFI, whose masks this reconstruction generalises, skips the first 400 iterations.",
    )
    strides: tuple[int, ...] = key(
        (),
        comment="Strides of the pyramid levels to distil; []: all that both detectors have.",
    )
    adapter: str = key(
        "always",
        one_of(MODES),
        'Convolution on the student\'s levels: "always", "auto" (only where channels differ), '
        '"never".',
    )
    adapter_kernel: int = key(
        1, one_of((1, 3)), "Kernel of that convolution, 1 or 3 (FGFI and DeFeat: 3)."
    )
    adapter_init: str = key(
        "identity",
        one_of(INITS),
        'Its first weights: "identity" (where channels agree, else PyTorch\'s default), "default" '
        'or "small" (near zero: FGFI and DeFeat).',
    )
    mask: MaskOptions = group(MaskOptions())
    relation: RelationOptions = group(RelationOptions())
    advice_iter: int = key(
        1000,
        NOT_NEGATIVE,
        "After this many iterations a log line says which share of the detection loss each term "
        "has, and which weight would bring it into the range that this reconstruction aims at. It "
        "is advice: nothing is rescaled. 0: no advice.",
    )


@DISTILL_HEAD_REGISTRY.register()
class MAR(DistillHead):
    """Mask-guided and relation-based distillation, a reconstruction.

    The mask-guided term brings the student's pyramid to the teacher's where anchors say that
    objects are near; the relation term compares cosine similarities between pixels. Zeng et al.,
    IJCSE 27(2), 2024, as docs/methods/mar.md reconstructs it from the abstract.

    Args:
        options: the values of ``DISTILL.MAR``.
        student_spec, teacher_spec: of the pair.
        positives: most positive RoIs of an image.
    """

    Options = MAROptions
    term_options = {"mask": "mask.weight", "relation": "relation.weight"}

    @configurable
    def __init__(
        self,
        *,
        options: MAROptions,
        student_spec: DetectorSpec,
        teacher_spec: DetectorSpec,
        positives: int,
    ):
        super().__init__()
        pair = student_spec, teacher_spec
        self.options = _with_default_relation(options, student_spec)
        self.weights = self.term_weights(self.options)
        self.strides = pair_levels(*pair, options.strides)
        self.adapters = build_adapters(
            *pair,
            self.strides if "mask" in self.weights else (),
            kernel_size=options.adapter_kernel,
            mode=options.adapter,
            init=options.adapter_init,
        )
        self.anchors = _anchor_field(options.mask.anchors, student_spec)
        self.positives = positives
        self.advice: Advice | None = None
        if options.advice_iter:
            self.advice = Advice(options.advice_iter, options.schedule.start_iter, options.weight)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        arguments = super().from_config(cfg, student_spec, teacher_spec)
        return {**arguments, "positives": most_positives(cfg)}

    @classmethod
    def needs(
        cls, options: MAROptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> Sequence[Need]:
        options = _with_default_relation(options, student)
        site, weights = options.relation.site, cls.term_weights(options)
        anchors = _anchor_field(options.mask.anchors, student)
        fields = {"mask": "pyramid", "relation": SITES[site][0]}
        needs = [Need("", both=("pyramid",)), *(Need(t, both=(fields[t],)) for t in weights)]
        needs += [Need(t, student=(anchors,)) for t in _mask_terms(options, weights) if anchors]
        if "relation" in weights and site in MAP_SITES:
            _check_map_levels(options, student, teacher)
        return needs

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        masks: dict[int, Tensor] = {}
        if _mask_terms(self.options, self.weights):
            masks = self.build_masks(student, batch.gt_boxes)
        terms = {}
        if "mask" in self.weights:
            levels = adapted_levels(student, teacher, self.strides, self.adapters)
            background = self.options.mask.background
            terms["mask"] = mask_guided_loss(*levels, list(masks.values()), background)
        if "relation" in self.weights:
            terms["relation"] = self._relate(student, teacher, masks)
        terms = self.weigh(terms)
        if self.advice is not None:
            self.advice.update(batch, terms, self.weights)
        return terms

    def sketch(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Sketch:
        """The mask of each level."""
        masks = self.build_masks(student, batch.gt_boxes)
        return Sketch({f"mask ({self.options.mask.kind})": {s: m[0] for s, m in masks.items()}})

    def build_masks(
        self, student: FeatureBundle, gt_boxes: Sequence[Tensor], kind: str = ""
    ) -> dict[int, Tensor]:
        """The multi-value masks of a batch: stride -> (B, H, W) for the levels in use.

        Which objects take part in a level depends on all levels, those out of use too.

        Args:
            student: gives the sizes of the levels and the anchors; levels without anchors of
                their own get pseudo-anchors.
            gt_boxes: per image (n, 4).
            kind: of the masks; "" for that of the options.
        """
        sizes = {s: (level.shape[2], level.shape[3]) for s, level in student.pyramid.items()}
        anchors: dict[int, Tensor] = {}
        if self.anchors:
            view = student.rpn if self.anchors == "rpn.anchors" else student.dense
            anchors.update(view.anchors)
        without = {s: size for s, size in sizes.items() if s not in anchors}
        anchors.update(pseudo_anchors(without, student.pyramid[self.strides[0]].device))
        options = self.options.mask
        rule = MaskRule(kind or options.kind, options.iou_ratio, options.participation, options.cap)
        masks = multi_value_masks(anchors, sizes, gt_boxes, rule)
        return {s: masks[s] for s in self.strides}

    def _relate(
        self, student: FeatureBundle, teacher: FeatureBundle, masks: dict[int, Tensor]
    ) -> Tensor:
        site = self.options.relation.site
        if site == "class_tower":
            return self._relate_maps(student.dense.class_tower, teacher.dense.class_tower, masks)
        if site == "rpn_dense":
            return self._relate_maps(student.rpn.features, teacher.rpn.features, masks)
        if site == "roi_pixels":
            return self._relate_roi_pixels(student, teacher)
        return _relate_roi_vectors(student.roi, teacher.roi)

    def _relate_maps(
        self,
        student: dict[int, Tensor],
        teacher: dict[int, Tensor],
        masks: dict[int, Tensor],
    ) -> Tensor:
        """Relations between the positions of each level, averaged over images and levels."""
        strides = [s for s in self.strides if s in student and s in teacher]
        flat = [masks[s].flatten(1) for s in strides]
        lengths = [mask.shape[1] for mask in flat]
        weights = pixel_weights(torch.cat(flat, 1), lengths, self.options.relation.pixel_weights)
        return map_relation_loss(
            [student[s] for s in strides], [teacher[s] for s in strides], weights
        )

    def _relate_roi_pixels(self, student: FeatureBundle, teacher: FeatureBundle) -> Tensor:
        """Relations between the cells of each positive RoI of the batch, averaged over RoIs."""
        num_classes = student.spec.num_classes
        assert num_classes is not None  # a detector with RoIs has classes
        # How many are positive only the device knows; the sampler bounds it.
        most = self.positives * len(student.roi.boxes)
        chosen, positive = pick_foreground(student.roi.labels[None], num_classes, most)
        mine, theirs = (
            side.roi.features.index_select(0, chosen[0]).flatten(2) for side in (student, teacher)
        )
        return relation_loss(mine, theirs, groups=positive[0])


def _relate_roi_vectors(student: RoIView, teacher: RoIView) -> Tensor:
    """Relations between the sampled RoIs of each image, averaged over images."""
    rows = Ragged.of(student.boxes)
    weights = rows.valid / rows.lengths.clamp(min=1).unsqueeze(1)
    return relation_loss(rows.pad(student.hidden).mT, rows.pad(teacher.hidden).mT, weights)


def _mask_terms(options: MAROptions, weights: Mapping[str, float]) -> list[str]:
    """The terms that read masks: relations on maps weigh their pixels by them, those inside RoIs
    know none."""
    relations = ["relation"] if options.relation.site in MAP_SITES else []
    return [term for term in ("mask", *relations) if term in weights]


def _with_default_relation(options: MAROptions, student: DetectorSpec) -> MAROptions:
    """``options`` with the relation site and its weight decided."""
    site, weight = options.relation.site, options.relation.weight
    if site == "auto":
        site = "roi_pixels" if student.two_stage else "class_tower"
    weight = SITES[site][1] if weight is None else weight
    relation = dataclasses.replace(options.relation, site=site, weight=weight)
    return dataclasses.replace(options, relation=relation)


def _anchor_field(anchors: str, student: DetectorSpec) -> str:
    """The student's field that holds its anchors, or "" for pseudo-anchors."""
    own = "rpn.anchors" if student.two_stage else "dense.anchors"
    anchor_free = own not in student.fields or student.anchors_per_location in (None, 1)
    return "" if anchors == "pseudo" or (anchors == "auto" and anchor_free) else own


def _check_map_levels(options: MAROptions, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse relations on maps where none of the levels in use has them in both detectors."""
    strides = pair_levels(student, teacher, options.strides)
    common = sorted(set(student.head_strides) & set(teacher.head_strides))
    if not set(strides) & set(common):
        raise ConfigError(
            f"relations at '{options.relation.site}' are on the levels of stride {common}, and "
            f"DISTILL.MAR.STRIDES leaves {list(strides)}; DISTILL.MAR.RELATION.WEIGHT 0 "
            "distils without relations"
        )


class Advice:
    """Says once, in the log, what share of the detection loss the terms have.

    Their averages are taken over the second half of the first ``iterations`` of the head, at full
    weight whatever the warm-up. Nothing is rescaled.

    Args:
        iterations: when to speak, counted from ``start_iter``.
        start_iter: the head's first iteration.
        weight: ``DISTILL.MAR.WEIGHT``.
    """

    def __init__(self, iterations: int, start_iter: int = 0, weight: float = 1.0):
        self.begin, self.end = start_iter + iterations // 2, start_iter + iterations
        self.weight = weight
        self.sums: dict[str, Tensor] = {}

    def update(self, batch: Batch, terms: dict[str, Tensor], weights: Mapping[str, float]) -> None:
        """Take note of one iteration's terms, without ``DISTILL.MAR.WEIGHT``; log when due."""
        if self.begin <= batch.iteration < self.end and batch.student_losses:
            values = {name: self.weight * term.detach() for name, term in terms.items()}
            values["detection"] = torch.stack(list(batch.student_losses.values())).sum()
            for name, value in values.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        if batch.iteration >= self.end - 1 and self.sums:
            # Waits for the device once in a training: the log needs numbers.
            names, sums = list(self.sums), torch.stack(list(self.sums.values())).tolist()
            self.sums = {}
            if comm.is_main_process():
                self._log(dict(zip(names, sums, strict=True)), weights)

    def _log(self, sums: dict[str, float], weights: Mapping[str, float]) -> None:
        detection = sums.pop("detection")
        for name, value in sums.items():
            logger.info(advise(name, value / detection if detection else 0.0, weights[name]))


def advise(term: str, share: float, weight: float) -> str:
    """The sentence about a term that has ``share`` of the detection loss at ``weight``."""
    low, high = _RANGES[term]
    key = f"DISTILL.MAR.{term.upper()}.WEIGHT"
    sentence = (
        f"MAR (reconstruction): the weighted {term} term is {share:.2%} of the detection loss; "
        f"this reconstruction aims at {low:.0%} to {high:.0%}"
    )
    if low <= share <= high or share == 0:
        return f"{sentence}; {key} stays at {weight:g}"
    # The middle of the range, as factors count.
    return f"{sentence}; {key} {weight * (low * high) ** 0.5 / share:.3g} would be in its middle"
