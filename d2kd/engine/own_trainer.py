"""Distillation in a trainer of the user's own, a plain DefaultTrainer or what derives from it."""

from __future__ import annotations

import logging

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer

from ..config import validate_solver
from ..detectors.teacher import Teacher
from ..meta_arch import moments_of
from . import logs
from .checkpoint import AtomicCheckpointer
from .hooks import StudentHook, first_hooks
from .identity import describe_teacher
from .output import Run
from .step import StepTrainer, seed_for
from .teacher_check import check_teacher
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)


def add_distillation_hooks(trainer: DefaultTrainer) -> None:
    """Let a ``DefaultTrainer`` do all that the keys of d2kd ask of it; call it once, before
    ``resume_or_load``.

    Hooks are added for the heads, ``DISTILL.INHERIT``, the teacher's check, ``SOLVER.EMA`` and the
    student's files at the end; AdamW of ``SOLVER.OPTIMIZER`` takes the place of Detectron2's SGD,
    and the step honours ``SOLVER.AMP.PRECISION`` and logs the sums of the losses. An optimiser, a
    step (``run_step``, ``_trainer``) or a checkpointer that is your own stays as it is. A
    :class:`~d2kd.DistillTrainer` has all of it already.

    Raises:
        ConfigError: a value of ``SOLVER`` is not valid.
    """
    if isinstance(trainer, DistillTrainer):
        return
    cfg: CfgNode = trainer.cfg
    logs.follow_program()
    validate_solver(cfg)
    if cfg.SOLVER.OPTIMIZER == "AdamW" and isinstance(trainer.optimizer, torch.optim.SGD):
        trainer._trainer.optimizer = DistillTrainer.build_optimizer(cfg, trainer.model)
        trainer.scheduler = trainer.build_lr_scheduler(cfg, trainer.optimizer)
    if type(trainer.checkpointer) is DetectionCheckpointer:
        # In place: hooks have it already. Detectron2's own looks for the student's modules in the
        # Distiller where the shape of a weight differs.
        trainer.checkpointer.__class__ = AtomicCheckpointer
    moments = moments_of(trainer.model)
    if _has_detectron2s_step(trainer):
        step, amp = trainer._trainer, cfg.SOLVER.AMP
        trainer._trainer = StepTrainer(
            step.model,
            step.optimizer,
            lambda seed, start: step.data_loader,
            precision=amp.PRECISION if amp.ENABLED else "",
            seed=seed_for(cfg),
        )
        first = first_hooks(cfg, moments)
    else:
        trainer.optimizer.register_step_pre_hook(lambda *_: moments.after_backward())
        first = first_hooks(cfg, moments)[1:]  # its losses are logged as they come
    theirs = trainer._hooks
    trainer._hooks = []
    trainer.register_hooks([_StartHook(), *first, StudentHook()])
    trainer._hooks += theirs


def _has_detectron2s_step(trainer: DefaultTrainer) -> bool:
    """Whether a step is the one that Detectron2's DefaultTrainer makes for the config."""
    step = trainer._trainer
    is_default = getattr(step, "precision", torch.float16) is torch.float16
    is_own = type(trainer).run_step is not DefaultTrainer.run_step
    return type(step) in (SimpleTrainer, AMPTrainer) and is_default and not is_own


class _StartHook(HookBase):
    """The moments of a training's start, which DistillTrainer tells the model of itself."""

    def before_train(self) -> None:
        trainer, moments = self.trainer, moments_of(self.trainer.model)
        if trainer.start_iter == 0:
            moments.start_from_weights()
        elif isinstance(trainer._trainer, StepTrainer):
            trainer._trainer.tell_rates(trainer.scheduler)
        teacher = moments.teacher
        if teacher is not None:
            run = Run(trainer.cfg)
            run.record = {"teacher": describe_teacher(trainer.cfg, teacher)}
            run.check_teacher(teacher, self._check)
        moments.before_training()

    def _check(self, teacher: Teacher) -> dict:
        # Not type(): of the weak proxy that a hook has.
        try:
            return check_teacher(self.trainer.cfg, teacher, self.trainer.__class__)
        except NotImplementedError:
            logger.warning("The teacher is not checked: the trainer has no build_evaluator")
            return {}
