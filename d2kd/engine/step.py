"""One training step: data, forward, backward, update; on CPU and GPU, in fp32, bf16 or fp16."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from torch import nn

from ..config import PRECISIONS
from ..data.loader import seed_of
from ..errors import ConfigError
from ..meta_arch import moments_of, unwrap
from .cost import TrainingCost
from .loss_log import LossLog


def seed_for(cfg: CfgNode) -> int:
    """``SEED``, or one that all processes draw."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed() % 2**31


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
        self.moments = moments_of(model)
        self.optimizer = optimizer
        self._settings = group_settings(optimizer.param_groups)
        self._has_new_rates = False
        self.make_loader = make_loader
        self.data_loader = None
        self.precision = precision
        self.seed = seed
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None
        self.cost = TrainingCost()
        self.losses = LossLog()
        self._data: list[dict] = []

    def run_step(self) -> None:
        start = time.perf_counter()
        if self.data_loader is None:
            self.data_loader = self.make_loader(self.seed, self.iter)
            self._batches = iter(self.data_loader)
        self._data = next(self._batches)
        data_time = time.perf_counter() - start

        torch.manual_seed(seed_of(self.seed, self.iter, comm.get_rank()))
        device = unwrap(self.model).device
        with torch.autocast(device.type, PRECISIONS[self.precision], enabled=bool(self.precision)):
            losses = self.model(self._data)
        total = sum(losses.values())
        self.optimizer.zero_grad()
        (total if self.scaler is None else self.scaler.scale(total)).backward()
        self.moments.after_backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.losses.add(self.iter, losses, data_time, self.moments.factors)
        self.cost.add_step(time.perf_counter() - start, device)

    def read_losses(self) -> None:
        """Check and log the losses of all steps so far; all ranks together. A LossError if one was
        not finite."""
        steps = len(self.losses)
        self.cost.add_wait(self.losses.flush(), steps)

    def batch_words(self) -> str:
        """What this rank's last step was given; "" if there was none."""
        shapes = [item["image"].shape[-2:] for item in self._data if "image" in item]
        if not shapes:
            return ""
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        return f"{len(shapes)} images of up to {height} x {width} pixels"

    def state_dict(self) -> dict:
        state = {
            **super().state_dict(),
            "seed": self.seed,
            "optimizer": self.optimizer.state_dict(),
            "settings": self._settings,
            "parameters": self._parameters(),
            "cost": self.cost.state_dict(),
            "model": self.moments.state_dict_of_training(),
        }
        # Dense detectors keep the running mean of their loss normaliser outside the state dict.
        if hasattr(self.moments.student, "loss_normalizer"):
            state["loss_normalizer"] = self.moments.student.loss_normalizer
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def _parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of what is trained, in the order of the optimiser's state."""
        named = unwrap(self.model).named_parameters()
        return [(name, tuple(p.shape)) for name, p in named if p.requires_grad]

    def check_state(self, state_dict: dict) -> None:
        """Refuse the state of a model with other parameters, or of another optimiser."""
        # The optimiser's state knows its parameters by position only, and does not look at shapes.
        check_parameters(state_dict.get("parameters"), self._parameters())
        own = self.optimizer.state_dict()["param_groups"]
        check_optimizer(state_dict["optimizer"]["param_groups"], own)

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state of this class, or of Detectron2's trainers; of the settings of the
        optimiser, those that the config changed since are the config's."""
        self.check_state(state_dict)
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        saved = state_dict["optimizer"]["param_groups"]
        before = state_dict.get("settings") or group_settings(saved)
        self._has_new_rates = change_settings(self.optimizer, before, self._settings)
        if "cost" in state_dict:
            self.cost.load_state_dict(state_dict["cost"])
        self.moments.load_state_dict_of_training(state_dict.get("model", {}))
        if "loss_normalizer" in state_dict:
            self.moments.student.loss_normalizer = state_dict["loss_normalizer"]
        scaler = state_dict.get("scaler", state_dict.get("grad_scaler"))  # or Detectron2's
        if self.scaler is not None and scaler:
            self.scaler.load_state_dict(scaler)

    def tell_rates(self, scheduler: Any) -> None:
        """Let a scheduler whose state is loaded go on from the learning rates of the config, where
        those are new."""
        if not self._has_new_rates:
            return
        if hasattr(scheduler, "base_lrs"):
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for part in getattr(scheduler, "_schedulers", ()):  # PyTorch's SequentialLR has some
            self.tell_rates(part)


def check_parameters(saved: list | None, own: list) -> None:
    """Refuse a checkpoint whose optimiser state is not for these parameters (name, shape)."""
    for before, now in itertools.zip_longest(saved if saved is not None else own, own):
        if before != now:
            was, is_now = (f"{x[0]} {list(x[1])}" if x else "nothing" for x in (before, now))
            raise ConfigError(
                f"the checkpoint is of a model with other parameters (it has {was} where this "
                f"config has {is_now}): resume with its own config, or train into another "
                "OUTPUT_DIR, with MODEL.WEIGHTS to start from its weights"
            )


def check_optimizer(saved: list[dict], own: list[dict]) -> None:
    """Refuse parameter groups of another optimiser: SGD has momentum, AdamW has betas."""
    before, now = (_optimizer_name(groups) for groups in (saved, own))
    if before == now:
        before, now = (f"{len(groups)} groups of parameters" for groups in (saved, own))
    if before != now:
        raise ConfigError(
            f"the checkpoint is of a training by {before}, this config's is by {now}: resume with "
            "its own SOLVER keys, or train into another OUTPUT_DIR, with MODEL.WEIGHTS to start "
            "from its weights"
        )


def _optimizer_name(groups: list[dict]) -> str:
    keys = set().union(*groups)
    return "AdamW" if "betas" in keys else "SGD" if "momentum" in keys else "another optimiser"


def group_settings(groups: list[dict]) -> list[dict]:
    """What is set for each group of an optimiser's parameters; "lr" is that before any schedule."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        | {"lr": group.get("initial_lr", group["lr"])}
        for group in groups
    ]


def change_settings(optimizer: torch.optim.Optimizer, before: list[dict], now: list[dict]) -> bool:
    """Change what differs between two :func:`group_settings`, and leave what schedules changed.

    Returns:
        Whether learning rates did.
    """
    for group, was, own in zip(optimizer.param_groups, before, now, strict=True):
        group |= {k: v for k, v in own.items() if k != "lr" and v != was.get(k)}
        if own["lr"] != was["lr"]:
            group["lr"] = group["lr"] * own["lr"] / was["lr"] if was["lr"] else own["lr"]
            group["initial_lr"] = own["lr"]
    return any(own["lr"] != was["lr"] for was, own in zip(before, now, strict=True))


def use_fused_update(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """On a CPU, update in one pass over the memory instead of one for each operation.

    Not on CUDA: there a fused optimiser takes the scale off the gradients of fp16 within its step,
    which is after Detectron2 has clipped them.
    """
    for group in optimizer.param_groups:
        on_cpu = all(p.device.type == "cpu" for p in group["params"])
        group.update(fused=on_cpu, foreach=not on_cpu)
    return optimizer
