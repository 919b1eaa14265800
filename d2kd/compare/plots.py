"""The plots of a comparison: gains with their intervals, and curves of training, as SVG."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..files import write_atomically
from .tables import by_arm, controls_of, half_interval, mean_of, paired_gains, tasks_of

TASK_NAMES = {"bbox": "box AP", "segm": "mask AP"}
CONTROL, METHOD = "#b8bec7", "#3d6fb6"
# The same figures give the same file.
matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "d2kd", "font.size": 10, "axes.axisbelow": True})
matplotlib.rcParams["text.parse_math"] = False  # a "$" in a label is one


def save(figure: Figure, path: Path) -> None:
    options = {"format": path.suffix[1:], "bbox_inches": "tight", "metadata": {"Date": None}}
    write_atomically(path, lambda temporary: figure.savefig(temporary, **options))
    plt.close(figure)


def plot_gains(lines: list[dict], path: Path, times: bool = True) -> bool:
    """Bars of the paired gains in AP with 95 % intervals and the gain of each seed, each with the
    cost of a step. A bar of one seed, which has no interval, is hatched.

    Args:
        times: whether the machine was idle enough to show that cost.

    Returns:
        Whether there was anything to plot.
    """
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    base = arms.pop(baseline, {})
    found = {t: [paired_gains(runs, base, t) for runs in arms.values()] for t in tasks_of(lines)}
    found = {task: gains for task, gains in found.items() if any(map(len, gains))}
    if not found:
        return False
    size = 6.2, (0.42 * len(arms) + 1) * len(found)
    figure, axes = plt.subplots(len(found), figsize=size, squeeze=False, layout="constrained")
    controls = controls_of(lines)
    colours = [CONTROL if label in controls else METHOD for label in arms]
    labels = list(arms)
    if times:
        alone = mean_of(base, "step_seconds")
        costs = [mean_of(runs, "step_seconds") / alone for runs in arms.values()]
        labels = [f"{label}  ({cost:.2f}x a step)" for label, cost in zip(arms, costs, strict=True)]
    for axis, (task, gains) in zip(axes[:, 0], found.items(), strict=True):
        means = [g.mean() if len(g) else 0.0 for g in gains]
        errors = [half_interval(g) for g in gains]  # NaN, so no bar, with one seed
        bars = axis.barh(labels, means, xerr=errors, color=colours, height=0.62, capsize=3)
        for row, (bar, group) in enumerate(zip(bars, gains, strict=True)):
            if len(group) == 1:
                bar.set(facecolor="white", edgecolor=colours[row], hatch="///")
            points = {"markersize": 5, "markeredgecolor": "black", "zorder": 3}
            axis.plot(group, [row] * len(group), "o", color="white", **points)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"gain in {TASK_NAMES[task]} over '{baseline}'")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    save(figure, path)
    return True


# --- curves -------------------------------------------------------------------------------------


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Detection "loss" (of the student, without distillation) and "AP" by iteration, from a run's
    metrics.json. Where a resumed run went over iterations again, the last time counts."""
    loss, ap = {}, {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # of a process that was killed while it wrote
            continue
        if "total_loss" in entry:
            loss[entry["iteration"]] = entry["total_loss"] - entry.get("total_kd_loss", 0.0)
        if np.isfinite(entry.get("bbox/AP", np.nan)):
            ap[entry["iteration"]] = entry["bbox/AP"]
    return {"loss": loss, "AP": ap}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; at the ends of the values that there are."""
    kernel = np.ones(min(window, len(values)))
    ones = np.ones(len(values))
    return np.convolve(values, kernel, "same") / np.convolve(ones, kernel, "same")


def plot_curves(lines: list[dict], output: Path, name: str, path: Path) -> bool:
    """Curves of each arm, averaged over the seeds: of detection "loss" over iterations, or of "AP"
    over the time that the training steps took.

    Returns:
        Whether there was anything to plot; AP needs periodic evaluation.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    controls = controls_of(lines)
    for label, runs in by_arm(lines).items():
        metrics = [read_metrics(output / run["folder"] / "metrics.json") for run in runs.values()]
        curves = [m[name] for m in metrics if len(m[name]) > 1]
        if not curves:
            continue
        common = sorted(set.intersection(*map(set, curves)))
        mean = np.mean([[curve[i] for i in common] for curve in curves], axis=0)
        place = np.array(common, float)
        if name == "loss":
            mean = smooth(mean, max(len(mean) // 20, 1))
        else:
            place = (place + 1) * mean_of(runs, "step_seconds") / 60
        dashes, marker = "--" if label in controls else "-", "" if name == "loss" else "o"
        style = {"linestyle": dashes, "marker": marker, "markersize": 4, "linewidth": 1.4}
        # A space, because matplotlib leaves out labels that begin with "_".
        axis.plot(place, mean, label=f" {label}", **style)
    if not axis.lines:
        plt.close(figure)
        return False
    if name == "loss":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    else:
        axis.set(xlim=(0, None), ylim=(0, None))
    axis.set_ylabel("detection loss, without distillation" if name == "loss" else "box AP")
    axis.set_xlabel("iteration" if name == "loss" else "minutes of training steps")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    return True
