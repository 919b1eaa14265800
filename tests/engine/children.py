"""Trainings in child processes, which a test may stop, kill or starve.

Children are forked from the test's process, which has PyTorch loaded, so that a training of a few
iterations takes a second or two.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from detectron2.utils.logger import setup_logger

from d2kd.engine.train import main

from ..detectors import write_config
from ..golden.training import training_config, write_inputs

CONFIG, OUTPUT = "config.yaml", "output"
# For train_net.py in a process of its own: the tests' head has keys in each config that they write.
TOY_HEAD = ("--import", "tests.toy_head")
DATASET = "golden_train"


def write_job(folder: Path, *opts) -> Path:
    """A folder with data, a teacher, and ``config.yaml`` of a distillation of six iterations.

    It writes a checkpoint after each second iteration into ``output``, and is evaluated.
    """
    write_inputs(folder)
    cfg = training_config()
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.DATASETS.TEST = (DATASET,)
    cfg.merge_from_list(list(opts))
    write_config(cfg, folder / CONFIG)
    return folder


class Child(NamedTuple):
    """A process that runs."""

    process: multiprocessing.Process
    log: Path

    def wait(self, seconds: float = 60.0) -> Outcome:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(
                f"still running after {seconds} s:\n{self.log.read_text()[-2000:]}"
            )
        return Outcome(self.process.exitcode, self.log.read_text())


class Outcome(NamedTuple):
    """How a child ended: its exit code (negative: killed by that signal), and what it printed."""

    code: int
    text: str

    @property
    def last(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""


def start(folder: Path, *argv: str, prepare: Callable[[], object] | None = None) -> Child:
    """Start a training in ``folder`` with its ``config.yaml``.

    Args:
        argv: further arguments of train_net.py.
        prepare: called in the child before it starts.
    """
    log = folder / f"printed_{time.monotonic_ns()}.txt"
    return fork(folder, lambda: main(["--config-file", CONFIG, *argv]), log, prepare)


def fork(
    folder: Path,
    run: Callable[[], object],
    log: Path,
    prepare: Callable[[], object] | None = None,
) -> Child:
    """Start ``prepare()``, then ``run()``, in ``folder``, with what they print in ``log``."""
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(folder, run, log, prepare)
    )
    process.start()
    return Child(process, log)


def train(folder: Path, *argv: str, prepare: Callable[[], object] | None = None) -> Outcome:
    """Run a training as :func:`start` does, to its end."""
    return start(folder, *argv, prepare=prepare).wait()


def _child(folder: Path, run: Callable[[], object], log: Path, prepare) -> None:
    os.setsid()  # a signal to the tests is not one to their children
    # Tests that run in the background of a shell ignore it, and so would they.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    for name in ("fvcore", "detectron2", "d2kd"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    os.chdir(folder)
    if prepare is not None:
        prepare()
    run()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it did not happen in time")
        time.sleep(0.02)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below ``folder``: a file's time of change and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        if path.is_file()
        else (0, b"")
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(folder: Path):
    """Assert that the body changes no file below ``folder``, and adds or removes none, nor a
    folder."""
    before = content(folder)
    yield
    after = content(folder)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []
