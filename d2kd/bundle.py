"""The typed view of one detector's training step that distillation heads read.

A head gets two of them: the student's holds what its own forward computed, the teacher's computes a
field when it is first read and keeps it for the step, so that what no head reads is never computed.
Maps are keyed by stride, fine to coarse, never by name or position: levels of different pyramids
meet only where their strides agree.

Shapes: B images, C channels, K classes, R sampled RoIs of the whole batch (image after image),
P pooled size, A anchors a location, N = sum of H x W x A over levels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .config import ConfigError
from .pooling import build_pooler


@dataclass(frozen=True)
class DetectorSpec:
    """What is known of a detector when distillation is wired: sizes, and the fields it can serve.

    Attributes:
        role: "student" or "teacher".
        meta_arch: name of its meta-architecture, e.g. "GeneralizedRCNN".
        channels: stride -> channels of the pyramid, fine to coarse.
        fields: names of the bundle's fields that it can serve, e.g. "pyramid", "roi.logits".
        num_classes: foreground classes, None where it predicts none.
        roi_strides, mask_strides: strides its box head, and its mask head, pools from; () where
            there is none.
        roi_resolution, mask_resolution: pooled size P of the box and the mask branch.
        num_stages: stages of a cascade, 1 for an ordinary box head, 0 for dense detectors.
        box_hidden_dim: width of the box head's output.
        class_tower_channels: width of the map that a dense detector's class prediction reads.
        rpn_channels: width of the RPN's hidden map.
        head_strides: levels that the RPN, or the dense head, reads.
        anchors_per_location: A, of the RPN or of the dense head.
        anchors: stride -> the anchors around one location of a dense detector, as (offset of their
            centre in strides, corners); None where these numbers are not known.
        box_coding: name of the transform its box deltas are coded with.
        class_agnostic_mask: one mask for all classes.
        sigmoid_classes: its box head is trained with a sigmoid a class (as for LVIS), not softmax.
    """

    role: str
    meta_arch: str
    channels: dict[int, int]
    fields: frozenset[str]
    num_classes: int | None = None
    roi_strides: tuple[int, ...] = ()
    mask_strides: tuple[int, ...] = ()
    roi_resolution: int | None = None
    mask_resolution: int | None = None
    num_stages: int = 0
    box_hidden_dim: int | None = None
    class_tower_channels: int | None = None
    rpn_channels: int | None = None
    head_strides: tuple[int, ...] = ()
    anchors_per_location: int | None = None
    anchors: dict[int, tuple] | None = None
    box_coding: str | None = None
    class_agnostic_mask: bool = False
    sigmoid_classes: bool = False

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the pyramid, fine to coarse."""
        return tuple(self.channels)

    @property
    def two_stage(self) -> bool:
        """Whether the detector has a box head on RoIs."""
        return self.num_stages > 0

    @property
    def mask_channels(self) -> int | None:
        """Channels of the mask branch's pooled features, None without one."""
        return self.channels[self.mask_strides[0]] if self.mask_strides else None


@dataclass
class Batch:
    """The ground truth and the place in training that both detectors share.

    Attributes:
        inputs: Detectron2's ``batched_inputs``.
        instances: per image the ground truth, with Detectron2's fields, on the model's device.
        gt_boxes: per image (n_i, 4) xyxy in pixels of the resized image.
        gt_classes: per image (n_i,) long.
        image_sizes: (h, w) of each resized image, before padding.
        iteration, max_iter: the current iteration, from 0, and the length of training.
        student_losses: the student's own losses of this step, detached.
    """

    inputs: list[dict]
    instances: list[Instances]
    iteration: int = 0
    max_iter: int = 1
    student_losses: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_inputs(cls, inputs: list[dict], device: torch.device, **kwargs) -> Batch:
        """Move the ground truth of Detectron2's ``batched_inputs`` to ``device``."""
        return cls(inputs, [item["instances"].to(device) for item in inputs], **kwargs)

    @property
    def gt_boxes(self) -> list[Tensor]:
        return [instances.gt_boxes.tensor for instances in self.instances]

    @property
    def gt_classes(self) -> list[Tensor]:
        return [instances.gt_classes for instances in self.instances]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [tuple(item["image"].shape[-2:]) for item in self.inputs]


class Lazy:
    """A field that is computed when it is first read, with gradients wherever that is: a reader
    under ``no_grad`` must not take them from the next one."""

    def __init__(self, compute: Callable):
        self.compute = compute


class View:
    """Named fields, each a value or a :class:`Lazy`; reading an unknown one names all."""

    def __init__(self, owner: str, **fields):
        self._owner = owner
        self._fields = fields

    def __getattr__(self, name: str):
        fields = self.__dict__.get("_fields", {})
        if name.startswith("__") or name not in fields:
            have = ", ".join(sorted(fields)) or "nothing"
            raise AttributeError(
                f"the {self.__dict__.get('_owner')}'s {type(self).__name__} has no field "
                f"'{name}'; it has: {have}"
            )
        value = fields[name]
        if isinstance(value, Lazy):
            with torch.enable_grad():
                value = value.compute()
        self.__dict__[name] = value
        return value

    def release(self) -> None:
        """Forget all fields. Lazy fields refer back to their view: without this their tensors would
        live until Python's next cyclic garbage collection."""
        values = [*self._fields.values(), *self.__dict__.values()]
        self._fields = {}
        for value in values:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, View):
                    item.release()
        for name in [n for n in self.__dict__ if n not in ("_owner", "_fields")]:
            del self.__dict__[name]


class RoIView(View):
    """The student's sampled RoIs of one box-head stage, and what the detector computes on them.

    Attributes:
        boxes: per image (R_i, 4) xyxy in pixels of the resized image; constants.
        labels: (R,) long, the matched class, K for background.
        image_index: (R,) long, the image a RoI belongs to.
        features: (R, C, P, P) pooled, before the box head; pooled alike in both detectors.
        hidden: (R, D) output of the box head.
        logits: (R, K + 1), background last.
        deltas: (R, 4 K), or (R, 4) when class-agnostic.
        delta_weights: (wx, wy, ww, wh) that the deltas are multiplied by.
    """

    boxes: list[Tensor]
    labels: Tensor
    image_index: Tensor
    features: Tensor
    hidden: Tensor
    logits: Tensor
    deltas: Tensor
    delta_weights: tuple[float, ...]


class MaskView(View):
    """The student's foreground RoIs in the mask branch (F of them in the batch).

    Attributes:
        boxes: per image (F_i, 4). labels: (F,) long. image_index: (F,) long.
        features: (F, C, P, P) pooled for the mask head, alike in both detectors.
        logits: (F, K, M, M), or (F, 1, M, M) when class-agnostic.
    """

    boxes: list[Tensor]
    labels: Tensor
    image_index: Tensor
    features: Tensor
    logits: Tensor


class RPNView(View):
    """The region proposal network's maps, by stride.

    Attributes:
        features: (B, C, H, W), the hidden map after its convolution and ReLU.
        logits: (B, A, H, W). deltas: (B, 4 A, H, W). anchors: (H W A, 4), ordered y, x, anchor.
    """

    features: dict[int, Tensor]
    logits: dict[int, Tensor]
    deltas: dict[int, Tensor]
    anchors: dict[int, Tensor]


class DenseView(View):
    """A dense detector's outputs, by stride.

    Attributes:
        logits: (B, H W A, K) before the sigmoid. deltas: (B, H W A, 4).
        delta_weights: (wx, wy, ww, wh) that the deltas are multiplied by.
        class_tower, box_tower: (B, C, H, W), the maps that the final convolutions read.
        anchors: (H W A, 4), ordered y, x, anchor.
        labels: (B, N) over all levels, K for background, -1 to ignore: the student's own matching.
        matched_boxes: (B, N, 4) the ground-truth box of each anchor; undefined off the foreground.
        decode: function (deltas (..., 4), anchors (..., 4)) -> boxes (..., 4).
    """

    logits: dict[int, Tensor]
    deltas: dict[int, Tensor]
    delta_weights: tuple[float, ...]
    class_tower: dict[int, Tensor]
    box_tower: dict[int, Tensor]
    anchors: dict[int, Tensor]
    labels: Tensor
    matched_boxes: Tensor
    decode: Callable[[Tensor, Tensor], Tensor]


class FeatureBundle(View):
    """One detector's step.

    Attributes:
        image_sizes: (h, w) of each resized image, before padding.
        padded_size: (H, W) of the batch of padded images; the student's only.
        pyramid: stride -> (B, C, H, W), fine to coarse. The teacher's maps have the student's size.
        rois: a :class:`RoIView` for each box-head stage of the student.
        mask, rpn, dense: see their classes.
    """

    image_sizes: list[tuple[int, int]]
    padded_size: tuple[int, int]
    pyramid: dict[int, Tensor]
    rois: list[RoIView]
    mask: MaskView
    rpn: RPNView
    dense: DenseView

    def __init__(self, spec: DetectorSpec, context=contextlib.nullcontext, **fields):
        super().__init__(spec.role, **fields)
        self.spec = spec
        self._context = context

    @property
    def roi(self) -> RoIView:
        """The first (for most detectors the only) stage of ``rois``."""
        return self.rois[0]

    def pool(
        self,
        boxes: list[Tensor],
        output_size: int = 7,
        *,
        strides: Sequence[int] | None = None,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> Tensor:
        """RoIAlign ``boxes`` on this detector's pyramid, each on the level its size asks for.

        Args:
            boxes: per image (n_i, 4) xyxy in pixels of the resized image.
            output_size: side of the pooled map.
            strides: consecutive levels to pool from; default: the whole pyramid.
            sampling_ratio, aligned: as in :class:`detectron2.layers.ROIAlign`.

        Returns:
            (sum n_i, C, output_size, output_size).
        """
        strides = tuple(strides or self.spec.strides)
        pooler = build_pooler(output_size, strides, sampling_ratio, aligned)
        with self._context():
            if len(strides) == 1:
                # Detectron2 would ask the device how many boxes each image has.
                rois = torch.cat(boxes)
                rois = torch.cat([image_index(boxes)[:, None].to(rois.dtype), rois], dim=1)
                return pooler.level_poolers[0](self.pyramid[strides[0]], rois)
            return pooler([self.pyramid[s] for s in strides], [Boxes(b) for b in boxes])


def image_index(boxes: list[Tensor]) -> Tensor:
    """The image each row of the concatenated ``boxes`` belongs to, (sum n_i,) long."""
    return torch.cat([b.new_full((len(b),), i, dtype=torch.long) for i, b in enumerate(boxes)])


# --- reading a detector's build -----------------------------------------------------------------


def feature_strides(model: nn.Module) -> dict[str, int]:
    """Name -> stride of the backbone's output maps, fine to coarse."""
    shapes = model.backbone.output_shape()
    return dict(sorted(((name, s.stride) for name, s in shapes.items()), key=lambda kv: kv[1]))


def box_stages(roi_heads: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(suffix, box head, box predictor) of each stage; a cascade keeps its stages in lists."""
    head, predictor = roi_heads.box_head, roi_heads.box_predictor
    if isinstance(head, nn.ModuleList):
        pairs = enumerate(zip(head, predictor, strict=True))
        return [(f".{k}", h, p) for k, (h, p) in pairs]
    return [("", head, predictor)]


def dense_delta_weights(model: nn.Module) -> tuple[float, ...]:
    """Factors of a dense detector's box deltas; ones for a transform that has none (FCOS)."""
    return tuple(getattr(model.box2box_transform, "weights", (1.0, 1.0, 1.0, 1.0)))


def _strides_of(model: nn.Module, in_features: Sequence[str]) -> tuple[int, ...]:
    strides = feature_strides(model)
    return tuple(strides[name] for name in in_features)


def describe_detector(
    model: nn.Module, role: str, student: DetectorSpec | None = None
) -> DetectorSpec:
    """Read a Detectron2 detector's build.

    Args:
        model: a GeneralizedRCNN, a dense detector such as RetinaNet or FCOS, or any model with a
            Detectron2 ``backbone`` (then only its pyramid can be read).
        role: "student" or "teacher".
        student: for the teacher, the student's spec: the teacher is read on the student's RoIs.

    Raises:
        ConfigError: the model has no such backbone, so nothing of it can be read.
    """
    if not hasattr(getattr(model, "backbone", None), "output_shape"):
        raise ConfigError(
            f"the {role}, a {type(model).__name__}, has no Detectron2 backbone (a submodule "
            "'backbone' with output_shape()), so nothing of it can be distilled"
        )
    shapes = model.backbone.output_shape()
    channels = {stride: shapes[name].channels for name, stride in feature_strides(model).items()}
    if len(channels) != len(shapes):
        channels = {}  # two maps of one stride are no pyramid; nothing can be paired
    known: dict = {}
    fields = {"pyramid"} if channels else set()
    if hasattr(model, "roi_heads") and hasattr(model.roi_heads, "box_pooler"):
        _describe_roi_heads(model, known, fields)
    if hasattr(getattr(model, "proposal_generator", None), "rpn_head"):
        _describe_rpn(model, known, fields)
    if hasattr(model, "head") and hasattr(model, "head_in_features"):
        _describe_dense(model, known, fields)
    if student is not None:
        _restrict_to_student_rois(channels, student, fields)
    return DetectorSpec(role, type(model).__name__, channels, frozenset(fields), **known)


def _describe_roi_heads(model: nn.Module, known: dict, fields: set[str]) -> None:
    roi_heads = model.roi_heads
    stages = box_stages(roi_heads)
    predictor = stages[0][2]
    known.update(
        num_classes=roi_heads.num_classes,
        roi_strides=_strides_of(model, roi_heads.box_in_features),
        roi_resolution=roi_heads.box_pooler.output_size[0],
        num_stages=len(stages),
        box_hidden_dim=predictor.cls_score.in_features,
        box_coding=type(predictor.box2box_transform).__name__,
        sigmoid_classes=getattr(predictor, "use_sigmoid_ce", False),
    )
    fields |= {"roi", "roi.features", "roi.hidden", "roi.logits", "roi.deltas"}
    mask_pooler = getattr(roi_heads, "mask_pooler", None)
    if mask_pooler is not None:
        known["mask_resolution"] = mask_pooler.output_size[0]
        known["mask_strides"] = _strides_of(model, roi_heads.mask_in_features)
        fields |= {"mask", "mask.features"}
        if hasattr(roi_heads.mask_head, "predictor"):
            # The only mask of a detector of one class is that class's.
            one_mask = roi_heads.mask_head.predictor.out_channels == 1
            known["class_agnostic_mask"] = one_mask and roi_heads.num_classes > 1
            fields.add("mask.logits")


def _describe_rpn(model: nn.Module, known: dict, fields: set[str]) -> None:
    rpn, head = model.proposal_generator, model.proposal_generator.rpn_head
    known["anchors_per_location"] = rpn.anchor_generator.num_anchors[0]
    known["head_strides"] = _strides_of(model, rpn.in_features)
    fields.add("rpn.anchors")
    if hasattr(head, "conv") and hasattr(head, "objectness_logits"):
        known["rpn_channels"] = head.objectness_logits.in_channels
        fields |= {"rpn.features", "rpn.logits", "rpn.deltas"}


def _describe_dense(model: nn.Module, known: dict, fields: set[str]) -> None:
    known.update(
        num_classes=model.num_classes,
        anchors_per_location=model.anchor_generator.num_anchors[0],
        anchors=_dense_anchors(model),
        head_strides=_strides_of(model, model.head_in_features),
        box_coding=type(model.box2box_transform).__name__,
    )
    fields |= {"dense.logits", "dense.deltas", "dense.anchors"}
    if hasattr(model, "label_anchors"):
        fields.add("dense.labels")
    if hasattr(model.head, "cls_subnet") and hasattr(model.head, "bbox_subnet"):
        known["class_tower_channels"] = model.head.cls_score.in_channels
        fields |= {"dense.class_tower", "dense.box_tower"}


def _dense_anchors(model: nn.Module) -> dict[int, tuple] | None:
    """The numbers are not there on the meta device, or of a generator that is not Detectron2's."""
    generator, shapes = model.anchor_generator, model.backbone.output_shape()
    cells = list(getattr(generator, "cell_anchors", []))
    if not cells or any(cell.is_meta for cell in cells):
        return None
    corners = ([round(corner, 3) for corner in cell.flatten().tolist()] for cell in cells)
    strides = (shapes[name].stride for name in model.head_in_features)
    return {
        stride: (generator.offset, *cell) for stride, cell in zip(strides, corners, strict=True)
    }


def _restrict_to_student_rois(
    channels: dict[int, int], student: DetectorSpec, fields: set[str]
) -> None:
    """The teacher's RoI fields live on the student's RoIs: without those there are none, and with
    them any pyramid that has the levels can be pooled."""
    if not student.two_stage:
        fields -= {name for name in fields if name.split(".")[0] in ("roi", "mask")}
        return
    fields.add("roi")
    for branch, strides in (("roi", student.roi_strides), ("mask", student.mask_strides)):
        if not strides:
            fields -= {name for name in fields if name.split(".")[0] == branch}
        elif set(strides) <= set(channels):
            fields |= {branch, f"{branch}.features"}
        else:
            fields.discard(f"{branch}.features")
