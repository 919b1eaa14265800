"""How long one image takes: the teacher, the student, and the files that it was exported to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from ..benchmark.steps import interleaved

WARM_UP = 3


@dataclass
class Latency:
    """Time of one image of the fixed size, from pixels to detections.

    Attributes:
        model: in words. device: "cpu" or "cuda".
        megabytes: of the file, or of the parameters.
        median_ms, percentile95_ms: over ``repeats`` calls.
    """

    model: str
    device: str
    megabytes: float
    median_ms: float
    percentile95_ms: float
    repeats: int


def measure(
    models: dict[str, tuple[Callable[[], object], float]], device: str, repeats: int
) -> list[Latency]:
    """The latency of each model, called in turn, so that a busy machine disturbs all equally.

    Args:
        models: in words -> a call of it with one image, and its megabytes.
    """
    calls = {name: call for name, (call, _) in models.items()}
    interleaved(calls, WARM_UP, device)
    seconds = interleaved(calls, repeats, device)
    rows = []
    for name, (_, megabytes) in models.items():
        median, high = 1000 * np.percentile(seconds[name], [50, 95])
        rows.append(Latency(name, device, megabytes, float(median), float(high), repeats))
    return rows


def latency_table(rows: list[Latency]) -> str:
    """The rows as Markdown."""
    cells = [
        [r.model, r.device, f"{r.megabytes:.1f}", f"{r.median_ms:.1f}", f"{r.percentile95_ms:.1f}"]
        for r in rows
    ]
    headers = ["model", "device", "MB", "median, ms", "95th percentile, ms"]
    return tabulate(cells, headers, tablefmt="pipe", disable_numparse=True)
