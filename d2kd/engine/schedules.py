"""The factor of a head's loss over the iterations of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Schedule:
    """``schedule(iteration)`` is the factor of a head, 0 where the head does not run.

    Attributes:
        weight: factor of the whole schedule.
        start, stop: first iteration with the head, and first without it again.
        warmup: iterations of linear growth from 0 after ``start``.
        decay: "constant", "linear" or "cosine" (to 0 at ``stop``), or "step".
        steps, gamma: with "step", the factor is multiplied by ``gamma`` at each of ``steps``.
    """

    weight: float
    start: int
    stop: int
    warmup: int = 0
    decay: str = "constant"
    steps: Sequence[int] = ()
    gamma: float = 0.1

    @classmethod
    def from_config(cls, node: CfgNode, solver: CfgNode) -> Schedule:
        """Read a head's node (``WEIGHT``, ``SCHEDULE``)."""
        schedule = node.SCHEDULE
        return cls(
            weight=node.WEIGHT,
            start=schedule.START_ITER,
            stop=solver.MAX_ITER if schedule.STOP_ITER < 0 else schedule.STOP_ITER,
            warmup=schedule.WARMUP_ITERS,
            decay=schedule.DECAY,
            steps=tuple(schedule.STEPS) or tuple(solver.STEPS),
            gamma=schedule.GAMMA,
        )

    def __call__(self, iteration: int) -> float:
        if not self.start <= iteration < self.stop:
            return 0.0
        since = iteration - self.start
        if since < self.warmup:
            return self.weight * (since + 1) / (self.warmup + 1)
        return self.weight * self._decayed(iteration)

    def _decayed(self, iteration: int) -> float:
        begin = self.start + self.warmup
        done = (iteration - begin) / max(self.stop - begin, 1)
        if self.decay == "linear":
            return 1.0 - done
        if self.decay == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        if self.decay == "step":
            return self.gamma ** sum(iteration >= step for step in self.steps)
        return 1.0
