"""The typed view of one detector's training step that distillation heads read.

A head gets two of them: the student's holds what its own forward computed, the teacher's computes a
field when it is first read and keeps it for the step, so that what no head reads is never computed.
Maps are keyed by stride, fine to coarse, never by name or position: levels of different pyramids
meet only where their strides agree.

Shapes: B images, C channels, K classes, R sampled RoIs of the whole batch (image after image),
P pooled size, A anchors per position, N = sum of H x W x A over levels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..geometry.pooling import PlacedBoxes, PooledBoxes, place_boxes, pool_boxes
from .inputs import to_device
from .pyramid import LazyLevels
from .spec import DetectorSpec

T = TypeVar("T")
V = TypeVar("V", bound="View")
# What a field is computed in, e.g. the teacher's "no gradient".
Context = Callable[[], contextlib.AbstractContextManager[Any]]


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

    inputs: list[dict[str, Any]]
    instances: list[Instances]
    iteration: int = 0
    max_iter: int = 1
    student_losses: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_inputs(
        cls, inputs: list[dict[str, Any]], device: torch.device, **kwargs: Any
    ) -> Batch:
        """Detectron2's ``batched_inputs``, copied to ``device`` unless they lie there already."""
        inputs = to_device(inputs, device)
        return cls(inputs, [item["instances"] for item in inputs], **kwargs)

    @property
    def gt_boxes(self) -> list[Tensor]:
        return [instances.gt_boxes.tensor for instances in self.instances]

    @property
    def gt_classes(self) -> list[Tensor]:
        return [instances.gt_classes for instances in self.instances]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [(item["image"].shape[-2], item["image"].shape[-1]) for item in self.inputs]


# --- fields that are computed when they are read --------------------------------------------------


class Lazy(Generic[T]):
    """A value of :class:`View`'s constructor that is computed when it is first read."""

    def __init__(self, compute: Callable[[], T]):
        self.compute = compute


class lazy(Generic[T]):
    """Decorator: a method of a :class:`View` that is a field, computed when it is first read.

    With gradients wherever that is, unless the view's own context has none: a reader under
    ``no_grad`` must not take them from the next one.
    """

    def __init__(self, compute: Callable[[Any], T]):
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, view: None, owner: type) -> lazy[T]: ...
    @overload
    def __get__(self, view: View, owner: type) -> T: ...
    def __get__(self, view: View | None, owner: type) -> T | lazy[T]:
        if view is None:
            return self
        return view._keep(self.name, lambda: self.compute(view))


class View:
    """Named fields of one part of a detector; reading one that is not there names all that are.

    Args:
        owner: "student" or "teacher".
        fields: by name, each a value or a :class:`Lazy`. A class derived from this one may have
            fields that are :class:`lazy` methods.
    """

    def __init__(self, owner: str, **fields: Any):
        self._owner = owner
        self._fields = fields
        self._context: Context = contextlib.nullcontext
        self._withheld: frozenset[str] = frozenset()

    def bind(self, context: Context, withheld: Sequence[str] = ()) -> None:
        """Compute fields in ``context``; the detector cannot serve those of ``withheld``."""
        self._context = context
        self._withheld = frozenset(withheld)

    def _keep(self, name: str, compute: Callable[[], T]) -> T:
        """Compute the field ``name``, once."""
        if name in self._withheld:
            raise AttributeError(name)  # Python asks __getattr__ next, which says what there is
        try:
            with torch.enable_grad(), self._context():
                value = compute()
        except AttributeError as error:  # a mistake within, not a field that is missing
            raise RuntimeError(f"the {self._owner}'s field '{name}': {error}") from error
        self.__dict__[name] = value
        return value

    # A type checker sees the fields of each class and no others.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str):
            if name.startswith("_"):  # asked for by copy and pickle before there is anything
                raise AttributeError(name)
            if name not in self._fields or name in self._withheld:
                raise AttributeError(self._no_field(name))
            value = self._fields[name]
            if isinstance(value, Lazy):
                return self._keep(name, value.compute)
            self.__dict__[name] = value
            return value

    def _no_field(self, name: str) -> str:
        have = ", ".join(sorted(self.field_names())) or "nothing"
        kind = next(c.__name__ for c in type(self).__mro__ if View in (c, *c.__bases__))
        return f"the {self._owner}'s {kind} has no field '{name}'; it has: {have}"

    def _lazy_names(self) -> set[str]:
        methods = (n for c in type(self).__mro__ for n, v in vars(c).items() if isinstance(v, lazy))
        public = {name for name in methods if not name.startswith("_")}
        return public | {n for n, v in self._fields.items() if isinstance(v, Lazy)}

    def field_names(self) -> set[str]:
        """Names of the fields that can be read."""
        return (self._fields.keys() | self._lazy_names()) - self._withheld

    def computed(self) -> Iterator[tuple[str | int, ...]]:
        """Paths of the fields that were computed so far, those of views within this one too.

        A path holds names of fields, positions in lists of views, and strides of levels that are
        computed one by one; :meth:`at` follows it.
        """
        for name in sorted(self._lazy_names() & self.__dict__.keys()):
            yield (name,)
            value = self.__dict__[name]
            if isinstance(value, LazyLevels):
                yield from ((name, stride) for stride in value.computed())
        for name, value in self._fields.items():
            if isinstance(value, View):
                yield from ((name, *path) for path in value.computed())
            elif isinstance(value, list):
                views = ((i, item) for i, item in enumerate(value) if isinstance(item, View))
                yield from ((name, i, *path) for i, item in views for path in item.computed())

    def at(self, path: tuple[str | int, ...]) -> Any:
        """The field at a path of :meth:`computed`."""
        found: Any = self
        for step in path:
            found = found[step] if isinstance(step, int) else getattr(found, step)
        return found

    def release(self) -> None:
        """Forget all fields. Views and what computes their fields refer to each other: without this
        their tensors would live until Python's next cyclic garbage collection."""
        for value in self._fields.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, View):
                    item.release()
        owner = self._owner
        self.__dict__.clear()
        View.__init__(self, owner)


# --- what there is to read ------------------------------------------------------------------------


class RoIView(View):
    """The student's sampled RoIs of one box-head stage, and what the detector computes on them.

    Attributes:
        boxes: per image (R_i, 4) xyxy in pixels of the resized image; constants.
        pooled: the call of the student's pooler that these boxes are of.
        labels: (R,) long, the matched class, K for background.
        image_index: (R,) long, the image a RoI belongs to.
        features: (R, C, P, P) pooled, before the box head, pooled equally in both detectors.
        hidden: (R, D) output of the box head.
        logits: (R, K + 1), background last.
        deltas: (R, 4 K), or (R, 4) when class-agnostic.
        delta_weights: (wx, wy, ww, wh) that the deltas are multiplied by.
    """

    pooled: PooledBoxes
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
        pooled: the call of the student's pooler that these boxes are of.
        boxes: per image (F_i, 4). labels: (F,) long. image_index: (F,) long.
        features: (F, C, P, P) pooled for the mask head, equally in both detectors.
        logits: (F, K, M, M), or (F, 1, M, M) when class-agnostic.
    """

    pooled: PooledBoxes
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
        logit_maps: (B, A K, H, W) before the sigmoid, as the head predicts them.
        delta_maps: (B, A 4, H, W).
        logits, deltas: the same by anchor, (B, H W A, K) and (B, H W A, 4); copies.
        delta_weights: (wx, wy, ww, wh) that the deltas are multiplied by.
        class_tower, box_tower: (B, C, H, W), the maps that the final convolutions read.
        tower_maps: "cls" and "box" -> stride -> what each convolution of that tower reads and
            what the tower returns, (B, C_i, H, W) each; of the student.
        finish_tower: function (branch, maps, n) -> predictions: what the last n convolutions of the
            tower "cls" or "box", and the prediction behind it, make of ``maps``, stride ->
            (B, C_i, H, W), with gradients to the maps: stride -> (B, A K or A 4, H, W); of the
            teacher.
        anchors: (H W A, 4), ordered y, x, anchor.
        labels: (B, N) over all levels, K for background, -1 to ignore: the student's own matching.
        matched_boxes: (B, N, 4) the ground-truth box of each anchor; undefined off the foreground.
        decode: function (deltas (..., 4), anchors (..., 4)) -> boxes (..., 4).
    """

    logit_maps: dict[int, Tensor]
    delta_maps: dict[int, Tensor]
    logits: dict[int, Tensor]
    deltas: dict[int, Tensor]
    delta_weights: tuple[float, ...]
    class_tower: dict[int, Tensor]
    box_tower: dict[int, Tensor]
    tower_maps: dict[str, dict[int, Sequence[Tensor]]]
    finish_tower: Callable[[str, Mapping[int, Tensor], int], dict[int, Tensor]]
    anchors: dict[int, Tensor]
    labels: Tensor
    matched_boxes: Tensor
    decode: Callable[[Tensor, Tensor], Tensor]

    @lazy
    def own_logit_maps(self) -> dict[int, Tensor]:
        """(B, A K, H, W) in the detector's own classes, K of them; a teacher's ``logit_maps`` are
        in the student's, where a class map is in use."""
        return self.logit_maps


class FeatureBundle(View):
    """One detector's step.

    Attributes:
        image_sizes: (h, w) of each resized image, before padding.
        images: (B, 3, H, W), normalised and padded, what the backbone read; the student's only.
        padded_size: (H, W) of the batch of padded images; the student's only.
        pyramid: stride -> (B, C, H, W), fine to coarse. The teacher's maps have the student's size.
        rois: a :class:`RoIView` for each box-head stage of the student.
        mask, rpn, dense: see their classes.

    A part of a user's is a field of the part's own name.
    """

    image_sizes: list[tuple[int, int]]
    images: Tensor
    padded_size: tuple[int, int]
    pyramid: Mapping[int, Tensor]
    rois: list[RoIView]
    mask: MaskView
    rpn: RPNView
    dense: DenseView

    def __init__(
        self, spec: DetectorSpec, context: Context = contextlib.nullcontext, **fields: Any
    ):
        super().__init__(spec.role, **fields)
        self.spec = spec
        self.bind(context)

    def add(self, name: str, views: View | Sequence[View], withheld: Sequence[str] = ()) -> None:
        """Make views of a part, all but their fields ``withheld``, the field ``name``."""
        for view in [views] if isinstance(views, View) else views:
            view.bind(self._context, withheld)
        self._fields[name] = views

    @property
    def roi(self) -> RoIView:
        """The first (for most detectors the only) stage of ``rois``."""
        return self.rois[0]

    def view(self, kind: type[V]) -> V:
        """The view of this class, e.g. of a part of a user's; typed, where its name is not.

        Raises:
            AttributeError: this detector has none; names what it has.
        """
        for value in self._fields.values():
            if isinstance(value, kind):
                return value
        raise AttributeError(self._no_field(kind.__name__))

    def pool(
        self,
        boxes: Sequence[Tensor] | PlacedBoxes,
        output_size: int = 7,
        *,
        strides: Sequence[int] | None = None,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> Tensor:
        """RoIAlign ``boxes`` on this detector's pyramid, each on the level its size asks for.

        Args:
            boxes: per image (n_i, 4) xyxy in pixels of the resized image. Where both detectors
                pool them from several levels, :func:`~d2kd.geometry.pooling.place_boxes` finds
                those levels once for both.
            output_size: side of the pooled map.
            strides: consecutive levels to pool from; default: the whole pyramid, or where the
                boxes are placed.
            sampling_ratio, aligned: as in :class:`detectron2.layers.ROIAlign`.

        Returns:
            (sum n_i, C, output_size, output_size).
        """
        if not isinstance(boxes, PlacedBoxes):
            boxes = place_boxes(boxes, strides or self.spec.strides)
        with self._context():
            maps = [self.pyramid[s] for s in boxes.strides]
            return pool_boxes(maps, boxes, output_size, sampling_ratio, aligned)
