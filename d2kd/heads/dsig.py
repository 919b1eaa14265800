"""DSIG: "Deep Structured Instance Graph for Distilling Object Detectors" (ICCV 2021).

Student and teacher each span a graph over the same boxes of an image: pooled features are its
nodes, cosine similarities its edges. A two-stage student is compared on its own sampled RoIs, a
dense one on its own best predictions. The mathematics is in :mod:`d2kd.losses.dsig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle, RoIView
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..geometry.pooling import place_boxes
from ..keys import COUNT, NOT_NEGATIVE, POSITIVE, Rule, key, one_of
from ..losses import dsig as losses
from ..losses.logits import dense_box_loss, mask_loss, roi_box_loss
from ..losses.mimic import pyramid_mimic_loss
from ..numerics import Ragged
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import build_adapters, build_roi_adapter, pair_levels
from .base import DistillHead, Terms
from .dense import DensePair, is_constant, pick_classes, say_constant, softmax_classes
from .dsig_nodes import Graph, TopPredictions
from .needs import Need
from .sketch import Sketch

GRAPH_TERMS = ("foreground", "background", "edge")
OUTPUT_TERMS = ("class", "box")
MASK_TERMS = ("mask", "mask_node")


@dataclass(frozen=True)
class DSIGOptions(HeadOptions):
    """Keys of ``DISTILL.DSIG``."""

    image_reduction: str = key(
        "mean",
        one_of(losses.IMAGE_REDUCTIONS),
        'Node and edge terms over the images of a GPU: "mean", so that their strength does not '
        'depend on the batch, or "sum", the authors\' code. At 2 images per GPU "mean" with the '
        'default weights equals their "sum" with half of them (0.5, 0.5, 2.0).',
    )
    foreground_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "lambda_1: mean squared error of foreground nodes. 0 switches a term off.",
    )
    background_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "lambda_2: mean squared error of background nodes, times BACKGROUND_ALPHA * foreground / "
        "background nodes of the image. Dense students have no background nodes.",
    )
    background_alpha: float = key(
        7.5, NOT_NEGATIVE, "alpha, strength of the adaptive weight of background nodes."
    )
    edge_weight: float = key(
        4.0,
        NOT_NEGATIVE,
        "lambda_3: half the mean squared difference of the cosine similarities of all pairs of "
        "nodes. Authors: 4.0 for light two-stage students, 2.0 for R50 and up and for RetinaNet.",
    )
    mine_background: bool = key(
        True,
        comment="Background samples mining: a background RoI has edges where the teacher's "
        'cross-entropy with "background" reaches MINING_THRESHOLD. False: edges between '
        "foreground nodes only.",
    )
    mining_threshold: float = key(
        0.6, NOT_NEGATIVE, "Cross-entropy from which on a background RoI has edges. 0: all have."
    )
    class_weight: float = key(
        3.0,
        NOT_NEGATIVE,
        "KL divergence of class probabilities, averaged over all logits: of a softmax, also over "
        "the sigmoid logits of dense students. Authors: 3.0, or 1.0 for RetinaNet, or off.",
    )
    class_temperature: float = key(1.0, POSITIVE, "T of that softmax.")
    box_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "L1 distance of the box deltas of foreground RoIs or anchors.",
    )
    pyramid_weight: float = key(
        0.5,
        NOT_NEGATIVE,
        "Mean squared error of the pyramid levels that both detectors have. Authors: off "
        "from R50 up.",
    )
    mask_weight: float = key(
        0.0,
        NOT_NEGATIVE,
        "Mask logits of the labelled class on foreground RoIs (not in the paper).",
    )
    mask_nodes: bool = key(
        False,
        comment="Foreground nodes from the mask branch's pooled features too, weighted by "
        "FOREGROUND_WEIGHT (an experiment of the authors that their configs never used).",
    )
    stage: int = key(0, NOT_NEGATIVE, "The stage of a cascade whose RoIs are the nodes.")
    predictions_per_level: int = key(
        1000,
        COUNT,
        "Nodes of a one-stage student are its own best predictions: so many (position, class) "
        "pairs per level go into class-wise NMS.",
    )
    predictions_nms: float = key(
        0.5,
        Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1"),
        "IoU from which on that NMS drops the worse of two predictions of a class.",
    )
    predictions_per_image: int = key(
        100, COUNT, "Predictions of an image that are nodes: the best that NMS leaves."
    )
    pool_resolution: int = key(7, COUNT, "Side of the pooled nodes of a dense student, in cells.")


@DISTILL_HEAD_REGISTRY.register()
class DSIG(DistillHead):
    """Structured instance graphs of student and teacher, and the authors' logit and pyramid terms.

    Args:
        options: the values of ``DISTILL.DSIG``.
        student_spec, teacher_spec: of the pair.
    """

    Options = DSIGOptions
    term_options = {
        "foreground": "foreground_weight",
        "background": "background_weight",
        "edge": "edge_weight",
        "class": "class_weight",
        "box": "box_weight",
        "pyramid": "pyramid_weight",
        "mask": "mask_weight",
        "mask_node": "foreground_weight",
    }

    @configurable
    def __init__(
        self, *, options: DSIGOptions, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ):
        super().__init__()
        pair = student_spec, teacher_spec
        common = pair_levels(*pair)
        self.options = options
        self.weights = self._weights(options, *pair)
        if options.class_weight and is_constant(*pair):
            say_constant("DSIG's term 'class'")
        self.two_stage = student_spec.two_stage
        self.num_classes = student_spec.num_classes or 0
        self.softmax_classes = softmax_classes(*pair)
        self.node_adapter: nn.Module = nn.Identity()
        if self._any(("foreground", "background", "mask_node")):
            self.node_adapter = build_roi_adapter(*pair, common[0])
        # Levels to pool nodes from, on both pyramids; none where the bundles have pooled RoIs.
        self.node_strides = () if _are_pooled(*pair) else common
        self.node_size = student_spec.roi_resolution or options.pool_resolution
        self.pyramid_strides = common if "pyramid" in self.weights else ()
        self.pyramid_adapters = build_adapters(*pair, self.pyramid_strides)
        self.predictions = TopPredictions(
            options.predictions_per_level, options.predictions_nms, options.predictions_per_image
        )

    @classmethod
    def _weights(
        cls, options: DSIGOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> dict[str, float]:
        """Weight of each term that is switched on and that a student of this kind has."""
        absent = set() if student.two_stage else {"background"}  # all predictions are foreground
        if is_constant(student, teacher):
            absent.add("class")
        if not options.mask_nodes:
            absent.add("mask_node")
        return cls.term_weights(options, absent)

    @classmethod
    def needs(
        cls, options: DSIGOptions, student: DetectorSpec, teacher: DetectorSpec
    ) -> Sequence[Need]:
        _check_options(options, student)
        weights = cls._weights(options, student, teacher)
        # Nodes come from the pooled RoIs, or each detector pools them from its own pyramid.
        nodes = "roi.features" if _are_pooled(student, teacher) else "pyramid"
        needs = [Need("", student=("roi",) if student.two_stage else ())]
        if weights.keys() & set(GRAPH_TERMS):
            if nodes == "pyramid":
                _check_widths(student, teacher)
            needs.append(Need("", both=(nodes,), student=_chooses_nodes(student)))
        return needs + [need for need in _term_needs(options, student) if need.term in weights]

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        terms: dict[str, Tensor] = {}
        if self._any(OUTPUT_TERMS):
            if self.two_stage:
                stage = self.options.stage
                terms |= self._compare_rois(student.rois[stage], teacher.rois[stage])
            else:
                pair = DensePair(student.dense, teacher.dense, self.num_classes)
                terms |= self._compare_anchors(pair)
        if self._any(MASK_TERMS):
            terms |= self._compare_masks(student, teacher)
        if "pyramid" in self.weights:
            terms["pyramid"] = self._compare_pyramids(student, teacher)
        if self._any(GRAPH_TERMS):
            graph = self._roi_graph if self.two_stage else self._prediction_graph
            terms |= self._compare_graphs(graph(student, teacher))
        return self.weigh(terms)

    def sketch(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Sketch:
        """The nodes that have edges, and the edges in both detectors."""
        if not self._any(GRAPH_TERMS):
            return Sketch()
        if self.two_stage:
            graph, boxes = self._roi_graph(student, teacher), student.rois[self.options.stage].boxes
        else:
            graph = self._prediction_graph(student, teacher)
            boxes = self.predictions(student.dense, student.image_sizes)
        nodes = torch.cat(boxes)
        rows = slice(None) if graph.has_edges is None else graph.has_edges
        sides = {"teacher": graph.teacher, "student": graph.student}
        edges = {
            f"edges, {side}": losses.cosine_graph(features[rows].detach().float().flatten(1)[None])
            for side, features in sides.items()
        }
        return Sketch(graphs={title: (nodes[rows], matrix[0]) for title, matrix in edges.items()})

    def _any(self, terms: Iterable[str]) -> bool:
        return not self.weights.keys().isdisjoint(terms)

    # --- graphs ----------------------------------------------------------------------------------

    def _roi_graph(self, student: FeatureBundle, teacher: FeatureBundle) -> Graph:
        """The student's sampled RoIs; background has edges where the teacher finds it hard."""
        options = self.options
        mine, theirs = student.rois[options.stage], teacher.rois[options.stage]
        foreground = has_edges = mine.labels < self.num_classes
        if "edge" in self.weights and options.mine_background:
            threshold = options.mining_threshold
            has_edges = losses.nodes_with_edges(theirs.logits, foreground, threshold)
        nodes = (
            self._pool(student, teacher, mine.boxes)
            if self.node_strides
            else (mine.features, theirs.features)
        )
        return Graph(*nodes, Ragged.of(mine.boxes), foreground, has_edges)

    def _prediction_graph(self, student: FeatureBundle, teacher: FeatureBundle) -> Graph:
        """The student's top predictions, all of them foreground."""
        boxes = self.predictions(student.dense, student.image_sizes)
        return Graph(*self._pool(student, teacher, boxes), Ragged.of(boxes))

    def _pool(
        self, student: FeatureBundle, teacher: FeatureBundle, boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        placed = place_boxes(boxes, self.node_strides)
        return student.pool(placed, self.node_size), teacher.pool(placed, self.node_size)

    def _compare_graphs(self, graph: Graph) -> Terms:
        reduction, terms = self.options.image_reduction, {}
        if self._any(("foreground", "background")):
            nodes = self.node_adapter(graph.student), graph.teacher
            if graph.foreground is None:
                loss = losses.foreground_node_loss(*nodes, graph.layout, image_reduction=reduction)
                terms["foreground"] = loss
            else:
                terms["foreground"], terms["background"] = losses.node_losses(
                    *nodes,
                    graph.foreground,
                    graph.layout,
                    alpha=self.options.background_alpha,
                    image_reduction=reduction,
                )
        if "edge" in self.weights:
            terms["edge"] = losses.edge_loss(*graph.with_edges(), image_reduction=reduction)
        return {term: loss for term, loss in terms.items() if term in self.weights}

    # --- outputs, masks and pyramids -------------------------------------------------------------

    def _compare_rois(self, mine: RoIView, theirs: RoIView) -> Terms:
        """Class and box outputs on the sampled RoIs."""
        terms = {}
        if "class" in self.weights:
            terms["class"] = losses.class_logit_loss(
                mine.logits, theirs.logits, temperature=self.options.class_temperature
            )
        if "box" in self.weights:
            units = mine.delta_weights, theirs.delta_weights
            terms["box"] = roi_box_loss(
                mine.deltas, theirs.deltas, mine.labels, self.num_classes, *units
            )
        return terms

    def _compare_anchors(self, pair: DensePair) -> Terms:
        """Outputs of a dense pair: classes of the anchors in use, boxes of the foreground."""
        terms = {}
        if "class" in self.weights:
            mine, theirs = pick_classes(pair.logits, self.softmax_classes, 2)
            terms["class"] = losses.class_logit_loss(
                mine, theirs, pair.valid, temperature=self.options.class_temperature, dim=2
            )
        if "box" in self.weights:
            units = pair.student.delta_weights, pair.teacher.delta_weights
            terms["box"] = dense_box_loss(
                *pair.deltas, pair.foreground, pair.num_foreground, *units
            )
        return terms

    def _compare_masks(self, student: FeatureBundle, teacher: FeatureBundle) -> Terms:
        """The mask branch on the foreground RoIs: its logits, and its pooled features as nodes."""
        mine, theirs = student.mask, teacher.mask
        terms = {}
        if "mask" in self.weights:
            terms["mask"] = mask_loss(mine.logits, theirs.logits, mine.labels)
        if "mask_node" in self.weights:
            terms["mask_node"] = losses.foreground_node_loss(
                self.node_adapter(mine.features),
                theirs.features,
                Ragged.of(mine.boxes),
                image_reduction=self.options.image_reduction,
            )
        return terms

    def _compare_pyramids(self, student: FeatureBundle, teacher: FeatureBundle) -> Tensor:
        """All levels that both pyramids have, padding included."""
        return pyramid_mimic_loss(
            [self.pyramid_adapters(s, student.pyramid[s]) for s in self.pyramid_strides],
            [teacher.pyramid[s] for s in self.pyramid_strides],
        )


def _are_pooled(student: DetectorSpec, teacher: DetectorSpec) -> bool:
    """Whether both bundles have the student's RoIs pooled. A dense student has none, and a teacher
    may lack a level that the student's box head pools from."""
    return "roi.features" in student.fields & teacher.fields


def _check_widths(student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse levels of different channels, from which no node can be pooled."""
    common = pair_levels(student, teacher)
    for spec in (student, teacher):
        widths = [spec.channels[stride] for stride in common]
        if len(set(widths)) > 1:
            raise ConfigError(
                f"DSIG pools its nodes from the levels of stride {list(common)}, which must have "
                f"one number of channels; those of the {spec.role}, a {spec.meta_arch}, "
                f"have {widths}"
            )


def _chooses_nodes(student: DetectorSpec) -> tuple[str, ...]:
    """What tells which boxes are nodes."""
    return () if student.two_stage else ("dense.logits", "dense.deltas", "dense.anchors")


def _check_options(options: DSIGOptions, student: DetectorSpec) -> None:
    """Refuse values that make no sense together, or none for this student."""
    if student.two_stage and options.stage >= student.num_stages:
        raise ConfigError(
            f"DISTILL.DSIG.STAGE is {options.stage}; "
            f"the student's box head has the stages {list(range(student.num_stages))}"
        )
    if options.mask_nodes and not options.foreground_weight:
        raise ConfigError("DISTILL.DSIG.MASK_NODES weighs as FOREGROUND_WEIGHT, which is 0")


def _term_needs(options: DSIGOptions, student: DetectorSpec) -> list[Need]:
    """Needs of all terms. Deltas of RoIs may come one box per class; those of anchors know none."""
    needs = [
        Need("pyramid", both=("pyramid",)),
        Need("mask", both=("mask.logits",), same=("num_classes",)),
        Need("mask_node", both=("mask.features",), without="DISTILL.DSIG.MASK_NODES False"),
    ]
    if not student.two_stage:
        labels, anchors = ("dense.labels",), ("anchors_per_location", "anchors")
        return [
            Need("class", both=("dense.logits",), student=labels, same=("num_classes", *anchors)),
            Need("box", both=("dense.deltas",), student=labels, same=(*anchors, "box_coding")),
            *needs,
        ]
    both, logits, classes = ("student", "teacher"), ("roi.logits",), ("num_classes",)
    if options.mine_background:
        without = "DISTILL.DSIG.MINE_BACKGROUND False"
        needs.insert(0, Need("edge", teacher=logits, softmax=("teacher",), without=without))
    return [
        Need("class", both=logits, same=classes, softmax=both),
        Need("box", both=("roi.deltas",), same=(*classes, "box_coding")),
        *needs,
    ]
