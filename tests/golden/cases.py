"""Which losses are golden, and how one is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor

import d2kd

from ..detectors import ARCHS, DENSE, DENSE_HEADS, distiller_config, write_config
from .detectors import NUM_CLASSES, fill, generator, golden_batch, golden_config

HEADS_PREFIX = "distill_heads."
# The step of all cases: not the first, so that a schedule shows, of MAX_ITER.
ITERATION, MAX_ITER = 3, 10
PROTOTYPES = "the file of prototypes"  # in options: replaced by its path


class Case(NamedTuple):
    """One distillation step.

    ``opts`` are KEY VALUE pairs below the head's node. ``width`` is that of the teacher's pyramid;
    the student's is 16. With ``own_start`` the head keeps the parameters that it starts with.
    """

    student: str
    teacher: str
    head: str
    variant: str = "default"
    opts: tuple = ()
    width: int = 24
    own_start: bool = False

    @property
    def name(self) -> str:
        return f"{self.student} from {self.teacher}/{self.head}/{self.variant}"

    @property
    def has_noise(self) -> bool:
        """Whether a little noise of PyTorch's takes part: its gradient is not golden, and the loss
        holds to 1e-3 only."""
        return self.own_start and "small" in self.variant


# Pairs of different build, with default keys: what they cannot serve, they refuse.
MIXED = (
    ("faster", "retinanet"),
    ("retinanet", "faster"),
    ("retinanet", "fcos"),
    ("fcos", "retinanet"),
    ("cascade", "faster"),
    ("mask", "cascade"),
    ("faster", "cascade_mask"),
    ("mask", "cascade_mask"),
)
_NO_TERMS_BUT_LOCAL = ("GLOBAL.WEIGHT", 0.0, "RELIABILITY", False, "SOFT_LABELS.WEIGHT", 0.0)
# head -> variant -> (students, options)
VARIANTS: dict[str, dict[str, tuple[str, tuple]]] = {
    "SSIM": {
        "tensor": ("faster retinanet", ("RESCALE", "tensor")),
        "channel": ("faster retinanet", ("RESCALE", "channel")),
        "detached": ("faster", ("DETACH_RANGE", True)),
        "no luminance": ("faster", ("EXPONENTS", [0, 1, 1])),
        "no contrast": ("faster", ("EXPONENTS", [1, 0, 1])),
        "luminance": ("faster", ("EXPONENTS", [1, 0, 0])),
        "structure": ("faster", ("EXPONENTS", [0, 0, 1])),
        "channel, no structure": ("faster", ("EXPONENTS", [1, 1, 0], "RESCALE", "channel")),
        "window": ("faster", ("WINDOW_SIZE", 5, "SIGMA", 1.0, "K1", 0.02, "K2", 0.05)),
        "strides": ("faster", ("STRIDES", [8, 32])),
        "schedule": (
            "faster",
            ("WEIGHT", 2.0, "SCHEDULE.WARMUP_ITERS", 5, "SCHEDULE.DECAY", "cosine"),
        ),
    },
    "FeatureMimic": {
        "l1": ("faster retinanet", ("DISTANCE", "l1")),
        "l1 image": ("faster", ("DISTANCE", "l1", "RESCALE", "image")),
        "tensor": ("faster", ("RESCALE", "tensor")),
        "channel": ("faster", ("RESCALE", "channel")),
        "strides": ("retinanet", ("STRIDES", [16, 128])),
    },
    "Logits": {
        "temperature": ("faster cascade mask retinanet fcos", ("TEMPERATURE", 2.0)),
        "smooth boxes": ("faster retinanet fcos", ("BOX_BETA", 0.5)),
        "unfocused": ("retinanet fcos", ("DENSE_FOCUS", 0.0)),
        "boxes": ("mask retinanet", ("CLASS_WEIGHT", 0.0, "MASK_WEIGHT", 0.0)),
    },
    "PKD": {"strides": ("faster retinanet", ("STRIDES", [8, 32]))},
    "CWD": {
        "temperature": ("faster retinanet", ("TEMPERATURE", 4.0)),
        "strides": ("retinanet", ("STRIDES", [16, 128])),
    },
    "CrossKD": {
        "prediction alone": ("retinanet fcos", ("TEACHER_CONVS", 0)),
        "whole head": ("retinanet fcos", ("TEACHER_CONVS", 2)),
        "unfocused": ("retinanet", ("FOCUS", 0.0, "BOX_WEIGHT", 0.0)),
        "squared focus": ("fcos", ("FOCUS", 2.0, "BOX_WEIGHT", 0.0)),
        "boxes": ("retinanet", ("CLASS_WEIGHT", 0.0)),
    },
    "MaskMimic": {
        "temperature": ("mask", ("TEMPERATURE", 3.0, "FEATURES_WEIGHT", 0.0)),
        "features": ("mask", ("LOGITS_WEIGHT", 0.0)),
    },
    "DSIG": {
        "sum": ("faster retinanet", ("IMAGE_REDUCTION", "sum")),
        "not mined": ("faster", ("MINE_BACKGROUND", False)),
        "none mined": ("faster", ("MINING_THRESHOLD", 50.0)),
        "temperature": ("faster retinanet", ("CLASS_TEMPERATURE", 2.0, "PYRAMID_WEIGHT", 0.0)),
        "masks": ("mask", ("MASK_WEIGHT", 1.0, "MASK_NODES", True)),
        "second stage": ("cascade", ("STAGE", 1)),
        "few predictions": (
            "retinanet fcos",
            ("PREDICTIONS_PER_LEVEL", 60, "PREDICTIONS_PER_IMAGE", 9, "POOL_RESOLUTION", 3),
        ),
    },
    "DRKD": {
        "paper": ("faster retinanet fcos", ("PROFILE", "paper")),
        "normalised": ("faster", ("NORMALIZE", True, "STRIDES", [8, 16])),
        "uniform filter": ("faster retinanet", ("RELATION_FILTER", "uniform")),
        "no filter": ("faster", ("RELATION_FILTER", "none")),
        "pooling": (
            "retinanet",
            ("INSTANCE_LEVELS", 3, "POOL_RESOLUTION", 2, "ALIGNED", True, "SAMPLING_RATIO", 2),
        ),
        "units": ("faster", ("NODES", [16, 8], "BOTTLENECK", 8, "FREEZE_TEACHER_UNITS", True)),
        "instances": ("faster", ("PIXEL_WEIGHT", 0.0, "INSTANCE_WEIGHT", 1.0)),
        "pixels": (
            "faster",
            ("PIXEL_WEIGHT", 1.0, "INSTANCE_WEIGHT", 0.0, "RELATION_WEIGHT", 0.0),
        ),
    },
    "GlobalKnowledge": {
        "without prototypes": ("faster retinanet", _NO_TERMS_BUT_LOCAL),
        "ground truth": ("faster retinanet fcos", ("BOXES", "gt")),
        "few boxes": ("retinanet", ("BOXES", "gt", "MAX_BOXES", 3)),
        "kernel 1": ("faster", ("LOCAL.ADAPTER_KERNEL", 1, "ATTENUATION", "none")),
        "levels": ("faster", ("STRIDES", [8, 16], "LEVEL_SIZE", 24.0)),
        "prototypes": (
            "faster cascade mask retinanet fcos",
            ("PROTOTYPES.FILE", PROTOTYPES),
        ),
        "prototypes of ground truth": (
            "faster retinanet",
            ("PROTOTYPES.FILE", PROTOTYPES, "BOXES", "gt", "SOFT_LABELS.TEMPERATURE", 1.0),
        ),
        "projection": (
            "faster retinanet",
            ("PROTOTYPES.FILE", PROTOTYPES, "GLOBAL.RESPONSES", "projection"),
        ),
        "assigned level": (
            "faster retinanet",
            ("PROTOTYPES.FILE", PROTOTYPES, "GLOBAL.ASSIGNED_LEVEL_ONLY", True),
        ),
        "unreliable": ("faster", ("PROTOTYPES.FILE", PROTOTYPES, "RELIABILITY", False)),
    },
    "MAR": {
        "rpn": ("faster", ("RELATION.SITE", "rpn_dense")),
        "uniform rpn": (
            "faster",
            ("RELATION.SITE", "rpn_dense", "RELATION.PIXEL_WEIGHTS", "uniform"),
        ),
        "vectors": ("faster cascade", ("RELATION.SITE", "roi_vectors")),
        "uniform tower": ("retinanet", ("RELATION.PIXEL_WEIGHTS", "uniform")),
        "no relation": ("retinanet fcos", ("RELATION.WEIGHT", 0.0)),
        "no mask": ("faster retinanet", ("MASK.WEIGHT", 0.0)),
        **{
            kind: ("faster retinanet", ("MASK.KIND", kind))
            for kind in ("binary", "iou", "gauss", "zones", "roi_level")
        },
        "pseudo": ("faster retinanet", ("MASK.ANCHORS", "pseudo", "MASK.CAP", True)),
        "thresholds": ("faster", ("MASK.IOU_RATIO", 0.2, "MASK.PARTICIPATION", 0.6)),
        "background": ("faster", ("MASK.BACKGROUND", 0.5, "ADAPTER_KERNEL", 3)),
    },
}
# Channels agree, so that adapters are a choice.
EQUAL_WIDTH = (
    ("SSIM", "same width", (), False),
    ("SSIM", "adapter always", ("ADAPTER", "always"), False),
    ("SSIM", "adapter identity", ("ADAPTER", "always", "ADAPTER_INIT", "identity"), True),
    ("FeatureMimic", "adapter never", ("ADAPTER", "never"), False),
    ("FeatureMimic", "adapter always", ("ADAPTER", "always"), False),
    ("FeatureMimic", "adapter small", ("ADAPTER", "always", "ADAPTER_INIT", "small"), True),
    ("GlobalKnowledge", "adapter auto", ("LOCAL.ADAPTER", "auto"), False),
    ("DSIG", "same width", (), False),
    ("DRKD", "same width", (), False),
    ("MAR", "adapter identity", (), True),
    ("MAR", "adapter auto", ("ADAPTER", "auto"), False),
    ("MaskMimic", "same width", (), False),
    ("PKD", "same width", (), False),
    ("CWD", "adapter always", ("ADAPTER", "always"), False),
    ("CrossKD", "same width", (), False),
)


def builtin_heads() -> list[str]:
    """Names of the heads that d2kd itself registers."""
    registered = d2kd.DISTILL_HEAD_REGISTRY
    return sorted(name for name, head in registered if head.__module__.startswith("d2kd."))


def node_of(head: str) -> str:
    """The head's node below DISTILL: its name in upper case, with underscores."""
    nodes = _plain("faster").DISTILL
    return next(n for n in nodes if n.replace("_", "") == head.upper())


def all_cases() -> Iterator[Case]:
    """Every built-in head on every detector and mixed pair, and the variants."""
    for head in builtin_heads():
        for student, teacher in (*((arch, arch) for arch in ARCHS), *MIXED):
            yield Case(student, teacher, head)
        for variant, (students, opts) in VARIANTS.get(head, {}).items():
            for arch in students.split():
                yield Case(arch, arch, head, variant, opts)
    for head, variant, opts, own_start in EQUAL_WIDTH:
        arch = "mask" if head == "MaskMimic" else "retinanet" if head in DENSE_HEADS else "faster"
        yield Case(arch, arch, head, variant, opts, 16, own_start)


def measure(case: Case, folder: Path) -> dict:
    """What the case gives.

    Args:
        folder: for files of teachers, which later calls find there.

    Returns:
        ``{"losses": {name: value}, "gradient": sum of the absolute gradients of the losses with
        respect to the student's backbone}``, or ``{"refused": True}``.
    """
    try:
        model = _build(case, folder)
    except d2kd.ConfigError:
        return {"refused": True}
    torch.manual_seed(0)
    with EventStorage(ITERATION):
        losses = model(golden_batch())
    losses = {name: loss for name, loss in losses.items() if name.startswith("loss_kd_")}
    found = {"losses": {name: loss.item() for name, loss in losses.items()}}
    if not case.has_noise:
        found["gradient"] = _backbone_gradient(model, sum(losses.values()))
    return found


def _backbone_gradient(model: torch.nn.Module, loss: Tensor) -> float:
    state = model.state_dict(keep_vars=True)
    parameters = [
        value
        for name, value in state.items()
        if name.startswith("backbone.") and value.requires_grad
    ]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return sum(g.double().abs().sum().item() for g in gradients if g is not None)


def _plain(arch: str, width: int = 16):
    cfg = golden_config(arch, width=width)
    cfg.SOLVER.MAX_ITER = MAX_ITER
    return cfg


def _build(case: Case, folder: Path) -> torch.nn.Module:
    node = f"DISTILL.{node_of(case.head)}"
    # Later keys win: a variant may set the schedule that is switched off here.
    opts = [f"{node}.SCHEDULE.WARMUP_ITERS", 0]
    opts += ["DISTILL.TEACHER.WEIGHTS", str(_teacher_weights(case.teacher, case.width, folder))]
    for key, value in zip(case.opts[::2], case.opts[1::2], strict=True):
        path = value is PROTOTYPES and _prototypes(case.student in DENSE, case.width, folder)
        opts += [f"{node}.{key}", str(path) if path else value]
    teacher_file = folder / f"{case.teacher}_{case.width}.yaml"
    cfg = distiller_config(_plain(case.student), [case.head], str(teacher_file), tuple(opts))
    torch.manual_seed(0)
    model = build_model(cfg).train()
    fill(model, "student", skip=HEADS_PREFIX if case.own_start else None)
    return model


def _teacher_weights(arch: str, width: int, folder: Path) -> Path:
    """A checkpoint of the teacher; its config is beside it."""
    path = folder / f"{arch}_{width}.pth"
    if not path.exists():
        cfg = _plain(arch, width)
        write_config(cfg, path.with_suffix(".yaml"))
        model = build_model(cfg)
        fill(model, "teacher")
        torch.save({"model": model.state_dict()}, path)
    return path


def _prototypes(dense: bool, width: int, folder: Path) -> Path:
    """A file as ``tools/prototypes.py`` writes it: 3, 2 and no prototypes of the three classes."""
    path = folder / f"prototypes_{'dense' if dense else 'roi'}_{width}.pth"
    counts = (3, 2, 0)
    assert len(counts) == NUM_CLASSES
    random, total = generator("prototypes", str(dense)), sum(counts)
    levels = {
        stride: {
            "teacher": _tensor(random, total, width),
            "student": _tensor(random, total, 16),
            "offsets": torch.tensor([0, *np.cumsum(counts)]),
            "instances": torch.arange(total),
        }
        for stride in ((8, 16, 32, 64, 128) if dense else (4, 8, 16, 32, 64))
    }
    classes = np.repeat(np.arange(NUM_CLASSES), counts).tolist()
    instances = [(number, "", (0.0, 0.0, 9.0, 9.0), name) for number, name in enumerate(classes)]
    torch.save({"levels": levels, "instances": instances, "meta": {}}, path)
    return path


def _tensor(random: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))
