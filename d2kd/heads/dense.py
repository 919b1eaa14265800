"""What heads that compare dense outputs share: both detectors on the anchors that both have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.bundle import DenseView
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError


@dataclass(frozen=True)
class DensePair:
    """Two dense detectors on the anchors of the levels that both have, fine to coarse.

    Shapes: B images, N anchors of an image over those levels.
    """

    student: DenseView
    teacher: DenseView

    @property
    def strides(self) -> list[int]:
        """The levels that both have."""
        return [stride for stride in self.student.anchors if stride in self.teacher.anchors]

    @property
    def labels(self) -> Tensor:
        """(B, N) the student's matching: K for background, -1 to ignore."""
        anchors = self.student.anchors
        levels = self.student.labels.split([len(level) for level in anchors.values()], dim=1)
        return self._join(dict(zip(anchors, levels, strict=True)))

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """(B, N, K) of student and teacher."""
        return self._join(self.student.logits), self._join(self.teacher.logits)

    @property
    def deltas(self) -> tuple[Tensor, Tensor]:
        """(B, N, 4) of student and teacher, each in its own units."""
        return self._join(self.student.deltas), self._join(self.teacher.deltas)

    @property
    def delta_weights(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Those units."""
        return self.student.delta_weights, self.teacher.delta_weights

    def _join(self, levels: dict[int, Tensor]) -> Tensor:
        return torch.cat([levels[stride] for stride in self.strides], dim=1)


def check_anchors(student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Refuse two dense detectors whose outputs belong to different boxes.

    Raises:
        ConfigError: names the first level where the anchors differ.
    """
    mine, theirs = student.anchors or {}, teacher.anchors or {}
    for stride in mine:
        if mine[stride] != theirs.get(stride, mine[stride]):
            raise ConfigError(
                f"student and teacher have different anchors at stride {stride}; "
                "MODEL.ANCHOR_GENERATOR must be the same in both configs"
            )
