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
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError


class StageFailed(ConfigError):
    """A process that was started failed, or is already running elsewhere; names its log."""


def progress_of(line: str) -> str | None:
    """What a line of a training's or pre-training's log says of its progress."""
    if line.startswith("pre-training"):
        return (
            line.split(":", 1)[0].removeprefix("pre-training ") + line.rsplit(",", 1)[-1].rstrip()
        )
    match = re.search(r"eta: (.+?)\s+iter: (\d+)\s+total_loss: (\S+)", line)
    return f"iteration {match[2]}, loss {match[3]}, {match[1]} to go" if match else None


class Processes:
    """The processes that run now, so that they can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def start(self, command: list[str], **kwargs) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise StageFailed("stopped")
            process = subprocess.Popen(command, **kwargs)
            self._running.add(process)
        return process

    def forget(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """End all, and start none any more. Their checkpoints stay whole."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


# glibc hands the memory of large tensors back to the system after use and has it mapped in again,
# a few percent of a small detector's step on a CPU. Each step wants the same memory: it may stay.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": f"{2**30}", "MALLOC_MMAP_THRESHOLD_": f"{2**30}"}


def run_stage(
    name: str,
    command: list[str],
    done: Path,
    logs: Path,
    threads: int,
    *,
    environment: dict[str, str] | None = None,
    processes: Processes | None = None,
) -> None:
    """Run ``python command`` in the working directory, printing its progress, unless the file
    ``done`` is there already. The arguments are those of :func:`stage_lines`."""
    lines = stage_lines(
        name, command, done, logs, threads, environment=environment, processes=processes
    )
    with contextlib.closing(lines):
        for line in lines:
            print(line, flush=True)


def stage_lines(
    name: str,
    command: list[str],
    done: Path,
    logs: Path,
    threads: int,
    *,
    environment: dict[str, str] | None = None,
    processes: Processes | None = None,
) -> Generator[str]:
    """Run ``python command`` in the working directory, unless the file ``done`` is there already.

    Args:
        logs: folder for the full output.
        threads: CPU threads of the process.
        environment: further variables of the process.
        processes: where to enlist the process.

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
        code, last = yield from _run_logged(
            name, command, log, environment, lock, processes or Processes()
        )
    if code != 0 or not done.exists():
        reason = last.removeprefix("error: ")[:200]
        raise StageFailed(f"{name} failed ({reason}); its output is in {log}")
    yield f"{name}: {time.perf_counter() - start:.0f} s"


def _run_logged(
    name: str, command: list[str], log: Path, environment: dict, lock, processes: Processes
) -> Generator[str, None, tuple[int, str]]:
    """Run ``python command`` with its output in ``log``.

    Yields:
        Its progress.

    Returns:
        Exit status, and the last line.
    """
    last = ""
    with log.open("w") as file:
        process = processes.start(
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
                progress = progress_of(line)
                if progress:
                    yield f"  {name}: {progress}"
        except BaseException:  # Ctrl-C in this thread, or the reader has gone
            process.terminate()
            raise
        finally:
            code = process.wait()
            processes.forget(process)
    return code, last


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
            while len(running) < jobs:
                task = next((t for t in waiting if ready(t)), None)
                if task is None:
                    break
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

    Raises:
        KeyboardInterrupt: with the message.
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


class Devices:
    """GPUs shared out to processes, one each as long as there are enough; none on a CPU."""

    def __init__(self, jobs: int):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = (
            visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        )
        self._free: queue.Queue[str] = queue.Queue()
        for job in range(jobs if torch.cuda.is_available() else 0):
            self._free.put(names[job % len(names)])
        self.count = len(names) if torch.cuda.is_available() else 0

    def take(self) -> dict[str, str]:
        """Environment of a process on the next free GPU."""
        return {"CUDA_VISIBLE_DEVICES": self._free.get()} if self.count else {}

    def give_back(self, environment: dict[str, str]) -> None:
        for name in environment.values():
            self._free.put(name)


class LocalProcesses(Processes):
    """Stages that run on this machine, over its GPUs if there are any.

    Args:
        jobs: how many there are at a time.
    """

    def __init__(self, jobs: int):
        super().__init__()
        self._devices = Devices(jobs)

    def run_stage(
        self, name: str, command: list[str], done: Path, logs: Path, threads: int
    ) -> None:
        """Run one, as :func:`run_stage` does."""
        environment = self._devices.take()
        try:
            run_stage(name, command, done, logs, threads, environment=environment, processes=self)
        finally:
            self._devices.give_back(environment)
