"""The head DRKD: its keys, and its three terms."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ...config import HeadOptions
from ...detectors.bundle import Batch, FeatureBundle
from ...detectors.spec import DetectorSpec
from ...geometry.pooling import PlacedBoxes, place_boxes
from ...keys import COUNT, NOT_NEGATIVE, Rule, key, one_of, or_none
from ...losses.drkd import (
    PROFILES,
    batch_size_factors,
    instance_loss,
    pixel_relation_loss,
    relation_matrix_loss,
)
from ...numerics import Ragged, full_precision
from ...registry import DISTILL_HEAD_REGISTRY
from ..adapters import INITS, Adapters, build_adapters, pair_levels
from ..base import DistillHead, Terms
from ..sketch import Sketch
from .graph import GraphUnit
from .instances import (
    RELATION_FILTERS,
    InstanceRelation,
    RelationUnit,
    refine_instances,
    relation_matrices,
)
from .pixels import Level, squared_relation_gaps

logger = logging.getLogger(__name__)

# (profile, two-stage student) -> weights of L_PR, L_IR and L_INS. "code": the released code; of its
# one-stage weights the first and the last stand in commented lines. "paper": the same strength of
# gradient at a typical gap, see docs/methods/drkd.md; the paper's own are not known to us.
DEFAULT_WEIGHTS = {
    ("code", True): (1e-3, 4e-3, 2.4e-3),
    ("code", False): (4e-3, 5e-3, 6e-3),
    ("paper", True): (4.0, 10.0, 2.6e-4),
    ("paper", False): (8.0, 10.0, 6.6e-4),
}


@dataclass(frozen=True)
class DRKDOptions(HeadOptions):
    """Keys of ``DISTILL.DRKD``."""

    profile: str = key(
        "code",
        one_of(PROFILES),
        '"code": what the authors released, un-squared norms of gaps between refined features. '
        '"paper": the formulas of the paper, mean squares and relation matrices.',
    )
    pixel_weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "lambda_1, weight of the pixel-wise relation; 0 turns the term off. None: that of the "
        "released code, 0.001 for two-stage students and 0.004 for one-stage ones; with the "
        'profile "paper" 4 and 8, converted from those and not tuned.',
    )
    relation_weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "lambda_2, weight of the instance-wise relation; 0 turns the term off. None: that of the "
        "released code, 0.004 for two-stage students and 0.005 for one-stage ones; with the "
        'profile "paper" 10, a guess.',
    )
    instance_weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "lambda_3, weight of the instance features; 0 turns the term off. None: that of the "
        "released code, 0.0024 for two-stage students and 0.006 for one-stage ones; with the "
        'profile "paper" 0.00026 and 0.00066, converted from those and not tuned.',
    )
    batch_size_rule: bool = key(
        True,
        comment="Keep the meaning of the weights, which are for 2 images per GPU, at B images: "
        "norms grow with the batch, so the pixel term is multiplied by sqrt(2 / B) and the others "
        'by 2 / B. Profile "code" only.',
    )
    strides: tuple[int, ...] = key(
        (),
        comment="Strides of the levels of the pixel-wise relation; []: all that both detectors "
        "have.",
    )
    nodes: tuple[int, ...] = key(
        (64, 64, 256, 256, 256),
        Rule(
            lambda value: bool(value) and all(type(n) is int and n >= 1 for n in value),
            "it must have a positive integer per level",
        ),
        "Nodes of the graph units by level, fine to coarse (M in the paper); the last number holds "
        "for further levels.",
    )
    normalize: bool = key(
        False,
        comment="Divide node features by the number of pixels. The released code does not.",
    )
    adapter_init: str = key(
        "default",
        one_of(INITS),
        "First weights of the 1x1 convolutions on the student's side: \"default\" (PyTorch's, as "
        'in the released code), "identity" (starts as no adapter, where channels agree) or '
        '"small" (near zero).',
    )
    zero_init_bn: bool = key(
        False,
        comment="Start the scale of the graph units' batch norm at 0, which makes them the "
        "identity.",
    )
    instance_levels: int = key(
        2,
        COUNT,
        "Number of levels, from the finest, that instances are pooled from; each object is pooled "
        "from each of them.",
    )
    pool_resolution: int = key(3, COUNT, "Side of a pooled instance, in cells.")
    sampling_ratio: int = key(
        0, NOT_NEGATIVE, "Samples of RoIAlign along each side of a cell; 0: as its size asks for."
    )
    aligned: bool = key(
        False,
        comment="Half-pixel shift of RoIAlign. Without it a box narrower than one position of the "
        "level is widened to one, as in the released code.",
    )
    relation_filter: str = key(
        "learned",
        one_of(RELATION_FILTERS),
        'Weights on relations: "learned"; "uniform" (1 / objects of the image, where "learned" '
        'starts); "random" (new at each step, the released code); "none".',
    )
    bottleneck: int = key(
        0,
        NOT_NEGATIVE,
        "Width inside the relation units; 0: half of their input, which at 256 channels and 3 x 3 "
        "cells means 44 million parameters with the learned filter.",
    )
    freeze_teacher_units: bool = key(
        False,
        comment="Keep the teacher's graph and relation units at their random start. The released "
        "code trains them with the student.",
    )
    max_instances: int = key(
        200,
        COUNT,
        "Most objects of an image that take part; of an image with more, a random choice does.",
    )


@DISTILL_HEAD_REGISTRY.register()
class DRKD(DistillHead):
    """Dual Relation Knowledge Distillation for Object Detection (IJCAI 2023, arXiv 2302.05637).

    Three terms: ``pixel`` (L_PR) compares pyramid levels after graph units, ``relation`` (L_IR)
    compares ground-truth instances after relation units, and ``instance`` (L_INS) their plain
    pooled features. Both sides of a pair have trainable units; their identity paths keep the
    teacher's features in what the student must match, so training cannot empty the target.

    Profile ``paper`` compares the relation matrices themselves. Nothing keeps the teacher there, so
    its side is frozen; the student's starts as a copy of it where the widths agree.

    Args:
        options: the values of ``DISTILL.DRKD``.
        student_spec, teacher_spec: of the pair.
    """

    Options = DRKDOptions
    term_options = {
        "pixel": "pixel_weight",
        "relation": "relation_weight",
        "instance": "instance_weight",
    }

    @configurable
    def __init__(
        self, *, options: DRKDOptions, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ):
        super().__init__()
        specs = student_spec, teacher_spec
        self.options = options
        self.weights = self.term_weights(_with_default_weights(options, student_spec.two_stage))
        self.strides = pair_levels(*specs, options.strides)
        self.instance_strides = pair_levels(*specs)[: options.instance_levels]

        levels = self.strides if "pixel" in self.weights else ()
        self.student_graphs, self.teacher_graphs = (
            _build_graphs(options, spec, levels) for spec in specs
        )
        self.pixel_adapters = self._build_adapters(*specs, levels)

        levels = self.instance_strides if "relation" in self.weights else ()
        self.student_relations, self.teacher_relations = (
            _build_relations(options, spec, levels) for spec in specs
        )
        if options.profile == "code":
            self.relation_adapters = self._build_adapters(*specs, levels)
        else:
            _copy_where_shapes_agree(self.teacher_relations, self.student_relations)

        levels = self.instance_strides if "instance" in self.weights else ()
        self.instance_adapters = self._build_adapters(*specs, levels)

        trained = not options.freeze_teacher_units
        self.teacher_graphs.requires_grad_(trained)
        self.teacher_relations.requires_grad_(trained and options.profile == "code")
        logger.info(describe_parameters(self))

    def _build_adapters(
        self, student: DetectorSpec, teacher: DetectorSpec, strides: Sequence[int]
    ) -> Adapters:
        init = self.options.adapter_init
        return build_adapters(student, teacher, strides, mode="always", init=init)

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        terms: dict[str, Tensor] = {}
        if "pixel" in self.weights:
            terms["pixel"] = self._pixel_loss(student.pyramid, teacher.pyramid)
        if "relation" in self.weights or "instance" in self.weights:
            boxes, students, teachers = self._instances(student, teacher, batch)
            rows = Ragged.of(boxes)
            if "relation" in self.weights:
                terms["relation"] = self._relation_loss(students, teachers, rows)
            if "instance" in self.weights:
                terms["instance"] = self._instance_loss(students, teachers, rows)
        factors = self._batch_size_factors(len(batch.inputs))
        return {name: self.weights[name] * factors[name] * loss for name, loss in terms.items()}

    def sketch(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Sketch:
        """The relations of the objects on the finest level, in both detectors."""
        if "relation" not in self.weights:
            return Sketch()
        boxes, mine, theirs = self._instances(student, teacher, batch)

        def relations(units: nn.ModuleDict, instances: Tensor) -> tuple[Tensor, Tensor]:
            unit = _in_order(units)[0]
            relation = getattr(unit, "relation", unit)  # of the profile "code", or of "paper"
            matrices = relation_matrices([relation], [instances.flatten(1)], Ragged.of(boxes))
            return torch.cat(boxes), matrices[0][0].detach()

        teachers = relations(self.teacher_relations, theirs[0])
        students = relations(self.student_relations, mine[0])
        graphs = {"relations, teacher": teachers, "relations, student": students}
        return Sketch(graphs=graphs)

    def _instances(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The objects per image, and of both detectors what is pooled of them from each level."""
        boxes = choose_boxes(batch.gt_boxes, self.options.max_instances, seed=batch.iteration)
        placed = [place_boxes(boxes, self.instance_strides[:1])]
        placed += [PlacedBoxes((s,), placed[0].rois) for s in self.instance_strides[1:]]
        return boxes, self._pool(student, placed), self._pool(teacher, placed)

    def _pool(self, side: FeatureBundle, levels: Sequence[PlacedBoxes]) -> list[Tensor]:
        """Each instance from each of the finest levels: (R, C, k, k) by level."""
        options = self.options
        return [
            side.pool(
                placed,
                options.pool_resolution,
                sampling_ratio=options.sampling_ratio,
                aligned=options.aligned,
            )
            for placed in levels
        ]

    def _pixel_loss(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
        """L_PR over levels; the pyramids are stride -> (B, C_s, H, W), (B, C_t, H, W)."""
        modules = zip(
            _in_order(self.student_graphs),
            _in_order(self.teacher_graphs),
            _in_order(self.pixel_adapters),
            strict=True,
        )
        levels = [
            Level(mine, theirs, adapter, student[s], teacher[s])
            for s, (mine, theirs, adapter) in zip(self.strides, modules, strict=True)
        ]
        squared_gaps = squared_relation_gaps(levels)
        sizes = [teacher[s].numel() for s in self.strides]
        return pixel_relation_loss(squared_gaps, sizes, self.options.profile)

    @full_precision
    def _relation_loss(
        self, students: list[Tensor], teachers: list[Tensor], rows: Ragged
    ) -> Tensor:
        """L_IR over levels; instances are (R, C_s, k, k), (R, C_t, k, k) by level."""
        units = [*_in_order(self.student_relations), *_in_order(self.teacher_relations)]
        instances = [x.flatten(1) for x in (*students, *teachers)]
        levels = len(students)
        if self.options.profile == "paper":
            matrices = relation_matrices(units, instances, rows)
            return relation_matrix_loss(matrices[:levels], matrices[levels:], rows.lengths)
        refined = refine_instances(units, instances, rows)
        related = [r.view_as(x) for r, x in zip(refined, (*students, *teachers), strict=True)]
        gaps = self._gaps(self.relation_adapters, related[:levels], related[levels:])
        return instance_loss(gaps, rows.image_index, len(rows.counts))

    @full_precision
    def _instance_loss(
        self, students: list[Tensor], teachers: list[Tensor], rows: Ragged
    ) -> Tensor:
        """L_INS over levels; instances as in L_IR."""
        gaps = self._gaps(self.instance_adapters, students, teachers)
        return instance_loss(gaps, rows.image_index, len(rows.counts), self.options.profile)

    def _gaps(
        self, adapters: Adapters, students: Sequence[Tensor], teachers: Sequence[Tensor]
    ) -> list[Tensor]:
        """Adapted student minus teacher by level, (R, C_t, k, k)."""
        levels = zip(self.instance_strides, students, teachers, strict=True)
        return [adapters(stride, mine) - theirs for stride, mine, theirs in levels]

    def _batch_size_factors(self, num_images: int) -> dict[str, float]:
        options = self.options
        has_rule = options.batch_size_rule and options.profile == "code"
        pixel, instance = batch_size_factors(num_images) if has_rule else (1.0, 1.0)
        return {"pixel": pixel, "relation": instance, "instance": instance}


def _with_default_weights(options: DRKDOptions, two_stage: bool) -> DRKDOptions:
    """``options`` with numbers for the weights that are None."""
    defaults = zip(
        DRKD.term_options.values(), DEFAULT_WEIGHTS[options.profile, two_stage], strict=True
    )
    missing: dict[str, Any] = {n: w for n, w in defaults if getattr(options, n) is None}
    return dataclasses.replace(options, **missing)


def _in_order(modules: nn.ModuleDict) -> list[Any]:
    """The modules of all levels, fine to coarse."""
    return list(modules.values())


def _build_graphs(
    options: DRKDOptions, spec: DetectorSpec, strides: Sequence[int]
) -> nn.ModuleDict:
    """A graph unit per level, keyed by its stride."""
    nodes = [*options.nodes, *[options.nodes[-1]] * len(strides)]
    return nn.ModuleDict(
        {
            str(stride): GraphUnit(
                spec.channels[stride],
                num_nodes,
                normalize=options.normalize,
                zero_init_norm=options.zero_init_bn,
            )
            for stride, num_nodes in zip(strides, nodes, strict=False)
        }
    )


def _build_relations(
    options: DRKDOptions, spec: DetectorSpec, strides: Sequence[int]
) -> nn.ModuleDict:
    """A relation unit per level, or what it needs for its relation matrix; keyed by its stride."""
    unit = RelationUnit if options.profile == "code" else InstanceRelation
    cells = options.pool_resolution**2
    return nn.ModuleDict(
        {
            str(stride): unit(
                spec.channels[stride] * cells, options.bottleneck, options.relation_filter
            )
            for stride in strides
        }
    )


def _copy_where_shapes_agree(source: nn.ModuleDict, target: nn.ModuleDict) -> None:
    for name, module in target.items():
        state = source[name].state_dict()
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if shapes == {key: value.shape for key, value in state.items()}:
            module.load_state_dict(state)


def describe_parameters(head: DRKD) -> str:
    """One line: the trainable parameters that a DRKD head adds, by part."""
    parts = {
        "graph units": (head.student_graphs, head.teacher_graphs),
        "relation units": (head.student_relations, head.teacher_relations),
    }
    sizes = {name: sum(map(_count, modules)) for name, modules in parts.items()}
    total = _count(head)
    sizes["adapters"] = total - sum(sizes.values())
    text = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return (
        f"DRKD trains {total:,} parameters besides the student ({text}); they serve training only "
        "and are not in student_final.pth. DISTILL.DRKD.BOTTLENECK makes relation units smaller."
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def choose_boxes(boxes: list[Tensor], limit: int, seed: int) -> list[Tensor]:
    """At most ``limit`` of the boxes (n_i, 4) of each image, a random choice where there are more.

    The choice depends on ``seed`` only: it leaves the student's random numbers alone, and a resumed
    run makes it again.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for box in boxes:
        if len(box) > limit:
            order = torch.randperm(len(box), generator=generator)[:limit]
            box = box[order.to(box.device, non_blocking=True)]
        chosen.append(box)
    return chosen
