"""What heads that compare whole pyramids share: levels paired by stride, brought to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..config import HeadOptions
from ..detectors.bundle import FeatureBundle
from ..detectors.spec import DetectorSpec
from ..keys import key, one_of
from .adapters import INITS, MODES, Adapters, build_adapters, pair_levels


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


def build_pyramid_adapters(
    options: PyramidOptions, student: DetectorSpec, teacher: DetectorSpec
) -> tuple[tuple[int, ...], Adapters]:
    """Strides and 1x1 adapters that ``STRIDES``, ``ADAPTER`` and ``ADAPTER_INIT`` ask for.

    "auto" puts an adapter where channels differ, and on every level where the detectors are of
    different kinds: another meta-architecture, or another number of box-head stages.

    Raises:
        ConfigError: a stride that is not in both pyramids, or an unknown or impossible mode.
    """
    strides = pair_levels(student, teacher, options.strides)
    kinds = [(spec.meta_arch, spec.num_stages) for spec in (student, teacher)]
    mode = "always" if options.adapter == "auto" and kinds[0] != kinds[1] else options.adapter
    return strides, build_adapters(student, teacher, strides, mode=mode, init=options.adapter_init)


def adapted_levels(
    student: FeatureBundle, teacher: FeatureBundle, strides: Sequence[int], adapters: Adapters
) -> tuple[list[Tensor], list[Tensor]]:
    """Both detectors' levels at ``strides``, the student's with the shape of the teacher's.

    Sizes differ only where backbones round differently; then the student's map is resized.

    Returns:
        Two lists of (B, C_teacher, H, W).
    """
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
