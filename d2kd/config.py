"""d2kd's config keys that belong to no single head, and the checks that a config must pass.

A head declares its own keys (``Options`` of its class), a backbone or meta-architecture its own
(:func:`d2kd.keys.config_keys`); here they are only collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from .balance import Balance, BalanceOptions
from .config_files import check_registered, merge_overrides, resolve_teacher
from .errors import ConfigError
from .keys import (
    BELOW_ONE,
    NOT_NEGATIVE,
    KeyInfo,
    Options,
    config_keys,
    group,
    key,
    node_at,
    one_of,
)
from .registry import CONFIG_FUNCTIONS, CONFIG_KEYS, DISTILL_HEAD_REGISTRY, node_name
from .schedules import Schedule, ScheduleOptions

PRECISIONS = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class HeadOptions(Options):
    """Keys that every head has; a head's own options derive from this class."""

    weight: float = key(1.0, NOT_NEGATIVE, "Factor of all of the head's terms.")
    share: float = key(
        0.0,
        BELOW_ONE,
        "Part of the gradient that the head makes where DISTILL.BALANCE is on; 0: an equal part of "
        "DISTILL.BALANCE.SHARE.",
    )
    schedule: ScheduleOptions = group(ScheduleOptions())


@config_keys("SOLVER")
@dataclass(frozen=True)
class SolverOptions(Options):
    """Keys that d2kd adds to ``SOLVER``."""

    optimizer: str = key(
        "SGD",
        one_of(("SGD", "AdamW")),
        '"SGD" as in Detectron2, or "AdamW" (BASE_LR and WEIGHT_DECAY then mean AdamW\'s), which '
        "learns faster from scratch.",
    )
    checkpoint_keep: int = key(
        0,
        NOT_NEGATIVE,
        "How many of the last checkpoints to keep, and with them the one of the best AP, where "
        "TEST.EVAL_PERIOD evaluates on the way. 0 keeps all, as Detectron2 does.",
    )


@config_keys("SOLVER.AMP")
@dataclass(frozen=True)
class AmpOptions(Options):
    """Keys that d2kd adds to ``SOLVER.AMP``."""

    precision: str = key(
        "fp16",
        one_of(("fp16", "bf16")),
        'Precision of SOLVER.AMP.ENABLED: "fp16" (needs a GPU; losses are scaled) or "bf16".',
    )


@config_keys("SOLVER.EMA")
@dataclass(frozen=True)
class EmaOptions(Options):
    """Keys of ``SOLVER.EMA``, the average of the student's weights over the training."""

    enabled: bool = key(
        False,
        comment="Evaluate and keep an average of the student's weights over the last steps (an "
        "exponential moving average) instead of the weights that the last step left.",
    )
    decay: float = key(
        0.9998,
        BELOW_ONE,
        "What the average keeps of itself each step: it is over about 1 / (1 - DECAY) steps. In "
        "the first n steps it is at most (1 + n) / (10 + n).",
    )


@dataclass(frozen=True)
class TeacherOptions(Options):
    """Keys of ``DISTILL.TEACHER``."""

    config_file: str = key(
        "",
        comment="A YAML file, a LazyConfig (.py, which is run), or a model-zoo name of either, "
        'such as "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"; or a model of another library, '
        '"timm:resnet50" or "torchvision:fasterrcnn_resnet50_fpn_v2".',
    )
    weights: str = key(
        "",
        comment='Its checkpoint. "": that of the zoo for a zoo name, else MODEL.WEIGHTS of '
        "CONFIG_FILE (LazyConfig: train.init_checkpoint), or the library's own. "
        '"random": none, for tests only.',
    )
    opts: tuple[Any, ...] = key(
        (),
        comment="KEY VALUE pairs merged into the teacher's config, e.g. "
        '["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]; of a LazyConfig ["model.roi_heads.num_classes=7"]; '
        "of another library's model arguments of its builder, e.g. "
        '["num_classes", 11].',
    )
    precision: str = key(
        "",
        one_of(PRECISIONS),
        '"": the student\'s (autocast when SOLVER.AMP is on). "fp32", "bf16", "fp16": the '
        "teacher's own.",
    )
    class_map: tuple[Any, ...] = key(
        (),
        comment='Pairs ["student\'s class", "teacher\'s"], each a name or a number from 0, if the '
        'two call a class differently. Classes of equal names are paired without it; "" as the '
        "teacher's parts them. Terms that compare classes act on those that both have.",
    )
    check: bool = key(
        True,
        comment="Evaluate the teacher on DATASETS.TEST before training, so that a broken one is "
        "seen at once.",
    )


@config_keys("DISTILL")
@dataclass(frozen=True)
class DistillOptions(Options):
    """Keys of ``DISTILL`` that belong to no head."""

    student_meta_arch: str = key(
        "GeneralizedRCNN",
        comment="The meta-architecture that is trained and saved: GeneralizedRCNN, RetinaNet, "
        "FCOS, ... The student is the config itself: backbone, heads, input and solver keys are "
        "its own.",
    )
    heads: tuple[str, ...] = key(
        (),
        comment='Names of registered heads, e.g. ["DSIG", "SSIM"]. () trains the plain student.',
    )
    inherit: tuple[str, ...] = key(
        (),
        comment="Parts that the student copies from the teacher before training, after "
        'MODEL.WEIGHTS are loaded and not on --resume: any of "fpn", "rpn", "box_head", '
        '"mask_head", "head" (of one-stage detectors), or paths of modules such as '
        '"backbone.bottom_up". [] copies nothing.',
    )
    teacher: TeacherOptions = group(TeacherOptions())
    balance: BalanceOptions = group(BalanceOptions())


def add_distillation_config(cfg: CfgNode) -> None:
    """Add d2kd's keys to Detectron2's ``cfg``, and those of :func:`d2kd.adds_config`; call it
    before merging any file.

    Heads and keys that are registered later are not in ``cfg``.
    """
    for add in CONFIG_FUNCTIONS:
        add(cfg)
    for path, options in CONFIG_KEYS.items():
        options.add_to(node_at(cfg, path, create=True))
    for name, head in DISTILL_HEAD_REGISTRY:
        node = cfg.DISTILL[node_name(name)] = CfgNode()
        HeadOptions.add_to(node)
        head.add_config(node)


def declared_keys() -> Iterator[KeyInfo]:
    """Every key that :func:`add_distillation_config` adds and that has a declaration, by node."""
    for path, options in CONFIG_KEYS.items():
        yield from options.declared(path)
    for name, head in DISTILL_HEAD_REGISTRY:
        yield from head.Options.declared(f"DISTILL.{node_name(name)}")


# --- checking -----------------------------------------------------------------------------------


def validate_solver(cfg: CfgNode) -> None:
    """Check the values of d2kd's own keys under ``SOLVER``, of any training."""
    SolverOptions.read(cfg.SOLVER, "SOLVER")
    EmaOptions.read(cfg.SOLVER.EMA, "SOLVER.EMA")
    precision = AmpOptions.read(cfg.SOLVER.AMP, "SOLVER.AMP").precision
    if cfg.SOLVER.AMP.ENABLED and precision == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.PRECISION fp16 needs a GPU; bf16 works on the CPU too")


def validate_distillation_config(cfg: CfgNode, folders: Sequence[str] = ()) -> None:
    """Check what can be checked of ``cfg.DISTILL`` without building a model.

    Args:
        folders: where the teacher's config may lie besides the working directory.

    Raises:
        ConfigError: in one line that names the key and what is valid.
    """
    if "DISTILL" not in cfg:
        raise ConfigError("the config has no DISTILL: call d2kd.add_distillation_config(cfg) first")
    options = DistillOptions.read(cfg.DISTILL, "DISTILL")
    _check_heads(cfg)
    for name in options.heads:
        head_schedule(cfg, name)
    head_balance(cfg)
    teacher = options.teacher
    if options.heads or options.inherit:
        if not teacher.config_file:
            raise ConfigError(
                "DISTILL.TEACHER.CONFIG_FILE is empty: give the teacher's config file or model-zoo "
                "name"
            )
        resolve_teacher(teacher.config_file, folders)
    if teacher.precision == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("DISTILL.TEACHER.PRECISION fp16 needs a GPU; bf16 works on the CPU too")
    check_registered("DISTILL.STUDENT_META_ARCH", options.student_meta_arch, META_ARCH_REGISTRY)
    if options.student_meta_arch == "Distiller":
        raise ConfigError("DISTILL.STUDENT_META_ARCH names the student, e.g. GeneralizedRCNN")


def set_heads(cfg: CfgNode, heads: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Write heads into ``cfg.DISTILL`` as a LazyConfig names them, keys in lower or upper case:
    ``{"SSIM": {"weight": 2.0, "schedule": {"stop_iter": 900}}}``."""
    cfg.DISTILL.HEADS = list(heads)
    _check_heads(cfg)
    for name, options in heads.items():
        pairs = _key_values(options or {}, f"DISTILL.{node_name(name)}")
        merge_overrides(cfg, [word for pair in pairs for word in pair], f"the head {name}")


def _key_values(options: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        key = f"{path}.{str(name).upper()}"
        if isinstance(value, Mapping):
            yield from _key_values(value, key)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield key, list(value)
        else:
            yield key, value


def _check_heads(cfg: CfgNode) -> None:
    """Refuse names in ``DISTILL.HEADS`` that no head has, or that stand there twice."""
    known = sorted(name for name, _ in DISTILL_HEAD_REGISTRY)
    for name in cfg.DISTILL.HEADS:
        if name not in known:
            raise ConfigError(
                f"DISTILL.HEADS: unknown head '{name}'; valid: {', '.join(known)}; the module of "
                "yours is to be imported first, by --import"
            )
        if list(cfg.DISTILL.HEADS).count(name) > 1:
            raise ConfigError(f"DISTILL.HEADS names '{name}' twice")
        if node_name(name) not in cfg.DISTILL:
            raise ConfigError(
                f"there is no node DISTILL.{node_name(name)}: the head {name} must be registered "
                "(imported) before add_distillation_config(cfg) is called"
            )


def _head_options(cfg: CfgNode, name: str) -> HeadOptions:
    return HeadOptions.read(cfg.DISTILL[node_name(name)], f"DISTILL.{node_name(name)}")


def head_schedule(cfg: CfgNode, name: str) -> Schedule:
    """The checked schedule of the head ``name``.

    Raises:
        ConfigError: a value is not valid, or the schedule never runs.
    """
    options = _head_options(cfg, name)
    schedule = Schedule.from_options(
        options.weight, options.schedule, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS
    )
    if schedule.start >= schedule.stop:
        raise ConfigError(
            f"DISTILL.{node_name(name)}.SCHEDULE never runs: START_ITER {schedule.start} is not "
            f"before {'STOP_ITER' if options.schedule.stop_iter >= 0 else 'SOLVER.MAX_ITER'} "
            f"{schedule.stop}"
        )
    return schedule


def head_balance(cfg: CfgNode) -> Balance | None:
    """What balances the heads of ``cfg``; None where ``DISTILL.BALANCE`` is off. A ConfigError if
    the shares leave nothing for the detector's losses."""
    options = BalanceOptions.read(cfg.DISTILL.BALANCE, "DISTILL.BALANCE")
    heads = {name: _head_options(cfg, name) for name in cfg.DISTILL.HEADS}
    if not options.enabled or not heads:
        return None
    shares = {name: head.share or options.share / len(heads) for name, head in heads.items()}
    if sum(shares.values()) >= 1:
        keys = ", ".join(f"DISTILL.{node_name(name)}.SHARE" for name in heads)
        raise ConfigError(
            f"{keys}: the heads' shares are {sum(shares.values()):.3g} in all; they must be below "
            "1, which is what heads and the detector's own losses make together"
        )
    return Balance(options, shares, {name: head.weight for name, head in heads.items()})


def student_config(cfg: CfgNode) -> CfgNode:
    """``cfg`` for the plain student, which ``--eval-only`` builds and a checkpoint fits."""
    student = cfg.clone()
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == "Distiller":
        student.MODEL.META_ARCHITECTURE = student.DISTILL.STUDENT_META_ARCH
    student.freeze()
    return student


def head_nodes(cfg: CfgNode) -> dict[str, CfgNode]:
    """Nodes of the heads that ``cfg`` trains with, by name."""
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        return {}
    return {node_name(head): cfg.DISTILL[node_name(head)] for head in cfg.DISTILL.HEADS}


def stretched(cfg: CfgNode, max_iter: int) -> dict[str, Any]:
    """Overrides for a training of ``max_iter`` iterations: schedules keep their proportions."""
    values = {f"SOLVER.{end}": cfg.SOLVER[end] for end in ("STEPS", "WARMUP_ITERS")}
    freeze = "DISTILL.BALANCE.FREEZE_ITER"
    for name, node in head_nodes(cfg).items():
        values[freeze] = cfg.DISTILL.BALANCE.FREEZE_ITER
        for end in ("START_ITER", "STOP_ITER", "WARMUP_ITERS", "STEPS"):
            values[f"DISTILL.{name}.SCHEDULE.{end}"] = node.SCHEDULE[end]
    factor = max_iter / cfg.SOLVER.MAX_ITER
    opts: dict[str, Any] = {"SOLVER.MAX_ITER": max_iter}
    for path, value in values.items():
        if isinstance(value, int) and value > 0:
            opts[path] = max(round(factor * value), int(path == freeze))  # 0 would never balance
        elif isinstance(value, (tuple, list)) and value:
            opts[path] = type(value)(dict.fromkeys(round(factor * step) for step in value))
    if "SOLVER.STEPS" in opts:  # Detectron2 refuses those at the end, as short trainings may have
        steps = opts["SOLVER.STEPS"]
        opts["SOLVER.STEPS"] = type(steps)(step for step in steps if step < max_iter)
    return opts
