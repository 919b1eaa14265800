"""What heads that compare whole pyramids share: levels paired by stride, brought to one shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import key, one_of
from .adapters import INITS, MODES, Adapters, build_adapters, pair_levels
from .base import DistillHead, Terms


@dataclass(frozen=True)
class PyramidOptions(HeadOptions):
    """Keys of heads that compare whole pyramids."""

    strides: tuple[int, ...] = key(
        (), comment="Strides of the pyramid levels to distil; []: all that both detectors have."
    )
    adapter: str = key(
        "auto",
        one_of(MODES),
        '1x1 convolution on the student\'s levels (phi): "auto" (where channels differ, and '
        "everywhere if the detectors differ in meta-architecture or number of box stages), "
        '"always" or "never".',
    )
    adapter_init: str = key(
        "default",
        one_of(INITS),
        'Its first weights: "default" (PyTorch\'s), "identity" (starts as no adapter, where '
        'channels agree) or "small" (near zero).',
    )


def adapted_levels(
    student: FeatureBundle, teacher: FeatureBundle, strides: Sequence[int], adapters: Adapters
) -> tuple[list[Tensor], list[Tensor]]:
    """Both detectors' levels at ``strides``, all (B, C_teacher, H, W) of the teacher's size."""
    students, teachers = [], []
    for stride in strides:
        mine, theirs = student.pyramid[stride], teacher.pyramid[stride]
        students.append(adapters(stride, resized_like(mine, theirs)))
        teachers.append(theirs)
    return students, teachers


def resized_like(mine: Tensor, theirs: Tensor) -> Tensor:
    """The student's map, of the size of the teacher's: they differ only where backbones round
    differently."""
    height, width = theirs.shape[-2:]
    if mine.shape[-2:] == (height, width):
        return mine
    return F.interpolate(mine, (height, width), mode="bilinear", align_corners=False)


class PyramidHead(DistillHead):
    """A head of one term that compares whole levels; a subclass defines :meth:`compare`.

    "auto" of ``ADAPTER`` puts an adapter where channels differ, and on every level where the
    detectors are of different kinds: another meta-architecture, or another number of box stages.

    Args:
        options: the head's ``Options``.
        student_spec, teacher_spec: of the pair.

    Attributes:
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
    """

    Options: type[PyramidOptions] = PyramidOptions
    reads = ("pyramid",)

    @configurable
    def __init__(self, *, options: Any, student_spec: DetectorSpec, teacher_spec: DetectorSpec):
        super().__init__()
        pair = student_spec, teacher_spec
        self.options = options
        self.strides = pair_levels(*pair, options.strides)
        kinds = {(spec.meta_arch, spec.num_stages) for spec in pair}
        mode = "always" if options.adapter == "auto" and len(kinds) > 1 else options.adapter
        self.adapters = build_adapters(*pair, self.strides, mode=mode, init=options.adapter_init)

    def forward(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Terms:
        levels = adapted_levels(student, teacher, self.strides, self.adapters)
        return {"": self.compare(*levels, batch)}

    @abstractmethod
    def compare(self, students: list[Tensor], teachers: list[Tensor], batch: Batch) -> Tensor:
        """The loss, a scalar, of levels (B, C_teacher, H, W), fine to coarse."""
