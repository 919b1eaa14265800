"""Hooks of the trainer: reading losses, keeping checkpoints, and the end of a training."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..files import write_json
from ..meta_arch import TrainingMoments
from .checkpoint import prune
from .deliverable import save_deliverable, write_receipt
from .ema import EmaHook
from .output import RESULTS_FILE
from .summary import summarise

logger = logging.getLogger(__name__)

# Iterations between two lines of a log, as in Detectron2.
LOG_PERIOD = 20


def first_hooks(cfg: CfgNode, moments: TrainingMoments) -> list[HookBase]:
    """What comes before Detectron2's hooks, which save, evaluate and write."""
    periods = [LOG_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD]
    ema = [EmaHook(cfg.SOLVER.EMA.DECAY, periods[1:])] if cfg.SOLVER.EMA.ENABLED else []
    return [LossHook(periods), *ema, *moments.build_hooks(cfg)]


class LossHook(HookBase):
    """Reads the losses of the steps before what follows from them is written, kept or evaluated, in
    ``periods`` of iterations (0 for never)."""

    def __init__(self, periods: Sequence[int]):
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self.trainer._trainer.read_losses()


class LazyWriters(EventWriter):
    """Writers that are made, and their files with them, when there is something to write."""

    def __init__(self, make: Callable[[], list[EventWriter]]):
        self._make = make
        self._writers: list[EventWriter] | None = None

    def write(self) -> None:
        if self._writers is None:
            self._writers = self._make()
        for writer in self._writers:
            writer.write()

    def close(self) -> None:
        for writer in self._writers or ():
            writer.close()


class KeepHook(HookBase):
    """Removes all checkpoints but the ``SOLVER.CHECKPOINT_KEEP`` last ones and the one that was
    evaluated as the best.

    It comes behind checkpoints and evaluations, on the main process.
    """

    def after_step(self) -> None:
        trainer = self.trainer
        keep, period = trainer.cfg.SOLVER.CHECKPOINT_KEEP, trainer.cfg.TEST.EVAL_PERIOD
        done = trainer.iter + 1
        if period > 0 and done % period == 0 and done != trainer.max_iter:
            self._note_best()
        best = trainer.run.record.get("best") or {}
        prune(trainer.cfg.OUTPUT_DIR, keep, best.get("checkpoint", ""))

    def _note_best(self) -> None:
        trainer = self.trainer
        found = flatten_results_dict(trainer.last_results)
        metric = next((name for name in found if name.split("/")[-1] == "AP"), None)
        best = trainer.run.record.get("best") or {"value": -math.inf}
        if metric is None or not found[metric] > best["value"]:
            return
        name = f"model_{trainer.iter:07d}"
        if not os.path.isfile(os.path.join(trainer.cfg.OUTPUT_DIR, f"{name}.pth")):
            trainer.checkpointer.save(name, iteration=trainer.iter)
        best = {"checkpoint": f"{name}.pth", "metric": metric, "value": float(found[metric])}
        trainer.run.update(best=best)


class StudentHook(HookBase):
    """Writes the student's files when the last step is done, before anything else can fail.

    Attributes:
        is_done: they are written, by the main process, of this very training.
    """

    is_done = False

    def after_train(self) -> None:
        trainer = self.trainer
        if trainer.iter >= trainer.max_iter:
            if comm.is_main_process():
                self.save()
            self.is_done = True

    def save(self) -> None:
        save_deliverable(self.trainer.cfg, self.trainer.model)


class FinishHook(HookBase):
    """At the end of a complete training: the results, the receipt, and a summary."""

    def after_train(self) -> None:
        trainer = self.trainer
        if trainer.iter < trainer.max_iter or not comm.is_main_process():
            return
        cost, results = trainer.cost, trainer.last_results
        write_json({"results": results, **cost}, os.path.join(trainer.run.folder, RESULTS_FILE))
        write_receipt(trainer.run, cost, results, trainer.seed)
        trainer.run.update(finished=True)
        changes = trainer.run.record["changes"]
        text = summarise(trainer.cfg, results, trainer.run.teacher_results, cost, changes)
        logger.info("\n%s", text)
