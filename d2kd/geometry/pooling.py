"""RoIAlign of boxes on the pyramid levels that their sizes ask for, in float32, without a wait.

Detectron2's pooler asks the device which boxes lie on which level, once a level and pyramid. Here
every level gets all boxes, those of other levels moved far outside of its map, where RoIAlign gives
exact zeros at almost no cost, and the levels are added up; boxes are placed once for both
detectors. Boxes that the student's own pooler has sorted are taken in its order. On a CPU
torchvision's backward pass is one thread's work, and was most of what pooling the boxes of a dense
student added to a step; here it uses all threads.

Shapes: R boxes of all images, image after image; B images; C channels; P the pooled side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torchvision.ops import roi_align

from ..numerics import full_precision, image_index
from .boxes import assign_levels

# A layer of one level: maps (B, C, H, W), rois (R, 5) -> (R, C, P, P).
Layer = Callable[[Tensor, Tensor], Tensor]

# Outside of every map at every stride, and exact in 16-bit floats.
_FAR = -32768.0


@dataclass(frozen=True)
class PlacedBoxes:
    """Boxes of several images on the levels that each is pooled from.

    Attributes:
        strides: of the levels, fine to coarse.
        rois: per level (R, 5), rows of an image's index and xyxy in pixels of the network's input;
            a box of another level lies outside of every map.
    """

    strides: tuple[int, ...]
    rois: Sequence[Tensor]


def place_boxes(
    boxes: Sequence[Tensor], strides: Sequence[int], base_size: float | None = None
) -> PlacedBoxes:
    """Place boxes by FPN's rule: one of 224 pixels (side) on stride 16, each octave a level.

    Args:
        boxes: per image (n_i, 4) xyxy in pixels of the network's input.
        strides: of consecutive levels, fine to coarse; boxes beyond them go to the nearest.
        base_size: side of the smallest boxes of the second octave, those of the finest level;
            default: 14 strides of that level.
    """
    corners = torch.cat(list(boxes)).detach()
    index = image_index(boxes)[:, None]
    strides = tuple(strides)
    if len(strides) == 1:
        return PlacedBoxes(strides, [torch.cat([index, corners], dim=1)])
    level = assign_levels(corners, len(strides), base_size or 14.0 * strides[0], margin=0)
    levels = torch.arange(len(strides), device=level.device)[:, None]
    placed = corners.masked_fill((level != levels)[..., None], _FAR)  # (L, R, 4)
    rois = torch.cat([index.expand(len(strides), -1, -1), placed], dim=2)
    return PlacedBoxes(strides, rois.unbind())


def pool_boxes(
    maps: Sequence[Tensor],
    boxes: PlacedBoxes,
    output_size: int = 7,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign boxes on the levels of a pyramid.

    Args:
        maps: per level (B, C, H, W).
        output_size: side P of the pooled map.
        sampling_ratio, aligned: as in :class:`detectron2.layers.ROIAlign`.

    Returns:
        (R, C, P, P), in the order and precision of the boxes and the maps.
    """
    size = (output_size, output_size)
    layers = [
        functools.partial(_roi_align, (size, 1 / stride, sampling_ratio, aligned))
        for stride in boxes.strides
    ]
    return pool_levels(layers, maps, boxes.rois).to(maps[0].dtype)


def pool_levels(layers: Iterable[Layer], maps: Sequence[Tensor], rois: Sequence[Tensor]) -> Tensor:
    """Pool placed boxes with a layer of each level's own, for instance one of Detectron2's."""
    pooled = (layer(*inputs) for layer, *inputs in zip(layers, maps, rois, strict=True))
    return functools.reduce(torch.add, pooled)


@dataclass
class PooledBoxes:
    """One call of a :class:`detectron2.modeling.poolers.ROIPooler`.

    Attributes:
        boxes: per image (n_i, 4) xyxy in pixels of the resized image; constants.
        features: (R, C, P, P).
        level_rois: per level of the pooler (m_l, 5), the boxes that it pooled there, rows of the
            image's index and xyxy; their number is known without asking the device.
        pooler: that was called.
    """

    boxes: list[Tensor]
    features: Tensor
    level_rois: list[Tensor]
    pooler: Any

    @functools.cached_property
    def order(self) -> Tensor:
        """(R,) long: where each row of the concatenated ``level_rois`` is among the boxes."""
        pooler = self.pooler
        level = assign_boxes_to_levels(
            [Boxes(torch.cat(self.boxes))],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        return level.argsort(stable=True)

    def pool(self, layers: Iterable[Layer], maps: Sequence[Tensor]) -> Tensor:
        """Pool the boxes on other maps of the same levels: (R, C, P', P')."""
        pooled = [
            layer(level, rois)
            for layer, level, rois in zip(layers, maps, self.level_rois, strict=True)
        ]
        if len(pooled) == 1:
            return pooled[0]
        rows = torch.cat(pooled)
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


# Boxes would be rounded to the maps' precision otherwise: by pixels, in bfloat16.
@full_precision
def _roi_align(arguments: tuple[Any, ...], maps: Tensor, rois: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    if maps.device.type == "cpu" and maps.requires_grad and threads > 1:
        pooled: Tensor = _ROIAlignOnCPU.apply(maps, rois.to(maps.dtype), *arguments)
    else:
        pooled = roi_align(maps, rois.to(maps.dtype), *arguments)
    return pooled


class _ROIAlignOnCPU(torch.autograd.Function):
    """torchvision's RoIAlign; its gradient is linear in the channels, so threads share them."""

    @staticmethod
    def forward(ctx: FunctionCtx, maps: Tensor, rois: Tensor, *arguments: Any) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.arguments = maps.shape, arguments  # type: ignore[attr-defined]
        pooled: Tensor = roi_align(maps, rois, *arguments)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        (height, width), scale, sampling_ratio, aligned = ctx.arguments
        batch, _, *size = ctx.shape

        def part(grad: Tensor) -> Tensor:
            shape = height, width, batch, grad.shape[1], *size
            share: Tensor = torch.ops.torchvision._roi_align_backward(
                grad, rois, scale, *shape, sampling_ratio, aligned
            )
            return share

        parts = _threads().map(part, grad.chunk(torch.get_num_threads(), dim=1))
        return torch.cat(list(parts), dim=1), None, None, None, None, None


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="RoIAlign")
