"""What is known of a detector when distillation is wired: sizes, and the fields it can serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError


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
