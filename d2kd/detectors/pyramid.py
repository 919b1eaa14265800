"""A pyramid of which a level is computed when it is first read.

Detectron2's FPN ends each level with a convolution that costs as much as all before it: on the
finest level 79 GFLOPs for an image of 800 x 1333 pixels. A teacher's level that no head reads stays
without. Backbones of other classes compute all levels at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from detectron2.modeling import FPN
from torch import Tensor, nn


class LazyLevels(Mapping[int, Tensor]):
    """Stride -> map, fine to coarse.

    Args:
        levels: stride -> function that computes the map, called once.
    """

    def __init__(self, levels: dict[int, Callable[[], Tensor]]):
        self._levels = levels
        self._maps: dict[int, Tensor] = {}

    def __getitem__(self, stride: int) -> Tensor:
        if stride not in self._maps:
            self._maps[stride] = self._levels[stride]()
        return self._maps[stride]

    def computed(self) -> list[int]:
        """Strides of the maps that were read so far."""
        return list(self._maps)

    def __iter__(self) -> Iterator[int]:
        return iter(self._levels)

    def __len__(self) -> int:
        return len(self._levels)


@contextlib.contextmanager
def last_convolutions_left_out(backbone: Any) -> Iterator[dict[str, nn.Module]]:
    """Within it ``backbone`` returns maps that lack their level's last convolution.

    Yields:
        name of a map -> the module that is still to be applied to it.
    """
    left_out = _last_convolutions(backbone)
    if not left_out:
        yield {}
        return
    convolutions = backbone.output_convs
    kept = set(left_out.values())
    backbone.output_convs = [nn.Identity() if conv in kept else conv for conv in convolutions]
    try:
        yield left_out
    finally:
        backbone.output_convs = convolutions


def _last_convolutions(backbone: Any) -> dict[str, nn.Module]:
    """Name of a map -> the last module of its level, where that can be left out."""
    if getattr(type(backbone), "forward", None) is not FPN.forward:
        return {}
    if not isinstance(backbone.output_convs, list):  # from coarse to fine
        return {}
    names = list(backbone.output_shape())[: len(backbone.output_convs)]
    convolutions = dict(zip(names, reversed(backbone.output_convs), strict=True))
    # Levels above the pyramid's top are made of a finished map.
    convolutions.pop(getattr(backbone.top_block, "in_feature", ""), None)
    return convolutions
