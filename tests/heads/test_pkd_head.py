"""The PKD head: what it sums, its options, its limits."""

from __future__ import annotations

import pytest
import torch

from d2kd import ConfigError
from d2kd.config import head_schedule
from d2kd.detectors.bundle import Batch
from d2kd.heads.pkd import PKD
from d2kd.losses.pkd import pkd_loss

from ..detectors import build, detector_config, distiller_config, make_batch, run_step
from .test_ssim_head import SIZES, make_bundle, make_spec


def make_head(teacher_channels: int = 4, **opts) -> PKD:
    """The head as a config builds it."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.PKD[key] = value
    return PKD(cfg, make_spec("student"), make_spec("teacher", teacher_channels))


@pytest.mark.parametrize("strides", [[], [4, 16]])
def test_sum_over_levels(strides):
    """The term is the sum over the chosen levels of the loss of raw features."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    (loss,) = make_head(STRIDES=strides)(student, teacher, Batch([], [])).values()
    expected = sum(pkd_loss(student.pyramid[s], teacher.pyramid[s]) for s in strides or SIZES)
    torch.testing.assert_close(loss, expected)


def test_adapter_where_channels_differ():
    """With other channels than the teacher's, one adapter a level, which learns: its weights, not
    its bias, which correlation does not see."""
    student, teacher = make_bundle("student"), make_bundle("teacher", 6, seed=1)
    head = make_head(6)
    (loss,) = head(student, teacher, Batch([], [])).values()
    loss.backward()
    assert len(head.adapters) == len(SIZES)
    assert all(a.weight.grad.abs().sum() > 0 for a in head.adapters.values())
    assert all(a.bias.grad.abs().sum() < 1e-6 for a in head.adapters.values())
    assert all(level.grad.abs().sum() > 0 for level in student.pyramid.values())


def test_the_weight_is_the_authors():
    """The default is that of their configs."""
    assert head_schedule(detector_config(), "PKD")(0) == 6


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"WEIGHT": -1.0}, "PKD.WEIGHT is -1.0; it must be 0 or positive"),
        ({"STRIDES": [64]}, "no level of stride"),
    ],
)
def test_bad_values_are_refused(opts, message):
    """One line names the key and what is valid."""
    with pytest.raises(ConfigError, match=message):
        make_head(**opts)


@pytest.mark.parametrize("student, teacher", [("cascade", "faster"), ("retinanet", "fcos")])
def test_trains_a_detector(student, teacher, teacher_files):
    """In a Distiller the single term is finite and reaches backbone and adapters."""
    model = build(distiller_config(detector_config(student), ["PKD"], teacher_files[teacher]))
    loss = run_step(model, make_batch((0, 2)))["loss_kd_pkd"]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is not None for p in model.distill_heads.parameters())
