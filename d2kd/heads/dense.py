"""What heads that compare dense outputs share: both detectors on the anchors that both have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..detectors.bundle import DenseView
from ..detectors.spec import DetectorSpec
from ..numerics import on_device

logger = logging.getLogger(__name__)


def join_levels(maps: Mapping[int, Tensor], strides: Sequence[int], width: int) -> Tensor:
    """Dense predictions of the levels ``strides`` in one tensor, as the maps lie in memory.

    Args:
        maps: stride -> (B, A x width, H, W); width is K for logits, 4 for deltas.

    Returns:
        (B, A, width, L), L being the positions of those levels.
    """
    return torch.cat([maps[s].unflatten(1, (-1, width)).flatten(3) for s in strides], dim=3)


def at_anchors(joined: Tensor, anchors: Tensor) -> Tensor:
    """Predictions at a few anchors.

    Args:
        joined: (B, A, width, L) of :func:`join_levels`.
        anchors: (B, P) long, numbers of anchors over those levels, ordered y, x, anchor.

    Returns:
        (B, P, width).
    """
    _, num_anchors, width, num_locations = joined.shape
    first = anchors % num_anchors * (width * num_locations) + anchors // num_anchors
    steps = torch.arange(0, width * num_locations, num_locations, device=anchors.device)
    places = first[..., None] + steps
    return joined.flatten(1).gather(1, places.flatten(1)).view_as(places)


def softmax_classes(student: DetectorSpec, teacher: DetectorSpec) -> tuple[int, ...]:
    """The student's classes that a softmax over one-stage logits compares: those that both know.

    There the student's own logit of another class would not cancel, as it does in a sigmoid.
    """
    if teacher.class_map is not None:
        return teacher.class_map.shared
    return tuple(range(student.num_classes or 0))


def pick_classes(logits: Sequence[Tensor], classes: Sequence[int], dim: int) -> list[Tensor]:
    """The logits of these classes, K being dimension ``dim``."""
    if len(classes) == logits[0].shape[dim]:
        return list(logits)
    index = on_device(classes, logits[0].device)
    return [x.index_select(dim, index) for x in logits]


def is_constant(student: DetectorSpec, teacher: DetectorSpec) -> bool:
    """Whether such a softmax has one class only: it is 1, whatever the detectors predict."""
    return not student.two_stage and len(softmax_classes(student, teacher)) == 1


def say_constant(term: str) -> None:
    """Log that ``term`` is absent for :func:`is_constant`."""
    words = "%s is off: a softmax over one class is constant. The head Logits compares its sigmoid"
    logger.info(words, term)


@dataclass(frozen=True)
class DensePair:
    """Two dense detectors on the anchors of the levels that both have, fine to coarse.

    Shapes: B images, A anchors per position, L positions of an image over those levels.

    Attributes:
        student, teacher: their views.
        num_classes: K.
    """

    student: DenseView
    teacher: DenseView
    num_classes: int

    @cached_property
    def strides(self) -> list[int]:
        """The levels that both have."""
        theirs = self.teacher.delta_maps
        return [stride for stride in self.student.delta_maps if stride in theirs]

    @cached_property
    def labels(self) -> Tensor:
        """(B, A, L) the student's matching: K for background, -1 to ignore."""
        maps = self.student.delta_maps
        num_anchors = next(iter(maps.values())).shape[1] // 4
        sizes = {s: m.shape[1] * m.shape[2] * m.shape[3] // 4 for s, m in maps.items()}
        parts = self.student.labels.split(list(sizes.values()), dim=1)
        by_stride = dict(zip(sizes, parts, strict=True))
        levels = [by_stride[s].unflatten(1, (-1, num_anchors)).mT for s in self.strides]
        return torch.cat(levels, dim=2)

    @cached_property
    def valid(self) -> Tensor:
        """(B, A, L) bool, anchors that are not ignored."""
        return self.labels >= 0

    @cached_property
    def foreground(self) -> Tensor:
        """(B, A, L) bool, anchors that are matched with an object."""
        return self.valid & (self.labels < self.num_classes)

    @cached_property
    def num_foreground(self) -> Tensor:
        """Scalar, their number."""
        return self.foreground.sum()

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """(B, A, K, L) of student and teacher."""
        return (
            join_levels(self.student.logit_maps, self.strides, self.num_classes),
            join_levels(self.teacher.logit_maps, self.strides, self.num_classes),
        )

    @cached_property
    def deltas(self) -> tuple[Tensor, Tensor]:
        """(B, A, 4, L) of student and teacher, each in its own units."""
        return (
            join_levels(self.student.delta_maps, self.strides, 4),
            join_levels(self.teacher.delta_maps, self.strides, 4),
        )
