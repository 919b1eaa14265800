"""What a comparison adds to the receipts of its students: the gain, also over equal time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..engine.output import RECEIPT_FILE
from ..files import write_json
from .tables import by_arm, controls_of, half_interval, paired_gains, tasks_of


def complete_receipts(lines: list[dict], output: Path) -> None:
    """Write into the receipt of each student but the baseline how its arm compares, so far.

    Args:
        lines: of results.jsonl.
        output: folder of the runs.
    """
    arms = by_arm(lines)
    base = lines[0]["baseline"] if lines else ""
    no_methods = {base, *controls_of(lines)}
    for label, runs in arms.items():
        if label in no_methods:
            continue
        compared = {
            "suite": lines[0]["suite"],
            "baseline": base,
            "gain": _gains(runs, arms.get(base, {}), lines),
            "over_equal_time": {
                control: _gains(runs, others, lines)
                for control, others in arms.items()
                if all(run["same_time_as"] == label for run in others.values())
            },
        }
        for run in runs.values():
            path = output / run["folder"] / RECEIPT_FILE
            if path.is_file():  # else it is a run of an earlier version
                receipt = json.loads(path.read_text())
                if receipt["compared"] != compared:
                    write_json({**receipt, "compared": compared}, path)


def _gains(runs: dict[int, dict], others: dict[int, dict], lines: list[dict]) -> dict[str, dict]:
    """Task -> gain in AP over ``others``, seed by seed, with half of its 95 % interval."""
    gains = {task: paired_gains(runs, others, task) for task in tasks_of(lines)}
    return {
        task: {
            "mean": float(np.mean(values)),
            "half_interval": half_interval(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        for task, values in gains.items()
        if len(values)
    }
