"""DSIG: "Deep Structured Instance Graph for Distilling Object Detectors" (ICCV 2021).

Student and teacher each span a graph over the same boxes of an image: pooled features are its
nodes, cosine similarities its edges. A two-stage student is compared on its own sampled RoIs, a
dense one on its own best predictions. The mathematics is in :mod:`d2kd.losses.dsig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, DenseView, FeatureBundle, image_index
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..keys import COUNT, NOT_NEGATIVE, POSITIVE, Rule, key, one_of
from ..losses import dsig as losses
from ..losses.logits import dense_box_loss, mask_loss, roi_box_loss
from ..losses.mimic import pyramid_mimic_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .adapters import Adapters, build_adapters, build_roi_adapter, pair_levels
from .base import DistillHead
from .dense import DensePair, check_anchors

# Terms and the keys of DISTILL.DSIG that hold their weights.
WEIGHT_KEYS = {
    "foreground": "FOREGROUND_WEIGHT",
    "background": "BACKGROUND_WEIGHT",
    "edge": "EDGE_WEIGHT",
    "class": "CLASS_WEIGHT",
    "box": "BOX_WEIGHT",
    "mask": "MASK_WEIGHT",
    "pyramid": "PYRAMID_WEIGHT",
}
GRAPH_TERMS = {"foreground", "background", "edge"}
OUTPUT_TERMS = {"class", "box"}
MASK_TERMS = {"mask", "mask_node"}


@dataclass(frozen=True)
class TopPredictions:
    """The best boxes that a dense detector currently predicts: the nodes of its graph.

    There is no score threshold, so a graph has its nodes from the first iteration on.

    Attributes:
        per_level: (location, class) pairs that a pyramid level may propose for an image.
        nms_threshold: IoU of the class-wise non-maximum suppression.
        per_image: boxes that are kept over all levels.
    """

    per_level: int = 1000
    nms_threshold: float = 0.5
    per_image: int = 100

    @torch.no_grad()
    def __call__(self, dense: DenseView, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Per image (n_i, 4) xyxy boxes, best first, clipped to the image; constants."""
        levels = [self._decode(dense, stride) for stride in dense.logits]
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        # A delta that overflowed is for the trainer to report; here it only has to be a box.
        boxes = boxes.nan_to_num()
        kept = []
        for *image, (height, width) in zip(boxes, scores, classes, image_sizes, strict=True):
            best = image[0][batched_nms(*image, self.nms_threshold)[: self.per_image]]
            x, y = best[:, 0::2].clamp(0, width), best[:, 1::2].clamp(0, height)
            kept.append(torch.stack([x, y], dim=2).flatten(1))
        return kept

    def _decode(self, dense: DenseView, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, n, 4), scores (B, n) and classes (B, n) of a level's best pairs."""
        logits, deltas = dense.logits[stride], dense.deltas[stride].float()
        num_classes = logits.shape[-1]
        pairs = logits.float().flatten(1)
        # The sigmoid is monotonic: ranking logits leaves it to the few that are chosen.
        best, index = pairs.topk(min(self.per_level, pairs.shape[1]), dim=1)
        location = index.div(num_classes, rounding_mode="floor")
        deltas = deltas.gather(1, location[:, :, None].expand(-1, -1, 4))
        anchors = dense.anchors[stride][location]
        boxes = dense.decode(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(anchors)
        return boxes, best.sigmoid(), index % num_classes


@dataclass(frozen=True)
class _Graph:
    """The R boxes of a batch on which student and teacher are compared.

    Attributes:
        student, teacher: (R, C, P, P) pooled features.
        foreground, has_edges: (R,) bool.
        image_index: (R,) long.
        edge_counts: nodes with edges, by image, where they are known without asking the device.
    """

    student: Tensor
    teacher: Tensor
    foreground: Tensor
    has_edges: Tensor
    image_index: Tensor
    edge_counts: list[int] | None = None


@dataclass(frozen=True)
class DSIGOptions(HeadOptions):
    """Keys of ``DISTILL.DSIG``."""

    image_reduction: str = key(
        "mean",
        one_of(losses.IMAGE_REDUCTIONS),
        'Node and edge terms of the images of a GPU: "mean", so that their strength does '
        'not depend on the batch, or "sum", the authors\' code. At 2 images a GPU the '
        'default "mean" with the three default weights below equals their "sum" with half '
        "of them (0.5, 0.5, 2.0).",
    )
    foreground_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mean squared error of foreground nodes (lambda_1 in the paper); 0 switches a term off.",
    )
    background_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "Mean squared error of background nodes (lambda_2), times ALPHA * foreground / "
        "background count of the image. Dense students have no background nodes.",
    )
    background_alpha: float = key(
        7.5, NOT_NEGATIVE, "alpha, strength of the weight of background nodes."
    )
    edge_weight: float = key(
        4.0,
        NOT_NEGATIVE,
        "Half the mean squared difference of the cosine similarities of all pairs of "
        "nodes (lambda_3). Authors: 4.0 for light two-stage students, 2.0 for R50 and up "
        "and for RetinaNet.",
    )
    mine_background: bool = key(
        True,
        comment="Background samples mining: a background RoI has edges where the teacher's cross- "
        'entropy with "background" reaches the threshold. False: edges between foreground '
        "nodes only.",
    )
    mining_threshold: float = key(
        0.6, NOT_NEGATIVE, "Cross-entropy from which a background RoI has edges."
    )
    class_weight: float = key(
        3.0,
        NOT_NEGATIVE,
        "KL divergence of class probabilities, averaged over all logits: softmax with "
        "this temperature, over the K sigmoid logits for dense students too. Authors: "
        "3.0, or 1.0 for RetinaNet, or off.",
    )
    class_temperature: float = key(1.0, POSITIVE, "Temperature of CLASS_WEIGHT's softmax.")
    box_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "L1 distance of the box deltas of foreground predictions.",
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
        comment="Foreground nodes from the mask branch's pooled features too, with "
        "FOREGROUND_WEIGHT (an experiment of the authors that their configs never used).",
    )
    stage: int = key(0, NOT_NEGATIVE, "The stage of a cascade whose RoIs are the nodes.")
    predictions_per_level: int = key(
        1000,
        COUNT,
        "Nodes of a dense student: its best (location, class) pairs a level, through "
        "class-wise NMS, the best of all levels, pooled to POOL_RESOLUTION squared cells.",
    )
    predictions_nms: float = key(
        0.5,
        Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1"),
        "IoU of the class-wise NMS of those predictions.",
    )
    predictions_per_image: int = key(
        100, COUNT, "Predictions that stay, over all levels of an image."
    )
    pool_resolution: int = key(
        7, COUNT, "Side of the pooled nodes of a one-stage student, in cells."
    )


@DISTILL_HEAD_REGISTRY.register()
class DSIG(DistillHead):
    """Structured instance graphs of student and teacher, and the authors' logit and pyramid terms.

    Args:
        weights: term -> weight, terms as in ``WEIGHT_KEYS``; what is absent is not computed.
        two_stage: nodes are the student's sampled RoIs; else its top predictions.
        num_classes: K of the student.
        node_adapter: student -> teacher channels of pooled features (R, C, P, P).
        pyramid_adapters: student -> teacher channels of the levels of the "pyramid" term.
        pyramid_strides: those levels.
        node_strides: levels that nodes are pooled from, each detector on its own pyramid; () where
            the bundles have the student's RoIs pooled already.
        node_resolution: P, with ``node_strides``.
        stage: the box-head stage whose RoIs are the nodes (a cascade has several).
        alpha: strength of the adaptive background weight.
        mining_threshold: teacher's loss from which a background RoI has edges; None: none has.
        temperature: T of the "class" term.
        predictions: what the nodes of a dense student are.
        image_reduction: "mean" or "sum" over images, of node and edge terms.
    """

    Options = DSIGOptions

    @configurable
    def __init__(
        self,
        *,
        weights: dict[str, float],
        two_stage: bool,
        num_classes: int,
        node_adapter: nn.Module,
        pyramid_adapters: Adapters,
        pyramid_strides: tuple[int, ...] = (),
        node_strides: tuple[int, ...] = (),
        node_resolution: int = 7,
        stage: int = 0,
        alpha: float = 7.5,
        mining_threshold: float | None = 0.6,
        temperature: float = 1.0,
        predictions: TopPredictions | None = None,
        image_reduction: str = "mean",
    ):
        super().__init__()
        self.weights = weights
        self.two_stage = two_stage
        self.num_classes = num_classes
        self.node_adapter = node_adapter
        self.pyramid_adapters = pyramid_adapters
        self.pyramid_strides = pyramid_strides
        self.node_strides = node_strides
        self.node_resolution = node_resolution
        self.stage = stage
        self.alpha = alpha
        self.mining_threshold = mining_threshold
        self.temperature = temperature
        self.predictions = predictions or TopPredictions()
        self.image_reduction = image_reduction
        self._declare_reads()

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.DSIG
        _check_values(node, student_spec)
        weights = _weights(node, student_spec)
        if not weights:
            raise ConfigError(
                f"the weights in DISTILL.DSIG leave a {student_spec.meta_arch} nothing to distil"
            )
        mining_threshold = node.MINING_THRESHOLD if node.MINE_BACKGROUND else None
        _check_pair(weights, mining_threshold, student_spec, teacher_spec)

        # Dense students pool their predictions from the levels that both pyramids have, and so do
        # students whose box head pools from a level that the teacher lacks.
        pooled = "roi.features" in student_spec.fields & teacher_spec.fields
        node_strides = () if pooled else pair_levels(student_spec, teacher_spec)
        pyramid_strides = pair_levels(student_spec, teacher_spec) if "pyramid" in weights else ()
        return {
            "weights": weights,
            "two_stage": student_spec.two_stage,
            "num_classes": student_spec.num_classes,
            "node_adapter": _build_node_adapter(weights, student_spec, teacher_spec),
            "pyramid_adapters": build_adapters(student_spec, teacher_spec, pyramid_strides),
            "pyramid_strides": pyramid_strides,
            "node_strides": node_strides,
            "node_resolution": student_spec.roi_resolution or node.POOL_RESOLUTION,
            "stage": node.STAGE,
            "alpha": node.BACKGROUND_ALPHA,
            "mining_threshold": mining_threshold,
            "temperature": node.CLASS_TEMPERATURE,
            "predictions": TopPredictions(
                node.PREDICTIONS_PER_LEVEL, node.PREDICTIONS_NMS, node.PREDICTIONS_PER_IMAGE
            ),
            "image_reduction": node.IMAGE_REDUCTION,
        }

    def _declare_reads(self) -> None:
        """Set ``reads`` and its siblings to what the terms in use read."""
        terms, outputs = self.weights.keys(), "roi" if self.two_stage else "dense"
        fields = {
            "class": f"{outputs}.logits",
            "box": f"{outputs}.deltas",
            "mask": "mask.logits",
            "mask_node": "mask.features",
            "pyramid": "pyramid",
        }
        both = {field for term, field in fields.items() if term in terms}
        student, teacher = {"roi"} if self.two_stage else set(), set()
        if terms & GRAPH_TERMS:
            both.add("pyramid" if self.node_strides else "roi.features")
            if not self.two_stage:
                student |= {"dense.logits", "dense.deltas", "dense.anchors"}
        if terms & OUTPUT_TERMS and not self.two_stage:
            student |= {"dense.labels", "dense.anchors"}
            teacher.add("dense.anchors")
        if "edge" in terms and self.two_stage and self.mining_threshold is not None:
            teacher.add("roi.logits")
        self.reads, self.student_reads, self.teacher_reads = both, student, teacher

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self._any(OUTPUT_TERMS):
            compare = self._compare_rois if self.two_stage else self._compare_anchors
            terms |= compare(student, teacher)
        if self._any(MASK_TERMS):
            terms |= self._compare_masks(student, teacher)
        if self._any({"pyramid"}):
            terms["pyramid"] = self._compare_pyramids(student, teacher)
        if self._any(GRAPH_TERMS):
            graph = self._roi_graph if self.two_stage else self._prediction_graph
            terms |= self._compare_graphs(graph(student, teacher), len(student.image_sizes))
        return {term: self.weights[term] * loss for term, loss in terms.items()}

    def _any(self, terms: Iterable[str]) -> bool:
        return not self.weights.keys().isdisjoint(terms)

    # --- graphs ----------------------------------------------------------------------------------

    def _roi_graph(self, student: FeatureBundle, teacher: FeatureBundle) -> _Graph:
        """The student's sampled RoIs; background has edges where the teacher finds it hard."""
        mine, theirs = student.rois[self.stage], teacher.rois[self.stage]
        if self.node_strides:
            nodes = self._pool(student, mine.boxes), self._pool(teacher, mine.boxes)
        else:
            nodes = mine.features, theirs.features
        foreground = has_edges = mine.labels < self.num_classes
        if "edge" in self.weights and self.mining_threshold is not None:
            mined = losses.mine_background(theirs.logits, foreground, self.mining_threshold)
            has_edges = foreground | mined
        return _Graph(*nodes, foreground, has_edges, mine.image_index)

    def _prediction_graph(self, student: FeatureBundle, teacher: FeatureBundle) -> _Graph:
        """The student's top predictions, all of them foreground."""
        boxes = self.predictions(student.dense, student.image_sizes)
        index = image_index(boxes)
        every = torch.ones_like(index, dtype=torch.bool)
        nodes = self._pool(student, boxes), self._pool(teacher, boxes)
        return _Graph(*nodes, every, every, index, [len(b) for b in boxes])

    def _pool(self, bundle: FeatureBundle, boxes: list[Tensor]) -> Tensor:
        return bundle.pool(boxes, self.node_resolution, strides=self.node_strides)

    def _compare_graphs(self, graph: _Graph, num_images: int) -> dict[str, Tensor]:
        terms = {}
        if self._any({"foreground", "background"}):
            foreground, background = losses.node_losses(
                self.node_adapter(graph.student),
                graph.teacher,
                graph.foreground,
                graph.image_index,
                num_images,
                alpha=self.alpha,
                image_reduction=self.image_reduction,
            )
            terms = {"foreground": foreground, "background": background}
            terms = {term: loss for term, loss in terms.items() if term in self.weights}
        if "edge" in self.weights:
            terms["edge"] = self._compare_edges(graph, num_images)
        return terms

    def _compare_edges(self, graph: _Graph, num_images: int) -> Tensor:
        """Edge loss of the nodes that have edges, packed: most background RoIs have none."""
        counts = graph.edge_counts
        if counts is None:
            # Waits for the device: how large the largest graph is decides shapes.
            counts = graph.image_index.new_zeros(num_images)
            counts = counts.index_add(0, graph.image_index, graph.has_edges.long()).tolist()
        shape = num_images, max(counts)
        nodes = graph.student.flatten(1), graph.teacher.flatten(1)
        if counts == [len(graph.has_edges) / num_images] * num_images:
            # Every box of equally full images: RoIs lie image after image, so nothing moves.
            valid = graph.has_edges.view(shape)
        else:
            index, valid = losses.pack_nodes(graph.has_edges, graph.image_index, *shape)
            nodes = (features.index_select(0, index.flatten()) for features in nodes)
        packed = (features.unflatten(0, shape) for features in nodes)
        return losses.edge_loss(*packed, valid, image_reduction=self.image_reduction)

    # --- outputs, masks and pyramids -------------------------------------------------------------

    def _compare_rois(self, student: FeatureBundle, teacher: FeatureBundle) -> dict[str, Tensor]:
        """Class and box outputs on the sampled RoIs."""
        mine, theirs = student.rois[self.stage], teacher.rois[self.stage]
        terms = {}
        if "class" in self.weights:
            terms["class"] = losses.class_logit_loss(
                mine.logits, theirs.logits, temperature=self.temperature
            )
        if "box" in self.weights:
            weights = mine.delta_weights, theirs.delta_weights
            terms["box"] = roi_box_loss(
                mine.deltas, theirs.deltas, mine.labels, self.num_classes, *weights
            )
        return terms

    def _compare_anchors(self, student: FeatureBundle, teacher: FeatureBundle) -> dict[str, Tensor]:
        """Outputs of a dense pair: classes of the anchors in use, boxes of the foreground."""
        pair = DensePair(student.dense, teacher.dense)
        labels, terms = pair.labels, {}
        if "class" in self.weights:
            logits = (outputs.flatten(0, 1) for outputs in pair.logits)
            terms["class"] = losses.class_logit_loss(
                *logits, labels.flatten() >= 0, temperature=self.temperature
            )
        if "box" in self.weights:
            terms["box"] = dense_box_loss(
                *pair.deltas, labels, self.num_classes, *pair.delta_weights
            )
        return terms

    def _compare_masks(self, student: FeatureBundle, teacher: FeatureBundle) -> dict[str, Tensor]:
        """The mask branch on the foreground RoIs: its logits, and its pooled features as nodes."""
        mine, theirs = student.mask, teacher.mask
        terms = {}
        if "mask" in self.weights:
            terms["mask"] = mask_loss(mine.logits, theirs.logits, mine.labels)
        if "mask_node" in self.weights:
            terms["mask_node"], _ = losses.node_losses(
                self.node_adapter(mine.features),
                theirs.features,
                torch.ones_like(mine.labels, dtype=torch.bool),
                mine.image_index,
                len(student.image_sizes),
                image_reduction=self.image_reduction,
            )
        return terms

    def _compare_pyramids(self, student: FeatureBundle, teacher: FeatureBundle) -> Tensor:
        """All levels that both pyramids have, padding included."""
        return pyramid_mimic_loss(
            [self.pyramid_adapters(s, student.pyramid[s]) for s in self.pyramid_strides],
            [teacher.pyramid[s] for s in self.pyramid_strides],
        )


def _build_node_adapter(
    weights: dict[str, float], student: DetectorSpec, teacher: DetectorSpec
) -> nn.Module:
    """Student -> teacher channels, for the terms that compare nodes one by one."""
    if not weights.keys() & {"foreground", "background", "mask_node"}:
        return nn.Identity()
    return build_roi_adapter(student, teacher, pair_levels(student, teacher)[0])


def _check_values(node: CfgNode, student: DetectorSpec) -> None:
    """Refuse values of ``DISTILL.DSIG`` that make no sense, or none for this student."""
    if student.two_stage and node.STAGE >= student.num_stages:
        raise ConfigError(
            f"DISTILL.DSIG.STAGE is {node.STAGE}; "
            f"the student's box head has the stages {list(range(student.num_stages))}"
        )


def _weights(node: CfgNode, student: DetectorSpec) -> dict[str, float]:
    """Weight of each term that is switched on and that a student of this kind has."""
    if node.MASK_NODES and not node.FOREGROUND_WEIGHT:
        raise ConfigError("DISTILL.DSIG.MASK_NODES weighs as FOREGROUND_WEIGHT, which is 0")
    weights = {term: node[key] for term, key in WEIGHT_KEYS.items()}
    weights["mask_node"] = node.FOREGROUND_WEIGHT if node.MASK_NODES else 0.0
    if not student.two_stage:
        weights["background"] = 0.0  # all top predictions are foreground
    return {term: weight for term, weight in weights.items() if weight}


def _check_pair(
    weights: dict[str, float],
    mining_threshold: float | None,
    student: DetectorSpec,
    teacher: DetectorSpec,
) -> None:
    """Refuse terms that this pair cannot serve, with the key that switches them off.

    Outputs can only be compared where both detectors have them, for the same things and in the
    same code.
    """
    outputs = "roi" if student.two_stage else "dense"
    alike = () if student.two_stage else ("anchors_per_location",)
    # Deltas of RoIs may come one box a class; those of anchors never do.
    boxes_alike = ("num_classes", "box_coding") if student.two_stage else (*alike, "box_coding")
    needs: dict[str, tuple[str, str, tuple[str, ...]]] = {
        "class": (f"{outputs}.logits", "CLASS_WEIGHT 0", ("num_classes", *alike)),
        "box": (f"{outputs}.deltas", "BOX_WEIGHT 0", boxes_alike),
        "mask": ("mask.logits", "MASK_WEIGHT 0", ("num_classes",)),
        "mask_node": ("mask.features", "MASK_NODES False", ()),
    }
    for term, (field, remedy, names) in needs.items():
        if term not in weights:
            continue
        for spec in (student, teacher):
            if field not in spec.fields:
                raise ConfigError(
                    f"the term '{term}' reads {field} of the {spec.role}, and a {spec.meta_arch} "
                    f"has none here; without the term: DISTILL.DSIG.{remedy}"
                )
        for name in names:
            mine, theirs = getattr(student, name), getattr(teacher, name)
            if mine != theirs:
                raise ConfigError(
                    f"the term '{term}' needs detectors of the same {name}; the student has "
                    f"{mine}, the teacher {theirs}; without the term: DISTILL.DSIG.{remedy}"
                )
    if not student.two_stage and {"class", "box"} & weights.keys():
        check_anchors(student, teacher)
    mines = student.two_stage and "edge" in weights and mining_threshold is not None
    if mines and "roi.logits" not in teacher.fields:
        raise ConfigError(
            f"mining background RoIs needs a teacher with a box head, and a {teacher.meta_arch} "
            "has none; without mining: DISTILL.DSIG.MINE_BACKGROUND False"
        )
    _check_softmax("class" in weights and student.two_stage, mines, student, teacher)


def _check_softmax(
    compares: bool, mines: bool, student: DetectorSpec, teacher: DetectorSpec
) -> None:
    """Refuse to read box heads that are trained with sigmoids as softmax: their background logit
    is not trained at all.

    Args:
        compares: whether the "class" term reads both box heads.
        mines: whether the teacher's tells which background RoIs have edges.
    """
    for wanted, spec, remedy in (
        (compares, student, "CLASS_WEIGHT 0 (the head Logits has a term for sigmoids)"),
        (compares, teacher, "CLASS_WEIGHT 0"),
        (mines, teacher, "MINE_BACKGROUND False"),
    ):
        if wanted and spec.sigmoid_classes:
            raise ConfigError(
                f"DSIG reads class logits of RoIs as softmax, but the {spec.role}'s box head is "
                f"trained with sigmoids (USE_SIGMOID_CE): set DISTILL.DSIG.{remedy}"
            )
