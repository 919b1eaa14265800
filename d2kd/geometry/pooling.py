"""RoIAlign on a pyramid in float32, with a backward pass that uses all threads of a CPU.

torchvision's is one thread's work there, and was most of what pooling the boxes of a dense student
added to a step.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

from ..numerics import full_precision


@functools.lru_cache(maxsize=64)
def build_pooler(
    output_size: int, strides: tuple[int, ...], sampling_ratio: int, aligned: bool
) -> ROIPooler:
    """Detectron2's pooler of the levels with these consecutive ``strides``.

    Args:
        output_size: side of the pooled map.
        sampling_ratio, aligned: as in :class:`detectron2.layers.ROIAlign`.
    """
    pooler_type = "ROIAlignV2" if aligned else "ROIAlign"
    pooler = ROIPooler(output_size, [1.0 / s for s in strides], sampling_ratio, pooler_type)
    pooler.level_poolers = nn.ModuleList(_ThreadedROIAlign(p) for p in pooler.level_poolers)
    return pooler


class _ThreadedROIAlign(nn.Module):
    """``layer``, and on a CPU a backward pass in as many threads as PyTorch may use."""

    def __init__(self, layer: ROIAlign):
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor, rois: Tensor) -> Tensor:
        """Pool ``rois`` (R, 5), rows of an image's index and xyxy, from ``maps`` (B, C, H, W)."""
        return self._pool(maps, rois).to(maps.dtype)

    # Detectron2's layer would round the boxes to the maps' precision: by pixels, in bfloat16.
    @full_precision
    def _pool(self, maps: Tensor, rois: Tensor) -> Tensor:
        layer = self.layer
        if maps.device.type != "cpu" or not maps.requires_grad or torch.get_num_threads() == 1:
            return layer(maps, rois)
        options = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        return _ROIAlignOnCPU.apply(maps, rois.to(maps.dtype), *options)


class _ROIAlignOnCPU(torch.autograd.Function):
    """torchvision's RoIAlign; its gradient is linear in the channels, so threads share them."""

    @staticmethod
    def forward(ctx, maps, rois, *options):
        ctx.save_for_backward(rois)
        ctx.shape, ctx.options = maps.shape, options
        return roi_align(maps, rois, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rois,) = ctx.saved_tensors
        (height, width), scale, sampling_ratio, aligned = ctx.options
        batch, _, *size = ctx.shape

        def part(grad: Tensor) -> Tensor:
            shape = height, width, batch, grad.shape[1], *size
            return torch.ops.torchvision._roi_align_backward(
                grad, rois, scale, *shape, sampling_ratio, aligned
            )

        parts = _threads().map(part, grad.chunk(torch.get_num_threads(), dim=1))
        return torch.cat(list(parts), dim=1), None, None, None, None, None


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="RoIAlign")
