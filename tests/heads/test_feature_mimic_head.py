"""The FeatureMimic head: what it sums, its options, its limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch
from d2kd.heads.feature_mimic import FeatureMimic
from d2kd.losses.mimic import mimic_loss

from ..detectors import build, detector_config, distiller_config, make_batch, run_step
from .test_ssim_head import SIZES, make_bundle, make_spec


def make_head(teacher_channels: int = 4, **opts) -> FeatureMimic:
    """The head as a config builds it."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.FEATURE_MIMIC[key] = value
    return FeatureMimic(cfg, make_spec("student"), make_spec("teacher", teacher_channels))


@pytest.mark.parametrize("distance, function", [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_sum_over_levels_of_the_mean_distance(distance, function):
    """The term is the sum over levels of PyTorch's own mean loss of raw features."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    head = make_head(DISTANCE=distance)
    (loss,) = head(student, teacher, Batch([], [])).values()
    expected = sum(function(student.pyramid[s], teacher.pyramid[s]) for s in SIZES)
    torch.testing.assert_close(loss, expected)


def test_rescaled_frame_and_chosen_levels():
    """RESCALE and STRIDES reach the loss."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    head = make_head(RESCALE="image", STRIDES=[8])
    (loss,) = head(student, teacher, Batch([], [])).values()
    expected = mimic_loss(student.pyramid[8], teacher.pyramid[8], "l2", "image")
    torch.testing.assert_close(loss, expected)


def test_adapter_where_channels_differ():
    """With other channels than the teacher's, one adapter a level, which learns."""
    student, teacher = make_bundle("student"), make_bundle("teacher", 6, seed=1)
    head = make_head(6)
    (loss,) = head(student, teacher, Batch([], [])).values()
    loss.backward()
    assert len(head.adapters) == len(SIZES)
    assert all(p.grad.abs().sum() > 0 for p in head.adapters.parameters())


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"DISTANCE": "l3"}, r"FEATURE_MIMIC.DISTANCE is 'l3'; valid: \['l1', 'l2'\]"),
        ({"RESCALE": "level"}, "valid: .'none', 'image', 'tensor', 'channel'"),
        ({"STRIDES": [64]}, "no level of stride"),
    ],
)
def test_bad_values_are_refused(opts, message):
    """One line names the key and what is valid."""
    with pytest.raises(ConfigError, match=message):
        make_head(**opts)


@pytest.mark.parametrize("arch", ["cascade", "retinanet"])
def test_trains_a_detector(arch, teacher_files):
    """In a Distiller the single term is finite and reaches backbone and adapters."""
    model = build(distiller_config(detector_config(arch), ["FeatureMimic"], teacher_files[arch]))
    loss = run_step(model, make_batch((0, 2)))["loss_kd_feature_mimic"]
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is not None for p in model.distill_heads.parameters())
