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
from torch import Tensor

from ..geometry.pooling import build_pooler
from .spec import DetectorSpec


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
