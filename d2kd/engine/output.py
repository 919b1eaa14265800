"""A run and its output folder: claimed when all checks are done, known by ``run.json``. One run has
it at a time, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import shutil
import socket
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..detectors.teacher import Teacher
from ..errors import ConfigError
from ..files import (
    check_folder,
    nearest_there,
    read_json,
    remove_leftovers,
    shown,
    write_json,
    write_text,
)
from . import logs
from .checkpoint import LAST_CHECKPOINT, STUDENT_FILE
from .faults import on_main_process
from .identity import describe_run, differences
from .teacher_check import read_teacher_results, write_teacher_results

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
RECEIPT_FILE = "receipt.json"
EVALUATION_FOLDER = "inference"
EARLIER = "earlier_"

# What a run leaves, by which a folder is known to hold one.
_FILES_OF_A_RUN = (
    RUN_FILE,
    CONFIG_FILE,
    RESULTS_FILE,
    LAST_CHECKPOINT,
    STUDENT_FILE,
    "student_config.yaml",
    RECEIPT_FILE,
    "teacher_results.json",
    "metrics.json",
    "log.txt*",
    "model_*.pth",
    "events.out.tfevents.*",
    "prototypes.pth",
    "prototypes.json",
)

# (Folder, process) -> the open, locked file. The system frees a lock when its process ends, however
# it ends; a process that opens the file a second time would free it, too. A fork has no locks.
_held: dict[tuple[str, int], int] = {}


def check_output_dir(path: str) -> None:
    """Refuse an ``OUTPUT_DIR`` that is empty, a URL, a file, or cannot be made or written."""
    if not path.strip():
        raise ConfigError("OUTPUT_DIR is empty: name a folder")
    if "://" in path:
        raise ConfigError(f"OUTPUT_DIR '{path}' is a URL; it must be a local folder")
    try:
        check_folder(path)
    except ConfigError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{shown(path)}': {error}; name another OUTPUT_DIR"
        ) from error


def check_folder_of_run(path: str, begins: bool) -> None:
    """Refuse a folder in which no run can be now; nothing is made. ``begins``: a new training."""
    check_output_dir(path)
    check_free(path)
    if begins:
        _check_unfinished(path)


def check_space(path: str, needed: int) -> None:
    """Refuse a folder, which need not be there, without room for ``needed`` bytes."""
    free = shutil.disk_usage(nearest_there(path)).free
    if free < needed:
        raise ConfigError(
            f"OUTPUT_DIR '{shown(path)}': {free / 2**20:,.1f} MiB are free, and a checkpoint takes "
            f"about {needed / 2**20:,.1f} MiB: free some, or name another OUTPUT_DIR"
        )


def lock(path: str) -> bool:
    """Make the folder and take its lock, until :func:`unlock` or the end of the process; a
    ConfigError if another process has it.

    Returns:
        Whether this process did not have it already.
    """
    folder = os.path.realpath(path)
    if (folder, os.getpid()) in _held:
        return False
    os.makedirs(folder, exist_ok=True)
    file = os.open(os.path.join(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(file, path)
    except ConfigError:
        os.close(file)
        raise
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[folder, os.getpid()] = file
    return True


def unlock(path: str) -> None:
    """Free the lock of :func:`lock`, if this process has it."""
    file = _held.pop((os.path.realpath(path), os.getpid()), None)
    if file is not None:
        os.close(file)


def check_free(path: str) -> None:
    """Refuse a folder that another process has; nothing is made."""
    folder = os.path.realpath(path)
    name = os.path.join(folder, LOCK_FILE)
    if (folder, os.getpid()) in _held or not os.path.isfile(name):
        return
    try:
        file = os.open(name, os.O_RDWR)
    except OSError:  # of another user; making files there fails, too, and is said
        return
    try:
        _lock(file, path)
    finally:
        os.close(file)


def _lock(file: int, path: str) -> None:
    # Not flock(): workers that load data inherit that, and keep it for seconds after a kill.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"OUTPUT_DIR '{shown(path)}' is in use by {holder}: wait for its end or name "
                "another OUTPUT_DIR"
            ) from error
        logger.warning("OUTPUT_DIR '%s' cannot be locked: %s", shown(path), error)


def read_record(path: str) -> dict:
    """What ``run.json`` of a folder says; {} where there is none."""
    name = os.path.join(path, RUN_FILE)
    return read_json(name) if os.path.isfile(name) else {}


def _check_unfinished(path: str) -> None:
    """Refuse the place of a training that was stopped after a checkpoint, and can still go on."""
    if not os.path.isfile(os.path.join(path, LAST_CHECKPOINT)):
        return
    finished = os.path.isfile(os.path.join(path, STUDENT_FILE))  # as version 0.1 said it
    if not read_record(path).get("finished", finished):
        raise ConfigError(
            f"OUTPUT_DIR '{shown(path)}' holds a training that was not finished: go on with it by "
            "--resume, or name another OUTPUT_DIR"
        )


def set_aside(path: str) -> str:
    """Move what another run left in the folder into a folder below; "" if there is nothing.

    What Detectron2's ``default_setup`` wrote there just now is no run: the log stays.
    """
    patterns = set(_FILES_OF_A_RUN)
    if logs.is_written_by_program(os.path.join(path, "log.txt")):
        patterns.remove("log.txt*")
    found = [name for pattern in patterns for name in glob.glob(pattern, root_dir=path)]
    for name in glob.glob("*.tmp", root_dir=path):
        remove_leftovers(os.path.join(path, name.rsplit(".", 2)[0]))
    if not set(found) - {CONFIG_FILE}:
        return ""
    number = 1
    while os.path.lexists(os.path.join(path, f"{EARLIER}{number}")):
        number += 1
    target = os.path.join(path, f"{EARLIER}{number}")
    os.mkdir(target)
    # A folder with only evaluations is not a run, but of a run it is a part.
    for name in [*found, EVALUATION_FOLDER]:
        if os.path.lexists(os.path.join(path, name)):
            os.rename(os.path.join(path, name), os.path.join(target, name))
    return target


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
        check_folder_of_run(folder, begins=not resumes)
        check_space(folder, needed)
        lock(folder)
        before = read_record(folder) if resumes else {}
        kept = {key: before[key] for key in ("best", "changes") if key in before}
        record = {"finished": False, "changes": [], **kept, **identity}
        changed = differences(before, identity) if before else []
        if changed:
            record["changes"] = [*record["changes"], {"iteration": start, "changed": changed}]
        teacher = folder, self.cfg, identity["teacher"]
        checked = read_teacher_results(*teacher)
        moved = "" if resumes else set_aside(folder)
        if moved:
            where = shown(folder), shown(moved)
            logger.warning("'%s' held files of another run: they are in '%s' now", *where)
        if checked is not None:
            write_teacher_results(*teacher, checked)
        write_json(record, os.path.join(folder, RUN_FILE))
        write_text(self.cfg.dump(), os.path.join(folder, CONFIG_FILE))
        return record

    def update(self, **changes: Any) -> None:
        """Change ``run.json``; on the main process."""
        self.record |= changes
        write_json(self.record, os.path.join(self.folder, RUN_FILE))

    def check_teacher(self, teacher: Teacher | None, evaluate: Callable[[Teacher], dict]) -> None:
        """Evaluate the teacher, if the config asks for it and this very teacher was not yet on
        these images; ``evaluate`` gives the results on the main process."""
        if teacher is None:
            return
        checked = self.folder, self.cfg, self.record["teacher"]
        known = on_main_process(lambda: read_teacher_results(*checked))
        if known is None and self.cfg.DISTILL.TEACHER.CHECK:
            known = evaluate(teacher)
            if comm.is_main_process():
                write_teacher_results(*checked, known)
        self.teacher_results = known or {}

    def release(self) -> None:
        """The run ends: another one may have the folder."""
        unlock(self.folder)
        logs.close()
