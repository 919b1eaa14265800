"""The SSIM head: levels, adapters, options from the config, the contrast that it logs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch, FeatureBundle
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.ssim import SSIM
from d2kd.losses.ssim import min_max_rescale, patch_statistics, ssim_loss

from ..detectors import build, detector_config, distiller_config, make_batch, run_step

SIZES = {4: (16, 20), 8: (8, 10), 16: (4, 5)}


def make_spec(role: str, channels: int = 4, **kwargs) -> DetectorSpec:
    return DetectorSpec(
        role,
        kwargs.pop("meta_arch", "RetinaNet"),
        {stride: channels for stride in SIZES},
        frozenset({"pyramid"}),
        **kwargs,
    )


def make_bundle(role: str, channels: int = 4, seed: int = 0, sizes=SIZES) -> FeatureBundle:
    """A bundle with a random pyramid; the student's requires gradients."""
    generator = torch.Generator().manual_seed(seed)
    pyramid = {
        stride: torch.randn(2, channels, *size, generator=generator).requires_grad_(
            role == "student"
        )
        for stride, size in sizes.items()
    }
    return FeatureBundle(make_spec(role, channels), pyramid=pyramid)


def make_head(student: DetectorSpec | None = None, teacher=None, **opts) -> SSIM:
    """The head as a config builds it."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.SSIM[key] = value
    return SSIM(cfg, student or make_spec("student"), teacher or make_spec("teacher"))


def run_head(head: SSIM, student: FeatureBundle, teacher: FeatureBundle, iteration=1) -> Tensor:
    (loss,) = head(student, teacher, Batch([], [], iteration=iteration)).values()
    return loss


def test_loss_is_the_sum_over_levels():
    """Without adapters, the term is the sum over all levels of the loss of raw features."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    expected = sum(ssim_loss(student.pyramid[s], teacher.pyramid[s]) for s in SIZES)
    torch.testing.assert_close(run_head(make_head(), student, teacher), expected)


def test_chosen_levels():
    """STRIDES leaves the other levels alone."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    loss = run_head(make_head(STRIDES=[8]), student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, ssim_loss(student.pyramid[8], teacher.pyramid[8]))
    assert student.pyramid[4].grad is None and student.pyramid[8].grad is not None


def test_options_reach_the_loss():
    """Each key changes what is computed, as the loss's own argument does."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    for key, value, options in (
        ("RESCALE", "channel", {"rescale": "channel"}),
        ("RESCALE", "tensor", {"rescale": "tensor"}),
        ("EXPONENTS", [0, 0, 1], {"exponents": (0, 0, 1)}),
        ("WINDOW_SIZE", 7, {"window_size": 7}),
        ("SIGMA", 3.0, {"sigma": 3.0}),
        ("K1", 0.1, {"k1": 0.1}),
        ("K2", 0.1, {"k2": 0.1}),
    ):
        loss = run_head(make_head(STRIDES=[4], **{key: value}), student, teacher)
        torch.testing.assert_close(
            loss, ssim_loss(student.pyramid[4], teacher.pyramid[4], **options)
        )
        assert loss != ssim_loss(student.pyramid[4], teacher.pyramid[4])

    loss = run_head(make_head(STRIDES=[4], DETACH_RANGE=True), student, teacher)
    loss.backward()
    assert student.pyramid[4].grad[0].sum().abs() > 1e-5


def test_adapters_are_for_pairs_that_need_them():
    """Adapters where channels differ, and everywhere where the detectors are of other kinds."""
    cascade = make_spec("teacher", meta_arch="GeneralizedRCNN", num_stages=3)
    faster = make_spec("student", meta_arch="GeneralizedRCNN", num_stages=1)
    assert len(make_head().adapters) == 0
    assert len(make_head(teacher=make_spec("teacher", 6)).adapters) == 3
    assert len(make_head(faster, cascade).adapters) == 3
    assert len(make_head(faster, cascade, ADAPTER="never").adapters) == 0
    assert len(make_head(ADAPTER="always", STRIDES=[4, 8]).adapters) == 2


def test_adapter_and_student_get_gradients():
    """The adapter and the student learn; the teacher's features do not."""
    student, teacher = make_bundle("student"), make_bundle("teacher", 6, seed=1)
    head = make_head(teacher=make_spec("teacher", 6))
    run_head(head, student, teacher).backward()
    for stride in SIZES:
        assert student.pyramid[stride].grad.abs().sum() > 0
        assert teacher.pyramid[stride].grad is None
    assert all(p.grad is not None for p in head.adapters.parameters())


def test_identity_adapter_starts_at_the_loss_without_adapter():
    """ADAPTER_INIT identity, with equal channels, starts as if there were no adapter."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    with_adapter = run_head(make_head(ADAPTER="always", ADAPTER_INIT="identity"), student, teacher)
    torch.testing.assert_close(with_adapter, run_head(make_head(), student, teacher))


def test_student_is_resized_to_the_teacher():
    """Where sizes differ, the student's map is resized, before its adapter."""
    sizes = {stride: (h + 1, w) for stride, (h, w) in SIZES.items()}
    student, teacher = make_bundle("student"), make_bundle("teacher", 6, seed=1, sizes=sizes)
    head = make_head(teacher=make_spec("teacher", 6))
    expected = 0.0
    for stride in SIZES:
        resized = F.interpolate(student.pyramid[stride], sizes[stride], mode="bilinear")
        expected = expected + ssim_loss(head.adapters(stride, resized), teacher.pyramid[stride])
    torch.testing.assert_close(run_head(head, student, teacher), expected)


def test_teacher_contrast_is_logged_now_and_then():
    """Every STATS_PERIOD iterations the median local deviation of psi(T) is noted, by level."""
    student, teacher = make_bundle("student"), make_bundle("teacher", seed=1)
    head = make_head(STATS_PERIOD=10, STRIDES=[4, 8])
    with EventStorage(0) as storage:
        run_head(head, student, teacher, iteration=20)
        assert not storage.latest()
        run_head(head, student, teacher, iteration=19)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert sorted(logged) == ["ssim/teacher_std_4", "ssim/teacher_std_8"]
    rescaled = min_max_rescale(teacher.pyramid[8])
    expected = patch_statistics(rescaled, rescaled)[2].median().sqrt()
    assert logged["ssim/teacher_std_8"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"RESCALE": "level"}, "SSIM.RESCALE is 'level'"),
        ({"EXPONENTS": [0, 0, 0]}, "not all 0"),
        ({"EXPONENTS": [1, 1]}, "three of 0 or 1"),
        ({"EXPONENTS": [1, 2, 1]}, "three of 0 or 1"),
        ({"WINDOW_SIZE": 10}, "odd and positive"),
        ({"SIGMA": 0.0}, "SIGMA is 0.0; it must be positive"),
        ({"K2": 0.0}, "K2 is 0.0; it must be positive"),
        ({"STRIDES": [2]}, r"no level of stride \[2\]"),
        ({"ADAPTER": "sometimes"}, "ADAPTER is 'sometimes'; valid"),
    ],
)
def test_bad_values_are_refused_in_one_line(opts, message):
    """A value that the loss is not defined for is refused when the head is built."""
    with pytest.raises(ConfigError, match=message) as error:
        make_head(**opts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
@pytest.mark.parametrize("objects", [(2, 3), (0, 0)], ids=["objects", "no objects"])
def test_trains_a_detector(arch, objects, teacher_files):
    """In a Distiller the single term is finite, reaches the backbone, and needs no objects."""
    student = detector_config(arch)
    model = build(distiller_config(student, ["SSIM"], teacher_files[arch]))
    losses = run_step(model, make_batch(objects))
    loss = losses["loss_kd_ssim"]
    loss.backward()
    levels = len(model.distill_heads["SSIM"].strides)
    assert 0 < loss < 4 * levels
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is not None for p in model.distill_heads.parameters())
