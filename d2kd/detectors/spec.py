"""What is known of a detector when distillation is wired: sizes, and the fields it can serve."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..errors import ConfigError
from ..registry import DETECTOR_PART_REGISTRY
from .class_map import ClassMap


@dataclass(frozen=True)
class DetectorSpec:
    """What is known of a detector when distillation is wired: sizes, and the fields it can serve.

    Attributes:
        role: "student" or "teacher".
        meta_arch: name of its meta-architecture, e.g. "GeneralizedRCNN".
        channels: stride -> channels of the pyramid, fine to coarse.
        fields: names of the bundle's fields that it can serve, e.g. "pyramid", "roi.logits".
        num_classes: foreground classes, None where it predicts none.
        class_names: their names in order, None where these are not known.
        roi_strides, mask_strides: strides its box head, and its mask head, pools from; () where
            there is none.
        roi_resolution, mask_resolution: pooled size P of the box and the mask branch.
        num_stages: stages of a cascade, 1 for an ordinary box head, 0 for dense detectors.
        box_hidden_dim: width of the box head's output.
        class_tower_channels: width of the map that a dense detector's class prediction reads.
        tower_channels: widths of what each convolution of its towers reads and of what they return.
        rpn_channels: width of the RPN's hidden map.
        head_strides: levels that the RPN, or the dense head, reads.
        anchors_per_location: A, of the RPN or of the dense head.
        anchors: stride -> the anchors around one position of a one-stage detector, as (offset of
            their centre in strides, corners); None where these numbers are not known.
        box_coding: name of the transform its box deltas are coded with.
        class_agnostic_mask: one mask for all classes.
        sigmoid_classes: its box head has a sigmoid per class (as for LVIS), not a softmax.
        class_map: of a teacher of other classes: those that it shares with the student. Its views
            give outputs in the student's classes then.
        extra: name of a part of a user's -> what the part says of itself.
    """

    role: str
    meta_arch: str
    channels: dict[int, int]
    fields: frozenset[str]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    roi_strides: tuple[int, ...] = ()
    mask_strides: tuple[int, ...] = ()
    roi_resolution: int | None = None
    mask_resolution: int | None = None
    num_stages: int = 0
    box_hidden_dim: int | None = None
    class_tower_channels: int | None = None
    tower_channels: tuple[int, ...] = ()
    rpn_channels: int | None = None
    head_strides: tuple[int, ...] = ()
    anchors_per_location: int | None = None
    anchors: dict[int, tuple[float, ...]] | None = None
    box_coding: str | None = None
    class_agnostic_mask: bool = False
    sigmoid_classes: bool = False
    class_map: ClassMap | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the pyramid, fine to coarse."""
        return tuple(self.channels)

    @property
    def two_stage(self) -> bool:
        """Whether the detector has a box head on RoIs."""
        return self.num_stages > 0

    @property
    def kind(self) -> str:
        """What predicts boxes, in a word."""
        if self.two_stage:
            return "two-stage"
        return "one-stage" if "dense.logits" in self.fields else "maps only"

    @property
    def mask_channels(self) -> int | None:
        """Channels of the mask branch's pooled features, None without one."""
        return self.channels[self.mask_strides[0]] if self.mask_strides else None


class Facts(NamedTuple):
    """What one part says of a detector.

    Attributes:
        fields: names of the bundle's fields that the detector can serve, with the part's prefix.
        sizes: attributes of :class:`DetectorSpec`.
        extra: what else there is to know of the part.
    """

    fields: Collection[str] = ()
    sizes: Mapping[str, Any] = {}
    extra: Any = None


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
    channels = pyramid_channels(model)
    fields = {"pyramid"} if channels else set()
    sizes: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for _, part in DETECTOR_PART_REGISTRY:
        facts: Facts = part().describe(model, student)
        fields |= set(facts.fields)
        sizes.update(facts.sizes)
        if facts.extra is not None:
            extra[part.name] = facts.extra
    meta_arch = getattr(model, "meta_arch", type(model).__name__)  # a foreign one has a name
    known = {"role": role, "meta_arch": meta_arch, "channels": channels, **sizes}
    return DetectorSpec(**known, fields=frozenset(fields), extra=extra)


# --- reading a detector's build -----------------------------------------------------------------


def has_all(module: object, *paths: str) -> bool:
    """Whether there is something at each dotted path of attributes."""
    try:
        operator.attrgetter(*paths)(module)
    except AttributeError:
        return False
    return True


def _output_shape(model: nn.Module) -> dict[str, Any]:
    backbone: Any = model.backbone
    return dict(backbone.output_shape())


def feature_strides(model: nn.Module) -> dict[str, int]:
    """Name -> stride of the backbone's output maps, fine to coarse."""
    shapes = _output_shape(model)
    return dict(sorted(((name, s.stride) for name, s in shapes.items()), key=lambda kv: kv[1]))


def strides_of(model: nn.Module, in_features: Iterable[str]) -> tuple[int, ...]:
    """Strides of the backbone's maps of these names."""
    strides = feature_strides(model)
    return tuple(strides[name] for name in in_features)


def pyramid_channels(model: nn.Module) -> dict[int, int]:
    """Stride -> channels, fine to coarse; {} where two maps share a stride: that is no pyramid, and
    nothing can be paired."""
    shapes = _output_shape(model)
    channels = {stride: shapes[name].channels for name, stride in feature_strides(model).items()}
    return channels if len(channels) == len(shapes) else {}


def fields_on_student_boxes(
    part: str, fields: Collection[str], model: nn.Module, student_strides: Collection[int]
) -> set[str]:
    """What a teacher can serve of a part that lives on the student's boxes.

    Args:
        part: its name. fields: of the teacher's own build.
        student_strides: the levels that the student's part pools from, () where it has none: then
            there are no boxes. A teacher that has these levels, with one number of channels, can
            pool ``<part>.features``.
    """
    if not student_strides:
        return set()
    channels = pyramid_channels(model)
    widths = {channels.get(stride) for stride in student_strides}
    if len(widths) == 1 and None not in widths:
        return {*fields, part, f"{part}.features"}
    return set(fields) - {f"{part}.features"}
