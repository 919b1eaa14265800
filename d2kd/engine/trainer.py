"""The trainer: Detectron2's DefaultTrainer, resumable to the last bit, in a folder of its own."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.defaults import create_ddp_model, default_writers
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import (
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    verify_results,
)
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from ..config import stretched, validate_solver
from ..data.evaluation import CocoEvaluator
from ..data.loader import build_test_loader, build_train_loader, seed_of, validate_loader_config
from ..detectors.building import building
from ..detectors.teacher import Teacher
from ..errors import ConfigError, first_line
from ..files import shown
from ..meta_arch import unwrap
from . import logs
from .checkpoint import STUDENT_FILE, AtomicCheckpointer, find_checkpoint, read_checkpoint
from .faults import LossError, Stopped, TrainingError, explain, on_main_process, stopping_by_signals
from .hooks import FinishHook, KeepHook, LazyWriters, StudentHook, first_hooks
from .output import EVALUATION_FOLDER, Run
from .step import StepTrainer, seed_for, use_fused_update
from .teacher_check import check_teacher

logger = logging.getLogger(__name__)

EVALUATORS = {
    "coco": CocoEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": lambda name, output_dir: PascalVOCDetectionEvaluator(name),
}


def find_evaluator(dataset_name: str) -> str:
    """The dataset's ``evaluator_type``; a ConfigError if there is no evaluator of that type."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise ConfigError(
            f"dataset '{dataset_name}' has evaluator_type '{kind}'; valid: {list(EVALUATORS)}"
        )
    return kind


class DistillTrainer(DefaultTrainer):
    """Trains what ``cfg`` says, a plain detector or a Distiller; used as Detectron2's trainer.

    Building it writes nothing. :meth:`resume_or_load` claims ``cfg.OUTPUT_DIR`` when all that can
    be checked before the first step was good, and :meth:`train` calls it where the caller did not.

    Args:
        cfg: the full config. ``SEED`` decides the initial weights, data order, augmentation and
            sampling; a resumed run takes its own again.
        resume: go on from the last checkpoint, if there is one: weights that it replaces are then
            not asked for.
        model: built by the caller; default: built here.

    Attributes:
        run: the output folder, and what it says of this run.
    """

    def __init__(self, cfg: CfgNode, *, resume: bool = False, model: nn.Module | None = None):
        TrainerBase.__init__(self)
        logs.follow_program()
        validate_solver(cfg)
        # First of all, because the heads' schedules end with SOLVER.MAX_ITER.
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        validate_loader_config(cfg, comm.get_world_size())
        self.cfg, self._resume = cfg, resume
        seed = seed_for(cfg)
        if model is None:
            seed_all_rng(seed)
            resumes = resume and find_checkpoint(cfg.OUTPUT_DIR)
            model = self.build_model(without_start(cfg) if resumes else cfg)
        optimizer = self.build_optimizer(cfg, model)
        on_gpu = unwrap(model).device.type == "cuda"
        model = create_ddp_model(
            model,
            **self.ddp_options,
            device_ids=[comm.get_local_rank()] if on_gpu else None,
        )
        self._trainer = StepTrainer(
            model,
            optimizer,
            self._make_loader,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
            seed=seed,
        )
        self._moments = self._trainer.moments
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.before_save = self._trainer.losses.check
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.run = Run(cfg)
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's scaling by ``SOLVER.REFERENCE_WORLD_SIZE``, of heads' schedules too."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        own = stretched(cfg, scaled.SOLVER.MAX_ITER)
        own = {key: value for key, value in own.items() if key.startswith("DISTILL.")}
        if own:
            scaled.defrost()
            scaled.merge_from_list([word for pair in own.items() for word in pair])
            if cfg.is_frozen():
                scaled.freeze()
            words = ", ".join(f"{key} to {value}" for key, value in own.items())
            logger.info("Scaled by SOLVER.REFERENCE_WORLD_SIZE, as MAX_ITER is: %s", words)
        return scaled

    def _make_loader(self, seed: int, start: int) -> Iterable:
        """The loader of training; of a subclass that overrides it as Detectron2's, without seed."""
        if "seed" in inspect.signature(self.build_train_loader).parameters:
            return self.build_train_loader(self.cfg, seed, start)
        if start:
            logger.warning("build_train_loader(cfg) has no 'start': the image order will differ")
        # Detectron2's loaders take theirs from here: each process changes images in its own way.
        seed_all_rng(seed_of(seed, start, comm.get_rank()) % 2**31)
        return self.build_train_loader(self.cfg)

    @property
    def ddp_options(self) -> dict[str, Any]:
        """Arguments of Detectron2's ``create_ddp_model``."""
        return {"broadcast_buffers": False}

    # --- before the first step -------------------------------------------------------------------

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume, or start from ``MODEL.WEIGHTS`` and ``DISTILL.INHERIT``; then take the folder.

        Raises:
            ConfigError: the checkpoint or the weights do not fit, or the folder is another run's.
        """
        folder, moments = self.cfg.OUTPUT_DIR, self._moments
        path = on_main_process(lambda: find_checkpoint(folder)) if resume else ""
        if path:
            checkpoint = read_checkpoint(path)
            self._trainer.check_state(checkpoint["trainer"]["_trainer"])
            logger.info("Resuming from %s", path)
            self.checkpointer.restore(checkpoint)
            # It holds the iteration that it was written after.
            self.start_iter = self.iter + 1
        else:
            self.checkpointer.load_weights(self.cfg.MODEL.WEIGHTS)
            moments.start_from_weights()
        resumes, needed = bool(path), self._checkpoint_bytes()
        self.run.claim(moments.teacher, self.start_iter, resumes, needed)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._trainer.tell_rates(self.scheduler)

    def _checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the model, and moments and average of what is trained."""
        moments = 1 if self.cfg.SOLVER.OPTIMIZER == "SGD" else 2
        moments += self.cfg.SOLVER.EMA.ENABLED
        return sum(
            p.numel() * p.element_size() * (1 + moments * p.requires_grad)
            for p in self.model.parameters()
        )

    def _evaluate_teacher(self, teacher: Teacher) -> dict:
        with _evaluating("the teacher"):
            return check_teacher(self.cfg, teacher, type(self))

    # --- training --------------------------------------------------------------------------------

    def train(self) -> dict:
        """Train to the end.

        Returns:
            Results of the last evaluation: task -> metrics.

        Raises:
            ConfigError, TrainingError: in one line, with how the training can go on.
            Stopped: by Ctrl-C or SIGTERM.
        """
        if not self.run.record:
            self.resume_or_load(self._resume)
        with stopping_by_signals():
            try:
                self.run.check_teacher(self._moments.teacher, self._evaluate_teacher)
                self._moments.before_training()
                self._train()
            except Stopped as stop:
                words = f"{stop} at iteration {self.iter}; {self._way_on()}"
                logs.write_to_file(f"error: {words}")
                stop.args = (words,)
                raise
            except Exception as error:
                fault = explain(error, self._trainer.batch_words(), self._way_on())
                logs.write_to_file(f"error: {fault}", error)
                if fault is error:
                    raise
                raise fault from error
            finally:
                self.run.release()
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            verify_results(self.cfg, self.last_results)
        return self.last_results

    def _train(self) -> None:
        """The loop of Detectron2, without its log of a traceback and its last evaluation of a
        training that failed."""
        logger.info("Starting training from iteration %d", self.start_iter)
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter = self.max_iter  # by which after_train tells success
                self.after_train()
            except BaseException as error:
                self._after_failure(error)
                raise

    def _after_failure(self, error: BaseException) -> None:
        """Write what was logged so far; a LossError where a loss that was not read yet is why
        ``error`` came."""
        if isinstance(error, Exception) and not isinstance(error, LossError):
            try:
                self._trainer.losses.check()
            except LossError:
                raise
            except RuntimeError:  # a device that failed cannot be read
                pass
        if self.iter < self.max_iter:
            for hook in self._hooks:
                if isinstance(hook, PeriodicWriter):
                    with contextlib.suppress(OSError):
                        hook.after_train()

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def before_step(self) -> None:
        """Detectron2's, timed: it is here that heads do what they do between steps."""
        start = time.perf_counter()
        super().before_step()
        self._trainer.cost.hook_seconds += time.perf_counter() - start

    def _way_on(self) -> str:
        """How a training that ends now can go on, in words."""
        folder = self.cfg.OUTPUT_DIR
        if any(isinstance(hook, StudentHook) and hook.is_done for hook in self._hooks):
            kept = shown(os.path.join(folder, STUDENT_FILE))
            return f"'{kept}' is kept; --resume evaluates it again"
        with contextlib.suppress(ConfigError, OSError):
            if path := find_checkpoint(folder):
                return f"--resume goes on from {os.path.basename(path)}"
        return "there is no checkpoint yet"

    @property
    def seed(self) -> int:
        """``SEED``, or what was drawn where it is -1."""
        return self._trainer.seed

    @property
    def cost(self) -> dict:
        """What the training took so far, over all its pieces; see :class:`TrainingCost`."""
        return self._trainer.cost.summary(unwrap(self.model))

    @property
    def last_results(self) -> dict:
        """Results of the last evaluation; {} before the first."""
        return getattr(self, "_last_eval_results", None) or {}

    # --- what a subclass may override ------------------------------------------------------------

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks; before them those of the heads, among them d2kd's own."""
        cfg, hooks = self.cfg, super().build_hooks()
        own = first_hooks(cfg, self._moments)
        at = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        behind = [FinishHook()]
        if comm.is_main_process() and cfg.SOLVER.CHECKPOINT_KEEP:
            behind.append(KeepHook())
        return [*own, *hooks[:at], StudentHook(), *hooks[at:], *behind]

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, which make their files with the first line."""
        return [LazyWriters(lambda: default_writers(self.cfg.OUTPUT_DIR, self.cfg.SOLVER.MAX_ITER))]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model of ``cfg``, without Detectron2's log of all its modules."""
        with building("the model"):
            return build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as Detectron2 builds it, or AdamW with the same groups of parameters."""
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return use_fused_update(super().build_optimizer(cfg, model))
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        decay = cfg.SOLVER.WEIGHT_DECAY
        return use_fused_update(adamw(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=decay))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, seed: int = 0, start: int = 0):
        """The loader of training, from batch ``start`` on; override it for a mapper of yours."""
        return build_train_loader(cfg, seed, start)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """The loader of evaluation; override it for a mapper of yours."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        """The evaluator of the dataset's ``evaluator_type``."""
        kind = find_evaluator(dataset_name)
        options = {"output_dir": os.path.join(cfg.OUTPUT_DIR, EVALUATION_FOLDER)}
        if kind == "coco":
            options["kpt_oks_sigmas"] = tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        return EVALUATORS[kind](dataset_name, **options)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """Detectron2's evaluation on ``DATASETS.TEST``.

        Raises:
            TrainingError: it failed; says why in one line.
        """
        with _evaluating(" and ".join(f"'{name}'" for name in cfg.DATASETS.TEST)):
            return super().test(cfg, model, evaluators)


@contextlib.contextmanager
def _evaluating(what: str):
    """Say in one line that an evaluation failed, and why; the traceback is in the log file."""
    try:
        yield
    except (ConfigError, TrainingError):
        raise
    except Exception as error:
        fault = explain(error)
        reason = fault if fault is not error else f"{type(error).__name__}: {first_line(error)}"
        raise TrainingError(f"the evaluation of {what} failed: {reason}") from error


def without_start(cfg: CfgNode) -> CfgNode:
    """``cfg`` to build a model from whose weights a checkpoint gives: without those it would start
    from."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.DISTILL.INHERIT = []
    cfg.freeze()
    return cfg
