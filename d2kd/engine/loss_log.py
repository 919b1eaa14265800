"""The losses of a training's steps: kept where they were computed, read and checked once a period.

Reading a loss makes the CPU wait for the device. So a step only puts its losses into one tensor;
once a period all of them are copied together, averaged over the ranks, checked and logged, each
under the iteration that it is of.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor

from ..balance import Outweighed
from .faults import LossError

DISTILLED = "loss_kd_"
_WINDOW = 20  # steps that Detectron2's writers smooth over

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    iteration: int
    losses: dict[str, float]  # NaN until they are read
    data_time: float
    factors: dict[str, float]


class LossLog:
    """Losses of steps that were not read yet, and how they are read."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._values: list[Tensor] = []  # float32, on the device: the losses of each step
        self._outweighed = Outweighed()

    def __len__(self) -> int:
        return len(self._steps)

    def add(
        self,
        iteration: int,
        losses: dict[str, Tensor],
        data_time: float,
        factors: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Note the losses of a step, without waiting for them; ``factors`` are those of the heads,
        whose terms are called ``loss_kd_<head>...``."""
        self._values.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        unread = dict.fromkeys(losses, math.nan)
        self._steps.append(_Step(iteration, unread, data_time, dict(factors)))

    def flush(self) -> float:
        """Read what was noted, and log its mean over the ranks, which all take part; on all of them
        a LossError of the first step with a loss that is not finite.

        Returns:
            Seconds that this rank waited for its device.
        """
        start = time.perf_counter()
        own = self._read()
        self._steps, self._values = [], []
        seconds = time.perf_counter() - start
        ranks = comm.all_gather(own)
        for steps in zip(*ranks, strict=True):
            for step in steps:
                _check(step)
            if comm.is_main_process():
                _log(steps)
                self._warn(steps[0].iteration)
        return seconds

    def _warn(self, iteration: int) -> None:
        """Say that distillation outweighs the detector's losses, unless gradients tell better."""
        histories = get_event_storage().histories()
        if "total_kd_loss" not in histories or "balance/share" in histories:
            return
        own, distilled = (histories[f"total_{x}_loss"].latest() for x in ("detection", "kd"))
        if self._outweighed.lasts(distilled > own, iteration):
            logger.warning(
                "The losses of distillation have been above the detector's own for %d iterations "
                "(now %.3g and %.3g): the student may mostly imitate. DISTILL.BALANCE.ENABLED True "
                "measures their gradients and chooses the heads' weights by them",
                self._outweighed.long,
                distilled,
                own,
            )

    def check(self) -> None:
        """Check this rank's losses that were not read yet; they stay to be logged. A LossError if
        one is not finite."""
        for step in self._read():
            _check(step)

    def _read(self) -> list[_Step]:
        values = iter(torch.cat(self._values).cpu().tolist() if self._values else ())
        return [
            step._replace(losses={name: next(values) for name in step.losses})
            for step in self._steps
        ]


def _check(step: _Step) -> None:
    for name, value in step.losses.items():
        if not math.isfinite(value):
            raise LossError.of(name, value, step.iteration)


def _log(ranks: tuple[_Step, ...]) -> None:
    """Log one step, seen by all ranks, in the storage of the training."""
    storage = get_event_storage()
    names, factors = ranks[0].losses, ranks[0].factors
    mean = {name: sum(rank.losses[name] for rank in ranks) / len(ranks) for name in names}
    # Detectron2 repeats the last values of a term for ever: one that is not computed is zero.
    known = [name for name, history in storage.histories().items() if isinstance(history, _Means)]
    mean |= {name: 0.0 for name in known if name not in mean and not name.startswith("total_")}
    totals = _totals(mean, factors)
    with _at(storage, ranks[0].iteration):
        storage.put_scalar("data_time", max(rank.data_time for rank in ranks))
        for name, value in {**totals, **mean}.items():  # the console prints them as they came first
            _history(storage, name, _Means)
            storage.put_scalar(name, value)
        for head, factor in factors.items():
            _history(storage, f"kd_loss_factor/{head}", _Latest)
            storage.put_scalar(f"kd_loss_factor/{head}", factor)


def _totals(losses: dict[str, float], factors: dict[str, float]) -> dict[str, float]:
    """The sum of the losses, and of those of the detector, of distillation, and of each head."""
    total = sum(losses.values())
    distilled = {name: value for name, value in losses.items() if name.startswith(DISTILLED)}
    if not (distilled or factors):
        return {"total_loss": total}
    heads = {f"total_kd_loss/{head}": 0.0 for head in factors}
    for name, value in distilled.items():
        rest = name.removeprefix(DISTILLED)
        own = [head for head in factors if rest == head or rest.startswith(f"{head}_")]
        if own:  # of "mask" and "mask_mimic" the longer
            heads[f"total_kd_loss/{max(own, key=len)}"] += value
    kd = sum(distilled.values())
    return {
        "total_loss": total,
        "total_detection_loss": total - kd,
        "total_kd_loss": kd,
        **heads,
    }


class _Means(HistoryBuffer):
    """Values whose smoothed value is their mean: means of terms add up to that of their sum, which
    medians do not."""

    def median(self, window_size: int) -> float:
        return self.avg(window_size)


class _Latest(HistoryBuffer):
    """Values that are not smoothed."""

    def median(self, window_size: int) -> float:
        return self.latest()


def _history(storage: EventStorage, name: str, kind: type[HistoryBuffer]) -> None:
    """Let the storage keep ``name`` in a buffer of that ``kind``; it was zero in the steps before,
    so that its window is that of the total."""
    histories = storage.histories()
    if not isinstance(histories.get(name), kind):
        history = histories[name] = kind()
        total = histories.get("total_loss")
        for _, iteration in total.values()[-_WINDOW:] if kind is _Means and total else ():
            if iteration < storage.iter:
                history.update(0.0, iteration)


@contextlib.contextmanager
def _at(storage: EventStorage, iteration: int) -> Iterator[None]:
    """What is put is of ``iteration``. (``put_scalar(cur_iter=)`` is not in all Detectron2s.)"""
    now = storage.iter
    storage.iter = iteration
    try:
        yield
    finally:
        storage.iter = now
