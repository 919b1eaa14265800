"""Pairing of levels by stride, and the adapters between them."""

from __future__ import annotations

import pytest
import torch

from d2kd import ConfigError, DetectorSpec, build_adapters, pair_levels


def spec(role: str, channels: dict[int, int]) -> DetectorSpec:
    return DetectorSpec(role, "RetinaNet", channels, frozenset({"pyramid"}))


STUDENT = spec("student", {4: 16, 8: 16, 16: 16})
TEACHER = spec("teacher", {8: 16, 16: 24, 32: 24})


def test_levels_pair_by_stride():
    """The common strides, whatever the order and number of levels on each side."""
    assert pair_levels(STUDENT, TEACHER) == (8, 16)
    assert pair_levels(STUDENT, TEACHER, [16]) == (16,)
    with pytest.raises(ConfigError, match=r"stride \[4\] in both pyramids; common: \[8, 16\]"):
        pair_levels(STUDENT, TEACHER, [4, 8])
    with pytest.raises(ConfigError, match="no common stride"):
        pair_levels(STUDENT, spec("teacher", {2: 8}))


def test_modes():
    """Auto adapts where the channels differ, always everywhere, never refuses a difference."""
    assert set(build_adapters(STUDENT, TEACHER, (8, 16))) == {"16"}
    assert set(build_adapters(STUDENT, TEACHER, (8, 16), mode="always")) == {"8", "16"}
    assert not build_adapters(STUDENT, TEACHER, (8,), mode="never")
    with pytest.raises(ConfigError, match="16 channels at stride 16, the teacher 24"):
        build_adapters(STUDENT, TEACHER, (8, 16), mode="never")
    with pytest.raises(ConfigError, match="valid: .*'auto'"):
        build_adapters(STUDENT, TEACHER, (8,), mode="sometimes")


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_shapes_and_identity(kernel_size):
    """The size stays, the channels become the teacher's; "identity" starts as no adapter."""
    adapters = build_adapters(STUDENT, TEACHER, (8, 16), kernel_size=kernel_size, mode="always")
    feature = torch.randn(2, 16, 5, 7)
    assert adapters(16, feature).shape == (2, 24, 5, 7)
    adapters = build_adapters(
        STUDENT, TEACHER, (8,), kernel_size=kernel_size, mode="always", init="identity"
    )
    torch.testing.assert_close(adapters(8, feature), feature)
    assert torch.equal(adapters(4, feature), feature)  # a level without an adapter passes through


def test_small_init():
    """FGFI's initialisation: truncated at two standard deviations of 1e-4, no bias."""
    conv = build_adapters(STUDENT, TEACHER, (16,), init="small")["16"]
    assert conv.weight.abs().max() <= 2e-4 and conv.weight.std() > 5e-5
    assert not conv.bias.any()
