"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    A reader finds the old file or the new one, never a part, wherever the process was killed. The
    content reaches the disk before the name does.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    _remove_leftovers(path)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote ``path`` have left beside it."""
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

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            file.write(text)

    write_atomically(path, write)


def write_json(data, path: str | os.PathLike) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    write_text(json.dumps(data, indent=1) + "\n", path)
