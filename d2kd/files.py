"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError, first_line


def shown(path: str | os.PathLike) -> str:
    """A path for a message: relative to the working directory, if it is below that."""
    name = os.fspath(path)
    here = os.getcwd() + os.sep
    return name.removeprefix(here) or name


def nearest_there(path: str | os.PathLike) -> str:
    """``path``, or the nearest of the folders above that is there."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    return place


def check_folder(path: str | os.PathLike) -> None:
    """Check that files can be written to a folder, which need not be there; none is left.

    Raises:
        ConfigError: in words that go on after the folder's name.
    """
    parent = nearest_there(path)
    if not os.path.isdir(parent):
        raise ConfigError(f"'{shown(parent)}' is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror or first_line(error)}") from error


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then move it there in one step.

    A reader finds the old file or the new one, never a part, wherever the process was killed. The
    content reaches the disk before the name does.

    Raises:
        OSError: ``path`` cannot be written (a full disk, for one); the old file is as it was.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    remove_leftovers(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno or errno.EIO, cause.strerror or str(cause), str(path)) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _os_error(error: BaseException | None) -> OSError | None:
    """The failure of the operating system that ``error`` is or comes from.

    A writer that is closed after a failed write may raise an error of its own, as PyTorch's does.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote ``path`` have left in its folder."""
    for leftover in glob.glob(f"{glob.escape(os.fspath(path))}.*.tmp"):
        process = leftover.rsplit(".", 2)[1]
        if process.isdigit() and not _is_alive(int(process)):
            os.remove(leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def write_json(data: Any, path: str | os.PathLike) -> None:
    """Write ``data`` to ``path`` as JSON, whole or not at all; NaN and infinities become null."""
    write_text(json.dumps(_without_nan(data), indent=1, allow_nan=False) + "\n", path)


def _without_nan(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def null_to_nan(data: Any) -> Any:
    """Metrics as they were before :func:`write_json`: numbers without null."""
    if isinstance(data, dict):
        return {key: null_to_nan(value) for key, value in data.items()}
    return math.nan if data is None else data


def parse_json(text: str, where: str, keys: Iterable[str] = ()) -> dict:
    """The JSON object of ``text``, which an earlier run has written to ``where``; a ConfigError if
    it is broken or lacks one of ``keys``."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is broken ({first_line(error)}); remove it") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        lacks = f" (it has no {missing[0]})" if missing else ""
        raise ConfigError(f"{where} is not what d2kd writes there{lacks}; remove it")
    return found


def read_json(path: str | os.PathLike, keys: Iterable[str] = ()) -> dict:
    """The JSON object of a file that an earlier run has written; see :func:`parse_json`."""
    with open(path, errors="replace") as file:
        return parse_json(file.read(), shown(path), keys)


def write_tensors(data: Any, path: str | os.PathLike) -> None:
    """``torch.save(data, path)``, whole or not at all."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # of a name, torch.save hides why it cannot write
            torch.save(data, file)

    write_atomically(path, write)
