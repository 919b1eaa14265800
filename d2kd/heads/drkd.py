"""DRKD: dual relation distillation, between the pixels of a map and between the instances of an
image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from detectron2.engine import HookBase
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..keys import COUNT, NOT_NEGATIVE, Rule, key, one_of, or_none
from ..losses.drkd import (
    PROFILES,
    batch_size_factors,
    instance_loss,
    pixel_relation_loss,
    relation_matrix_loss,
)
from ..numerics import full_precision
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import INITS, build_adapters, pair_levels
from .base import DistillHead
from .drkd_units import (
    RELATION_FILTERS,
    GraphUnit,
    InstanceLayout,
    InstanceRelation,
    RelationUnit,
    squared_relation_gap,
)

logger = logging.getLogger(__name__)

# (profile, two-stage student) -> weights of L_PR, L_IR and L_INS. "code": the released code; of its
# one-stage weights the first and the last stand in commented lines. "paper": the same strength of
# gradient at a typical gap, see docs/methods/drkd.md; the paper's own were not read by us.
DEFAULT_WEIGHTS = {
    ("code", True): (1e-3, 4e-3, 2.4e-3),
    ("code", False): (4e-3, 5e-3, 6e-3),
    ("paper", True): (4.0, 10.0, 2.6e-4),
    ("paper", False): (8.0, 10.0, 6.6e-4),
}

WEIGHT_KEYS = ("PIXEL_WEIGHT", "RELATION_WEIGHT", "INSTANCE_WEIGHT")


@dataclass(frozen=True)
class DRKDOptions(HeadOptions):
    """Keys of ``DISTILL.DRKD``."""

    profile: str = key(
        "code",
        one_of(PROFILES),
        '"code": what the authors released, un-squared norms of gaps between refined '
        'features. "paper": the formulas of the paper, mean squares and relation '
        "matrices.",
    )
    pixel_weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "Weights of the pixel-wise relation, the instance-wise relation and the instance "
        "features (lambda_1, lambda_2, lambda_3); 0 turns a term off. None: of the "
        "released code, by the kind of student: 0.001, 0.004, 0.0024 (two-stage) or "
        '0.004, 0.005, 0.006 (dense); for the profile "paper" 4, 10, 0.00026 or 8, 10, '
        "0.00066, converted and not tuned.",
    )
    relation_weight: float | None = key(
        None,
        or_none(NOT_NEGATIVE),
        "lambda_2, weight of the instance-wise relation; as PIXEL_WEIGHT.",
    )
    instance_weight: float | None = key(
        None, or_none(NOT_NEGATIVE), "lambda_3, weight of the instance features; as PIXEL_WEIGHT."
    )
    batch_size_rule: bool = key(
        True,
        comment="The weights are for 2 images a GPU. Norms grow with the batch: scale the first "
        'by sqrt(2 / B) and the others by 2 / B (profile "code").',
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
        "Nodes of the graph units, fine to coarse (M in the paper); the last holds for "
        "further levels.",
    )
    normalize: bool = key(
        False,
        comment="Divide node features by the number of pixels. The released code does not.",
    )
    adapter_init: str = key(
        "default",
        one_of(INITS),
        'First weights of the 1x1 convolutions on the student\'s side: "default" (released '
        'code), "identity" (starts as no adapter where channels agree) or "small".',
    )
    zero_init_bn: bool = key(
        False,
        comment="Start the graph units as the identity, with the scale of their batch norm at 0.",
    )
    instance_levels: int = key(
        2,
        COUNT,
        "The finest levels from which instances are pooled; every object from each of them.",
    )
    pool_resolution: int = key(
        3,
        COUNT,
        "Side of the pooled instance, and RoIAlign's flags: samples a bin (0: as many as "
        "cells) and the half-pixel shift. Without the shift a tiny box is enlarged to one "
        "cell.",
    )
    sampling_ratio: int = key(0, NOT_NEGATIVE, "Samples per bin of RoIAlign; 0: as many as cells.")
    aligned: bool = key(
        False,
        comment="Half-pixel shift of RoIAlign. Without it a tiny box is enlarged to one cell.",
    )
    relation_filter: str = key(
        "learned",
        one_of(RELATION_FILTERS),
        'Weights on relations: "learned"; "uniform" (1 / objects of the image, which '
        '"learned" starts as); "random" (new at each step, the released code); "none".',
    )
    bottleneck: int = key(
        0,
        NOT_NEGATIVE,
        "Width inside the relation units; 0: half of their input, which at 256 channels "
        "and 3 x 3 cells means 44 million parameters with the learned filter.",
    )
    freeze_teacher_units: bool = key(
        False,
        comment="Keep the teacher's graph and relation units at their random start; the released "
        "code trains them with the student.",
    )
    max_instances: int = key(
        200,
        COUNT,
        "Of an image with more objects, a random choice of this many takes part.",
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
        student_spec, teacher_spec: of the pair.
        strides: levels of the pixel term, fine to coarse.
        instance_strides: levels of the other two; each instance is pooled from each of them.
        num_nodes: nodes of the graph units by level; the last entry holds for further levels.
        pixel_weight, relation_weight, instance_weight: lambda_1, lambda_2, lambda_3. A term of
            weight 0 is not built.
        profile: one of ``PROFILES``, see :mod:`d2kd.losses.drkd`.
        batch_size_rule: keep the meaning of the weights at other than 2 images a GPU.
        adapter_init: first weights of the adapters, see :func:`~d2kd.adapters.build_adapters`.
        normalize, zero_init_norm: see :class:`~d2kd.heads.drkd_units.GraphUnit`.
        relation_filter: see :class:`~d2kd.heads.drkd_units.RelationFilter`.
        bottleneck: width inside the relation units; 0 for half of their input.
        freeze_teacher_units: keep the teacher-side units as they were initialised.
        pool_resolution, sampling_ratio, aligned: of RoIAlign on the instances.
        max_instances: of an image that has more, a random choice of this many takes part.
    """

    reads = ("pyramid",)

    Options = DRKDOptions

    @configurable
    def __init__(
        self,
        *,
        student_spec: DetectorSpec,
        teacher_spec: DetectorSpec,
        strides: Sequence[int],
        instance_strides: Sequence[int],
        num_nodes: Sequence[int],
        pixel_weight: float,
        relation_weight: float,
        instance_weight: float,
        profile: str = "code",
        batch_size_rule: bool = True,
        adapter_init: str = "default",
        normalize: bool = False,
        zero_init_norm: bool = False,
        relation_filter: str = "learned",
        bottleneck: int = 0,
        freeze_teacher_units: bool = False,
        pool_resolution: int = 3,
        sampling_ratio: int = 0,
        aligned: bool = False,
        max_instances: int = 200,
    ):
        super().__init__()
        self.profile = profile
        self.weights = {
            "pixel": pixel_weight,
            "relation": relation_weight,
            "instance": instance_weight,
        }
        self.batch_size_rule = batch_size_rule and profile == "code"
        self.max_instances = max_instances
        self.pooling = {
            "output_size": pool_resolution,
            "sampling_ratio": sampling_ratio,
            "aligned": aligned,
        }
        self.strides = tuple(strides)
        self.instance_strides = tuple(instance_strides)
        specs = student_spec, teacher_spec
        adapters = {"mode": "always", "init": adapter_init}

        levels = self.strides if pixel_weight else ()
        nodes = dict(zip(strides, _repeat_last(num_nodes, len(strides)), strict=True))
        self.student_graphs, self.teacher_graphs = (
            _modules(
                levels,
                lambda stride, spec=spec: GraphUnit(
                    spec.channels[stride],
                    nodes[stride],
                    normalize=normalize,
                    zero_init_norm=zero_init_norm,
                ),
            )
            for spec in specs
        )
        self.pixel_adapters = build_adapters(*specs, levels, **adapters)

        levels = self.instance_strides if relation_weight else ()
        unit = RelationUnit if profile == "code" else InstanceRelation
        self.student_relations, self.teacher_relations = (
            _modules(
                levels,
                lambda stride, spec=spec: unit(
                    spec.channels[stride] * pool_resolution**2, bottleneck, relation_filter
                ),
            )
            for spec in specs
        )
        if profile == "code":
            self.relation_adapters = build_adapters(*specs, levels, **adapters)
        else:
            _copy_where_shapes_agree(self.teacher_relations, self.student_relations)

        levels = self.instance_strides if instance_weight else ()
        self.instance_adapters = build_adapters(*specs, levels, **adapters)

        self.teacher_graphs.requires_grad_(not freeze_teacher_units)
        self.teacher_relations.requires_grad_(not freeze_teacher_units and profile == "code")

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.DRKD
        if all(node[key] == 0 for key in WEIGHT_KEYS):
            raise ConfigError("DISTILL.DRKD: all three of its weights are 0")
        strides = pair_levels(student_spec, teacher_spec, node.STRIDES)
        finest = pair_levels(student_spec, teacher_spec)[: node.INSTANCE_LEVELS]
        defaults = DEFAULT_WEIGHTS[node.PROFILE, student_spec.two_stage]
        chosen = (node[key] for key in WEIGHT_KEYS)
        pixel, relation, instance = (
            default if weight is None else weight
            for weight, default in zip(chosen, defaults, strict=True)
        )
        return {
            "student_spec": student_spec,
            "teacher_spec": teacher_spec,
            "strides": strides,
            "instance_strides": finest,
            "num_nodes": node.NODES,
            "pixel_weight": pixel,
            "relation_weight": relation,
            "instance_weight": instance,
            "profile": node.PROFILE,
            "batch_size_rule": node.BATCH_SIZE_RULE,
            "normalize": node.NORMALIZE,
            "adapter_init": node.ADAPTER_INIT,
            "zero_init_norm": node.ZERO_INIT_BN,
            "relation_filter": node.RELATION_FILTER,
            "bottleneck": node.BOTTLENECK,
            "freeze_teacher_units": node.FREEZE_TEACHER_UNITS,
            "pool_resolution": node.POOL_RESOLUTION,
            "sampling_ratio": node.SAMPLING_RATIO,
            "aligned": node.ALIGNED,
            "max_instances": node.MAX_INSTANCES,
        }

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        terms = {}
        if self.weights["pixel"]:
            terms["pixel"] = self._pixel_loss(student.pyramid, teacher.pyramid)
        if self.weights["relation"] or self.weights["instance"]:
            boxes = choose_boxes(batch.gt_boxes, self.max_instances, seed=batch.iteration)
            layout = InstanceLayout([len(b) for b in boxes], boxes[0].device)
            pooled = {
                s: tuple(
                    side.pool(boxes, strides=(s,), **self.pooling) for side in (student, teacher)
                )
                for s in self.instance_strides
            }
            if self.weights["relation"]:
                terms["relation"] = self._relation_loss(pooled, layout)
            if self.weights["instance"]:
                terms["instance"] = self._instance_loss(pooled, layout)
        factors = self._batch_size_factors(len(batch.inputs))
        return {name: self.weights[name] * factors[name] * terms[name] for name in terms}

    def _pixel_loss(self, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
        """L_PR over levels; the pyramids are stride -> (B, C_s, H, W), (B, C_t, H, W)."""
        squared_gaps = [
            squared_relation_gap(
                self.student_graphs[str(s)],
                self.teacher_graphs[str(s)],
                self.pixel_adapters[str(s)],
                student[s],
                teacher[s],
            )
            for s in self.strides
        ]
        sizes = [teacher[s].numel() for s in self.strides]
        return pixel_relation_loss(squared_gaps, sizes, self.profile)

    @full_precision
    def _relation_loss(
        self, pooled: dict[int, tuple[Tensor, Tensor]], layout: InstanceLayout
    ) -> Tensor:
        """L_IR over levels; ``pooled`` is stride -> (R, C_s, k, k), (R, C_t, k, k)."""
        matrix_losses, gaps = [], []
        for stride, (student, teacher) in pooled.items():
            key = str(stride)
            related = self.student_relations[key](student.flatten(1), layout)
            target = self.teacher_relations[key](teacher.flatten(1), layout)
            if self.profile == "paper":
                matrix_losses.append(relation_matrix_loss(related, target, layout.counts))
            else:
                adapted = self.relation_adapters(stride, related.view_as(student))
                gaps.append(adapted - target.view_as(teacher))
        if self.profile == "paper":
            return torch.stack(matrix_losses).sum()
        return instance_loss(gaps, layout.image_index, len(layout.counts))

    @full_precision
    def _instance_loss(
        self, pooled: dict[int, tuple[Tensor, Tensor]], layout: InstanceLayout
    ) -> Tensor:
        """L_INS over levels; ``pooled`` as in L_IR."""
        gaps = [
            self.instance_adapters(stride, student) - teacher
            for stride, (student, teacher) in pooled.items()
        ]
        return instance_loss(gaps, layout.image_index, len(layout.counts), self.profile)

    def _batch_size_factors(self, num_images: int) -> dict[str, float]:
        pixel, instance = batch_size_factors(num_images) if self.batch_size_rule else (1.0, 1.0)
        return {"pixel": pixel, "relation": instance, "instance": instance}

    def build_hooks(self, cfg) -> list[HookBase]:
        """Before training, say how many parameters the method adds."""
        return [_ReportParameters(self)]


class _ReportParameters(HookBase):
    """Logs the size of what is trained beside the student, once."""

    def __init__(self, head: DRKD):
        self.head = head

    def before_train(self) -> None:
        logger.info(describe_parameters(self.head))


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
        f"DRKD trains {total:,} parameters beside the student ({text}); they serve training only "
        "and are not in student_final.pth. DISTILL.DRKD.BOTTLENECK makes relation units smaller."
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def choose_boxes(boxes: list[Tensor], limit: int, seed: int) -> list[Tensor]:
    """At most ``limit`` boxes an image, a random choice where there are more.

    The choice depends on ``seed`` only: it leaves the student's random numbers alone, and a resumed
    run makes it again.

    Args:
        boxes: per image (n_i, 4).
        limit: largest number of boxes an image.
        seed: of the choice; the iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for box in boxes:
        if len(box) > limit:
            order = torch.randperm(len(box), generator=generator)[:limit]
            box = box[order.to(box.device, non_blocking=True)]
        chosen.append(box)
    return chosen


def _modules(strides: Sequence[int], build: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """A module a level, keyed by its stride."""
    return nn.ModuleDict({str(stride): build(stride) for stride in strides})


def _repeat_last(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[values[-1]] * length][:length]


def _copy_where_shapes_agree(source: nn.ModuleDict, target: nn.ModuleDict) -> None:
    for name, module in target.items():
        state = source[name].state_dict()
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if shapes == {key: value.shape for key, value in state.items()}:
            module.load_state_dict(state)
