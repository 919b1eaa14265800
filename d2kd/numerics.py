"""What distillation losses share: full precision, and a zero that stays in the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def _map_tensors(fn: Callable[[Tensor], Tensor], value):
    """Apply ``fn`` to each tensor inside nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _map_tensors(fn, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(fn, item) for item in value)
    return value


def full_precision(loss: Callable) -> Callable:
    """Decorator: run ``loss`` with autocast off and its half-precision tensors widened to float32.

    Distances, cosines and variances of features lose their meaning in 8 or 11 bits of mantissa.
    float64 passes through untouched, so that gradients can be checked numerically.
    """

    @functools.wraps(loss)
    def wrapper(*args, **kwargs):
        devices = set()

        def widen(tensor: Tensor) -> Tensor:
            devices.add(tensor.device.type)
            return tensor.float() if tensor.dtype in _HALF else tensor

        args, kwargs = _map_tensors(widen, args), _map_tensors(widen, kwargs)
        device = next(iter(devices - {"cpu"}), "cpu")
        with torch.autocast(device, enabled=False):
            return loss(*args, **kwargs)

    return wrapper


def connected_zero(*tensors: Tensor) -> Tensor:
    """A scalar zero whose gradient towards each of ``tensors`` is zero, not None.

    Losses that have nothing to compare return it, so that distributed training sees the same
    graph on every rank.
    """
    return sum((tensor[:0].sum() if tensor.dim() else tensor * 0) for tensor in tensors)


def on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of numbers on ``device``, without waiting for it (a copy of pageable memory does).

    Args:
        values: nested sequences of floats or ints.
    """
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def stack_channels(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors (..., C_i) of equal leading shapes: (len, ..., max C_i), padded with zeros."""
    widest = max(part.shape[-1] for part in parts)
    return torch.stack(
        [
            part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]))
            for part in parts
        ]
    )
