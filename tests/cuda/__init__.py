"""What only a GPU shows; skipped elsewhere. On one: python -m pytest tests/cuda"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Functions that may wait: non-maximum suppression decides how many boxes are left.
MAY_WAIT = ("nms",)


@contextlib.contextmanager
def waits_of_d2kd(student: nn.Module) -> Iterator[list[str]]:
    """Where the host waits for the device, outside of the student's own forward pass."""
    places: list[str] = []
    in_student = [False]

    def take_down(message, category, filename, lineno, file=None, line=None) -> None:
        stack = traceback.extract_stack()
        exempt = any(name in frame.name for frame in stack for name in MAY_WAIT)
        if "synchron" in str(message) and not in_student[0] and not exempt:
            own = [frame for frame in stack if "/d2kd/" in frame.filename]
            places.append(f"{own[-1].filename}:{own[-1].lineno}" if own else "backward, update")

    hooks = [
        student.register_forward_pre_hook(lambda *_: in_student.__setitem__(0, True)),
        student.register_forward_hook(lambda *_: in_student.__setitem__(0, False)),
    ]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = take_down
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for hook in hooks:
                hook.remove()
