"""Logging of a job: on the console from its start, in the output folder once that is the run's."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_LOGGERS = ("fvcore", "detectron2", "d2kd")
_FORMAT = logging.Formatter(
    "[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"
)
_handlers: list[logging.Handler] = []


class _LogFile(logging.FileHandler):
    """A log file that loses lines on a full disk, where it would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start() -> None:
    """Log to the console (of the main process), and keep what is logged for :func:`open_file`."""
    close()
    for name in _LOGGERS:
        setup_logger(distributed_rank=comm.get_rank(), name=name)
    _attach(logging.handlers.MemoryHandler(10_000, logging.CRITICAL + 1, flushOnClose=False))


def follow_program() -> None:
    """Log where the program lets Detectron2 log; :func:`start`, if it set up nothing."""
    theirs, own = logging.getLogger("detectron2"), logging.getLogger("d2kd")
    if not theirs.isEnabledFor(logging.INFO):
        start()
    elif not own.handlers:
        own.setLevel(theirs.level)
        own.propagate = theirs.propagate
        for handler in theirs.handlers:
            own.addHandler(handler)


def open_file(folder: str) -> bool:
    """Write the log to ``folder``/log.txt, what was kept since :func:`start` first.

    Other processes than the main one write log.txt.rank1, ... Without :func:`start`, the program
    has set up logging its own way, and nothing is done; nor where a log is being written.

    Returns:
        Whether a file was opened, which :func:`close` ends.
    """
    if not _handlers or isinstance(_handlers[0], _LogFile):
        return False
    (kept,) = _handlers
    rank = comm.get_rank()
    os.makedirs(folder, exist_ok=True)
    name = os.path.join(folder, "log.txt" + (f".rank{rank}" if rank else ""))
    file = _LogFile(name)
    file.setFormatter(_FORMAT)
    kept.setTarget(file)
    kept.flush()
    close()
    _attach(file)
    return True


def is_written_by_program(path: str) -> bool:
    """Whether ``path`` is a log file that the program opened, as ``default_setup`` does."""
    streams = [getattr(h, "stream", None) for n in _LOGGERS for h in logging.getLogger(n).handlers]
    names = [str(getattr(stream, "name", "")) for stream in streams]
    there = [name for name in names if os.path.exists(name) and os.path.exists(path)]
    return any(os.path.samefile(name, path) for name in there)


def write_to_file(text: str, error: BaseException | None = None) -> None:
    """Log what the console shows in another way, with the traceback of ``error``."""
    record = logging.LogRecord("d2kd", logging.ERROR, "", 0, text, None, None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    for handler in _handlers:
        handler.handle(record)


def close() -> None:
    """End what :func:`start` began, except for the console."""
    for handler in _handlers:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()
    _handlers.clear()


def _attach(handler: logging.Handler) -> None:
    _handlers.append(handler)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
