"""The Distiller: a student detector that a hidden teacher helps to train.

Three parts, and who touches which:

* the **student** is an ordinary Detectron2 detector; it runs its own forward and never knows.
* the **teacher** (:mod:`d2kd.detectors.teacher`) is frozen and outside the module tree; only
  heads ask it.
* a **head** (:mod:`d2kd.heads`) reads both through bundles and returns loss terms; it is the one
  thing that users write.

The Distiller runs the student, shows both bundles to each head, and adds the terms, weighted and
scheduled, to the student's losses. In evaluation, and in checkpoints, it is the student.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .balance import Balance
from .config import (
    add_distillation_config,
    head_balance,
    head_schedule,
    set_heads,
    student_config,
    validate_distillation_config,
)
from .data.model_classes import trained_classes
from .detectors.bundle import Batch
from .detectors.inherit import plan_inheritance
from .detectors.inputs import to_device
from .detectors.spec import DetectorSpec, describe_detector
from .detectors.taps import Taps
from .detectors.teacher import Teacher
from .errors import ConfigError
from .heads import DistillHead, build_head
from .registry import node_name
from .schedules import Schedule

logger = logging.getLogger(__name__)

STUDENT_PREFIX = "student."
HEADS_PREFIX = "distill_heads."


class TrainingMoments:
    """What a trainer asks of the model that it trains, and the moments that it tells it of.

    As they are here, nothing is done, for a model without distillation; a :class:`Distiller`
    overrides them, and :func:`moments_of` finds those of any model.

    Attributes:
        student: the detector that is trained, evaluated and saved.
        distill_heads: what is trained in addition to it.
        teacher: the frozen teacher, where there is one.
        factors: name of each head, as in its losses -> factor of its terms in the last step.
    """

    teacher: Teacher | None = None
    factors: Mapping[str, float] = MappingProxyType({})

    def __init__(self, student: nn.Module):
        self.student = student
        self.distill_heads = nn.ModuleDict()

    @property
    def trained_beside(self) -> list[nn.Parameter]:
        """The parameters of heads that are trained."""
        return [p for p in self.distill_heads.parameters() if p.requires_grad]

    def build_hooks(self, cfg: CfgNode) -> list[HookBase]:
        """Hooks that the trainer runs before its own."""
        return []

    def start_from_weights(self) -> None:
        """A training starts, and does not resume: ``MODEL.WEIGHTS`` are loaded."""

    def before_training(self) -> None:
        """The first step of this process comes next; weights are loaded, checks are done."""

    def after_backward(self) -> None:
        """Gradients are complete, over all ranks; the update comes next."""

    def state_dict_of_training(self) -> dict[str, Any]:
        """What the model needs to go on with this training, and is no weight; plain values."""
        return {}

    def load_state_dict_of_training(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict_of_training` gave."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def moments_of(model: nn.Module) -> TrainingMoments:
    """``model``, inside DistributedDataParallel or not, as a trainer talks to it."""
    model = unwrap(model)
    return model if isinstance(model, Distiller) else TrainingMoments(model)


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module, TrainingMoments):
    """Meta-architecture of a student in distillation.

    Args:
        student: a detector that returns a dict of losses in training.
        teacher: the frozen teacher; None where nothing is distilled or inherited.
        heads: name -> head, in the order in which they run; or name -> its keys, from which heads
            and schedules are built: ``{"SSIM": {"weight": 2.0}, "DSIG": {}}``, as a LazyConfig has
            them.
        schedules: name -> factor of the head by iteration.
        max_iter: length of training, told to the heads.
        inherit: parts of the student that :meth:`start_from_weights` copies from the teacher.
        specs: of student and teacher, where the caller has read them; default: read here.
        balance: chooses the heads' weights by their gradients; None: they are the schedules'.

    Raises:
        ConfigError: heads without teacher or schedule, or a part that cannot be inherited.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher | None = None,
        heads: Mapping[str, Any] | None = None,
        schedules: dict[str, Schedule] | None = None,
        max_iter: int = 1,
        inherit: Sequence[str] = (),
        specs: tuple[DetectorSpec, DetectorSpec] | None = None,
        balance: Balance | None = None,
    ):
        super().__init__()
        if heads and not any(isinstance(head, nn.Module) for head in heads.values()):
            _check_complete(teacher, heads, heads, inherit)
            cfg = get_cfg()
            add_distillation_config(cfg)
            cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = max_iter, ()
            set_heads(cfg, heads)
            specs = describe_pair(student, teacher)
            heads, schedules = _build_heads(cfg, list(heads), specs)
        _check_complete(teacher, heads or {}, schedules or {}, inherit)
        self.student = student
        self.distill_heads = nn.ModuleDict(heads or {})
        self.schedules = schedules or {}
        self.max_iter = max_iter
        self.balance = balance
        self._factors: dict[str, float] = {}
        self._has_trainer = False
        # In a tuple the teacher is no submodule, whatever it is.
        self._hidden = (teacher,)
        self._inheritance = plan_inheritance(student, teacher.model, inherit) if inherit else None
        if len(self.distill_heads):
            student_spec, self.teacher_spec = specs or describe_pair(student, teacher)
            self.taps = Taps(student, student_spec)
        self.register_state_dict_post_hook(_drop_student_prefix)
        self.register_load_state_dict_pre_hook(_add_student_prefix)
        self.register_load_state_dict_post_hook(_report_student_keys)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        validate_distillation_config(cfg)
        plain = student_config(cfg)
        student = META_ARCH_REGISTRY.get(plain.MODEL.META_ARCHITECTURE)(plain)
        names, inherit = list(cfg.DISTILL.HEADS), list(cfg.DISTILL.INHERIT)
        built = {"student": student, "max_iter": cfg.SOLVER.MAX_ITER, "inherit": inherit}
        if names or inherit:
            built["teacher"] = teacher = Teacher.from_config(cfg)
        if names:
            built["specs"] = specs = describe_pair(student, teacher, trained_classes(cfg))
            built["heads"], built["schedules"] = _build_heads(cfg, names, specs)
            built["balance"] = head_balance(cfg)
        return built

    @property
    def teacher(self) -> Teacher | None:
        return self._hidden[0]

    @property
    def device(self) -> torch.device:
        return self.student.device

    # --- the moments of a training; see TrainingMoments ---

    def build_hooks(self, cfg: CfgNode) -> list[HookBase]:
        return [hook for head in self.distill_heads.values() for hook in head.build_hooks(cfg)]

    @property
    def factors(self) -> Mapping[str, float]:
        return {_short_name(name): factor for name, factor in self._factors.items()}

    def start_from_weights(self) -> None:
        """Copy ``DISTILL.INHERIT`` from the teacher over the student's own weights, and log it.

        Each rank copies from its own teacher: all of them loaded the same file.

        Raises:
            RuntimeError: training began, which changed the teacher's modules.
        """
        if self._inheritance is not None:
            if self.teacher is None or self.teacher.is_prepared:
                raise RuntimeError("start_from_weights() comes before the first step, not after it")
            self._inheritance.copy(self.student, self.teacher.model)
            logger.info("Inherited from the teacher (DISTILL.INHERIT):\n%s", self._inheritance)

    def before_training(self) -> None:
        """Make the teacher ready; free the memory of one that no head reads: nothing is left to
        inherit from it."""
        self._has_trainer = True
        if not len(self.distill_heads):
            self._hidden = (None,)
        else:
            self.teacher.prepare()

    def after_backward(self) -> None:
        """Leave heads that were at rest in this step as they are.

        DistributedDataParallel gives parameters without a gradient one of zeros, by which an
        optimiser with momentum or weight decay would move them.
        """
        for name, head in self.distill_heads.items():
            if not self._factors.get(name, 1):
                head.zero_grad(set_to_none=True)

    def state_dict_of_training(self) -> dict[str, Any]:
        return {} if self.balance is None else {"balance": self.balance.state_dict()}

    def load_state_dict_of_training(self, state: dict[str, Any]) -> None:
        if self.balance is not None and "balance" in state:
            self.balance.load_state_dict(state["balance"])

    def _apply(self, fn, recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def forward(self, batched_inputs: list[dict]):
        """In training: the student's losses and ``loss_kd_<head>[_<term>]``, each a scalar.
        In evaluation: the student's output."""
        if self.training and not self._has_trainer:
            self._say_that_hooks_are_missing()
        if not self.training or not len(self.distill_heads):
            return self.student(batched_inputs)
        inputs = to_device(batched_inputs, self.device)
        with self.taps:
            losses = self.student(batched_inputs if _is_pictured(self.student) else inputs)
        losses.update(self._distill(inputs, losses))
        return _with_parameters_in_graph(losses, self.distill_heads.parameters())

    def _say_that_hooks_are_missing(self) -> None:
        self._has_trainer = True  # once is enough
        if self.teacher is not None:
            logger.warning(
                "The trainer of this Distiller runs no hooks of d2kd and drops, where the config "
                "asks for it: DISTILL.INHERIT, what heads do between steps, the teacher's check, "
                "resting heads, SOLVER.OPTIMIZER and SOLVER.EMA. Call "
                "d2kd.add_distillation_hooks(trainer) before it trains, or use d2kd.DistillTrainer"
            )

    def _distill(self, batched_inputs: list[dict], losses: dict[str, Tensor]) -> dict[str, Tensor]:
        iteration = get_event_storage().iter
        factors = {name: self.schedules[name](iteration) for name in self.distill_heads}
        terms: dict[str, Tensor] = {}
        if any(factors.values()):
            batch = Batch.from_inputs(
                batched_inputs,
                self.device,
                iteration=iteration,
                max_iter=self.max_iter,
                student_losses={name: loss.detach() for name, loss in losses.items()},
            )
            student = self.taps.bundle(batch)
            teacher = self.teacher.bundle(batched_inputs, self.teacher_spec, student, self.taps)
            found = {
                name: head(student, teacher, batch)
                for name, head in self.distill_heads.items()
                if factors[name]
            }
            if self.balance is not None:
                if self.balance.is_due(iteration, found):
                    pyramid, trunk = student.pyramid, self.student.backbone
                    self.balance.measure(iteration, factors, losses, found, pyramid, trunk)
                factors = self.balance.factors(iteration, factors)
            for name, own in found.items():
                factor = factors[name]
                for term, loss in own.items():
                    terms[_loss_name(name, term)] = loss if factor == 1 else loss * factor
            student.release()
            teacher.release()
        self._factors = factors
        self.taps.clear()
        return terms

    def inference(self, *args, **kwargs):
        """The student's inference."""
        return self.student.inference(*args, **kwargs)


def _is_pictured(student: nn.Module) -> bool:
    """Whether Detectron2 draws this step's images, with boxes that it expects on the CPU."""
    period = getattr(student, "vis_period", 0)
    return period > 0 and get_event_storage().iter % period == 0


def describe_pair(
    student: nn.Module, teacher: Teacher, class_names: tuple[str, ...] | None = None
) -> tuple[DetectorSpec, DetectorSpec]:
    """What heads may read of both, the teacher being read on the student's boxes; ``class_names``
    are the student's, in order, where they are known."""
    spec = describe_detector(student, "student")
    names = class_names or teacher.student_classes
    if names and spec.num_classes not in (None, len(names)):
        names = None
    spec = dataclasses.replace(spec, class_names=tuple(names) if names else None)
    return spec, teacher.describe(spec)


def _build_heads(
    cfg: CfgNode, names: Sequence[str], specs: tuple[DetectorSpec, DetectorSpec]
) -> tuple[dict[str, DistillHead], dict[str, Schedule]]:
    """The heads ``names`` of ``cfg`` for a pair, and their schedules."""
    # The student's random numbers, now and in training, are those of plain Detectron2.
    with torch.random.fork_rng(devices=[]):
        heads = {name: build_head(name, cfg, *specs) for name in names}
    return heads, {name: head_schedule(cfg, name) for name in names}


def _check_complete(teacher, heads: dict, schedules: dict, inherit: Sequence[str]) -> None:
    if teacher is None and (heads or inherit):
        wanted = f"the heads {list(heads)} need" if heads else f"inheriting {list(inherit)} needs"
        raise ConfigError(f"Distiller: {wanted} a teacher; None was given")
    missing = [name for name in heads if name not in schedules]
    if missing:
        raise ConfigError(f"Distiller: no schedule for the heads {missing}; one for each is needed")


def _short_name(head: str) -> str:
    return node_name(head).lower()


def _loss_name(head: str, term: str) -> str:
    name = f"loss_kd_{_short_name(head)}"
    return f"{name}_{term}" if term else name


def _with_parameters_in_graph(
    losses: dict[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Tensor]:
    """``losses``, whose graph reaches each of the parameters, though with no gradient.

    DistributedDataParallel waits for every parameter in every step; a head that has nothing to say
    in a step would make it wait for ever. Without other processes nothing waits.
    """
    if not dist.is_available() or not dist.is_initialized():
        return losses
    name, loss = next(iter(losses.items()))
    return {**losses, name: _TouchParameters.apply(loss, *parameters)}


class _TouchParameters(torch.autograd.Function):
    """The identity on a loss, with an edge of the graph to each parameter and no gradient along it.

    It costs nothing, where a zero-weighted sum would read and write each parameter.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *([None] * ctx.count)


# --- checkpoints: the state dict of a Distiller is the student's, plus "distill_heads." ----------


def _drop_student_prefix(module: nn.Module, state_dict, prefix: str, local_metadata) -> None:
    start = prefix + STUDENT_PREFIX
    for key in [k for k in state_dict if k.startswith(start)]:
        state_dict[prefix + key[len(start) :]] = state_dict.pop(key)
    metadata = getattr(state_dict, "_metadata", {})
    for key in [k for k in metadata if (k + ".").startswith(start)]:
        metadata[(prefix + key[len(start) :]).rstrip(".")] = metadata.pop(key)


def _add_student_prefix(module: nn.Module, state_dict, prefix: str, *_) -> None:
    heads = prefix + HEADS_PREFIX
    keys = [k for k in state_dict if k.startswith(prefix)]
    module._loads_heads = any(k.startswith(heads) for k in keys)
    for key in keys:
        if not key.startswith(heads):
            state_dict[prefix + STUDENT_PREFIX + key[len(prefix) :]] = state_dict.pop(key)


def _report_student_keys(module: nn.Module, incompatible) -> None:
    """Name keys as the file has them, and do not miss heads in a checkpoint of a plain student."""
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [k.removeprefix(STUDENT_PREFIX) for k in keys]
    if not module._loads_heads:
        missing = incompatible.missing_keys
        missing[:] = [k for k in missing if not k.startswith(HEADS_PREFIX)]
