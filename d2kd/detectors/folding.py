"""A frozen model made cheaper, with the same outputs: norms folded into convolutions, weights kept
in the precision that they are used in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Layers that autocast runs in half precision: it would cast their weights again in every step.
_CAST = (nn.modules.conv._ConvNd, nn.Linear)


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Fold batch norms with fixed statistics into the Detectron2 convolutions before them.

    In place; ``model`` must be in eval mode. Its state dict has other keys afterwards.
    """
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_fixed(module.norm):
            norm, dtype = module.norm, module.weight.dtype
            weight, bias = map(_wide, (module.weight, module.bias))
            mean, variance = map(_wide, (norm.running_mean, norm.running_var))
            scale, shift = map(_wide, (norm.weight, norm.bias))
            weight, bias = fuse_conv_bn_weights(
                weight, bias, mean, variance, norm.eps, scale, shift
            )
            module.weight = nn.Parameter(weight.to(dtype), False)
            module.bias = nn.Parameter(bias.to(dtype), False)
            module.norm = None


def _wide(tensor: Any) -> Any:
    return None if tensor is None else tensor.double()


def _is_fixed(norm: Any) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.track_running_stats


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` for autocast to ``dtype``: weights are cast now, not in every step."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _CAST):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model
