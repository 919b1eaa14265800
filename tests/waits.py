"""Counts operators that wait for a device, on a CPU too: what they ask for is in its memory."""

from __future__ import annotations

import os
import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their result, or the shape of it, must reach the CPU before Python can go on.
_WAITING = {
    "_local_scalar_dense",  # item(), tolist(), bool(), a tensor where a number is wanted
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
    "equal",
}


class Waits(TorchDispatchMode):
    """Within it, ``found`` counts waiting operators by the place that called them.

    Args:
        within: parts of paths; only calls that come from such a file are counted. () counts all.
    """

    def __init__(self, *within: str):
        super().__init__()
        self.within = within
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _waits(func.overloadpacket.__name__, args):
            frames = traceback.extract_stack()[:-1]
            here = [f for f in frames if any(part in f.filename for part in self.within)]
            if here or not self.within:
                frame = (here or frames)[-1]
                place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
                self.found[f"{func.overloadpacket.__name__} in {place}"] += 1
        return func(*args, **(kwargs or {}))


def _waits(name: str, args: tuple) -> bool:
    if name in ("index", "index_put", "index_put_"):  # with a mask instead of positions
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name in _WAITING
