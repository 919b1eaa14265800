"""Every method on every meta-architecture, in the situations that break distillation code."""

from __future__ import annotations

import pytest
import torch

from d2kd import DISTILL_HEAD_REGISTRY, ConfigError
from d2kd.detectors.spec import describe_detector

from .detectors import (
    ARCHS,
    DENSE,
    DENSE_HEADS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)

BUILT_IN = [name for name, head in DISTILL_HEAD_REGISTRY if head.__module__.startswith("d2kd.")]
# What not every pair can serve: one-stage detectors, masks, the same outputs in both detectors.
METHODS = tuple(name for name in BUILT_IN if name not in ("MaskMimic", *DENSE_HEADS))
FEATURES = tuple(method for method in METHODS if method != "Logits")
DENSE_FEATURES = (*FEATURES, *DENSE_HEADS)
# (student, teacher) of different build, and what each pair can serve.
MIXED = [
    ("retinanet", "faster", FEATURES),
    ("retinanet", "cascade", FEATURES),
    ("faster", "retinanet", FEATURES),
    ("cascade", "retinanet", FEATURES),
    ("fcos", "retinanet", DENSE_FEATURES),
    ("fcos", "faster", FEATURES),
    ("retinanet", "fcos", DENSE_FEATURES),
    ("faster", "fcos", FEATURES),
    ("faster", "cascade", METHODS),
    ("cascade", "faster", METHODS),
    ("faster", "mask", METHODS),
    ("mask", "cascade", tuple(method for method in FEATURES if method != "DSIG")),
    ("faster", "cascade_mask", METHODS),
    ("mask", "cascade_mask", (*METHODS, "MaskMimic")),
]
# What makes do without outputs that a teacher of another kind, or with other anchors, lacks.
DSIG_GRAPH = ("DISTILL.DSIG.CLASS_WEIGHT", 0.0, "DISTILL.DSIG.BOX_WEIGHT", 0.0)
DSIG_UNMINED = (*DSIG_GRAPH, "DISTILL.DSIG.MINE_BACKGROUND", False)
GLOBAL_HARD = ("DISTILL.GLOBAL_KNOWLEDGE.SOFT_LABELS.WEIGHT", 0.0)
MAR_MASKED = ("DISTILL.MAR.RELATION.WEIGHT", 0.0)
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
    """Finite losses that leave the student's own alone; gradients on the student, none on the
    teacher."""
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


def methods_for(arch: str) -> tuple[str, ...]:
    """The heads that a pair of two detectors of one kind can serve."""
    also = {"mask": ("MaskMimic",), **dict.fromkeys(DENSE, DENSE_HEADS)}
    return (*METHODS, *also.get(arch, ()))


def test_every_head_is_in_the_matrix():
    """A new head is in ``METHODS``, or for the detectors that it is made for."""
    assert {method for arch in ARCHS for method in methods_for(arch)} == set(BUILT_IN)


@pytest.mark.parametrize(
    ("method", "arch"), [(method, arch) for arch in ARCHS for method in methods_for(arch)]
)
def test_situations(method, arch, teacher_files, plain_losses):
    """Normal, without objects in an image or the batch, in bf16; then saved and resumed."""
    for objects in BATCHES.values():
        model = distiller(arch, teacher_files[arch], method)
        losses = run_step(model, make_batch(objects))
        check_step(model, losses, plain_losses(arch, objects))
        if all(objects):
            parameters = [p for p in model.distill_heads.parameters() if p.requires_grad]
            assert all(p.grad is not None for p in parameters)
    model = distiller(arch, teacher_files[arch], method)
    # PyTorch's bf16 weight gradient of a strided convolution on a 1x1 map, P7 of a smaller image,
    # holds uninitialised memory on the CPU.
    batch = make_batch(size=(160, 160) if arch in DENSE else (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = run_step(model, batch)
    assert all(loss.dtype == torch.float32 for loss in distillation(losses).values())
    check_step(model, losses, None)

    resumed = distiller(arch, teacher_files[arch], method)
    resumed.load_state_dict(model.state_dict())
    if arch in DENSE:  # a float outside the state dict, which the trainer keeps
        resumed.student.loss_normalizer = model.student.loss_normalizer
    expected, found = (run_step(m, make_batch(seed=5), 1) for m in (model, resumed))
    assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}


@pytest.mark.parametrize(
    ("student", "teacher", "method"),
    [(s, t, m) for s, t, methods in MIXED for m in methods],
)
def test_mixed_pairs(student, teacher, method, teacher_files, plain_losses):
    """Teacher and student of different build, as far as the method can serve them."""
    opts, same_kind = (), (student in DENSE) == (teacher in DENSE)
    if not same_kind or student in DENSE:
        opts = {"DSIG": DSIG_GRAPH, "GlobalKnowledge": GLOBAL_HARD}.get(method, ())
    if not same_kind:
        opts = {"DSIG": DSIG_UNMINED, "MAR": MAR_MASKED}.get(method, opts)
    model = distiller(student, teacher_files[teacher], method, opts=opts)
    check_step(model, run_step(model, make_batch()), plain_losses(student, BATCHES["normal"]))


@pytest.mark.parametrize(
    ("student", "teacher", "method", "remedy"),
    [
        ("fcos", "retinanet", "DSIG", "DISTILL.DSIG.CLASS_WEIGHT 0"),
        ("fcos", "retinanet", "GlobalKnowledge", GLOBAL_HARD[0]),
        ("fcos", "retinanet", "Logits", "SSIM, FeatureMimic, DRKD"),
        ("fcos", "faster", "DSIG", "DISTILL.DSIG.CLASS_WEIGHT 0"),
        ("fcos", "faster", "GlobalKnowledge", GLOBAL_HARD[0]),
        ("fcos", "faster", "Logits", "SSIM, FeatureMimic, DRKD"),
        ("fcos", "faster", "MAR", "DISTILL.MAR.RELATION.WEIGHT 0"),
        ("faster", "fcos", "DSIG", "DISTILL.DSIG.CLASS_WEIGHT 0"),
        ("faster", "fcos", "GlobalKnowledge", GLOBAL_HARD[0]),
        ("faster", "fcos", "Logits", "SSIM, FeatureMimic, DRKD"),
        ("faster", "fcos", "MAR", "DISTILL.MAR.RELATION.WEIGHT 0"),
        ("faster", "fcos", "CrossKD", "SSIM, FeatureMimic, DRKD"),
        ("fcos", "faster", "CrossKD", "SSIM, FeatureMimic, DRKD"),
        ("mask", "cascade", "CrossKD", "SSIM, FeatureMimic, DRKD"),
    ],
)
def test_refused_pairs(student, teacher, method, remedy, teacher_files):
    """What a pair cannot serve is refused when it is built: the message names the head, the
    detectors, and what works. All other methods build as they are (the test above)."""
    with pytest.raises(ConfigError) as refused:
        distiller(student, teacher_files[teacher], method)
    message = str(refused.value)
    assert method in message or f"DISTILL.{method.upper()}" in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("method", ("SSIM", "FeatureMimic", "DRKD", "PKD", "CWD"))
def test_other_models(method, teacher_files, tmp_path):
    """The pyramid of a student with no outputs that d2kd knows; a teacher must take images."""
    cfg = detector_config("faster")
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    model = build(distiller_config(cfg, [method], teacher_files["faster"]))
    check_step(model, run_step(model, make_batch()), None)
    with pytest.raises(ConfigError, match="the teacher, a ProposalNetwork, .* preprocess_image"):
        distiller("faster", write_config(cfg, tmp_path / "teacher.yaml"), method)


def test_models_without_a_backbone_are_refused():
    """There is nothing to read of a model that is not built as Detectron2's are."""
    with pytest.raises(ConfigError, match="the teacher, a Linear, has no Detectron2 backbone"):
        describe_detector(torch.nn.Linear(1, 1), "teacher")


@pytest.mark.parametrize(
    ("arch", "missing"),
    [
        ("retinanet", "anchor_generator"),
        ("retinanet", "box2box_transform"),
        ("retinanet", "num_classes"),
        ("faster", "roi_heads.box_predictor.cls_score"),
    ],
)
def test_what_only_resembles_a_detector_has_a_pyramid(arch, missing):
    """A user's detector that lacks what d2kd reads of Detectron2's."""
    model = build(detector_config(arch))
    holder, _, name = missing.rpartition(".")
    delattr(model.get_submodule(holder), name)
    parts = {field.split(".")[0] for field in describe_detector(model, "student").fields}
    assert parts <= {"pyramid", "rpn"}


@pytest.mark.parametrize(
    ("methods", "arch"),
    [(methods_for(arch)[start::3], arch) for arch in ARCHS for start in range(3)],
    ids=str,
)
def test_heads_add_up(methods, arch, teacher_files):
    """Methods together give each method's own losses, with the same parameters."""
    together = distiller(arch, teacher_files[arch], *methods)
    found = distillation(run_step(together, make_batch()))
    for method in methods:
        single = distiller(arch, teacher_files[arch], method)
        state = together.distill_heads[method].state_dict()
        single.distill_heads[method].load_state_dict(state)
        for name, loss in distillation(run_step(single, make_batch())).items():
            assert found.pop(name).item() == loss.item(), name
    assert not found
