"""The head of Global Knowledge: which boxes, which terms, with which weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from torch import Tensor

from ...detectors.bundle import Batch, FeatureBundle
from ...detectors.spec import DetectorSpec
from ...errors import ConfigError
from ...geometry.boxes import BoxCells, assign_levels, box_masks, crop_means
from ...losses import global_knowledge as losses
from ...numerics import stack_channels
from ...prototypes.hook import PrototypeHook
from ...prototypes.store import PrototypeBank, Prototypes
from ...registry import DISTILL_HEAD_REGISTRY
from ..adapters import build_adapters, pair_levels
from ..base import DistillHead, Terms
from ..dense import (
    at_anchors,
    is_constant,
    join_levels,
    pick_classes,
    say_constant,
    softmax_classes,
)
from ..needs import Need
from ..sketch import Sketch
from .boxes import (
    BoxesOnLevels,
    PickedBoxes,
    most_positives,
    pick_anchors,
    pick_objects,
    pick_rois,
)
from .options import GlobalKnowledgeOptions
from .responses import CosineResponses, ProjectionResponses

PATH = "DISTILL.GLOBAL_KNOWLEDGE"


@DISTILL_HEAD_REGISTRY.register()
class GlobalKnowledge(DistillHead):
    """Distilling Object Detectors with Global Knowledge (Tang et al., ECCV 2022).

    Args:
        options: the values of ``DISTILL.GLOBAL_KNOWLEDGE``.
        student_spec, teacher_spec: of the pair.
        positives: most positive RoIs of an image.

    Attributes:
        bank: the prototypes; None where neither the global loss nor reliability wants any.
    """

    Options = GlobalKnowledgeOptions
    term_options = {
        "global": "global_.weight",
        "foreground": "local.foreground_weight",
        "background": "local.background_weight",
        "soft": "soft_labels.weight",
    }

    @configurable
    def __init__(
        self,
        *,
        options: GlobalKnowledgeOptions,
        student_spec: DetectorSpec,
        teacher_spec: DetectorSpec,
        positives: int,
    ):
        super().__init__()
        pair = student_spec, teacher_spec
        self.options = options
        self.weights = self._weights(options, *pair)
        if options.soft_labels.weight and is_constant(*pair):
            say_constant("GlobalKnowledge's term 'soft'")
        self.strides = pair_levels(*pair, options.strides)
        self.num_classes = student_spec.num_classes or 0
        self.softmax_classes = softmax_classes(*pair)
        self.two_stage = student_spec.two_stage
        # Detectron2 represents the positions of anchor-free detectors by one square each.
        self.anchor_free = student_spec.anchors_per_location == 1
        is_local = self.weights.keys() & {"foreground", "background"}
        self.adapters = build_adapters(
            *pair,
            self.strides if is_local else (),
            kernel_size=options.local.adapter_kernel,
            mode=options.local.adapter,
            init=options.local.adapter_init,
        )
        self.bank = _build_bank(options, self.strides, *pair)
        self.max_boxes = options.max_boxes
        if self.two_stage and options.boxes == "positives":
            self.max_boxes = min(options.max_boxes, positives)
        self.responses: CosineResponses | ProjectionResponses = CosineResponses()
        if options.global_.responses == "projection":
            self.responses = ProjectionResponses(options.global_.ridge)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        arguments = super().from_config(cfg, student_spec, teacher_spec)
        return {**arguments, "positives": most_positives(cfg)}

    @classmethod
    def _weights(
        cls, options: GlobalKnowledgeOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> dict[str, float]:
        """Weight of each term that is switched on and that this pair has."""
        return cls.term_weights(options, ("soft",) if is_constant(student, teacher) else ())

    @classmethod
    def needs(
        cls, options: GlobalKnowledgeOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> list[Need]:
        weights = cls._weights(options, student, teacher)
        if student.num_classes is None:
            raise ConfigError(f"{PATH}: the student, a {student.meta_arch}, predicts no classes")
        positives = {"roi"} if student.two_stage else {"dense.labels", "dense.anchors"}
        boxes = positives if options.boxes == "positives" else set()
        needs = [Need("", both={"pyramid"}, student=boxes)]
        if "soft" in weights:
            needs.append(_soft_label_need(options, student, positives))
        return needs

    def build_hooks(self, cfg: CfgNode) -> list[HookBase]:
        """The refresh of the prototypes."""
        return [] if self.bank is None else [PrototypeHook(type(self).__name__, self.bank, cfg)]

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        picked = self.pick_boxes(student, batch)
        placed = self._place(picked, student)
        reliability, global_loss = self._compare(
            student, teacher, placed, with_global="global" in self.weights
        )
        decay = 1.0
        if self.options.attenuation == "linear":
            decay = losses.attenuation(batch.iteration, batch.max_iter)
        terms = {}
        if "global" in self.weights:
            terms["global"] = decay * self.weights["global"] * global_loss
        if self.weights.keys() & {"foreground", "background"}:
            local = self._local_losses(student, teacher, placed, reliability)
            for term, loss in zip(("foreground", "background"), local, strict=True):
                if term in self.weights:
                    terms[term] = decay * self.weights[term] * loss
        if "soft" in self.weights:
            soft_labels = self._roi_soft_labels if self.two_stage else self._dense_soft_labels
            loss = soft_labels(student, teacher, placed, reliability)
            terms["soft"] = self.weights["soft"] * loss
        return terms

    def sketch(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Sketch:
        """How much each cell resembles its nearest prototype, in both detectors."""
        if self.bank is None:
            return Sketch()
        if not self.bank.has_prototypes:
            return Sketch(note="no prototypes yet: give PROTOTYPES.FILE, or a checkpoint with some")
        maps: dict[str, dict[int, Tensor]] = {}
        for stride in self.strides:
            mine, theirs, present = self.bank.level(stride)
            for side, bundle, prototypes in (
                ("teacher", teacher, theirs),
                ("student", student, mine),
            ):
                level = bundle.pyramid[stride][0].detach()
                cosines = losses.cosine_responses(level.flatten(1).mT, prototypes)[:, present]
                nearest = cosines.amax(1).clamp(0).view(level.shape[1:])
                maps.setdefault(f"nearest prototype, {side}", {})[stride] = nearest
        return Sketch(maps)

    def pick_boxes(self, student: FeatureBundle, batch: Batch) -> PickedBoxes:
        """The boxes that the global and local losses are about."""
        if self.options.boxes == "gt":
            return pick_objects(batch.gt_boxes, batch.gt_classes, self.num_classes, self.max_boxes)
        return self._pick_positives(student)

    def _pick_positives(self, student: FeatureBundle) -> PickedBoxes:
        if self.two_stage:
            return pick_rois(student, self.num_classes, self.max_boxes)
        return pick_anchors(student, self.num_classes, self.max_boxes, self.anchor_free)

    def _place(self, picked: PickedBoxes, student: FeatureBundle) -> BoxesOnLevels:
        """The boxes, and where they lie on the student's levels."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in map(student.pyramid.__getitem__, self.strides)]
        level = assign_levels(picked.boxes, len(self.strides), self.options.level_size)
        return BoxesOnLevels(picked, level, BoxCells(picked.boxes, sizes, self.strides))

    # --- prototypes ------------------------------------------------------------------------------

    def _compare(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        placed: BoxesOnLevels,
        *,
        with_global: bool,
    ) -> tuple[Tensor, Tensor]:
        """Reliability (L, B, P) of the boxes on each level, a constant, and the global loss, a
        scalar; 0 without."""
        picked = placed.picked
        zero = picked.boxes.new_zeros(())
        if self.bank is None:
            return picked.boxes.new_ones(len(self.strides), *picked.valid.shape), zero
        pyramids = [[bundle.pyramid[s] for s in self.strides] for bundle in (student, teacher)]
        if not with_global:  # nothing to differentiate
            pyramids = [[level.detach() for level in pyramid] for pyramid in pyramids]
        bank, present = self.bank.levels(self.strides)
        features = crop_means(pyramids, placed.cells).flatten(2, 3)
        responses = self.responses.respond(features, bank)
        labels = picked.labels.flatten()
        reliability = self._reliability(responses, labels, present)
        shape = len(self.strides), *picked.valid.shape
        if not with_global:
            return reliability.view(shape), zero
        valid = picked.valid.expand(shape)
        if self.options.global_.assigned_level_only:
            valid = valid & placed.on_level(len(self.strides))
        mine, theirs = responses
        loss = self.responses.loss(mine, theirs, labels, reliability, valid.flatten(1), present)
        return reliability.view(shape), loss.sum()

    def _reliability(self, responses: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """r (L, N) of boxes with these responses (2, L, N, K, M) in student and teacher."""
        if not self.options.reliability:
            return responses.new_ones(responses.shape[1:3])
        student, teacher = responses.detach()
        return self.responses.reliability(student, teacher, labels, present)

    # --- local losses and soft labels ------------------------------------------------------------

    def _local_losses(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        placed: BoxesOnLevels,
        reliability: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Foreground and background loss, each the mean over levels."""
        weights = reliability * (placed.picked.valid & placed.on_level(len(self.strides)))
        masks = box_masks(placed.cells, weights)
        features = [self.adapters(s, student.pyramid[s]) for s in self.strides]
        targets = [teacher.pyramid[s] for s in self.strides]
        foreground, background = losses.decoupled_losses(features, targets, masks)
        return foreground.mean(), background.mean()

    def _roi_soft_labels(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        placed: BoxesOnLevels,
        reliability: Tensor,
    ) -> Tensor:
        is_same = self.options.boxes == "positives"
        rois = placed.picked if is_same else self._pick_positives(student)
        index, valid = rois.index.flatten(), rois.valid.flatten()
        weights = valid.float()
        if self.options.reliability:
            weights = self._roi_reliability(student, teacher, rois)
        logits = student.roi.logits[index], teacher.roi.logits[index]
        temperature = self.options.soft_labels.temperature
        return losses.soft_label_loss(*logits, weights, valid, temperature)

    def _roi_reliability(
        self, student: FeatureBundle, teacher: FeatureBundle, rois: PickedBoxes
    ) -> Tensor:
        """r (B P,) of RoIs by their pooled features, on the level that each was pooled from; 1 on
        a level without prototypes."""
        index = rois.index.flatten()
        strides = student.spec.roi_strides
        # FPN's rule, as Detectron2's pooler has it: 224 px to stride 16, so 14 strides.
        level = assign_levels(rois.boxes, len(strides), 14.0 * strides[0], margin=0).flatten()
        common = [stride for stride in strides if stride in self.strides]
        if self.bank is None or not common:
            return rois.boxes.new_ones(len(index))
        pooled = [bundle.roi.features.detach()[index] for bundle in (student, teacher)]
        features = stack_channels([x.float().mean(dim=(2, 3)) for x in pooled])
        bank, present = self.bank.levels(common)
        responses = self.responses.respond(features[:, None], bank)
        reliability = self._reliability(responses, rois.labels.flatten(), present)
        if len(common) < len(strides):
            ones = torch.ones_like(reliability[0])
            by_stride = dict(zip(common, reliability, strict=True))
            reliability = torch.stack([by_stride.get(stride, ones) for stride in strides])
        return reliability.gather(0, level[None])[0]

    def _dense_soft_labels(
        self,
        student: FeatureBundle,
        teacher: FeatureBundle,
        placed: BoxesOnLevels,
        reliability: Tensor,
    ) -> Tensor:
        if self.options.boxes != "positives":
            placed = self._place(self._pick_positives(student), student)
            reliability, _ = self._compare(student, teacher, placed, with_global=False)
        picked = placed.picked
        weights = reliability.gather(0, placed.level[None]).flatten()
        maps = (bundle.dense.logit_maps for bundle in (student, teacher))
        joined = (join_levels(m, list(m), self.num_classes) for m in maps)
        logits = [at_anchors(x, picked.index).flatten(0, 1) for x in joined]
        mine, theirs = pick_classes(logits, self.softmax_classes, 1)
        temperature = self.options.soft_labels.temperature
        return losses.soft_label_loss(mine, theirs, weights, picked.valid.flatten(), temperature)


def _soft_label_need(
    options: GlobalKnowledgeOptions, student: DetectorSpec, positives: set[str]
) -> Need:
    """Soft labels compare class outputs one by one, and those of RoIs as softmax."""
    if not student.two_stage:
        return Need(
            "soft",
            both={"dense.logits", "dense.anchors"},
            student=positives,
            same=("num_classes", "anchors_per_location", "head_strides", "anchors"),
        )
    fields = {"roi.logits", "roi.features"} if options.reliability else {"roi.logits"}
    return Need(
        "soft",
        both=fields,
        student=positives,
        same=("num_classes",),
        softmax=("student", "teacher"),
    )


def _build_bank(
    options: GlobalKnowledgeOptions,
    strides: Sequence[int],
    student: DetectorSpec,
    teacher: DetectorSpec,
) -> PrototypeBank | None:
    """An empty bank, or one with the prototypes of a file; None if nothing reads it."""
    if not options.global_.weight and not options.reliability:
        return None
    assert student.num_classes is not None
    bank = PrototypeBank(
        student.num_classes,
        options.prototypes.count,
        {s: student.channels[s] for s in strides},
        {s: teacher.channels[s] for s in strides},
    )
    path = options.prototypes.file
    if path:
        if not os.path.isfile(path):
            raise ConfigError(f"{PATH}.PROTOTYPES.FILE: no file '{path}'")
        try:
            prototypes = Prototypes.load(path)
            _check_names(prototypes, student.class_names or ())
            bank.fill(prototypes, options.schedule.start_iter)
        except ValueError as error:
            raise ConfigError(f"{PATH}.PROTOTYPES.FILE: {error}") from error
    return bank


def _check_names(prototypes: Prototypes, names: Sequence[str]) -> None:
    """Refuse prototypes of other classes, or in another order, where both names are known."""
    pairs = zip(prototypes.meta.get("classes") or (), names, strict=False)
    for number, (found, own) in enumerate(pairs):
        if found != own:
            raise ValueError(f"its class {number} is '{found}', the student's is '{own}'")
