"""What can end a training from outside or inside, and how it is said in one line.

A mistake of the user's is a :class:`~d2kd.errors.ConfigError`; a fault of the machine or of the
numbers is a :class:`TrainingError`; a signal is :class:`Stopped`. Whatever is none of them is a
defect of the code, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from detectron2.utils import comm

from ..errors import MAX_LINE, ConfigError, first_line, one_line
from ..files import shown

T = TypeVar("T")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_AGAINST_DIVERGENCE = (
    "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, set SOLVER.CLIP_GRADIENTS.ENABLED True, or "
    "bf16 as SOLVER.AMP.PRECISION"
)
_WORKER = re.compile(r"DataLoader worker.* (is killed by signal: (\w+)|exited unexpectedly)", re.S)
_LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Broken pipe|[Tt]imed? ?out|NCCL")


class TrainingError(RuntimeError):
    """A fault that ends a training, said in one line."""

    is_of_another_process = False  # it only shows here, as a connection that broke


class LossError(TrainingError, FloatingPointError):
    """A loss that is not finite."""

    @classmethod
    def of(cls, name: str, value: float, iteration: int) -> LossError:
        factor = "the head's WEIGHT or " if name.startswith("loss_kd_") else ""
        advice = _AGAINST_DIVERGENCE.replace("lower ", f"lower {factor}")
        return cls(
            f"{name} is {value} at iteration {iteration}, the first that is not finite: {advice}"
        )


class Stopped(KeyboardInterrupt):
    """The process was told to stop, by Ctrl-C or a signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@contextlib.contextmanager
def stopping_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise :class:`Stopped`, so that files are left whole.

    A second signal is heard as the first. Ctrl-C stays ignored where it is (``nohup``, ``&``).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: Exception, batch: str = "", resume: str = "") -> Exception:
    """A fault as one line; what is not known as a fault is returned as it is.

    Args:
        batch: what the step was given, e.g. "4 images of up to 800 x 1333 pixels".
        resume: how the training goes on; added to the line.
    """
    if isinstance(error, ConfigError):
        return ConfigError(one_line(_of_worker(str(error))))
    message = _words(error, batch)
    if not message:
        return error
    end = f"; {resume}" if resume else ""
    text = one_line(message, MAX_LINE - len("error: ") - len(end)) + end
    fault = (LossError if isinstance(error, LossError) else TrainingError)(text)
    fault.is_of_another_process = _is_lost_contact(error)
    return fault


def _is_lost_contact(error: Exception) -> bool:
    if isinstance(error, TrainingError):
        return error.is_of_another_process
    if isinstance(error, torch.distributed.DistError):
        return True
    return comm.get_world_size() > 1 and bool(_LOST_PEER.search(str(error)))


def _words(error: Exception, batch: str) -> str:
    text = str(error)
    if isinstance(error, TrainingError):
        return text
    is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_memory or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        return (
            f"out of memory{f' with {batch} in a process' if batch else ''}: lower "
            "SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, or set "
            "SOLVER.AMP.ENABLED True"
        )
    worker = _WORKER.search(text) if isinstance(error, RuntimeError) else None
    if worker:
        how = f"was killed by signal {worker[2]}" if worker[2] else "ended unexpectedly"
        return (
            f"a data loading worker {how}, usually for lack of memory: lower "
            "DATALOADER.NUM_WORKERS, or free memory (of /dev/shm, too)"
        )
    if isinstance(error, FloatingPointError):  # of Detectron2, which looks at its proposals
        return f"{first_line(error).rstrip('.')}: {_AGAINST_DIVERGENCE}"
    if _is_lost_contact(error):
        return f"lost contact with another process of the training: {first_line(error)}"
    if isinstance(error, OSError) and error.filename:
        return disk_words(error)
    return ""


def disk_words(error: OSError) -> str:
    """Why a file could not be written or read, with the free space where that is the matter."""
    path = os.fsdecode(error.filename)
    name = shown(path)
    reason = error.strerror or first_line(error)
    if error.errno not in _DISK_ERRORS:
        return f"'{name}': {reason}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        reason += f", {free / 2**20:,.1f} MiB free"
    return f"'{name}' cannot be written: {reason}"


def _of_worker(text: str) -> str:
    """The message of an error, without the traceback that PyTorch adds to those of workers."""
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def on_main_process(work: Callable[[], T]) -> T:
    """``work()`` of the main process, for all; what it refuses, all refuse."""
    result = error = None
    if comm.is_main_process():
        try:
            result = work()
        except (ConfigError, TrainingError) as refused:
            error = refused
        except OSError as refused:
            if not refused.filename:
                raise
            error = TrainingError(disk_words(refused))
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result
