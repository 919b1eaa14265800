"""Pairing of pyramid levels by stride, and the convolutions that bring the student's channels to
the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..detectors.spec import DetectorSpec
from ..errors import ConfigError

MODES = ("auto", "always", "never")
INITS = ("default", "identity", "small")


def pair_levels(
    student: DetectorSpec, teacher: DetectorSpec, strides: Sequence[int] = ()
) -> tuple[int, ...]:
    """Strides at which both pyramids have a level, fine to coarse.

    Args:
        strides: the levels that are wanted; () for all that both have.

    Raises:
        ConfigError: a wanted level is missing on one side, or there is no common level.
    """
    common = tuple(s for s in student.strides if s in teacher.channels)
    if not common:
        raise ConfigError(
            f"the pyramids have no common stride: student {list(student.strides)}, "
            f"teacher {list(teacher.strides)}"
        )
    missing = [s for s in strides if s not in common]
    if missing:
        raise ConfigError(f"no level of stride {missing} in both pyramids; common: {list(common)}")
    return tuple(s for s in common if s in strides) if strides else common


class Adapters(nn.ModuleDict):
    """One convolution per level on the student's side; ``adapters(stride, feature)`` applies it.

    Levels that need none pass through unchanged.
    """

    def forward(self, stride: int, feature: Tensor) -> Tensor:
        """(B, C_student, H, W) -> (B, C_teacher, H, W) at ``stride``."""
        key = str(stride)
        return self[key](feature) if key in self else feature


def build_adapters(
    student: DetectorSpec,
    teacher: DetectorSpec,
    strides: Sequence[int],
    *,
    kernel_size: int = 1,
    mode: str = "auto",
    init: str = "default",
) -> Adapters:
    """Adapters student -> teacher for the levels ``strides``.

    Args:
        kernel_size: 1 or 3 (zero padding keeps the size).
        mode: "always"; "auto": only where the channel counts differ; "never".
        init: "default" (PyTorch's); "identity" (starts as no adapter at all; needs equal channels,
            else "default"); "small" (truncated normal of std 1e-4, bias 0, as FGFI and DeFeat do).

    Raises:
        ConfigError: unknown ``mode`` or ``init``, or "never" with channel counts that differ.
    """
    for name, value, valid in (("adapter", mode, MODES), ("adapter init", init, INITS)):
        if value not in valid:
            raise ConfigError(f"{name} is '{value}'; valid: {list(valid)}")
    adapters = Adapters()
    for stride in strides:
        c_in, c_out = student.channels[stride], teacher.channels[stride]
        if mode == "never" and c_in != c_out:
            raise ConfigError(
                f"the student has {c_in} channels at stride {stride}, the teacher {c_out}: "
                "an adapter is needed ('auto' or 'always')"
            )
        if mode == "always" or (mode == "auto" and c_in != c_out):
            adapters[str(stride)] = _build_adapter(c_in, c_out, kernel_size, init)
    return adapters


def build_roi_adapter(student: DetectorSpec, teacher: DetectorSpec, stride: int) -> nn.Module:
    """1x1 convolution on pooled features, student -> teacher; the identity for equal channels.

    The levels that RoIs are pooled from, ``stride`` being any of them, share one, as they share one
    box or mask head.
    """
    adapters = build_adapters(student, teacher, (stride,))
    return adapters[str(stride)] if len(adapters) else nn.Identity()


def build_tower_adapter(
    student: DetectorSpec, teacher: DetectorSpec, convolutions: int
) -> nn.Module:
    """1x1 convolution on the map that the last ``convolutions`` of a dense detector's tower read,
    student -> teacher; the identity for equal channels. All levels share it, as they share a tower.
    """
    c_in, c_out = (spec.tower_channels[-1 - convolutions] for spec in (student, teacher))
    return nn.Identity() if c_in == c_out else _build_adapter(c_in, c_out, 1, "default")


def _build_adapter(c_in: int, c_out: int, kernel_size: int, init: str) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2)
    assert conv.bias is not None
    if init == "identity" and c_in == c_out:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    elif init == "small":
        nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)
        nn.init.zeros_(conv.bias)
    return conv
