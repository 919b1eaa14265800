"""Numeric helpers that exist once: precision of losses, softened divergence, unit vectors, and rows
of several images in a padded grid.

Shape legend: B images, R rows (boxes, instances) of all images, n rows of the fullest image,
N predictions, K logits of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

P = ParamSpec("P")
T = TypeVar("T")

HALF = (torch.float16, torch.bfloat16)

# A shorter vector has no direction worth comparing: the gradient of its cosine, which grows as
# 1 / length, would outweigh all others.
MIN_LENGTH = 1e-6


# --- precision and placement ----------------------------------------------------------------------


def _map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``fn`` to each tensor inside nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _map_tensors(fn, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_map_tensors(fn, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def full_precision(loss: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run ``loss`` with autocast off and its half-precision tensors widened to float32.

    Distances, cosines and variances of features lose their meaning in 8 or 11 bits of mantissa.
    float64 passes through untouched, so that gradients can be checked numerically.
    """

    @functools.wraps(loss)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        devices = set()

        def widen(tensor: Tensor) -> Tensor:
            devices.add(tensor.device.type)
            return tensor.float() if tensor.dtype in HALF else tensor

        wide_args, wide_kwargs = _map_tensors(widen, args), _map_tensors(widen, kwargs)
        device = next(iter(devices - {"cpu"}), "cpu")
        with torch.autocast(device, enabled=False):
            return loss(*wide_args, **wide_kwargs)

    return wrapper


def connected_zero(*tensors: Tensor) -> Tensor:
    """A scalar zero whose gradient towards each of ``tensors`` is zero, not None.

    Losses that have nothing to compare return it, so that distributed training sees the same
    graph on every rank.
    """
    zeros = [(tensor[:0].sum() if tensor.dim() else tensor * 0) for tensor in tensors]
    return zeros[0] if len(zeros) == 1 else torch.stack(zeros).sum()


def on_device(
    values: Sequence[Any] | np.ndarray[Any, Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor of numbers on ``device``, without waiting for it (a copy of pageable memory does).

    Args:
        values: nested sequences of numbers, or an array.
    """
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def check_shapes(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """Refuse pyramids whose levels are not of the same shapes.

    Raises:
        ValueError: names the shapes.
    """
    mine, theirs = ([tuple(x.shape) for x in maps] for maps in (students, teachers))
    if mine != theirs:
        raise ValueError(f"student {mine} and teacher {theirs} differ in shape")


def stack_channels(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors (..., C_i) of equal leading shapes: (len, ..., max C_i), padded with zeros."""
    widest = max(part.shape[-1] for part in parts)
    return torch.stack(
        [
            part if part.shape[-1] == widest else F.pad(part, (0, widest - part.shape[-1]))
            for part in parts
        ]
    )


def repeat_each(values: Tensor, times: Sequence[int]) -> Tensor:
    """Each value of the last dimension as often as the host says: (..., L) -> (..., sum of times).

    ``torch.repeat_interleave`` takes the numbers from the device, and waits for it.
    """
    parts = zip(values.split(1, dim=-1), times, strict=True)
    return torch.cat([value.expand(*value.shape[:-1], n) for value, n in parts], dim=-1)


# --- divergence of softened distributions ---------------------------------------------------------


def softened_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """T^2 sum_i w_i KL(softmax(t_i / T) || softmax(s_i / T)) (Hinton et al., 2015).

    Args:
        student, teacher: (..., K, ...) logits, K being dimension ``dim``; the teacher's are
            constants.
        temperature: T. The factor T^2 keeps the size of gradients.
        weights: (..., ...) w, the shape of the logits without K; constants; None: 1 each.
        dim: of the K logits that form a distribution.

    Returns:
        Scalar; zero, connected to ``student``, without predictions.
    """
    divergence: Tensor = _SoftenedKL.apply(student, teacher.detach(), temperature, weights, dim)
    return divergence


class _SoftenedKL(torch.autograd.Function):
    """Value and gradient in one go; what that saves is in docs/performance.md."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        weights: Tensor | None,
        dim: int,
    ) -> Tensor:
        if temperature != 1:
            student, teacher = student / temperature, teacher / temperature
        log_q, log_p = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p)
        gradient = log_q.exp_().sub_(p)
        if weights is not None:
            weights = weights.unsqueeze(dim)
            divergence, gradient = divergence.mul_(weights), gradient.mul_(weights)
        total = divergence.sum()
        if temperature != 1:
            total, gradient = total * temperature**2, gradient.mul_(temperature)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


# --- unit vectors ---------------------------------------------------------------------------------


def inverse_lengths(squared: Tensor) -> Tensor:
    """1 / length from squared lengths; 0, with gradient 0, where a vector has no direction."""
    return squared.masked_fill(squared <= MIN_LENGTH**2, torch.inf).rsqrt()


def unit_vectors(vectors: Tensor, dim: int = -1) -> Tensor:
    """``vectors`` scaled to length one along ``dim``.

    A vector without a direction, of at most ``MIN_LENGTH``, becomes zero, and so does its gradient.
    """
    return vectors * inverse_lengths(vectors.square().sum(dim, keepdim=True))


# --- rows of several images -----------------------------------------------------------------------


class Ragged:
    """Rows of several images, image after image, and the padded grid (B, n) in which they lie.

    Built from numbers that the host knows, so that using it waits for no device. Where all images
    have equally many rows, the grid is a view of the rows.

    Attributes:
        counts: rows of each image.
        shape: (B, n), n being the largest count, at least 1, so that no rows are no special case.

    Args:
        counts: rows of each image.
        device: of the tensors that are laid out.
    """

    def __init__(self, counts: Iterable[int], device: torch.device | str = "cpu"):
        self.counts = tuple(counts)
        self.shape = len(self.counts), max(1, max(self.counts, default=0))
        self.device = torch.device(device)
        self.is_full = all(count == self.shape[1] for count in self.counts)

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Ragged:
        """The layout of ``torch.cat(parts)``, a part (n_i, ...) an image."""
        return cls([len(part) for part in parts], parts[0].device)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(B,) long, ``counts``."""
        return on_device(self.counts, self.device, torch.long)

    @functools.cached_property
    def valid(self) -> Tensor:
        """(B, n) bool, True where the grid holds a row."""
        return on_device(self._valid(), self.device)

    @functools.cached_property
    def image_index(self) -> Tensor:
        """(R,) long, the image of each row."""
        return on_device(np.repeat(np.arange(self.shape[0]), self.counts), self.device)

    @functools.cached_property
    def slots(self) -> Tensor:
        """(R,) long, the place of each row in the flattened grid."""
        return on_device(np.flatnonzero(self._valid()), self.device)

    def _valid(self) -> np.ndarray[Any, Any]:
        valid: np.ndarray[Any, Any] = np.arange(self.shape[1]) < np.array(self.counts)[:, None]
        return valid

    def pad(self, rows: Tensor, fill: float = 0) -> Tensor:
        """(R, ...) -> (B, n, ...), ``fill`` where no row is."""
        if self.is_full:
            return rows.unflatten(0, self.shape)
        grid = rows.new_full((self.shape[0] * self.shape[1], *rows.shape[1:]), fill)
        return grid.index_copy(0, self.slots, rows).unflatten(0, self.shape)

    def unpad(self, grid: Tensor) -> Tensor:
        """(B, n, ...) -> (R, ...)."""
        rows = grid.flatten(0, 1)
        return rows if self.is_full else rows.index_select(0, self.slots)


def image_index(parts: Sequence[Tensor]) -> Tensor:
    """(R,) long, the image that each row of ``torch.cat(parts)`` belongs to."""
    return Ragged.of(parts).image_index
