"""Where datasets lie, and how one is written so that no process ever reads half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from iopath.common.file_io import file_lock


def dataset_root() -> Path:
    """`$DETECTRON2_DATASETS`, or `datasets` under the working directory, as in Detectron2."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def build_directory(
    target: Path, fill: Callable[[Path], None], is_current: Callable[[], bool]
) -> bool:
    """Makes the directory `target` by `fill(empty directory)`, all of it or nothing.

    The content is written next to `target` and renamed into place, so a killed build leaves
    `target` as it was; what it did leave is removed by the next build. Of several processes one
    builds while the others wait. An older `target` is replaced.

    Args:
        is_current: whether `target` already holds what is wanted. Asked once the lock is held,
            for another process may just have finished.

    Returns:
        Whether this call built it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(target.parent / f".{target.name}")):
        for leftover in target.parent.glob(f".{target.name}.new-*"):
            if not target.exists() and (leftover / "old").exists():
                os.replace(leftover / "old", target)  # killed between the two renames below
            shutil.rmtree(leftover)
        if is_current():
            return False
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            fresh = work / "new"
            fresh.mkdir()  # unlike mkdtemp's, with the user's usual permissions
            fill(fresh)
            if target.exists():
                os.replace(target, work / "old")
            os.replace(fresh, target)
        finally:
            shutil.rmtree(work)
    return True
