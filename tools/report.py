"""The report of a comparison: tables of AP, gain and cost from the lines of results.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from d2kd.files import write_atomically

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASKS = {"bbox": "Boxes", "segm": "Masks"}


def read_lines(output: Path) -> list[dict]:
    """The lines of results.jsonl in a comparison's folder; [] if there is none."""
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def by_arm(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> line, of the students."""
    arms: dict[str, dict[int, dict]] = {}
    for line in lines:
        if line["role"] == "student":
            arms.setdefault(line["arm"], {})[line["seed"]] = line
    return arms


# --- statistics ---------------------------------------------------------------------------------


def half_interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired_gains(arm: dict[int, dict], base: dict[int, dict], task: str, metric: str = "AP"):
    """Differences to the baseline, seed by seed, of the seeds that both have: (n,)."""
    seeds = [seed for seed in arm if seed in base]
    return np.array(
        [arm[s]["results"][task][metric] - base[s]["results"][task][metric] for s in seeds]
    )


def mean_and_error(values: np.ndarray) -> str:
    """``mean ± standard error``, without the error for a single value, "-" without a value."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    error = f" ± {stats.sem(values):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{error}"


def gain_text(gains: np.ndarray) -> str:
    """``mean ± half of the 95 % interval``, without the interval for a single seed."""
    if not len(gains):
        return "-"
    return f"{gains.mean():+.1f}" + (f" ± {half_interval(gains):.1f}" if len(gains) > 1 else "")


# --- tables -------------------------------------------------------------------------------------


def ap_table(lines: list[dict], task: str) -> str:
    """AP of all arms as mean and standard error, and paired gains, as Markdown."""
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    arms = {label: runs for label, runs in arms.items() if has_task(runs.values(), task)}
    rows = []
    for label, runs in arms.items():
        values = [[run["results"][task][metric] for run in runs.values()] for metric in METRICS]
        gains = paired_gains(runs, arms.get(baseline, {}), task)
        gain = "" if label == baseline else gain_text(gains)
        rows.append([label, len(runs), *(mean_and_error(np.array(v)) for v in values), gain])
    for line in lines:
        if line["role"] == "teacher" and task in line["results"]:
            values = [line["results"][task][metric] for metric in METRICS]
            rows.append(["teacher", "", *(mean_and_error(np.array([v])) for v in values), ""])
    headers = ["arm", "seeds", *METRICS, "gain in AP"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def cost_table(lines: list[dict]) -> str:
    """Iterations, time, memory and parameters of all arms, means over the seeds, as Markdown."""
    arms, baseline = by_arm(lines), lines[0]["baseline"]

    def mean(label: str, key: str) -> float:
        values = [run[key] for run in arms.get(label, {}).values() if run[key] is not None]
        return float(np.mean(values)) if values else float("nan")

    rows = []
    for label, runs in arms.items():
        step = mean(label, "step_seconds")
        rows.append(
            [
                label,
                f"{mean(label, 'iterations'):.0f}",
                f"{1000 * step:.0f}",
                f"{step / mean(baseline, 'step_seconds'):.2f}",
                f"{mean(label, 'train_seconds') / 60:.1f}",
                f"{mean(label, 'peak_memory_mib'):.0f}",
                f"{next(iter(runs.values()))['distillation_parameters']:,}",
            ]
        )
    memory = next(line["memory_of"] for line in lines if line["role"] == "student")
    headers = ["arm", "iterations", "ms a step", "x baseline", "minutes"]
    headers += [f"MiB ({memory})", "parameters added"]
    text = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return text.replace("nan", "-")


def has_task(lines, task: str) -> bool:
    return all(task in line["results"] for line in lines)


def markdown(lines: list[dict]) -> str:
    """The report of results.jsonl's lines, all tables, as Markdown."""
    students = [line for line in lines if line["role"] == "student"]
    if not students:
        return ""
    parts = [f"## {lines[0]['suite']}", ""] if lines[0]["suite"] else []
    for task, name in TASKS.items():
        if any(task in line["results"] for line in students):
            parts += [f"### {name}", "", ap_table(lines, task), ""]
    parts += ["### Cost", "", cost_table(lines), "", notes(students)]
    return "\n".join(parts)


def notes(students: list[dict]) -> str:
    """What the numbers of the tables are."""
    threads = sorted({line["threads"] for line in students})
    return (
        "AP: mean ± standard error over the seeds. Gain: difference to "
        f"'{students[0]['baseline']}', seed by seed, with its 95 % interval (Student's t). "
        f"Time a step: median, {'/'.join(map(str, threads))} CPU thread(s) a run. "
        "Parameters added are trained beside the student and not kept."
    )


def write_report(output: Path) -> str:
    """Write report.md into a comparison's folder; returns its text."""
    text = markdown(read_lines(output))
    write_atomically(output / "report.md", lambda path: Path(path).write_text(text + "\n"))
    return text
