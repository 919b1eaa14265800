"""The table that compares what d2kd choose decided with a full comparison of the same heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from d2kd.compare import tables

KEPT = ("candidates", "teacher", "stages", "seconds", "verdict")


def copied(path: Path) -> dict:
    """What a page needs of a choose.json: the rest is the settings of the machine's trainings."""
    state = json.loads(path.read_text())
    return {key: state[key] for key in KEPT}


def head_of(candidate: str) -> str:
    """ "SSIM x3" and "SSIM balanced" are SSIM."""
    return candidate.split(" ")[0]


def gains_in_rungs(state: dict) -> dict[str, tuple[int, float, str]]:
    """Head -> rungs that its best candidate was in, its mean gain there, and its name."""
    rungs = [stage for name, stage in state["stages"].items() if name.startswith("rung ")]
    best: dict[str, tuple[int, float, str]] = {}
    for candidate in state["candidates"]:
        inside = [rung for rung in rungs if rung["gains"].get(candidate)]
        if not inside:
            continue
        lengths = [rung["iterations"] for rung in inside]
        gains = [np.mean(rung["gains"][candidate]) for rung in inside]
        found = len(inside), float(np.average(gains, weights=lengths)), candidate
        best[head_of(candidate)] = max(best.get(head_of(candidate), found), found)
    return best


def markdown(choice: Path, results: Path) -> str:
    """Heads in the order of ``choice`` (a choose.json), with their gains in ``results`` (the
    results.jsonl of d2kd compare), the rank correlation of the two orders, and both winners."""
    state, lines = json.loads(choice.read_text()), tables.read_lines(results)
    arms = tables.by_arm(lines)
    base = arms[lines[0]["baseline"]]
    best = gains_in_rungs(state)
    heads = sorted((h for h in best if h in arms), key=best.get, reverse=True)
    full = {head: tables.paired_gains(arms[head], base) for head in heads}
    rows = [
        [head, best[head][2], f"{best[head][1]:+.1f}", best[head][0], tables.gain_text(full[head])]
        for head in heads
    ]
    headers = [
        "head",
        "best candidate",
        "gain in its rungs",
        "rungs",
        "gain, full comparison",
    ]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    order = range(len(heads), 0, -1)
    rank = stats.spearmanr(order, [full[head].mean() for head in heads]).statistic
    first = max(heads, key=lambda head: full[head].mean())
    seeds = max(len(gains) for gains in full.values())
    return (
        f"{table}\n\n`{state['verdict']['text']}` ({state['seconds'] / 60:.0f} minutes). The best "
        f"head of the full comparison with {seeds} seeds is {first}; Spearman's rank correlation "
        f"of the two orders is {rank:.2f}."
    )
