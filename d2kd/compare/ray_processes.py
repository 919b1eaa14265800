"""Running trainings on the machines of a Ray cluster; Ray is imported when a cluster is used.

All machines see the same files under the same paths, and have the same environment. Each training
is a process of a Ray actor, which holds the training's GPU or CPUs and sends back its progress.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, first_line
from .processes import Processes, StageFailed

AUTO = "auto"
# Seconds until a file that another machine has made is seen on a network file system.
_SEEN_WITHIN = 90.0
# Seconds that a stopped training is given to end before it is killed.
_GRACE = 30.0
# What the command was called with, and what the machines of a cluster do not know.
_FORWARDED = ("DETECTRON2_DATASETS", "PYTHONPATH")
# Linux ends the training with its actor, however that ends; 1 is PR_SET_PDEATHSIG, 15 SIGTERM.
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('error: stopped'); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class RayProcesses:
    """Stages that run on a Ray cluster: on a GPU each, or on CPUs where the cluster has no GPU.

    Args:
        address: of the cluster, HOST:PORT; :data:`AUTO` for ``RAY_ADDRESS``, else the cluster of
            this machine.
        threads: CPU threads of a training.

    Attributes:
        room: how many trainings the cluster holds now.

    Raises:
        ConfigError: Ray is not installed, no cluster is there, or no machine has so many CPUs.
    """

    def __init__(self, address: str, threads: int):
        self._ray = _connected(address)
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = [int(machine.get("CPU", 0)) for machine in machines]
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        self._uses_gpus, self._most_threads = gpus > 0, max(cpus, default=0)
        self.room = gpus or sum(count // threads for count in cpus)
        if not self.room:
            raise ConfigError(
                f"--threads {threads}: no machine of the Ray cluster has more than "
                f"{self._most_threads} CPUs"
            )
        self._lock = threading.Lock()
        self._running: dict[Any, bool] = {}  # actor -> whether it has a machine
        self._stopped = False

    def run_stage(
        self, name: str, command: list[str], done: Path, logs: Path, threads: int
    ) -> None:
        """Run one as :class:`~d2kd.compare.processes.LocalProcesses` does, where there is room.

        Raises:
            StageFailed: it failed, or its machine did; names the log.
        """
        if not self._uses_gpus:  # what is prepared before the runs asks for the threads of all
            threads = min(threads, self._most_threads)
        errors, actor = self._ray.exceptions, self._start(threads)
        try:
            stage = (name, command, done, logs, threads)
            for line in actor.run.options(num_returns="streaming").remote(os.getcwd(), stage):
                print(self._ray.get(line), flush=True)
                self._running[actor] = True
        except errors.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise StageFailed(str(error.cause)) from None
            raise
        except errors.RayError as error:
            why = "stopped" if self._stopped else _words(error)
            raise StageFailed(f"{name} failed ({why}); its output is in {logs}") from error
        finally:
            self._end([actor])
        if not _is_seen(done, _SEEN_WITHIN):
            raise StageFailed(f"{name} failed ({done} of another machine is not visible here)")

    def _start(self, threads: int) -> Any:
        own = {key: os.environ[key] for key in _FORWARDED if key in os.environ}
        options = {"max_concurrency": 2, "runtime_env": {"env_vars": own}}
        options |= {"num_gpus": 1, "num_cpus": 0} if self._uses_gpus else {"num_cpus": threads}
        with self._lock:
            if self._stopped:
                raise StageFailed("stopped")
            actor = self._ray.remote(_Stage).options(**options).remote(_SEEN_WITHIN)
            self._running[actor] = False
        return actor

    def _end(self, actors: list[Any]) -> None:
        """End what actors run, give their machines back."""
        placed = [actor for actor in actors if self._running.get(actor)]
        if placed:
            stopped = [actor.stop.remote() for actor in placed]
            self._ray.wait(stopped, num_returns=len(stopped), timeout=_GRACE)
        for actor in actors:
            self._ray.kill(actor)
            self._running.pop(actor, None)

    def stop(self) -> None:
        """End all, and start none any more. Their checkpoints stay whole."""
        with self._lock:
            self._stopped = True
            self._end(list(self._running))


class _Stage:
    """An actor: one stage, on the machine that Ray has chosen for it.

    Args:
        seen_within: seconds until a folder that another machine has made is seen.
    """

    def __init__(self, seen_within: float):
        self._seen_within = seen_within
        self._processes, self._ended = Processes(), threading.Event()

    def run(self, folder: str, stage: tuple) -> Iterator[str]:
        """Run it in the working directory ``folder``; the lines of its progress."""
        name, command, done, logs, threads = stage
        try:
            here = socket.gethostname()
            for path in (Path(folder), done.parent):
                if not _is_seen(path, self._seen_within):
                    raise StageFailed(
                        f"{name} failed ({here} does not see {path}: the machines of the cluster "
                        "need one file system under the same paths)"
                    )
            os.chdir(folder)
            yield f"{name}: on {here}"
            command = ["-c", _WITH_PARENT, str(os.getpid()), *command]
            yield from self._processes.stage_lines(name, command, done, logs, threads)
        finally:
            self._ended.set()

    def stop(self) -> None:
        """End its process, and wait for that."""
        self._processes.stop()
        self._ended.wait(_GRACE)


def _connected(address: str) -> Any:
    """The module ``ray``, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray: Ray is not installed: pip install 'd2kd[ray]'") from None
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS", AUTO)
    host, _, port = address.rpartition(":")
    if address != AUTO and not (host and port.isdecimal()):
        raise ConfigError(f"--ray {address}: an address is HOST:PORT")
    try:
        if address != AUTO:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--ray {address}: no cluster ({first_line(error)[:120]}); start one with "
            "ray start --head, or give its HOST:PORT"
        ) from error
    return ray


def _words(error: Exception) -> str:
    """One line of what Ray says of an actor that ended: its own error, if it could not start."""
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip()
    if "creation task" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:300]


def _is_seen(path: Path, seconds: float) -> bool:
    """Whether a path is there, or comes into sight in time."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):  # reading a folder brings what is known of it up to date
            os.listdir(path.parent)
        time.sleep(0.5)
    return True
