"""A run and its output folder: claimed when all checks are done, known by ``run.json``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..detectors.teacher import Teacher
from ..files import shown, write_json, write_text
from . import logs, output
from .faults import on_main_process
from .identity import describe_run, differences
from .teacher_check import read_teacher_results, write_teacher_results

logger = logging.getLogger(__name__)


class Run:
    """A training and the folder that it writes to.

    Attributes:
        record: what ``run.json`` says of the run; {} before :meth:`claim`.
        teacher_results: of the teacher's check; {} without.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.folder: str = cfg.OUTPUT_DIR
        self.record: dict[str, Any] = {}
        self.teacher_results: dict[str, Any] = {}

    def claim(self, teacher: Teacher | None, start: int, resumes: bool, needed: int) -> None:
        """Take the folder: from here on files are written. All processes together.

        Args:
            start: the first iteration.
            resumes: the folder's own training goes on; else what is there of another is set aside.
            needed: bytes of a checkpoint.
        """
        identity = describe_run(self.cfg, teacher) if comm.is_main_process() else {}
        self.record = on_main_process(lambda: self._claim(identity, start, resumes, needed))
        logs.open_file(self.folder)
        for change in self.record["changes"][-1:]:
            if change["iteration"] == start:
                logger.warning("Resuming at iteration %d: %s", start, ", ".join(change["changed"]))

    def _claim(self, identity: dict, start: int, resumes: bool, needed: int) -> dict:
        folder = self.folder
        output.check_folder_of_run(folder, begins=not resumes)
        output.check_space(folder, needed)
        output.lock(folder)
        before = output.read_record(folder) if resumes else {}
        kept = {key: before[key] for key in ("best", "changes") if key in before}
        record = {"finished": False, "changes": [], **kept, **identity}
        changed = differences(before, identity) if before else []
        if changed:
            record["changes"] = [*record["changes"], {"iteration": start, "changed": changed}]
        checked_teacher = folder, identity["teacher"], self.cfg.DATASETS.TEST
        checked = read_teacher_results(*checked_teacher)
        moved = "" if resumes else output.set_aside(folder)
        if moved:
            where = shown(folder), shown(moved)
            logger.warning("'%s' held files of another run: they are in '%s' now", *where)
        if checked is not None:
            write_teacher_results(*checked_teacher, checked)
        write_json(record, os.path.join(folder, output.RUN_FILE))
        write_text(self.cfg.dump(), os.path.join(folder, output.CONFIG_FILE))
        return record

    def update(self, **changes: Any) -> None:
        """Change ``run.json``; on the main process."""
        self.record |= changes
        write_json(self.record, os.path.join(self.folder, output.RUN_FILE))

    def check_teacher(self, teacher: Teacher | None, evaluate: Callable[[Teacher], dict]) -> None:
        """Evaluate the teacher, if the config asks for it and this very teacher was not yet;
        ``evaluate`` gives the results on the main process."""
        if teacher is None:
            return
        checked = self.folder, self.record["teacher"], self.cfg.DATASETS.TEST
        known = on_main_process(lambda: read_teacher_results(*checked))
        if known is None and self.cfg.DISTILL.TEACHER.CHECK:
            known = evaluate(teacher)
            if comm.is_main_process():
                write_teacher_results(*checked, known)
        self.teacher_results = known or {}

    def release(self) -> None:
        """The run ends: another one may have the folder."""
        output.unlock(self.folder)
        logs.close()
