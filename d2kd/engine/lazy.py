"""A training from a LazyConfig, by the conventions of Detectron2's ``lazyconfig_train_net.py``.

What is built (``model``, ``optimizer``, ``lr_multiplier``, ``dataloader``) comes from the file; how
it is trained, kept and resumed is the trainer's of every other config, for which the values of
``train`` are written into one.
"""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf, SCMode
from torch import nn

from ..config import add_distillation_config, set_heads
from ..config_files import SHARED_OUTPUT, default_output_dir, resolve_config_file
from ..config_paths import absolute_path
from ..data.custom import check_datasets
from ..detectors.teacher import load_teacher
from ..errors import ConfigError
from ..files import write_text
from ..lazy_config import build_lazy, load_lazy, override_lazy
from ..meta_arch import Distiller
from .checkpoint import STUDENT_FILE, find_checkpoint, save_student
from .deliverable import STUDENT_CONFIG
from .hooks import LossHook, StudentHook
from .setup import check_weights, import_user_module, setup
from .step import use_fused_update
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)

# Detectron2's common/train.py, and what d2kd reads besides.
TRAIN = {
    "output_dir": SHARED_OUTPUT,
    "init_checkpoint": "",
    "max_iter": 90000,
    "amp": {"enabled": False, "precision": "fp16"},
    "ema": {"enabled": False, "decay": 0.9998},
    "ddp": {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": False,
    },
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 5000,
    "log_period": 20,
    "device": "cuda",
    "seed": -1,
    "cudnn_benchmark": False,
    "check_teacher": True,
}
# The meta-architecture of a student whose parts no key names.
_STUDENT = "LazyConfig"
_EVALUATED = "dataloader.test"


def prepare(
    args: argparse.Namespace, base: type[DistillTrainer]
) -> tuple[CfgNode, type[DistillTrainer]]:
    """The checked config of a LazyConfig, as a trainer reads it, and a trainer, derived from
    ``base``, that builds what the file describes; nothing is written."""
    for name in getattr(args, "imports", []):
        import_user_module(name)
    path = resolve_config_file(args.config_file)
    lazy = load_lazy(path)
    given = lazy.get("train", {})
    unread = ", ".join(key for key in given if key not in TRAIN)
    if unread:
        logger.warning("%s: keys of 'train' that are not used: %s", path, unread)
    lazy.train = OmegaConf.merge(DictConfig(TRAIN, flags={"allow_objects": True}), given)
    override_lazy(lazy, args.opts, "a.b=c", trusted=True, free=("model.heads.",))
    train = not args.eval_only
    needed = ("optimizer", "lr_multiplier") if train else ()
    missing = [key for key in ("model", "dataloader", *needed) if key not in lazy]
    if missing:
        raise ConfigError(f"{path} defines no {' and no '.join(missing)}")
    cfg = _config(lazy, args.config_file, os.path.dirname(path))
    check_datasets(cfg, train=train)
    if not (args.resume and find_checkpoint(cfg.OUTPUT_DIR, weights_only=args.eval_only)):
        check_weights(cfg.MODEL.WEIGHTS, "train.init_checkpoint", [os.path.dirname(path)])
    _complete(lazy, cfg)
    # For run.json and config.yaml; resuming with other values is said.
    cfg.LAZY = CfgNode(_plain(lazy))
    cfg.freeze()
    trainer = type(base.__name__, (_LazyParts, base), {"lazy": lazy, "source": path})
    return setup(args, cfg), trainer


def _config(lazy: DictConfig, name: str, folder: str) -> CfgNode:
    """What a trainer reads of a config: the values of ``train``, the datasets and the heads."""
    cfg, train = get_cfg(), lazy.train
    add_distillation_config(cfg)
    cfg.OUTPUT_DIR = os.path.abspath(
        default_output_dir(name) if train.output_dir == SHARED_OUTPUT else train.output_dir
    )
    device = train.device
    cfg.MODEL.DEVICE = "cpu" if device != "cpu" and not torch.cuda.is_available() else device
    cfg.MODEL.WEIGHTS = absolute_path(train.init_checkpoint or "", [folder])
    cfg.SEED, cfg.CUDNN_BENCHMARK = train.seed, train.cudnn_benchmark
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = train.max_iter, ()
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = train.amp.enabled, train.amp.precision
    if train.amp.enabled and train.amp.precision == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("train.amp.precision fp16 needs a GPU; bf16 works on the CPU too")
    cfg.SOLVER.EMA.ENABLED, cfg.SOLVER.EMA.DECAY = train.ema.enabled, train.ema.decay
    cfg.SOLVER.CHECKPOINT_PERIOD = train.checkpointer.period
    cfg.SOLVER.CHECKPOINT_KEEP = train.checkpointer.get("max_to_keep") or 0
    cfg.TEST.EVAL_PERIOD = train.eval_period
    cfg.DATASETS.TRAIN = _names(lazy, "dataloader.train")
    # One name: the file's evaluator sees the whole of its loader.
    cfg.DATASETS.TEST = _names(lazy, _EVALUATED)[:1] if "evaluator" in lazy.dataloader else ()
    cfg.INPUT.FORMAT = OmegaConf.select(lazy, "dataloader.train.mapper.image_format") or "BGR"
    batch, workers = (
        OmegaConf.select(lazy, f"dataloader.train.{key}")
        for key in ("total_batch_size", "num_workers")
    )
    cfg.SOLVER.IMS_PER_BATCH = batch or cfg.SOLVER.IMS_PER_BATCH
    cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS if workers is None else workers
    for change in OmegaConf.select(lazy, f"{_EVALUATED}.mapper.augmentations") or ():
        if isinstance(change, DictConfig) and isinstance(change.get("short_edge_length"), int):
            cfg.INPUT.MIN_SIZE_TEST = change.short_edge_length
            cfg.INPUT.MAX_SIZE_TEST = change.get("max_size", cfg.INPUT.MAX_SIZE_TEST)
    cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCH = _STUDENT
    if _is(lazy.model, Distiller):
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
        set_heads(cfg, lazy.model.get("heads") or {})
        cfg.DISTILL.INHERIT = list(lazy.model.get("inherit") or ())
        node = cfg.DISTILL.TEACHER
        node.CHECK = train.check_teacher
        teacher = lazy.model.get("teacher") or {}
        node.CONFIG_FILE, node.WEIGHTS = teacher.get("config_file", ""), teacher.get("weights", "")
    return cfg


def _complete(lazy: DictConfig, cfg: CfgNode) -> None:
    """Say in the Distiller's arguments what other parts of the file say already."""
    model = lazy.model
    if not _is(model, Distiller):
        return
    model.setdefault("max_iter", "${train.max_iter}")
    if _is(model.get("teacher"), load_teacher):
        names = [MetadataCatalog.get(n).get("thing_classes") for n in cfg.DATASETS.TRAIN[:1]]
        model.teacher.setdefault("student_format", cfg.INPUT.FORMAT)
        model.teacher.setdefault("student_classes", names[0] if names else None)


def _is(node: Any, target: Any) -> bool:
    """Whether a node calls ``target``, given as such or by its name."""
    found = node.get("_target_") if isinstance(node, DictConfig) else None
    return (locate(found) if isinstance(found, str) else found) is target


def _names(lazy: DictConfig, loader: str) -> tuple[str, ...]:
    """Names of the datasets of a loader that Detectron2 builds; () of another."""
    names = OmegaConf.select(lazy, f"{loader}.dataset.names")
    return (names,) if isinstance(names, str) else tuple(names or ())


def _container(node: Any, resolve: bool) -> Any:
    return OmegaConf.to_container(node, resolve=resolve, structured_config_mode=SCMode.INSTANTIATE)


def _plain(value: Any) -> Any:
    """A LazyConfig as dicts, lists and plain values; others by name."""
    if OmegaConf.is_config(value):
        value = _container(value, resolve=False)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", None) or str(value)


class _LazyParts:
    """Over a trainer: it builds what ``lazy``, the LazyConfig of the file ``source``, describes."""

    lazy: ClassVar[DictConfig]
    source: ClassVar[str]

    @classmethod
    def _build(cls, key: str) -> Any:
        return build_lazy(cls.lazy, key, cls.source)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The file's model, or the student of a Distiller where ``cfg`` is the student's."""
        model = cls.lazy.model
        if not _is(model, Distiller):
            return cls._build("model").to(cfg.MODEL.DEVICE)
        if cfg.MODEL.META_ARCHITECTURE != "Distiller":
            return cls._build("model.student").to(cfg.MODEL.DEVICE)
        model.inherit = list(cfg.DISTILL.INHERIT)
        return cls._build("model").to(cfg.MODEL.DEVICE)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        params = cls.lazy.optimizer.params
        params.model = model  # as Detectron2 does
        optimizer = cls._build("optimizer")
        del params["model"]
        return use_fused_update(optimizer) if "fused" in optimizer.defaults else optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, cls._build("lr_multiplier"), cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """The file's own; a resumed training begins with other images than it left off."""
        return cls._build("dataloader.train")

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return cls._build(_EVALUATED)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return cls._build("dataloader.evaluator")

    @property
    def ddp_options(self) -> dict[str, Any]:
        return dict(self.lazy.train.ddp)

    def build_hooks(self) -> list[HookBase]:
        hooks, period = super().build_hooks(), self.lazy.train.log_period
        for number, hook in enumerate(hooks):
            if isinstance(hook, PeriodicWriter):
                hook._period = period
            elif isinstance(hook, LossHook):
                hook.periods.append(period)
            elif isinstance(hook, StudentHook):
                hooks[number] = _LazyStudentHook()
        return hooks


class _LazyStudentHook(StudentHook):
    """Writes the student's weights, and a LazyConfig of the student itself, which Detectron2's
    ``LazyConfig.load`` reads."""

    def save(self) -> None:
        trainer = self.trainer
        folder, model = trainer.cfg.OUTPUT_DIR, trainer.lazy.model
        weights = os.path.join(folder, STUDENT_FILE)
        save_student(trainer.model, weights)
        student = model.student if _is(model, Distiller) else model
        content = {
            "model": _container(student, resolve=True),
            "train": {"init_checkpoint": weights},
        }
        path = os.path.join(folder, STUDENT_CONFIG)
        LazyConfig.save(DictConfig(content, flags={"allow_objects": True}), path)
        with open(path) as file:
            text = file.read()
        write_text(
            f"# The student of {STUDENT_FILE}, for Detectron2's LazyConfig.load.\n{text}", path
        )
