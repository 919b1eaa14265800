"""Making the prototypes again during training, because the student's features move."""

from __future__ import annotations

import logging
import os
import time

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..files import write_json
from .generate import PrototypeGenerator
from .store import PrototypeBank, Prototypes

logger = logging.getLogger(__name__)

PROTOTYPES_FILE = "prototypes.pth"
# What each refresh of this process took.
COST_FILE = "prototypes.json"


class PrototypeHook(HookBase):
    """Fills a head's bank before the head's first iteration, and every ``REFRESH_PERIOD`` after.

    The bank is written at once, when everything is there; with the iteration it was made for it is
    part of the checkpoint. So a run that died in the middle of a refresh resumes with the
    prototypes of its last checkpoint, and starts the refresh again when it comes to it.

    Args:
        head: the head's name, to find its schedule: without the head there is no refresh.
        bank: to fill.
        cfg: the full config.

    Raises:
        ConfigError: no object of the training set can become a prototype.
    """

    def __init__(self, head: str, bank: PrototypeBank, cfg: CfgNode):
        self.head, self.bank, self.cfg = head, bank, cfg
        options = cfg.DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES
        self.period = options.REFRESH_PERIOD
        if self.period or not options.FILE:
            self.generate = PrototypeGenerator(cfg, bank)
        if self.period < 0:
            self.period = -(-self.generate.num_images // cfg.SOLVER.IMS_PER_BATCH)

    def before_train(self) -> None:
        model = self.trainer.model
        # DistributedDataParallel wraps the Distiller.
        self.distiller: nn.Module = getattr(model, "module", model)
        # What a new run finds in the bank is of the run whose checkpoint it starts from.
        found = self.trainer.start_iter > 0 and self.bank.has_prototypes
        node = self.cfg.DISTILL.GLOBAL_KNOWLEDGE
        if not found and node.PROTOTYPES.FILE:
            self.bank.fill(Prototypes.load(node.PROTOTYPES.FILE), node.SCHEDULE.START_ITER)
            found = True
        self.made_at = int(self.bank.iteration) if found else -1
        self.costs: list[dict] = []

    def before_step(self) -> None:
        if self._is_due(self.trainer.iter):
            self.refresh(self.trainer.iter)

    def _is_due(self, iteration: int) -> bool:
        if not self.distiller.schedules[self.head](iteration):
            return False
        return self.made_at < 0 or 0 < self.period <= iteration - self.made_at

    def refresh(self, iteration: int) -> None:
        """Make the prototypes of ``iteration``, on all processes together."""
        start = time.perf_counter()
        prototypes = self.generate(self.distiller.student, self.distiller.teacher)
        prototypes.meta["iteration"] = iteration
        if comm.is_main_process():
            prototypes.save(os.path.join(self.cfg.OUTPUT_DIR, PROTOTYPES_FILE))
        self.bank.fill(prototypes, iteration)
        self.made_at = iteration
        seconds = time.perf_counter() - start
        self.costs.append({"iteration": iteration, "seconds": seconds, **self.generate.cost})
        if comm.is_main_process():
            report = {"period": self.period, "refreshes": self.costs}
            write_json(report, os.path.join(self.cfg.OUTPUT_DIR, COST_FILE))
        message = f"prototypes of iteration {iteration} made in {seconds:.1f} s"
        if self.period:
            message += f", which is {1000 * seconds / self.period:.1f} s a thousand iterations"
        logger.info(message)
