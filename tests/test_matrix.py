"""Every method on every meta-architecture, in the situations that break distillation code."""

from __future__ import annotations

import pytest
import torch

from .detectors import ARCHS, build, detector_config, distiller_config, make_batch, run_step

METHODS = ("SSIM", "FeatureMimic", "Logits", "DSIG", "DRKD", "GlobalKnowledge", "MAR")
# (student, teacher) of different build, and what each pair can serve.
MIXED = [
    ("retinanet", "faster", ("SSIM", "FeatureMimic", "DSIG", "DRKD")),
    ("retinanet", "cascade", ("SSIM", "FeatureMimic", "DSIG", "DRKD")),
    ("faster", "retinanet", ("SSIM", "FeatureMimic", "DRKD")),
    ("faster", "cascade", METHODS),
    ("cascade", "faster", METHODS),
    ("faster", "mask", METHODS),
    ("mask", "cascade", ("SSIM", "FeatureMimic", "DRKD", "GlobalKnowledge", "MAR")),
]
BATCHES = {"normal": (2, 3), "an image without objects": (2, 0), "a batch without objects": (0, 0)}


@pytest.fixture(scope="module")
def plain_losses():
    """(arch, batch) -> the losses of plain Detectron2."""
    cache = {}

    def losses(arch: str, objects: tuple[int, ...]) -> dict[str, float]:
        if (arch, objects) not in cache:
            found = run_step(build(detector_config(arch)), make_batch(objects))
            cache[arch, objects] = {name: loss.item() for name, loss in found.items()}
        return cache[arch, objects]

    return losses


def distiller(student: str, teacher_file: str, *heads: str, opts: tuple = ()):
    """A distiller in the middle of its schedule, when every head runs."""
    cfg = distiller_config(detector_config(student), list(heads), teacher_file, opts)
    for head in cfg.DISTILL.values():
        if hasattr(head, "SCHEDULE"):
            head.SCHEDULE.START_ITER, head.SCHEDULE.WARMUP_ITERS = 0, 0
    return build(cfg)


def distillation(losses: dict) -> dict:
    return {name: loss for name, loss in losses.items() if name.startswith("loss_kd_")}


def check_step(model, losses: dict, expected: dict[str, float] | None) -> None:
    """Finite losses that leave the student's own alone; gradients on the student and every
    parameter of the head, none on the teacher."""
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert distillation(losses)
    if expected is not None:
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-5), name
    model.zero_grad()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", METHODS)
def test_situations(method, arch, teacher_files, plain_losses):
    """Normal, without objects in an image or the batch, in bf16; then saved and resumed."""
    for objects in BATCHES.values():
        model = distiller(arch, teacher_files[arch], method)
        losses = run_step(model, make_batch(objects))
        check_step(model, losses, plain_losses(arch, objects))
    model = distiller(arch, teacher_files[arch], method)
    # PyTorch's bf16 weight gradient of a strided convolution on a 1x1 map, P7 of a smaller image,
    # holds uninitialised memory on the CPU.
    batch = make_batch(size=(160, 160) if arch == "retinanet" else (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = run_step(model, batch)
    assert all(loss.dtype == torch.float32 for loss in distillation(losses).values())
    check_step(model, losses, None)

    resumed = distiller(arch, teacher_files[arch], method)
    resumed.load_state_dict(model.state_dict())
    if arch == "retinanet":  # a float outside the state dict, which the trainer keeps
        resumed.student.loss_normalizer = model.student.loss_normalizer
    expected, found = (run_step(m, make_batch(seed=5), 1) for m in (model, resumed))
    assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}


@pytest.mark.parametrize(
    ("student", "teacher", "method"),
    [(s, t, m) for s, t, methods in MIXED for m in methods],
)
def test_mixed_pairs(student, teacher, method, teacher_files, plain_losses):
    """Teacher and student of different build, as far as the method can serve them."""
    opts = ()
    if (method, student) == ("DSIG", "retinanet"):  # a two-stage teacher has no dense outputs
        opts = ("DISTILL.DSIG.CLASS_WEIGHT", 0.0, "DISTILL.DSIG.BOX_WEIGHT", 0.0)
    model = distiller(student, teacher_files[teacher], method, opts=opts)
    check_step(model, run_step(model, make_batch()), plain_losses(student, BATCHES["normal"]))


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_add_up(arch, teacher_files):
    """Methods together give each method's own losses, with the same parameters."""
    methods = ("SSIM", "Logits", "DSIG")
    together = distiller(arch, teacher_files[arch], *methods)
    found = distillation(run_step(together, make_batch()))
    for method in methods:
        single = distiller(arch, teacher_files[arch], method)
        state = together.distill_heads[method].state_dict()
        single.distill_heads[method].load_state_dict(state)
        for name, loss in distillation(run_step(single, make_batch())).items():
            assert found.pop(name).item() == loss.item(), name
    assert not found
