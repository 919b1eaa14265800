"""The factor of a head's loss over the iterations of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .keys import ITERATION_OR_NEVER, ITERATIONS, NOT_NEGATIVE, Options, key, one_of


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Keys of ``SCHEDULE``, which every head has."""

    start_iter: int = key(
        0, NOT_NEGATIVE, "First iteration of the head; before it the head is not computed."
    )
    stop_iter: int = key(
        -1,
        ITERATION_OR_NEVER,
        "First iteration without the head again; -1: it runs until the end.",
    )
    warmup_iters: int = key(
        0,
        NOT_NEGATIVE,
        "The factor grows linearly from 0 over this many iterations after START_ITER.",
    )
    decay: str = key(
        "constant",
        one_of(("constant", "linear", "cosine", "step")),
        'After the warm-up: "constant"; "linear" or "cosine" to 0 at STOP_ITER; "step": times '
        "GAMMA at each of STEPS.",
    )
    steps: tuple[int, ...] = key(
        (), ITERATIONS, 'Iterations of the decay "step"; []: SOLVER.STEPS.'
    )
    gamma: float = key(0.1, NOT_NEGATIVE, 'Factor of each step of the decay "step".')


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
    def from_options(
        cls, weight: float, options: ScheduleOptions, max_iter: int, solver_steps: Sequence[int]
    ) -> Schedule:
        """The schedule of a head with ``WEIGHT`` and ``SCHEDULE`` in a training of ``max_iter``
        iterations; ``solver_steps`` are for ``STEPS []``."""
        return cls(
            weight=weight,
            start=options.start_iter,
            stop=max_iter if options.stop_iter < 0 else options.stop_iter,
            warmup=options.warmup_iters,
            decay=options.decay,
            steps=tuple(options.steps) or tuple(solver_steps),
            gamma=options.gamma,
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
