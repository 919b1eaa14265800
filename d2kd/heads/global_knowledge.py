"""Global Knowledge: equal responses to prototypes, and local losses weighted by reliability."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.engine import HookBase
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..geometry.boxes import assign_levels, box_mask, crop_means
from ..keys import COUNT, NOT_NEGATIVE, POSITIVE, Options, Rule, group, key, one_of
from ..losses import global_knowledge as losses
from ..prototypes.hook import PrototypeHook
from ..prototypes.store import PrototypeBank, Prototypes
from ..registry import DISTILL_HEAD_REGISTRY
from ..schedules import ScheduleOptions
from .adapters import INITS, MODES, Adapters, build_adapters, pair_levels
from .base import DistillHead
from .dense import check_anchors

BOXES = ("positives", "gt")
RESPONSES = ("cosine", "projection")
ATTENUATIONS = ("linear", "none")

WEIGHT_KEYS = (
    "GLOBAL.WEIGHT",
    "LOCAL.FOREGROUND_WEIGHT",
    "LOCAL.BACKGROUND_WEIGHT",
    "SOFT_LABELS.WEIGHT",
)


@dataclass(frozen=True)
class PickedBoxes:
    """Boxes to distil on: B images, P boxes an image, padded.

    Attributes:
        boxes: (B, P, 4) xyxy in pixels of the resized image.
        labels: (B, P) classes; 0 where padded.
        valid: (B, P) bool.
        index: (B, P) positions among what they were picked from.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    index: Tensor


def pick_foreground(labels: Tensor, num_classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions of at most ``count`` foreground labels a row, evenly spread over those there are.

    Args:
        labels: (B, N); foreground are 0 to num_classes - 1.

    Returns:
        index (B, P) and validity (B, P) with P = min(count, N), found without waiting for the
        device. On the CPU, where looking costs nothing and padding does, P is what is needed.
    """
    number = ((labels >= 0) & (labels < num_classes)).cumsum(dim=1)  # 1 at the first, 2 ...
    count = min(count, labels.shape[1])
    total = number[:, -1:]
    if labels.device.type == "cpu" and total.numel():
        count = min(count, int(total.max()))
    steps = torch.arange(count, device=labels.device)
    wanted = steps * total.clamp(min=count) // max(count, 1) + 1
    index = torch.searchsorted(number, wanted).clamp(max=max(labels.shape[1] - 1, 0))
    return index, wanted <= total


def gather_levels(levels: Sequence[Tensor], index: Tensor) -> Tensor:
    """Rows ``index`` (B, P) of the concatenation of ``levels`` (B, N_l, K), without making it."""
    start, rows = 0, None
    for level in levels:
        local = index - start
        inside = (local >= 0) & (local < level.shape[1])
        local = local.clamp(0, level.shape[1] - 1)[..., None].expand(-1, -1, level.shape[2])
        found = level.gather(1, local) * inside[..., None]
        rows = found if rows is None else rows + found
        start += level.shape[1]
    return rows


@dataclass(frozen=True)
class GlobalOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.GLOBAL``."""

    weight: float = key(
        5.0,
        NOT_NEGATIVE,
        "Weight of the global knowledge loss; 0: none. Released config 5, class default 20.",
    )
    responses: str = key(
        "cosine",
        one_of(RESPONSES),
        'How a box responds to prototypes: "cosine" (released code), or "projection" on '
        "those of its class (the paper's wording; experimental) with the ridge mu that "
        "keeps it solvable.",
    )
    ridge: float = key(0.05, POSITIVE, 'mu, the ridge that keeps "projection" solvable.')
    assigned_level_only: bool = key(
        False,
        comment="Compare a box on the level of its size only, instead of on all levels.",
    )


@dataclass(frozen=True)
class LocalOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.LOCAL``."""

    foreground_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "k_fg and k_bg, weights of the squared error inside and outside of boxes; 0: none.",
    )
    background_weight: float = key(
        4.0, NOT_NEGATIVE, "k_bg, weight of the squared error outside of boxes; 0: none."
    )
    adapter: str = key(
        "always",
        one_of(MODES),
        'Convolution on the student\'s levels: "always", "auto" (only where channels '
        'differ), "never"; its kernel, 3 (released code) or 1 (cheaper); its first '
        'weights, "default" (released code), "identity" or "small".',
    )
    adapter_kernel: int = key(3, one_of((1, 3)), "Its kernel: 3 (released code) or 1 (cheaper).")
    adapter_init: str = key(
        "default",
        one_of(INITS),
        'Its first weights: "default" (released code), "identity" or "small".',
    )


@dataclass(frozen=True)
class SoftLabelOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.SOFT_LABELS``."""

    weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Weight of the soft labels on positives (0: none) and tau, their temperature.",
    )
    temperature: float = key(2.0, POSITIVE, "tau, temperature of the soft labels.")


@dataclass(frozen=True)
class PrototypeOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES``."""

    count: int = key(10, COUNT, "M, prototypes a class and level.")
    refresh_period: int = key(
        -1,
        Rule(lambda value: value >= -1, "it must be a number of iterations, 0 or -1"),
        "Iterations between refreshes; -1: an epoch (released code), 0: made once.",
    )
    file: str = key(
        "",
        comment="A file of tools/prototypes.py to start with, instead of making them at "
        "START_ITER.",
    )
    min_box_size: float = key(
        30.0,
        NOT_NEGATIVE,
        "Training objects wider and higher than this many pixels of the original image "
        "are candidates, of a random choice of this many images a class.",
    )
    max_images: int = key(
        800, COUNT, "Candidates come from a random choice of so many images per class."
    )
    alpha: float = key(
        10.0,
        NOT_NEGATIVE,
        "alpha, coupling of the teacher's and the student's coefficients in the matching pursuit.",
    )
    bandwidth: float = key(
        0.1,
        POSITIVE,
        "Density filter: width of the kernel, and the quantile of densities that must be exceeded.",
    )
    quantile: float = key(
        0.4,
        Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1"),
        "Density filter: quantile of the densities that must be exceeded.",
    )
    batch_size: int = key(4, COUNT, "Images that a process runs at once to read their features.")


@dataclass(frozen=True)
class GlobalKnowledgeOptions(HeadOptions):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE``."""

    schedule: ScheduleOptions = group(
        ScheduleOptions(start_iter=0),
        "Prototypes need a student that sees something: START_ITER 0 for a trained one (MODEL."
        "WEIGHTS of a detector, as in the paper), a warm-up of plain training for one from scratch "
        "or ImageNet.",
    )
    strides: tuple[int, ...] = key(
        (),
        comment="Strides of the pyramid levels to distil; []: all that both detectors have.",
    )
    boxes: str = key(
        "positives",
        one_of(BOXES),
        'Boxes of the global and local losses: "positives" (the student\'s sampled RoIs, '
        'or the anchors that it matched) or "gt"; and how many an image at most.',
    )
    max_boxes: int = key(128, COUNT, "At most so many boxes per image.")
    reliability: bool = key(
        True,
        comment="Weight each box by r, how far both detectors agree on its typicality; False: r = "
        "1.",
    )
    level_size: float = key(
        56.0,
        POSITIVE,
        "Local losses act on the level of a box's size: the finest up to twice this side "
        "in pixels, each further octave on the next.",
    )
    attenuation: str = key(
        "linear",
        one_of(ATTENUATIONS),
        '"linear": global and local losses decay by 1 - iteration / MAX_ITER, "none": they do not.',
    )
    global_: GlobalOptions = group(GlobalOptions())
    local: LocalOptions = group(LocalOptions())
    soft_labels: SoftLabelOptions = group(SoftLabelOptions())
    prototypes: PrototypeOptions = group(PrototypeOptions())


@DISTILL_HEAD_REGISTRY.register()
class GlobalKnowledge(DistillHead):
    """Distilling Object Detectors with Global Knowledge (Tang et al., ECCV 2022).

    Args:
        strides: pyramid levels.
        num_classes: K.
        two_stage: whether positives are RoIs, else anchors.
        anchor_free: whether a positive location stands for its matched box, not for an anchor.
        adapters: student's to teacher's channels, for the local losses.
        bank: the prototypes; None where neither the global loss nor reliability wants any.
        global_weight, foreground_weight, background_weight, soft_weight: of the terms; 0: without.
        boxes: "positives" (sampled RoIs, matched anchors) or "gt".
        max_boxes: boxes an image at most.
        responses: "cosine" or "projection".
        ridge: regulariser of the projection.
        use_reliability: whether boxes are weighted; else all count fully.
        assigned_level_only: whether a box takes part in the global loss of its own level only.
        level_size: ``base_size`` of :func:`~d2kd.geometry.assign_levels`.
        temperature: of the soft labels.
        attenuate: whether the global and local losses decay linearly to 0 over training.
    """

    Options = GlobalKnowledgeOptions

    @configurable
    def __init__(
        self,
        *,
        strides: Sequence[int],
        num_classes: int,
        two_stage: bool,
        anchor_free: bool = False,
        adapters: Adapters,
        bank: PrototypeBank | None,
        global_weight: float = 5.0,
        foreground_weight: float = 1.0,
        background_weight: float = 4.0,
        soft_weight: float = 1.0,
        boxes: str = "positives",
        max_boxes: int = 128,
        responses: str = "cosine",
        ridge: float = 0.05,
        use_reliability: bool = True,
        assigned_level_only: bool = False,
        level_size: float = 56.0,
        temperature: float = 2.0,
        attenuate: bool = True,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.two_stage, self.anchor_free = two_stage, anchor_free
        self.adapters = adapters
        self.bank = bank
        self.global_weight = global_weight
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.soft_weight = soft_weight
        self.boxes, self.max_boxes = boxes, max_boxes
        self.responses, self.ridge = responses, ridge
        self.use_reliability = use_reliability
        self.assigned_level_only = assigned_level_only
        self.level_size = level_size
        self.temperature = temperature
        self.attenuate = attenuate
        self.reads, self.student_reads = self._fields()

    def _fields(self) -> tuple[set[str], set[str]]:
        """What is read of both bundles, and of the student's only."""
        reads, student_reads = {"pyramid"}, set()
        if self.boxes == "positives" or self.soft_weight:
            student_reads |= {"roi"} if self.two_stage else {"dense.labels", "dense.anchors"}
        if self.soft_weight:
            reads |= {"roi.logits"} if self.two_stage else {"dense.logits", "dense.anchors"}
            if self.two_stage and self.use_reliability:
                reads.add("roi.features")
        return reads, student_reads

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.GLOBAL_KNOWLEDGE
        _check_config(node, student_spec, teacher_spec)
        strides = pair_levels(student_spec, teacher_spec, node.STRIDES)
        is_local = node.LOCAL.FOREGROUND_WEIGHT or node.LOCAL.BACKGROUND_WEIGHT
        adapters = build_adapters(
            student_spec,
            teacher_spec,
            strides if is_local else (),
            kernel_size=node.LOCAL.ADAPTER_KERNEL,
            mode=node.LOCAL.ADAPTER,
            init=node.LOCAL.ADAPTER_INIT,
        )
        max_boxes = node.MAX_BOXES
        if student_spec.two_stage:
            roi_heads = cfg.MODEL.ROI_HEADS
            positives = int(roi_heads.BATCH_SIZE_PER_IMAGE * roi_heads.POSITIVE_FRACTION)
            max_boxes = min(max_boxes, positives) if node.BOXES == "positives" else max_boxes
        return {
            "strides": strides,
            "num_classes": student_spec.num_classes,
            "two_stage": student_spec.two_stage,
            # Detectron2 represents the locations of anchor-free detectors by one square each.
            "anchor_free": student_spec.anchors_per_location == 1,
            "adapters": adapters,
            "bank": _build_bank(node, strides, student_spec, teacher_spec),
            "global_weight": node.GLOBAL.WEIGHT,
            "foreground_weight": node.LOCAL.FOREGROUND_WEIGHT,
            "background_weight": node.LOCAL.BACKGROUND_WEIGHT,
            "soft_weight": node.SOFT_LABELS.WEIGHT,
            "boxes": node.BOXES,
            "max_boxes": max_boxes,
            "responses": node.GLOBAL.RESPONSES,
            "ridge": node.GLOBAL.RIDGE,
            "use_reliability": node.RELIABILITY,
            "assigned_level_only": node.GLOBAL.ASSIGNED_LEVEL_ONLY,
            "level_size": node.LEVEL_SIZE,
            "temperature": node.SOFT_LABELS.TEMPERATURE,
            "attenuate": node.ATTENUATION == "linear",
        }

    def build_hooks(self, cfg) -> list[HookBase]:
        """The refresh of the prototypes."""
        return [] if self.bank is None else [PrototypeHook(type(self).__name__, self.bank, cfg)]

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        picked = self.pick_boxes(student, batch)
        reliability, global_loss = self._compare(
            student, teacher, picked, with_global=self.global_weight > 0
        )
        decay = losses.attenuation(batch.iteration, batch.max_iter) if self.attenuate else 1.0
        terms = {}
        if self.global_weight:
            terms["global"] = decay * self.global_weight * global_loss
        if self.foreground_weight or self.background_weight:
            foreground, background = self._local_losses(student, teacher, picked, reliability)
            terms["foreground"] = decay * self.foreground_weight * foreground
            terms["background"] = decay * self.background_weight * background
        if self.soft_weight:
            soft_labels = self._roi_soft_labels if self.two_stage else self._dense_soft_labels
            terms["soft"] = self.soft_weight * soft_labels(student, teacher, picked, reliability)
        return terms

    # --- boxes -----------------------------------------------------------------------------------

    def pick_boxes(self, student: FeatureBundle, batch: Batch) -> PickedBoxes:
        """The boxes that the global and local losses are about."""
        if self.boxes == "gt":
            return self._pick(batch.gt_boxes, batch.gt_classes)
        return self._pick_rois(student) if self.two_stage else self._pick_anchors(student)

    def _pick(self, boxes: list[Tensor], labels: list[Tensor]) -> PickedBoxes:
        """Pick foreground of per-image lists, (n_i, 4) and (n_i,)."""
        padded = pad_sequence(labels, batch_first=True, padding_value=self.num_classes)
        index, valid = pick_foreground(padded, self.num_classes, self.max_boxes)
        picked = pad_sequence(boxes, batch_first=True)
        picked = picked.gather(1, index[..., None].expand(-1, -1, 4))
        return PickedBoxes(picked, padded.gather(1, index) * valid, valid, index)

    def _pick_rois(self, student: FeatureBundle) -> PickedBoxes:
        roi = student.roi
        counts = [len(boxes) for boxes in roi.boxes]
        picked = self._pick(roi.boxes, list(roi.labels.split(counts)))
        # From positions in the image to positions among all RoIs of the batch.
        rows = torch.arange(len(roi.labels), device=roi.labels.device).split(counts)
        index = pad_sequence(list(rows), batch_first=True).gather(1, picked.index)
        return PickedBoxes(picked.boxes, picked.labels, picked.valid, index)

    def _pick_anchors(self, student: FeatureBundle) -> PickedBoxes:
        dense = student.dense
        index, valid = pick_foreground(dense.labels, self.num_classes, self.max_boxes)
        if self.anchor_free:
            boxes = dense.matched_boxes.gather(1, index[..., None].expand(-1, -1, 4))
        else:
            boxes = torch.cat(list(dense.anchors.values()))[index]
        return PickedBoxes(boxes, dense.labels.gather(1, index) * valid, valid, index)

    def _levels_of(self, boxes: Tensor) -> Tensor:
        """(B, P) position in ``strides`` of the level that each box's size assigns it to."""
        return assign_levels(boxes, len(self.strides), self.level_size)

    # --- prototypes ------------------------------------------------------------------------------

    def _compare(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        picked: PickedBoxes,
        *,
        with_global: bool,
    ) -> tuple[Tensor, Tensor]:
        """Reliability (B, P, L) of the boxes on each level, a constant, and the global loss, a
        scalar; 0 without."""
        zero = picked.boxes.new_zeros(())
        if self.bank is None:
            return picked.boxes.new_ones(*picked.valid.shape, len(self.strides)), zero
        assigned = self._levels_of(picked.boxes)
        pyramids = [bundle.pyramid for bundle in (student, teacher)]
        if not with_global:  # nothing to differentiate
            pyramids = [{s: feature.detach() for s, feature in p.items()} for p in pyramids]
        reliabilities, terms = [], []
        for number, stride in enumerate(self.strides):
            features = [
                crop_means(pyramid[stride], picked.boxes, stride).flatten(0, 1)
                for pyramid in pyramids
            ]
            labels = picked.labels.flatten()
            responses = self._respond(*features, stride)
            r = self._reliability(responses, labels, stride)
            if with_global:
                takes_part = picked.valid & (assigned == number)
                valid = (takes_part if self.assigned_level_only else picked.valid).flatten()
                terms.append(self._global_loss(responses, labels, r, valid, stride))
            reliabilities.append(r.view_as(picked.valid))
        return torch.stack(reliabilities, dim=-1), torch.stack(terms).sum() if terms else zero

    def _respond(self, student: Tensor, teacher: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Features (N, C_s), (N, C_t) -> responses (N, K, M) of both detectors."""
        prototypes = self.bank.level(stride)[:2]
        if self.responses == "cosine":
            return tuple(map(losses.cosine_responses, (student, teacher), prototypes))
        return tuple(
            losses.projection_responses(features, rows, self.ridge)
            for features, rows in zip((student, teacher), prototypes, strict=True)
        )

    def _reliability(self, responses: tuple[Tensor, Tensor], labels: Tensor, stride: int) -> Tensor:
        """r (N,) of boxes with these responses (N, K, M)."""
        if not self.use_reliability:
            return responses[0].new_ones(len(labels))
        if self.responses == "cosine":
            return losses.cosine_reliability(*responses, labels, self.bank.level(stride)[2])
        return losses.projection_reliability(*responses, labels)

    def _global_loss(
        self,
        responses: tuple[Tensor, Tensor],
        labels: Tensor,
        reliability: Tensor,
        valid: Tensor,
        stride: int,
    ) -> Tensor:
        if self.responses == "cosine":
            present = self.bank.level(stride)[2]
            return losses.cosine_global_loss(*responses, reliability, valid, present)
        return losses.projection_global_loss(*responses, labels, reliability, valid)

    # --- local losses and soft labels ------------------------------------------------------------

    def _local_losses(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        picked: PickedBoxes,
        reliability: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Foreground and background loss, each the mean over levels."""
        assigned = self._levels_of(picked.boxes)
        terms = []
        for number, stride in enumerate(self.strides):
            weights = reliability[..., number] * (picked.valid & (assigned == number))
            feature = self.adapters(stride, student.pyramid[stride])
            mask = box_mask(picked.boxes, weights, feature.shape[-2:], stride)
            terms.append(torch.stack(losses.decoupled_loss(feature, teacher.pyramid[stride], mask)))
        foreground, background = torch.stack(terms).mean(dim=0)
        return foreground, background

    def _roi_soft_labels(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        picked: PickedBoxes,
        reliability: Tensor,
    ) -> Tensor:
        rois = picked if self.boxes == "positives" else self._pick_rois(student)
        index, valid = rois.index.flatten(), rois.valid.flatten()
        weights = valid.float()
        if self.use_reliability:
            weights = self._roi_reliability(student, teacher, rois)
        return losses.soft_label_loss(
            student.roi.logits[index],
            teacher.roi.logits[index],
            weights,
            valid,
            self.temperature,
        )

    def _roi_reliability(
        self, student: FeatureBundle, teacher: FeatureBundle, rois: PickedBoxes
    ) -> Tensor:
        """r (B P,) of RoIs by their pooled features, on the level that each was pooled from."""
        index, labels = rois.index.flatten(), rois.labels.flatten()
        strides = student.spec.roi_strides
        # FPN's rule, as Detectron2's pooler has it: 224 px to stride 16, so 14 strides.
        level = assign_levels(rois.boxes, len(strides), 14.0 * strides[0], margin=0).flatten()
        features = [
            bundle.roi.features.detach()[index].float().mean(dim=(2, 3))
            for bundle in (student, teacher)
        ]
        weights = features[0].new_ones(len(index))
        for number, stride in enumerate(strides):
            if stride in self.strides:
                r = self._reliability(self._respond(*features, stride), labels, stride)
                weights = torch.where(level == number, r, weights)
        return weights

    def _dense_soft_labels(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        picked: PickedBoxes,
        reliability: Tensor,
    ) -> Tensor:
        if self.boxes != "positives":
            picked = self._pick_anchors(student)
            reliability, _ = self._compare(student, teacher, picked, with_global=False)
        level = self._levels_of(picked.boxes)[..., None]
        logits = [
            gather_levels(list(bundle.dense.logits.values()), picked.index).flatten(0, 1)
            for bundle in (student, teacher)
        ]
        weights = reliability.gather(-1, level).flatten()
        return losses.soft_label_loss(*logits, weights, picked.valid.flatten(), self.temperature)


def _build_bank(
    node, strides: Sequence[int], student: DetectorSpec, teacher: DetectorSpec
) -> PrototypeBank | None:
    """An empty bank, or one with the prototypes of a file; None if nothing reads it."""
    if not node.GLOBAL.WEIGHT and not node.RELIABILITY:
        return None
    bank = PrototypeBank(
        student.num_classes,
        node.PROTOTYPES.COUNT,
        {s: student.channels[s] for s in strides},
        {s: teacher.channels[s] for s in strides},
    )
    path = node.PROTOTYPES.FILE
    if path:
        if not os.path.isfile(path):
            raise ConfigError(f"DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE: no file '{path}'")
        try:
            bank.fill(Prototypes.load(path), node.SCHEDULE.START_ITER)
        except ValueError as error:
            raise ConfigError(f"DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE: {error}") from error
    return bank


def _check_config(node, student: DetectorSpec, teacher: DetectorSpec) -> None:
    prefix = "DISTILL.GLOBAL_KNOWLEDGE"
    if not any(operator.attrgetter(key)(node) for key in WEIGHT_KEYS):
        raise ConfigError(f"{prefix}: all of {', '.join(WEIGHT_KEYS)} are 0")
    if student.num_classes is None:
        raise ConfigError(f"{prefix}: the student, a {student.meta_arch}, predicts no classes")
    if node.SOFT_LABELS.WEIGHT:
        _check_soft_labels(f"{prefix}.SOFT_LABELS.WEIGHT", student, teacher)


def _check_soft_labels(key: str, student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Soft labels compare class outputs one by one, and those of RoIs as softmax."""
    field = "roi.logits" if student.two_stage else "dense.logits"
    if field not in teacher.fields:
        raise ConfigError(
            f"{key} reads {field} of the teacher, and a {teacher.meta_arch} has none here; "
            "0 trains without soft labels"
        )
    for spec in (student, teacher):
        if student.two_stage and spec.sigmoid_classes:
            raise ConfigError(
                f"{key} reads class logits of RoIs as softmax, but the {spec.role}'s box head is "
                "trained with sigmoids (USE_SIGMOID_CE); 0 trains without soft labels"
            )
    for what, attribute in (("classes", "num_classes"), ("anchors", "anchors_per_location")):
        if what == "anchors" and student.two_stage:
            continue
        mine, its = getattr(student, attribute), getattr(teacher, attribute)
        if mine != its:
            raise ConfigError(
                f"{key} needs equal outputs, but the student has {mine} {what} and the teacher "
                f"{its}; 0 trains without soft labels"
            )
    if student.anchors and teacher.anchors:
        mine, its = list(student.anchors), list(teacher.anchors)
        if mine != its:
            raise ConfigError(
                f"{key}: the student predicts at strides {mine}, the teacher at {its}; "
                "0 trains without soft labels"
            )
        check_anchors(student, teacher)
