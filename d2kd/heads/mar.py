"""MAR (reconstruction): features near objects, and relations between pixels of the class head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle, RoIView
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..geometry.anchor_masks import MASK_KINDS, multi_value_masks, pseudo_anchors
from ..keys import NOT_NEGATIVE, Options, Rule, group, key, one_of, or_none
from ..losses.mar import PIXEL_WEIGHTS, mask_guided_loss, pixel_weights, relation_loss
from ..registry import DISTILL_HEAD_REGISTRY
from ..schedules import ScheduleOptions
from .adapters import INITS, MODES, Adapters, build_adapters, pair_levels
from .base import DistillHead
from .pyramid import adapted_levels

logger = logging.getLogger(__name__)

# Relation site -> the field that it reads and the default of its weight.
SITES = {
    "class_tower": ("dense.class_tower", 10.0),
    "rpn_dense": ("rpn.features", 10.0),
    "roi_pixels": ("roi.features", 1.0),
    "roi_vectors": ("roi.hidden", 1.0),
}
MAP_SITES = ("class_tower", "rpn_dense")
ANCHORS = ("auto", "detector", "pseudo")

# Shares of the detection loss that the weighted terms should have: this reconstruction's own rule.
_RANGES = {"mask": (0.10, 0.40), "relation": (0.05, 0.20)}


@dataclass(frozen=True)
class MaskOptions(Options):
    """Keys of ``DISTILL.MAR.MASK``."""

    weight: float = key(3.0, NOT_NEGATIVE, "w_m, weight of the mask-guided term; 0 turns it off.")
    kind: str = key(
        "count",
        one_of(MASK_KINDS),
        'What a position is worth: "count", "binary", "iou", "gauss", "zones" or '
        '"roi_level", see d2kd/geometry/anchor_masks.py.',
    )
    iou_ratio: float = key(
        0.5,
        Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1"),
        "psi: an anchor is near an object if its IoU exceeds this share of the level's best IoU.",
    )
    participation: float = key(
        0.1,
        Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1"),
        "kappa: an object takes part in the levels whose best IoU is at least this share "
        "of its best.",
    )
    anchors: str = key(
        "auto",
        one_of(ANCHORS),
        'Whose anchors: "detector" (the student\'s own); "pseudo" (three of side 8 strides '
        'on each cell); "auto": pseudo for anchor-free students and those with a single '
        "anchor a location, which is how Detectron2 represents the points of FCOS.",
    )
    cap: bool = key(
        False,
        comment="Keep the values at the number of anchors a location, however many objects "
        "overlap.",
    )
    background: float = key(
        0.0,
        NOT_NEGATIVE,
        "eta, weight of the features outside the mask against those inside.",
    )


@dataclass(frozen=True)
class RelationOptions(Options):
    """Keys of ``DISTILL.MAR.RELATION``."""

    site: str = key(
        "auto",
        one_of(("auto", *SITES)),
        'Where pixels are related: "class_tower" (dense students); "roi_pixels" (the '
        'cells of each positive RoI), "rpn_dense" (the RPN\'s hidden map), "roi_vectors" '
        "(the box head's outputs of an image's RoIs) for two-stage ones. \"auto\": "
        "class_tower or roi_pixels.",
    )
    weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "w_r, weight of the relation term; 0 turns it off. None: 10 for maps "
        "(class_tower, rpn_dense) and 1 for RoIs (roi_pixels, roi_vectors).",
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
        'Convolution on the student\'s levels: "always", "auto" (only where channels '
        'differ), "never".',
    )
    adapter_kernel: int = key(
        1,
        one_of((1, 3)),
        'Its kernel, 1 or 3 (FGFI and DeFeat: 3), and its first weights: "identity" '
        '(where channels agree, else PyTorch\'s default), "default" or "small" (FGFI and '
        "DeFeat).",
    )
    adapter_init: str = key(
        "identity",
        one_of(INITS),
        'Its first weights: "identity" (where channels agree, else the default of PyTorch), '
        '"default" or "small" (FGFI and DeFeat).',
    )
    mask: MaskOptions = group(MaskOptions())
    relation: RelationOptions = group(RelationOptions())
    advice_iter: int = key(
        1000,
        NOT_NEGATIVE,
        "After this many iterations a log line says which share of the detection loss "
        "each term has, and which weight would bring it into the range that this "
        "reconstruction aims at. It is advice: nothing is rescaled. 0: no advice.",
    )


@DISTILL_HEAD_REGISTRY.register()
class MAR(DistillHead):
    """Mask-guided and relation-based distillation, a reconstruction.

    The mask-guided term brings the student's pyramid to the teacher's where anchors say that
    objects are near; the relation term compares cosine similarities between pixels. Zeng et al.,
    IJCSE 27(2), 2024, as docs/methods/mar.md reconstructs it from the abstract.

    Args:
        strides: pyramid levels of the mask-guided term, and of relations on maps.
        adapters: from the student's channels to the teacher's, by stride.
        mask_weight: w_m; 0 for no mask-guided term.
        mask_options: keywords of :func:`~d2kd.anchor_masks.multi_value_masks`.
        anchors: the student's field that holds its anchors; "" for pseudo-anchors.
        background_weight: eta of :func:`~d2kd.losses.mar.mask_guided_loss`.
        relation_site: a key of ``SITES``.
        relation_weight: w_r; 0 for no relation term.
        pixel_weighting: mode of :func:`~d2kd.losses.mar.pixel_weights`.
        advice: tells the terms' shares of the detection loss; None for silence.
    """

    Options = MAROptions

    @configurable
    def __init__(
        self,
        *,
        strides: Sequence[int],
        adapters: Adapters,
        mask_weight: float,
        mask_options: Mapping,
        anchors: str,
        background_weight: float,
        relation_site: str,
        relation_weight: float,
        pixel_weighting: str,
        advice: Advice | None = None,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters
        self.mask_weight = mask_weight
        self.mask_options = dict(mask_options)
        self.anchors = anchors
        self.background_weight = background_weight
        self.relation_site = relation_site
        self.relation_weight = relation_weight
        self.pixel_weighting = pixel_weighting
        self.advice = advice
        # Relations inside RoIs know no masks; relations on maps weigh their pixels by them.
        self.needs_masks = bool(mask_weight or (relation_weight and relation_site in MAP_SITES))
        self.reads = ("pyramid", *([SITES[relation_site][0]] if relation_weight else []))
        self.student_reads = (anchors,) if anchors and self.needs_masks else ()

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.MAR
        site, weight = node.RELATION.SITE, node.RELATION.WEIGHT
        if site == "auto":
            site = "roi_pixels" if student_spec.two_stage else "class_tower"
        relation_weight = SITES[site][1] if weight is None else weight
        if not node.MASK.WEIGHT and not relation_weight:
            raise ConfigError("DISTILL.MAR: MASK.WEIGHT and RELATION.WEIGHT are both 0")
        if relation_weight:
            _check_site(site, student_spec, teacher_spec)
        strides = pair_levels(student_spec, teacher_spec, node.STRIDES)
        if relation_weight and site in MAP_SITES:
            _check_map_levels(site, strides, student_spec, teacher_spec)
        adapters = build_adapters(
            student_spec,
            teacher_spec,
            strides if node.MASK.WEIGHT else (),
            kernel_size=node.ADAPTER_KERNEL,
            mode=node.ADAPTER,
            init=node.ADAPTER_INIT,
        )
        mask_options = {
            "kind": node.MASK.KIND,
            "iou_ratio": node.MASK.IOU_RATIO,
            "participation": node.MASK.PARTICIPATION,
            "cap": node.MASK.CAP,
        }
        advice = Advice(node.ADVICE_ITER, node.SCHEDULE.START_ITER, node.WEIGHT)
        return {
            "strides": strides,
            "adapters": adapters,
            "mask_weight": node.MASK.WEIGHT,
            "mask_options": mask_options,
            "anchors": _anchor_field(node.MASK.ANCHORS, student_spec),
            "background_weight": node.MASK.BACKGROUND,
            "relation_site": site,
            "relation_weight": relation_weight,
            "pixel_weighting": node.RELATION.PIXEL_WEIGHTS,
            "advice": advice if node.ADVICE_ITER > 0 else None,
        }

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        masks = self.build_masks(student, batch.gt_boxes) if self.needs_masks else {}
        terms = {}
        if self.mask_weight:
            levels = adapted_levels(student, teacher, self.strides, self.adapters)
            loss = mask_guided_loss(*levels, list(masks.values()), self.background_weight)
            terms["mask"] = self.mask_weight * loss
        if self.relation_weight:
            terms["relation"] = self.relation_weight * self._relate(student, teacher, masks)
        if self.advice is not None:
            weights = {"mask": self.mask_weight, "relation": self.relation_weight}
            self.advice.update(batch, terms, weights)
        return terms

    def build_masks(self, student: FeatureBundle, gt_boxes: list[Tensor]) -> dict[int, Tensor]:
        """The multi-value masks of a batch: stride -> (B, H, W) for the levels in use.

        Which objects take part in a level depends on all levels, those out of use too.

        Args:
            student: gives the sizes of the levels and the anchors; levels without anchors of
                their own get pseudo-anchors.
            gt_boxes: per image (n, 4).
        """
        sizes = {s: tuple(level.shape[-2:]) for s, level in student.pyramid.items()}
        view = {"rpn.anchors": "rpn", "dense.anchors": "dense"}.get(self.anchors)
        anchors = dict(getattr(student, view).anchors) if view else {}
        without = {s: size for s, size in sizes.items() if s not in anchors}
        anchors.update(pseudo_anchors(without, student.pyramid[self.strides[0]].device))
        masks = multi_value_masks(anchors, sizes, gt_boxes, **self.mask_options)
        return {s: masks[s] for s in self.strides}

    def _relate(
        self, student: FeatureBundle, teacher: FeatureBundle, masks: dict[int, Tensor]
    ) -> Tensor:
        if self.relation_site == "class_tower":
            return self._relate_maps(student.dense.class_tower, teacher.dense.class_tower, masks)
        if self.relation_site == "rpn_dense":
            return self._relate_maps(student.rpn.features, teacher.rpn.features, masks)
        if self.relation_site == "roi_pixels":
            return _relate_roi_pixels(student.roi, teacher.roi, student.spec.num_classes)
        return _relate_roi_vectors(student.roi, teacher.roi)

    def _relate_maps(
        self,
        student: dict[int, Tensor],
        teacher: dict[int, Tensor],
        masks: dict[int, Tensor],
    ) -> Tensor:
        """Relations between the positions of each level, averaged over images and levels."""
        losses = [
            relation_loss(
                student[s].flatten(2),
                teacher[s].flatten(2),
                pixel_weights(masks[s].flatten(1), self.pixel_weighting),
            )
            for s in self.strides
            if s in student and s in teacher
        ]
        return torch.stack(losses).mean()


def _relate_roi_pixels(student: RoIView, teacher: RoIView, num_classes: int) -> Tensor:
    """Relations between the cells of each positive RoI of the batch, averaged over RoIs."""
    # Waits for the device: relating all RoIs instead would cost several times the products.
    positive = (student.labels < num_classes).nonzero().squeeze(1)
    return relation_loss(
        student.features[positive].flatten(2), teacher.features[positive].flatten(2)
    )


def _relate_roi_vectors(student: RoIView, teacher: RoIView) -> Tensor:
    """Relations between the sampled RoIs of each image, averaged over images."""
    counts = [len(boxes) for boxes in student.boxes]

    def by_image(rois: Tensor) -> Tensor:
        """(R, ...) -> (B, largest R of an image, ...), padded with zeros."""
        return pad_sequence(rois.split(counts), batch_first=True)

    weights = torch.cat(
        [
            boxes.new_full((n,), 1 / max(n, 1))
            for boxes, n in zip(student.boxes, counts, strict=True)
        ]
    )
    return relation_loss(
        by_image(student.hidden).mT, by_image(teacher.hidden).mT, by_image(weights)
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

    def update(self, batch: Batch, terms: dict[str, Tensor], weights: dict[str, float]) -> None:
        """Take note of one iteration, and log when the time has come.

        Args:
            batch: of this iteration, for the student's own losses.
            terms: the head's terms, without ``DISTILL.MAR.WEIGHT``.
            weights: the head's own weight in each term.
        """
        if self.begin <= batch.iteration < self.end and batch.student_losses:
            values = {name: self.weight * term.detach() for name, term in terms.items()}
            values["detection"] = sum(batch.student_losses.values())
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0) + value
        if batch.iteration >= self.end - 1 and self.sums:
            # Waits for the device once in a training: the log needs numbers.
            names, sums = list(self.sums), torch.stack(list(self.sums.values())).tolist()
            self.sums = {}
            if comm.is_main_process():
                self._log(dict(zip(names, sums, strict=True)), weights)

    def _log(self, sums: dict[str, float], weights: dict[str, float]) -> None:
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


def _check_site(site: str, *specs: DetectorSpec) -> None:
    """Refuse a relation site that one of the detectors does not have.

    Raises:
        ConfigError: names the field, the detector and what works.
    """
    for spec in specs:
        if SITES[site][0] not in spec.fields:
            raise ConfigError(
                f"relations at '{site}' read {SITES[site][0]} of the {spec.role}, and a "
                f"{spec.meta_arch} has none here; DISTILL.MAR.RELATION.SITE has {list(SITES)}, and "
                "DISTILL.MAR.RELATION.WEIGHT 0 distils without relations"
            )


def _check_map_levels(
    site: str, strides: Sequence[int], student: DetectorSpec, teacher: DetectorSpec
) -> None:
    """Refuse relations on maps where none of the levels in use has them in both detectors.

    Raises:
        ConfigError: names the levels that have.
    """
    common = sorted(set(student.head_strides) & set(teacher.head_strides))
    if not set(strides) & set(common):
        raise ConfigError(
            f"relations at '{site}' are on the levels of stride {common}, and DISTILL.MAR.STRIDES "
            f"leaves {list(strides)}; DISTILL.MAR.RELATION.WEIGHT 0 distils without relations"
        )


def _anchor_field(anchors: str, student: DetectorSpec) -> str:
    """The student's field that holds its anchors, or "" for pseudo-anchors.

    Raises:
        ConfigError: the detector's own anchors are asked for, and it has none.
    """
    own = next((f for f in ("rpn.anchors", "dense.anchors") if f in student.fields), "")
    if anchors == "detector" and not own:
        raise ConfigError(
            f"DISTILL.MAR.MASK.ANCHORS is 'detector', but a {student.meta_arch} has no anchors; "
            "valid: auto, pseudo"
        )
    anchor_free = anchors == "auto" and student.anchors_per_location in (None, 1)
    return "" if anchors == "pseudo" or anchor_free else own
