"""Successive halving within a time budget: how many candidates each rung has, and how long it
trains. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SHORTEST = 1 / 4  # of the longest training: AP of a shorter one says little about it
TYPICAL_RATIO = 1.5  # of a distilled step to the student's, until it was measured


class Pace(NamedTuple):
    """What a run costs.

    Attributes:
        step: seconds of a step of the baseline.
        overhead: seconds of a run that are not its steps': start, data, evaluation.
        ratio: of a distilled step to the baseline's.
    """

    step: float
    overhead: float
    ratio: float = TYPICAL_RATIO


class Stage(NamedTuple):
    """Trainings of one length.

    Attributes:
        alone, distilled: how many there are of each kind; a control of equal time counts as what it
            controls.
        share: their length, as a part of the longest.
    """

    alone: int
    distilled: int
    share: float = 1.0

    def seconds(self, iterations: int, pace: Pace, jobs: int) -> float:
        """Wall time with ``jobs`` runs at a time, the longest having so many iterations."""
        runs = self.alone + self.distilled
        steps = (self.alone + pace.ratio * self.distilled) / runs
        each = pace.overhead + steps * pace.step * self.share * iterations
        return math.ceil(runs / jobs) * each


def stages(candidates: int, seeds: int) -> list[Stage]:
    """The rungs, each with half of the candidates of the one before, down to two; and the
    confirmation of the winner with its two controls."""
    sizes = []
    while candidates > 1:
        sizes.append(candidates)
        candidates = kept_of(candidates)
    shares = [max(2.0 ** (rung + 1 - len(sizes)), SHORTEST) for rung in range(len(sizes))]
    rungs = [Stage(1, size, share) for size, share in zip(sizes, shares, strict=True)]
    return [*rungs, Stage(seeds, 2 * seeds)]


def kept_of(candidates: int) -> int:
    """How many candidates of a rung go on."""
    return (candidates + 1) // 2


def seconds_of(to_do: Sequence[Stage], iterations: int, pace: Pace, jobs: int) -> float:
    """Wall time of stages, the longest training having so many iterations."""
    return sum(stage.seconds(iterations, pace, jobs) for stage in to_do)


def fitting_iterations(to_do: Sequence[Stage], seconds: float, pace: Pace, jobs: int) -> int:
    """How many iterations the longest training can have; below 1 where nothing fits."""
    fixed = seconds_of(to_do, 0, pace, jobs)
    return math.floor((seconds - fixed) / (seconds_of(to_do, 1, pace, jobs) - fixed))
