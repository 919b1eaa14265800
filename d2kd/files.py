"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    A reader finds the old file or the new one, never a part, wherever the process was killed. The
    content reaches the disk before the name does.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write ``text`` to ``path``, whole or not at all."""

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            file.write(text)

    write_atomically(path, write)


def write_json(data, path: str | os.PathLike) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    write_text(json.dumps(data, indent=1) + "\n", path)
