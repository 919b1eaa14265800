"""Files that are written whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from d2kd.files import write_atomically, write_json


def test_an_error_leaves_the_old_file(tmp_path):
    """A writer that fails leaves the file as it was, and nothing beside it."""
    path = tmp_path / "results.json"
    write_json({"AP": 1.0}, path)

    def fail(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == '{\n "AP": 1.0\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_is_removed(tmp_path):
    """SIGKILL in the middle: the old file stays, and the next writer removes the half one. What a
    living process writes, and other files, are left alone."""
    path, others = tmp_path / "model.pth", ["model.pth.tmp", f"model.pth.{os.getppid()}.tmp"]
    for name in ("model.pth", *others):
        (tmp_path / name).write_text("old")

    def die(temporary: str) -> None:
        Path(temporary).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=write_atomically, args=(path, die))
    child.start()
    child.join(30)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 4
    write_atomically(path, lambda temporary: Path(temporary).write_text("new"))
    assert path.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["model.pth", *others])
