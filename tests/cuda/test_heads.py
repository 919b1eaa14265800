"""Every head on every detector on a GPU: the CPU's losses, in each precision, without a wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from d2kd.benchmark.counts import count_waits

from ..detectors import (
    ARCHS,
    DENSE,
    DENSE_HEADS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
)
from . import MAY_WAIT, NEEDS_GPU

pytestmark = NEEDS_GPU

METHODS = (
    *("SSIM", "FeatureMimic", "PKD", "CWD", "Logits", "DSIG", "DRKD", "GlobalKnowledge"),
    "MAR",
)
CASES = [
    *((method, arch) for method in METHODS for arch in ARCHS),
    *((method, arch) for method in DENSE_HEADS for arch in DENSE),
    ("MaskMimic", "mask"),
    ("MaskMimic", "cascade_mask"),
]
# How many nodes its graphs have.
MOST_WAITS = {"DSIG": 1}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """No TF32, and the same samples of proposals and anchors on both devices."""

    def in_order(count, *_, device=None, **__) -> Tensor:
        return torch.arange(count, device=device)

    monkeypatch.setattr(torch, "randperm", in_order)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False):
        yield


def distiller(method: str, arch: str, teacher_file: str, device: str) -> nn.Module:
    cfg = distiller_config(detector_config(arch), [method], teacher_file)
    cfg.MODEL.DEVICE = device
    return build(cfg)


def batch(arch: str, objects: tuple[int, ...] = (2, 3)) -> list[dict]:
    return make_batch(objects, size=(160, 160) if arch in DENSE else (64, 64))


def distillation(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("loss_kd_")}


@pytest.mark.parametrize(("method", "arch"), CASES)
def test_losses_are_the_cpus(method, arch, teacher_files):
    """In float32, to 1e-3; with objects in all images, in one and in none."""
    models = {d: distiller(method, arch, teacher_files[arch], d) for d in ("cpu", "cuda")}
    for objects in ((2, 3), (2, 0), (0, 0)):
        expected, found = (
            {n: v.item() for n, v in run_step(model, batch(arch, objects)).items()}
            for model in models.values()
        )
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), objects


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("method", "arch"), CASES)
def test_precisions(method, arch, precision, teacher_files):
    """Finite losses in float32, and finite gradients."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = distiller(method, arch, teacher_files[arch], "cuda")
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        losses = run_step(model, batch(arch))
    assert all(loss.dtype == torch.float32 for loss in distillation(losses).values())
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(("method", "arch"), CASES)
def test_no_wait(method, arch, teacher_files):
    """Both passes ask nothing of the device but what is named; the first step fills caches."""
    model = distiller(method, arch, teacher_files[arch], "cuda")

    inputs = batch(arch)

    def step() -> None:
        sum(run_step(model, inputs).values()).backward()

    step()
    waits = count_waits(step, model.student, MAY_WAIT).waits
    assert len(waits) <= MOST_WAITS.get(method, 0), waits


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_inputs_on_the_device(arch, teacher_files):
    """A loader that puts its batches on the device: the same losses."""
    model = distiller("FeatureMimic", arch, teacher_files[arch], "cuda")
    there = [
        {k: v.to("cuda") if hasattr(v, "to") else v for k, v in item.items()}
        for item in batch(arch)
    ]
    expected, found = (
        {name: loss.item() for name, loss in distillation(run_step(model, inputs)).items()}
        for inputs in (batch(arch), there)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_teacher_moves_with_the_distiller(teacher_files):
    """``.to`` takes the teacher along, though it is no submodule."""
    model = distiller("SSIM", "faster", teacher_files["faster"], "cpu").to("cuda")
    assert {p.device.type for p in model.teacher.model.parameters()} == {"cuda"}
    state = tree_map(lambda t: t.device.type, dict(model.state_dict()))
    assert set(state.values()) == {"cuda"}
