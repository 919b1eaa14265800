"""The tables of a comparison: AP, gain and cost from the lines of results.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from ..files import null_to_nan, write_text

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASKS = {"bbox": "Boxes", "segm": "Masks"}


def read_lines(path: Path) -> list[dict]:
    """The lines of a results.jsonl, NaN for a metric without a value; [] if there is none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{**line, "results": null_to_nan(line["results"])} for line in lines]


def by_arm(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> line, of the students."""
    arms: dict[str, dict[int, dict]] = {}
    for line in lines:
        if line["role"] == "student":
            arms.setdefault(line["arm"], {})[line["seed"]] = line
    return arms


def prepared(lines: list[dict]) -> list[dict]:
    """The teacher and the student that all arms start with, where a suite has them."""
    return [line for line in lines if line["role"] != "student"]


def is_control(run: dict) -> bool:
    """Whether a run is one of another length, which controls what longer training gains."""
    return run["times"] != 1 or bool(run["same_time_as"])


def tasks_of(lines: list[dict]) -> list[str]:
    """The tasks that all students were evaluated on."""
    students = [line for line in lines if line["role"] == "student"]
    return [task for task in TASKS if students and all(task in s["results"] for s in students)]


# --- statistics ---------------------------------------------------------------------------------


def half_interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean (Student's t); NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def paired_gains(
    arm: dict[int, dict], base: dict[int, dict], task: str = "bbox", metric: str = "AP"
) -> np.ndarray:
    """Differences to the baseline, seed by seed, of the seeds that both have: (n,)."""
    gains = [
        run["results"][task][metric] - base[seed]["results"][task][metric]
        for seed, run in arm.items()
        if seed in base
    ]
    return np.array([gain for gain in gains if np.isfinite(gain)])


def mean_of(runs: dict[int, dict], key: str) -> float:
    """Mean over the seeds of a cost; NaN where no run has it."""
    values = [run[key] for run in runs.values() if run[key] is not None]
    return float(np.mean(values)) if values else float("nan")


def error_text(values: list[float]) -> str:
    """``mean ± standard error``, without the error for a single value, "-" without a value."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return "-"
    return f"{finite.mean():.1f}" + (f" ± {stats.sem(finite):.1f}" if len(finite) > 1 else "")


def gain_text(gains: np.ndarray) -> str:
    """``mean ± half of the 95 % interval``, without the interval for a single seed."""
    if not len(gains):
        return "-"
    return f"{gains.mean():+.1f}" + (f" ± {half_interval(gains):.1f}" if len(gains) > 1 else "")


# --- tables -------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows of text under headers, with a title."""

    title: str
    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="pipe", disable_numparse=True)

    def html(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="html", disable_numparse=True)


def ap_table(lines: list[dict], task: str) -> Table:
    """AP of all arms as mean and standard error over the seeds, and paired gains."""
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    rows = []
    for label, runs in arms.items():
        values = [[run["results"][task][metric] for run in runs.values()] for metric in METRICS]
        gain = gain_text(paired_gains(runs, arms.get(baseline, {}), task))
        gain = "" if label == baseline else gain
        rows.append([label, str(len(runs)), *map(error_text, values), gain])
    for line in prepared(lines):
        if task in line["results"]:
            values = [[line["results"][task][metric]] for metric in METRICS]
            rows.append([line["role"], "", *map(error_text, values), ""])
    return Table(TASKS[task], ["arm", "seeds", *METRICS, "gain in AP"], rows)


def cost_table(lines: list[dict]) -> Table:
    """Iterations, time, memory and parameters of all arms, means over the seeds."""
    arms = by_arm(lines)
    base = arms.get(lines[0]["baseline"], {})
    rows = []
    for label, runs in arms.items():
        step = mean_of(runs, "step_seconds")
        cells = [
            f"{mean_of(runs, 'iterations'):.0f}",
            f"{1000 * step:.0f}",
            f"{step / mean_of(base, 'step_seconds'):.2f}",
            f"{mean_of(runs, 'train_seconds') / 60:.1f}",
            f"{mean_of(runs, 'peak_memory_mib'):.0f}",
            f"{max(run['distillation_parameters'] for run in runs.values()):,}",
        ]
        rows.append([label, *("-" if cell == "nan" else cell for cell in cells)])
    memory = "/".join(sorted({run["memory_of"] for runs in arms.values() for run in runs.values()}))
    headers = ["arm", "iterations", "ms per step", "x baseline", "minutes", f"MiB ({memory})"]
    return Table("Cost", [*headers, "parameters added"], rows)


def gains_table(suites: list[list[dict]]) -> Table:
    """The short table: AP of the baseline and the teacher, and what each arm gains.

    Args:
        suites: the lines of one comparison each, a column each.
    """
    columns = [_gains_column(lines) for lines in suites]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    return Table("", ["gain in AP", *(lines[0]["suite"] for lines in suites)], rows)


def _gains_column(lines: list[dict]) -> dict[str, str]:
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    base = arms.get(baseline, {})
    column = {}
    for line in prepared(lines):
        column[f"({line['role']}: AP)"] = error_text([line["results"]["bbox"]["AP"]])
    alone = error_text([run["results"]["bbox"]["AP"] for run in base.values()])
    column[f"({baseline}: AP)"] = alone
    for label, runs in arms.items():
        if label != baseline:
            column[label] = gain_text(paired_gains(runs, base))
    return column


def tables(lines: list[dict]) -> list[Table]:
    """All tables of a report; [] without a finished run."""
    if not by_arm(lines):
        return []
    return [*(ap_table(lines, task) for task in tasks_of(lines)), cost_table(lines)]


def markdown(lines: list[dict]) -> str:
    """All tables, and what their numbers are."""
    parts = [f"### {table.title}\n\n{table.markdown()}\n" for table in tables(lines)]
    return "\n".join([*parts, *([notes(lines)] if parts else [])])


def notes(lines: list[dict]) -> str:
    """What the numbers of the tables are."""
    students = [line for line in lines if line["role"] == "student"]
    threads = "/".join(sorted({str(line["threads"]) for line in students}))
    return (
        f"AP: mean ± standard error over the seeds. Gain: difference to '{lines[0]['baseline']}', "
        "seed by seed, with its 95 % interval (Student's t). Time a step: median; minutes: "
        f"training without evaluation, {threads} CPU thread(s) a run. Parameters added are trained "
        "in addition to the student and not kept."
    )


def write_markdown(output: Path, pictures: dict[str, str] | None = None) -> str:
    """Write report.md of the runs that finished; returns the tables.

    Args:
        pictures: title -> file in ``output``, to be shown after the tables.
    """
    lines = read_lines(output / "results.jsonl")
    text = markdown(lines)
    page = f"# {lines[0]['suite'] if lines and lines[0]['suite'] else 'Comparison'}\n\n{text}\n"
    for title, name in (pictures or {}).items():
        page += f"\n![{title}]({name})\n"
    write_text(page, output / "report.md")
    return text
