"""The average of the student's weights over the training (``SOLVER.EMA``), which is what is
evaluated and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.engine import HookBase
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..meta_arch import moments_of


class EmaHook(HookBase):
    """Averages the student after each step, and puts the average into the model where it counts.

    After the steps of ``periods`` and after the last one, the hooks behind this one evaluate and
    save the average: the model of a checkpoint is the average, an ordinary student. The next step
    goes on from the weights that the step before left. They are part of the checkpoint, too, so
    that a resumed training continues as if it had not been stopped.

    The average keeps ``decay`` of itself a step; less in the first ones, (1 + n) / (10 + n) after n
    of them, so that it soon forgets the initial weights.
    """

    def __init__(self, decay: float, periods: Sequence[int]):
        self.decay = decay
        self.periods = [period for period in periods if period > 0]
        self._steps = 0
        # The average, or while that is in the model, the weights of the training.
        self._other: dict[str, Tensor] = {}
        self._is_average = False

    def before_train(self) -> None:
        self._own = self._student()
        if not self._other:
            self._other = {name: value.clone() for name, value in self._own.items()}

    def before_step(self) -> None:
        if self._is_average:
            self._swap()

    @torch.no_grad()
    def after_step(self) -> None:
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        average, own = ([m[name] for name in self._own] for m in (self._other, self._own))
        get_ema_multi_avg_fn(decay)(average, own, self._steps)
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self._swap()

    def after_train(self) -> None:
        # Of a training that was complete when it was resumed, to be evaluated again.
        if self.trainer.iter >= self.trainer.max_iter and not self._is_average:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._is_average = not self._is_average
        for name, value in self._own.items():
            kept = value.clone()
            value.copy_(self._other[name])
            self._other[name].copy_(kept)

    def _student(self) -> dict[str, Tensor]:
        """Name -> weights and statistics of norms, which move with them."""
        state = moments_of(self.trainer.model).student.state_dict().items()
        return {name: value for name, value in state if value.is_floating_point()}

    def state_dict(self) -> dict:
        state = {"steps": self._steps, "is_average": self._is_average, "other": self._other}
        return state if self._other else {}

    def load_state_dict(self, state: dict) -> None:
        """Of a checkpoint whose model was loaded before."""
        self._steps, self._is_average = state["steps"], state["is_average"]
        self._own = self._student()
        self._other = {n: t.to(self._own[n].device) for n, t in state["other"].items()}
        if self._is_average:
            self._swap()
