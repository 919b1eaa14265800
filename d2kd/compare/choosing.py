"""The table that compares what d2kd choose decided with a full comparison of the same heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from . import tables

KEPT = ("candidates", "teacher", "stages", "seconds", "verdict")


def copied(path: Path) -> dict:
    """What a page needs of a choose.json: the rest is the settings of the machine's trainings."""
    state = json.loads(path.read_text())
    return {key: state[key] for key in KEPT}


def verdict(state: dict) -> str:
    """What a choose.json says in the end, and after how long."""
    return f"After {state['seconds'] / 60:.1f} minutes: `{state['verdict']['text']}`"


def in_rungs(state: dict, candidate: str) -> tuple[int, float]:
    """In how many rungs a candidate was, and its mean gain there, each as much as it is long."""
    rungs = [stage for name, stage in state["stages"].items() if name.startswith("rung ")]
    rungs = [rung for rung in rungs if rung["gains"].get(candidate)]
    gains = [np.mean(rung["gains"][candidate]) for rung in rungs]
    return len(rungs), float(np.average(gains, weights=[rung["iterations"] for rung in rungs]))


def markdown(choice: Path, results: Path) -> str:
    """Candidates of a choose.json that are runs of a comparison too ("SSIM, balanced" there is
    "SSIM balanced" here), in the order of the choice, with their gains in both, and the rank
    correlation of the two orders."""
    state, lines = json.loads(choice.read_text()), tables.read_lines(results)
    arms = {label.replace(",", ""): runs for label, runs in tables.by_arm(lines).items()}
    base = arms.pop(lines[0]["baseline"])
    found = {c: in_rungs(state, c) for c in state["candidates"] if c in arms}
    order = sorted(found, key=found.get, reverse=True)
    full = {candidate: tables.paired_gains(arms[candidate], base) for candidate in order}
    rows = [
        [c, found[c][0], f"{found[c][1]:+.1f}", len(full[c]), tables.gain_text(full[c])]
        for c in order
    ]
    headers = ["candidate", "rungs", "gain in the rungs", "seeds", "gain in the full comparison"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    means = [full[candidate].mean() for candidate in order]
    rank = stats.spearmanr(range(len(order), 0, -1), means).statistic
    return (
        f"{table}\n\nThe verdict, after {state['seconds'] / 60:.0f} minutes: "
        f"`{state['verdict']['text']}`. In the full comparison {order[int(np.argmax(means))]} is "
        f"the best of these; Spearman's rank correlation of the two orders is {rank:.2f}."
    )
