"""The machine on which a file's rows were measured, and its name in a line below a table."""

from __future__ import annotations

import platform
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """What is written with measured rows: PyTorch's version, the device, its threads."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "torch": torch.__version__,
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def machine_text(where: dict[str, Any]) -> str:
    """:func:`machine` in words."""
    return f"{where['device']}, {where['threads']} threads, PyTorch {where['torch']}"
