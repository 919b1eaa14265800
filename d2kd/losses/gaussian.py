"""The separable Gaussian blur of maps, as products with banded matrices.

On a CPU this is an order of magnitude faster than a depth-wise convolution, and each product costs
the same for every position, however large the map.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# Side of the tiles of a banded matrix: small enough to skip its zeros, large enough for a fast
# product of each tile.
_TILE_CPU = 32
_TILE_GPU = 64


def gaussian_window(window_size: int, sigma: float) -> Tensor:
    """One-dimensional Gaussian of ``window_size`` taps that sums to 1, in float64."""
    offsets = torch.arange(window_size, dtype=torch.float64) - (window_size - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * sigma**2))
    return window / window.sum()


@functools.lru_cache(maxsize=128)
def blur_matrix(
    size: int,
    window_size: int,
    sigma: float,
    reflect: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The (size, size) banded matrix that blurs one axis, with its padding folded in.

    A blur with reflected or replicated borders is a linear map along each axis. It links a position
    to none that is more than ``window_size // 2`` away, borders included.
    """
    radius = window_size // 2
    # An inference-mode tensor in the cache would break the backward pass of a later step.
    with torch.inference_mode(False), torch.no_grad():
        outputs = torch.arange(size)[:, None]
        inputs = outputs + torch.arange(window_size) - radius
        if reflect:
            inputs = inputs.abs()
            inputs = (size - 1) - (size - 1 - inputs).abs()
        inputs = inputs.clamp(0, size - 1)
        taps = gaussian_window(window_size, sigma).expand(size, -1)
        matrix = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, inputs, taps)
        return matrix.to(device=device, dtype=dtype)


def _banded_product(matrix: Tensor, x: Tensor, radius: int, dim: int) -> Tensor:
    """Apply a (size, size) matrix, zero beyond ``radius`` of its diagonal, along ``dim`` of ``x``.

    Args:
        x: (..., H, W).
        dim: -2 or -1.
    """
    size, tile = len(matrix), _TILE_GPU if x.is_cuda else _TILE_CPU

    def product(block: Tensor, part: Tensor) -> Tensor:
        return block @ part if dim == -2 else part @ block.T

    if size < 2 * tile:
        return product(matrix, x)
    parts = []
    for start in range(0, size, tile):
        low, high = max(start - radius, 0), min(start + tile + radius, size)
        block = matrix[start : start + tile, low:high]
        parts.append(product(block, x.narrow(dim, low, high - low)))
    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Blur:
    """The 2-D Gaussian blur of maps (..., H, W): ``rows`` (H, H) and ``cols`` (W, W), zero beyond
    ``radius`` of their diagonals."""

    rows: Tensor
    cols: Tensor
    radius: int

    @classmethod
    def like(cls, x: Tensor, window_size: int, sigma: float) -> Blur:
        """The blur of maps like ``x`` (..., H, W).

        Reflection needs more rows and columns than half a window; smaller levels replicate their
        border. (No padding by zeros: it would fabricate the same structure in both maps.)
        """
        height, width = x.shape[-2:]
        radius = window_size // 2
        reflect = min(height, width) > radius
        rows = blur_matrix(height, window_size, sigma, reflect, x.dtype, x.device)
        cols = blur_matrix(width, window_size, sigma, reflect, x.dtype, x.device)
        return cls(rows, cols, radius)

    def __call__(self, x: Tensor) -> Tensor:
        x = _banded_product(self.cols, x, self.radius, dim=-1)
        return _banded_product(self.rows, x, self.radius, dim=-2)

    @property
    def transposed(self) -> Blur:
        """The blur's transpose, which takes gradients back through it."""
        return Blur(self.rows.T, self.cols.T, self.radius)
