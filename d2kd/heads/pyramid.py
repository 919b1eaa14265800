"""What heads that compare whole pyramids share: levels paired by stride, brought to one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..adapters import INITS, MODES, Adapters, build_adapters, pair_levels
from ..bundle import DetectorSpec, FeatureBundle
from ..config import one_of

# What the values of their common keys must be.
PYRAMID_RULES = {"ADAPTER": one_of(MODES), "ADAPTER_INIT": one_of(INITS)}


def build_pyramid_adapters(
    node, student: DetectorSpec, teacher: DetectorSpec
) -> tuple[tuple[int, ...], Adapters]:
    """Strides and 1x1 adapters that a head's ``STRIDES``, ``ADAPTER``, ``ADAPTER_INIT`` ask for.

    "auto" puts an adapter where channels differ, and on every level where the detectors are of
    different kinds: another meta-architecture, or another number of box-head stages.

    Raises:
        ConfigError: a stride that is not in both pyramids, or an unknown or impossible mode.
    """
    strides = pair_levels(student, teacher, node.STRIDES)
    kinds = [(spec.meta_arch, spec.num_stages) for spec in (student, teacher)]
    mode = "always" if node.ADAPTER == "auto" and kinds[0] != kinds[1] else node.ADAPTER
    return strides, build_adapters(student, teacher, strides, mode=mode, init=node.ADAPTER_INIT)


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
        if mine.shape[-2:] != theirs.shape[-2:]:
            mine = F.interpolate(mine, theirs.shape[-2:], mode="bilinear", align_corners=False)
        students.append(adapters(stride, mine))
        teachers.append(theirs)
    return students, teachers
