"""The trainer: Detectron2's DefaultTrainer, on CPU and GPU, resumable, in fp32, bf16 or fp16."""

from __future__ import annotations

import functools
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import LVISEvaluator, PascalVOCDetectionEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import PRECISIONS
from ..data.evaluation import CocoEvaluator
from ..data.loader import build_test_loader, build_train_loader, seed_of
from ..errors import ConfigError
from ..meta_arch import moments_of
from .checkpoint import AtomicCheckpointer
from .cost import TrainingCost
from .hooks import FinishHook

EVALUATORS = {
    "coco": CocoEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": lambda name, output_dir: PascalVOCDetectionEvaluator(name),
}


def find_evaluator(dataset_name: str) -> str:
    """The dataset's ``evaluator_type``.

    Raises:
        ConfigError: there is no evaluator of that type.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise ConfigError(
            f"dataset '{dataset_name}' has evaluator_type '{kind}'; valid: {list(EVALUATORS)}"
        )
    return kind


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def detector_of(model: nn.Module) -> nn.Module:
    """The detector that is trained: the student of a Distiller, or the model itself."""
    return moments_of(model).student


class StepTrainer(TrainerBase):
    """One training step: data, forward, backward, update.

    Args:
        make_loader: (seed, first batch) -> iterable of batches.
        precision: "" for float32; "bf16"; "fp16", which needs a GPU and scales the loss.
        seed: random numbers of a step are a function of the seed, the iteration and the rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        make_loader: Callable[[int, int], Iterable],
        *,
        precision: str = "",
        seed: int = 0,
    ):
        super().__init__()
        self.model = model.train()
        self.optimizer = optimizer
        self.make_loader = make_loader
        self.data_loader = None
        self.precision = precision
        self.seed = seed
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None
        self.cost = TrainingCost()

    def run_step(self) -> None:
        start = time.perf_counter()
        if self.data_loader is None:
            self.data_loader = self.make_loader(self.seed, self.iter)
            self._batches = iter(self.data_loader)
        data = next(self._batches)
        data_time = time.perf_counter() - start

        torch.manual_seed(seed_of(self.seed, self.iter, comm.get_rank()))
        device = unwrap(self.model).device
        with torch.autocast(device.type, PRECISIONS[self.precision], enabled=bool(self.precision)):
            losses = self.model(data)
        total = sum(losses.values())
        self.optimizer.zero_grad()
        (total if self.scaler is None else self.scaler.scale(total)).backward()
        moments_of(self.model).after_backward()
        write_losses(losses, data_time, self.iter)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.cost.add_step(time.perf_counter() - start, device)

    def state_dict(self) -> dict:
        state = {
            **super().state_dict(),
            "seed": self.seed,
            "optimizer": self.optimizer.state_dict(),
            "parameters": self._parameters(),
            "cost": self.cost.state_dict(),
        }
        # Dense detectors keep the running mean of their loss normaliser outside the state dict.
        detector = detector_of(self.model)
        if hasattr(detector, "loss_normalizer"):
            state["loss_normalizer"] = detector.loss_normalizer
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def _parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of what is trained, in the order of the optimiser's state."""
        named = unwrap(self.model).named_parameters()
        return [(name, tuple(p.shape)) for name, p in named if p.requires_grad]

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint of this config.

        Raises:
            ConfigError: it is of a model with other parameters; names the first.
        """
        # The optimiser's state knows its parameters by position only, and does not look at shapes.
        _check_parameters(state_dict.get("parameters"), self._parameters())
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        use_fused_update(self.optimizer)
        if "cost" in state_dict:
            self.cost.load_state_dict(state_dict["cost"])
        if "loss_normalizer" in state_dict:
            detector_of(self.model).loss_normalizer = state_dict["loss_normalizer"]
        if self.scaler is not None and "scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["scaler"])


def _check_parameters(saved: list | None, own: list) -> None:
    """Refuse a checkpoint whose optimiser state is not for these parameters (name, shape)."""
    for before, now in itertools.zip_longest(saved if saved is not None else own, own):
        if before != now:
            was, is_now = (f"{x[0]} {list(x[1])}" if x else "nothing" for x in (before, now))
            raise ConfigError(
                f"the checkpoint is of a model with other parameters (it has {was} where this "
                f"config has {is_now}): resume with its own config, or train into another "
                "OUTPUT_DIR, with MODEL.WEIGHTS to start from its weights"
            )


def use_fused_update(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """On a CPU, update in one pass over the memory instead of one for each operation.

    Not on CUDA: there a fused optimiser takes the scale off the gradients of fp16 within its step,
    which is after Detectron2 has clipped them.
    """
    for group in optimizer.param_groups:
        on_cpu = all(p.device.type == "cpu" for p in group["params"])
        group.update(fused=on_cpu, foreach=not on_cpu)
    return optimizer


def write_losses(losses: dict[str, Tensor], data_time: float, iteration: int) -> None:
    """Log each loss, averaged over the ranks, with one copy from the device for all of them.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    ranks = comm.gather((dict(zip(losses, values, strict=True)), data_time))
    if not comm.is_main_process():
        return
    storage = get_event_storage()
    storage.put_scalar("data_time", max(seconds for _, seconds in ranks))
    mean = {name: sum(rank[name] for rank, _ in ranks) / len(ranks) for name in losses}
    if not all(math.isfinite(value) for value in mean.values()):
        raise FloatingPointError(f"a loss is not finite at iteration {iteration}: {mean}")
    # The console repeats the last values of a term for ever: one of a head that stopped is zero.
    mean |= {n: 0.0 for n in storage.histories() if n.startswith("loss_kd_") and n not in mean}
    distilled = [value for name, value in mean.items() if name.startswith("loss_kd_")]
    total = sum(mean.values())
    storage.put_scalar("total_loss", total)
    if distilled:  # side by side on the console, which prints losses in the order of their coming
        storage.put_scalar("total_detection_loss", total - sum(distilled))
        storage.put_scalar("total_kd_loss", sum(distilled))
    storage.put_scalars(**mean)


class DistillTrainer(DefaultTrainer):
    """Trains what ``cfg`` says: a plain detector or a Distiller.

    Args:
        cfg: the full config.
        seed: of data order, augmentation and sampling; a resumed run takes its own again.
        model: built by the caller where that was needed before; default: built here.
    """

    def __init__(self, cfg: CfgNode, seed: int = 0, model: nn.Module | None = None):
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg) if model is None else model
        optimizer = self.build_optimizer(cfg, model)
        on_gpu = unwrap(model).device.type == "cuda"
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=[comm.get_local_rank()] if on_gpu else None,
        )
        self._trainer = StepTrainer(
            model,
            optimizer,
            functools.partial(self.build_train_loader, cfg),
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
            seed=seed,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume, or start: load ``MODEL.WEIGHTS``, then copy ``DISTILL.INHERIT``."""
        resumes = resume and self.checkpointer.has_checkpoint()
        super().resume_or_load(resume)
        if not resumes:
            moments_of(self.model).start_from_weights()

    def train(self) -> None:
        """Train, without a teacher that only gave its weights."""
        moments_of(self.model).before_training()
        super().train()

    def build_hooks(self) -> list:
        """Detectron2's hooks; before them those of the heads, behind them the end of training."""
        own = moments_of(self.model).build_hooks(self.cfg)
        return [*own, *super().build_hooks(), FinishHook()]

    def before_step(self) -> None:
        """Detectron2's, timed: it is here that heads do what they do between steps."""
        start = time.perf_counter()
        super().before_step()
        self._trainer.cost.hook_seconds += time.perf_counter() - start

    @property
    def cost(self) -> dict:
        """What the training took so far, over all its pieces; see :class:`TrainingCost`."""
        return self._trainer.cost.summary(unwrap(self.model))

    @property
    def last_results(self) -> dict:
        """Results of the last evaluation; {} before the first."""
        return getattr(self, "_last_eval_results", None) or {}

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
        kind = find_evaluator(dataset_name)
        options = {"output_dir": f"{cfg.OUTPUT_DIR}/inference"}
        if kind == "coco":
            options["kpt_oks_sigmas"] = tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        return EVALUATORS[kind](dataset_name, **options)
