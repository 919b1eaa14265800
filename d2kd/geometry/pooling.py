"""RoIAlign of boxes on the pyramid levels that their sizes ask for, in float32.

Detectron2's pooler finds the boxes of a level once for each pyramid, and asks the device about each
level; here they are placed once for both detectors. On a CPU torchvision's backward pass is one
thread's work, and was most of what pooling the boxes of a dense student added to a step; here it
uses all threads.

Shapes: R boxes of all images, image after image; B images; C channels; P the pooled side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torchvision.ops import roi_align

from ..numerics import full_precision, image_index
from .boxes import assign_levels


@dataclass(frozen=True)
class PlacedBoxes:
    """Boxes of several images, sorted by the level that each is pooled from.

    Attributes:
        strides: of the levels, fine to coarse.
        rois: per level (n_l, 5), rows of an image's index and xyxy in pixels of the network's
            input.
        inverse: (R,) long, where each box lies in the concatenation of ``rois``; None: in order.
    """

    strides: tuple[int, ...]
    rois: Sequence[Tensor]
    inverse: Tensor | None = None


def place_boxes(boxes: Sequence[Tensor], strides: Sequence[int]) -> PlacedBoxes:
    """Sort boxes by FPN's rule: one of 224 pixels (side) to stride 16, each octave a level.

    With several levels it waits for the device, once: how many boxes each has decides shapes.

    Args:
        boxes: per image (n_i, 4) xyxy in pixels of the network's input.
        strides: of consecutive levels, fine to coarse; boxes beyond them go to the nearest.
    """
    corners = torch.cat(list(boxes))
    rois = torch.cat([image_index(boxes)[:, None].to(corners.dtype), corners], dim=1)
    strides = tuple(strides)
    if len(strides) == 1:
        return PlacedBoxes(strides, [rois])
    level = assign_levels(corners, len(strides), 14.0 * strides[0], margin=0)
    order = level.argsort(stable=True)
    counts = level.bincount(minlength=len(strides)).tolist()
    return PlacedBoxes(strides, rois[order].split(counts), order.argsort())


class PoolOptions(NamedTuple):
    """How boxes are pooled.

    Attributes:
        output_size: side P of the pooled map.
        sampling_ratio, aligned: as in :class:`detectron2.layers.ROIAlign`.
    """

    output_size: int = 7
    sampling_ratio: int = 0
    aligned: bool = True


def pool_boxes(maps: Sequence[Tensor], boxes: PlacedBoxes, options: PoolOptions) -> Tensor:
    """RoIAlign boxes on the levels of a pyramid.

    Args:
        maps: per level (B, C, H, W).

    Returns:
        (R, C, P, P), in the order and precision of the boxes and the maps.
    """
    pooled = [
        _roi_align(level, rois, 1 / stride, options).to(level.dtype)
        for level, rois, stride in zip(maps, boxes.rois, boxes.strides, strict=True)
        # A level without boxes still takes part where all are without.
        if len(rois) or not any(map(len, boxes.rois))
    ]
    joined = torch.cat(pooled) if len(pooled) > 1 else pooled[0]
    return joined if boxes.inverse is None else joined.index_select(0, boxes.inverse)


# Boxes would be rounded to the maps' precision otherwise: by pixels, in bfloat16.
@full_precision
def _roi_align(maps: Tensor, rois: Tensor, scale: float, options: PoolOptions) -> Tensor:
    size = (options.output_size, options.output_size)
    arguments = size, scale, options.sampling_ratio, options.aligned
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
