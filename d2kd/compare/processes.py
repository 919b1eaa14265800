"""Running trainings as processes: progress on one line, logs in files, finished ones kept."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import ConfigError


class StageFailed(ConfigError):
    """A process that was started failed, or is already running elsewhere; names its log."""


# glibc hands the memory of large tensors back to the system after use and has it mapped in again,
# a few percent of a small detector's step on a CPU. Each step wants the same memory: it may stay.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": f"{2**30}", "MALLOC_MMAP_THRESHOLD_": f"{2**30}"}


class Processes:
    """The processes that run now, so that they can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def stop(self) -> None:
        """End all, and start none any more. Their checkpoints stay whole."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def stage_lines(
        self,
        name: str,
        command: list[str],
        done: Path,
        logs: Path,
        threads: int,
        environment: dict[str, str] | None = None,
    ) -> Generator[str]:
        """Run ``python command`` in the working directory, unless the file ``done`` is there.

        Args:
            logs: folder for the full output.
            threads: CPU threads of the process.
            environment: further variables of the process.

        Yields:
            What to show of its progress.

        Raises:
            StageFailed: it failed, or another process works on it; names the log.
        """
        for folder in (logs, done.parent):
            folder.mkdir(parents=True, exist_ok=True)
        file_name = re.sub(r"[^\w.+-]+", "_", name)
        log = logs / f"{file_name}.log"
        environment = {
            **_KEEP_MEMORY,
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads),
            **(environment or {}),
        }
        # Beside what it makes, which others may make too: suites share teachers.
        with lock_file(done.parent / f".{done.name}.lock", name) as lock:
            if done.exists():
                yield f"{name}: done before"
                return
            start = time.perf_counter()
            yield f"{name} ..."
            code, last = yield from self._run_logged(name, command, log, environment, lock)
        if code != 0 or not done.exists():
            reason = last.removeprefix("error: ")[:200]
            raise StageFailed(f"{name} failed ({reason}); its output is in {log}")
        yield f"{name}: {time.perf_counter() - start:.0f} s"

    def _run_logged(
        self, name: str, command: list[str], log: Path, environment: dict, lock: IO
    ) -> Generator[str, None, tuple[int, str]]:
        """Run it with its output in ``log``; exit status and last line."""
        last = ""
        with log.open("w") as file:
            process = self._start(
                [sys.executable, *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=[lock.fileno()],
            )
            try:
                for line in process.stdout:
                    file.write(line)
                    last = line.strip() or last
                    match = re.search(r"eta: (.+?)\s+iter: (\d+)\s+total_loss: (\S+)", line)
                    if match:
                        yield f"  {name}: iteration {match[2]}, loss {match[3]}, {match[1]} to go"
            except BaseException:  # Ctrl-C in this thread, or the reader has gone
                process.terminate()
                raise
            finally:
                code = process.wait()
                with self._lock:
                    self._running.discard(process)
        return code, last

    def _start(self, command: list[str], **kwargs) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise StageFailed("stopped")
            process = subprocess.Popen(command, **kwargs)
            self._running.add(process)
        return process


class LocalProcesses(Processes):
    """Stages that run on this machine, on a GPU each as long as there are enough.

    Args:
        jobs: how many there are at a time.
    """

    def __init__(self, jobs: int):
        super().__init__()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
        if not torch.cuda.is_available():
            environments = [{}]
        self._free: queue.Queue[dict[str, str]] = queue.Queue()
        for job in range(jobs):
            self._free.put(environments[job % len(environments)])

    def run_stage(
        self, name: str, command: list[str], done: Path, logs: Path, threads: int
    ) -> None:
        """Run one and print its progress, as :meth:`~Processes.stage_lines` describes it."""
        environment = self._free.get()
        try:
            lines = self.stage_lines(name, command, done, logs, threads, environment)
            with contextlib.closing(lines):
                for line in lines:
                    print(line, flush=True)
        finally:
            self._free.put(environment)


def lock_file(path: Path, name: str):
    """Open and lock a file; the lock is the process's that inherits it, and goes with its end.

    So a training that outlived a killed parent is not started a second time while it runs.

    Raises:
        StageFailed: another process has it.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StageFailed(f"{name}: another process works on it ({path})") from None
    return file


def run_in_order(
    tasks: list,
    work: Callable,
    *,
    jobs: int,
    ready: Callable = lambda task: True,
    finished: Callable = lambda task: None,
    processes: Processes,
) -> list[tuple[Any, str]]:
    """Do ``work(task)`` for all tasks, ``jobs`` at a time: always the first that is ready.

    Args:
        ready: whether a task can start, or waits for another one.
        finished: called in this thread after each task that did not fail.

    Returns:
        (task, why) of each that failed with a ConfigError, or waited for one that did; the others
        are done.

    Raises:
        Exception: any other, after ending the processes that run.
        KeyboardInterrupt: after ending the processes that run.
    """
    waiting, running, failures = list(tasks), {}, []
    pool = ThreadPoolExecutor(jobs)
    try:
        while waiting or running:
            for task in list(islice(filter(ready, waiting), jobs - len(running))):
                waiting.remove(task)
                running[pool.submit(work, task)] = task
            if not running and not failures:
                raise RuntimeError(f"these wait for each other: {waiting}")
            if not running:
                failures += [(task, "it needs a run that failed") for task in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    future.result()
                except ConfigError as error:
                    print(error, flush=True)
                    failures.append((task, str(error)))
                else:
                    finished(task)
    except BaseException:
        processes.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failures


@contextlib.contextmanager
def stopping_by_sigterm(message: str):
    """Let SIGTERM end what follows as Ctrl-C does, and say ``message`` of both.

    (Raising SIGINT would not: in the background it is ignored.)
    """

    def stop(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)
