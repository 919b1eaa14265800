"""A frozen model made cheaper, with the same outputs: norms folded into convolutions, weights kept
in the precision that they are used in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

# Layers that autocast runs in half precision: it would cast their weights again in every step.
_CAST = (nn.modules.conv._ConvNd, nn.Linear)


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Fold batch norms with fixed statistics into the Detectron2 convolutions before them.

    In place; ``model`` must be in eval mode. Its state dict has other keys afterwards.
    """
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_fixed(module.norm):
            scale, shift = _as_affine(module.norm)
            weight, bias = module.weight.double(), module.bias
            shape = (-1, *[1] * (weight.dim() - 1))
            shift = shift if bias is None else shift + bias.double() * scale
            dtype = module.weight.dtype
            module.weight = nn.Parameter((weight * scale.view(shape)).to(dtype), False)
            module.bias = nn.Parameter(shift.to(dtype), False)
            module.norm = None


def _is_fixed(norm: Any) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.track_running_stats


def _as_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) by channel, float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` for autocast to ``dtype``: weights are cast now, not in every step."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _CAST):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model
