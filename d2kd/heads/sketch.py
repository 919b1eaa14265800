"""What a head has to show of one image, for ``d2kd show --heads``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Sketch:
    """Pictures of what a head compares in one image.

    Attributes:
        maps: title -> stride -> (H, W), values from 0 on, to be laid over the image.
        graphs: title -> boxes (n, 4) in pixels and the weights of the edges between them (n, n).
        note: what there is not to be seen, and why.
    """

    maps: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    graphs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    note: str = ""
