"""The tables of a comparison: AP, gain and cost from the lines of results.jsonl."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize, stats
from tabulate import tabulate

from ..engine.summary import METRICS
from ..files import null_to_nan, parse_json, shown, write_text

TASKS = {"bbox": "Boxes", "segm": "Masks"}
LINE_KEYS = ("suite", "baseline", "role", "arm", "config", "opts", "results")
RUN_KEYS = ("seed", "times", "same_time_as", "threads", "folder", "iterations", "step_seconds")
OVERALL = ("AP", "AP50", "AP75")  # of objects of all sizes
ALPHA, POWER = 0.05, 0.8  # chance of a false gain in a whole table; of finding a true one


def read_lines(path: Path) -> list[dict]:
    """The lines of a results.jsonl, NaN for a metric without a value; [] if there is none.

    Raises:
        ConfigError: a line is broken or of another kind; names it.
    """
    lines = []
    text = path.read_text(errors="replace") if path.is_file() else ""
    for number, row in enumerate(text.splitlines(), start=1):
        place = f"{shown(path)}: line {number}"
        line = parse_json(row, place, LINE_KEYS)
        if line["role"] == "student":
            parse_json(row, place, RUN_KEYS)
        lines.append({**line, "results": counted(line["results"])})
    return lines


def counted(results: dict[str, dict]) -> dict[str, dict]:
    """Results of a detector, 0 for the AP of one that found nothing: Detectron2 has no number for
    that, and a seed that collapsed must not drop out of a mean."""
    return {
        task: {
            name: 0.0 if name in OVERALL and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        for task, metrics in null_to_nan(results).items()
    }


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


def controls_of(lines: list[dict]) -> dict[str, dict]:
    """The arms that train the baseline for another time, which tells what time alone gains; of each
    its first line. A method that trains for longer is a method."""
    first = {label: next(iter(runs.values())) for label, runs in by_arm(lines).items()}
    base = first.pop(lines[0]["baseline"], None) if lines else None
    return {
        label: run
        for label, run in first.items()
        if run["same_time_as"]
        or run["times"] != 1
        and (base is None or all(run[key] == base[key] for key in ("config", "opts")))
    }


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
        of_task(run, task, metric) - of_task(base[seed], task, metric)
        for seed, run in arm.items()
        if seed in base
    ]
    return np.array([gain for gain in gains if np.isfinite(gain)])


def of_task(line: dict, task: str, metric: str) -> float:
    """A metric of a line; NaN where the evaluator has none of that name."""
    return line["results"].get(task, {}).get(metric, np.nan)


def holm(gains: list[np.ndarray]) -> list[tuple[float, float]]:
    """Paired t-tests of several arms with Holm's correction for their number.

    Args:
        gains: of each arm, seed by seed.

    Returns:
        Of each arm p-value and half the width of the interval, NaN for a single seed. An interval
        leaves zero out exactly where p is below ``ALPHA``.
    """
    tested = [i for i, values in enumerate(gains) if len(values) > 1]
    alone = {i: _t_test(gains[i]) for i in tested}
    found = [(np.nan, np.nan)] * len(gains)
    largest, alpha = 0.0, ALPHA
    for rank, i in enumerate(sorted(tested, key=alone.get)):
        if largest < ALPHA:  # the first that is not significant ends Holm's descent
            alpha = ALPHA / (len(tested) - rank)
        largest = max(largest, min(alone[i] * (len(tested) - rank), 1.0))
        freedom = len(gains[i]) - 1
        found[i] = largest, float(stats.t.ppf(1 - alpha / 2, freedom) * stats.sem(gains[i]))
    return found


def _t_test(gains: np.ndarray) -> float:
    """p-value of the mean of paired differences, against zero, of both sides."""
    error, mean = stats.sem(gains), abs(gains.mean())
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(mean / error, len(gains) - 1))


def detectable_gain(gains: list[np.ndarray], count: int) -> float:
    """The smallest true gain that ``count`` seeds show with a chance of ``POWER``.

    The spread of the differences is that of all arms together: of one arm's few seeds it is hardly
    known. The level is Bonferroni's, the strictest of Holm's.
    """
    several = [values for values in gains if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom or count < 2:
        return float("nan")
    spread = np.sqrt(sum(values.var(ddof=1) * (len(values) - 1) for values in several) / freedom)
    least = stats.t.ppf(1 - ALPHA / len(several) / 2, count - 1)  # t of a gain that is shown

    def missing(shift: float) -> float:
        """What the power of the test lacks where t is shifted by a true gain."""
        return POWER - float(stats.nct.sf(least, count - 1, shift))

    return float(optimize.brentq(missing, 0, 4 * least + 10) * spread / np.sqrt(count))


def mean_of(runs: dict[int, dict], key: str) -> float:
    """Mean over the seeds of a cost; NaN where no run has it."""
    values = [run[key] for run in runs.values() if run.get(key) is not None]
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


def plain_markdown(text: str) -> str:
    """``text`` in Markdown that shows it as it is, whatever characters it has."""
    # An underscore within a word is one.
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


# --- tables -------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows of text under headers, with a title."""

    title: str
    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        rows = [[plain_markdown(cell) for cell in row] for row in self.rows]
        return tabulate(rows, self.headers, tablefmt="pipe", disable_numparse=True)

    def html(self) -> str:
        return tabulate(self.rows, self.headers, tablefmt="html", disable_numparse=True)


def ap_table(lines: list[dict], task: str) -> Table:
    """AP of all arms as mean and standard error over the seeds, and paired gains."""
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    rows = []
    for label, runs in arms.items():
        values = [[of_task(run, task, metric) for run in runs.values()] for metric in METRICS]
        gain = gain_text(paired_gains(runs, arms.get(baseline, {}), task))
        gain = "" if label == baseline else gain
        rows.append([label, str(len(runs)), *map(error_text, values), gain])
    for line in prepared(lines):
        if task in line["results"]:
            values = [[of_task(line, task, metric)] for metric in METRICS]
            rows.append([line["role"], "", *map(error_text, values), ""])
    return Table(TASKS[task], ["run", "seeds", *METRICS, "gain in AP"], rows)


def gain_table(lines: list[dict], task: str) -> Table | None:
    """What each method gains over the control of equal time, else over the baseline, with Holm's
    correction for the number of methods; None where no method has two seeds."""
    arms, baseline, controls = by_arm(lines), lines[0]["baseline"], controls_of(lines)
    methods = [name for name in arms if name != baseline and name not in controls]
    references = {label: reference_of(label, controls, baseline) for label in methods}
    gains = [paired_gains(arms[name], arms.get(references[name], {}), task) for name in methods]
    if not any(len(values) > 1 for values in gains):
        return None
    rows = []
    for label, values, (p, half) in zip(methods, gains, holm(gains), strict=True):
        least = detectable_gain(gains, len(values))
        interval = "" if np.isnan(half) else f" ± {half:.1f}"
        cells = [f"{values.mean():+.1f}{interval}" if len(values) else "-"]
        cells += ["-" if np.isnan(p) else f"{p:.3f}", "-" if np.isnan(least) else f"{least:.1f}"]
        rows.append([label, references[label], str(len(values)), *cells])
    headers = ["run", "against", "seeds", "gain in AP", "p", "detectable"]
    return Table(f"{TASKS[task]}: gains, tested", headers, rows)


def reference_of(label: str, controls: dict[str, dict], baseline: str) -> str:
    """The arm that tells what a method's time is worth without it: the baseline for the method's
    own time, for another method's, or for more iterations; the baseline where there is none.

    Args:
        controls: see :func:`controls_of`.
    """
    longer = [name for name, run in controls.items() if run["same_time_as"] or run["times"] > 1]

    def rank(name: str) -> tuple[bool, bool]:
        return controls[name]["same_time_as"] != label, not controls[name]["same_time_as"]

    return min(longer, key=rank, default=baseline)


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
            f"{max(run.get('distillation_parameters', 0) for run in runs.values()):,}",
        ]
        rows.append([label, *("-" if cell == "nan" else cell for cell in cells)])
    kinds = {run.get("memory_of", "?") for runs in arms.values() for run in runs.values()}
    memory = "/".join(sorted(kinds))
    headers = ["run", "iterations", "ms per step", "x baseline", "minutes", f"MiB ({memory})"]
    return Table("Cost", [*headers, "parameters added"], rows)


def gains_table(suites: list[list[dict]]) -> Table:
    """The short table: AP of the baseline and the teacher, and what arms of several suites gain.

    Args:
        suites: the lines of one comparison each, a column each.
    """
    columns = [_gains_column(lines) for lines in suites]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [
        [label, *(column.get(label, "-") for column in columns)]
        for label in labels
        if sum(label in column for column in columns) >= min(2, len(columns))
    ]
    return Table("", ["gain in AP", *(lines[0]["suite"] for lines in suites)], rows)


def _gains_column(lines: list[dict]) -> dict[str, str]:
    arms, baseline = by_arm(lines), lines[0]["baseline"]
    base = arms.get(baseline, {})
    column = {}
    for line in prepared(lines):
        column[f"({line['role']}: AP)"] = error_text([line["results"]["bbox"]["AP"]])
    own = [run["results"]["bbox"]["AP"] for run in base.values()]
    column[f"({baseline}: AP)"] = error_text(own)
    for label, runs in arms.items():
        if label != baseline:
            column[label] = gain_text(paired_gains(runs, base))
    return column


def tables(lines: list[dict]) -> list[Table]:
    """All tables of a report; [] without a finished run."""
    if not by_arm(lines):
        return []
    of_tasks = [make(lines, t) for t in tasks_of(lines) for make in (ap_table, gain_table)]
    return [*filter(None, of_tasks), cost_table(lines)]


def markdown(lines: list[dict]) -> str:
    """All tables, and what their numbers are."""
    parts = [f"### {table.title}\n\n{table.markdown()}\n" for table in tables(lines)]
    return "\n".join([*parts, *([plain_markdown(notes(lines))] if parts else [])])


def notes(lines: list[dict]) -> str:
    """What the numbers of the tables are."""
    students = [line for line in lines if line["role"] == "student"]
    threads = "/".join(sorted({str(line["threads"]) for line in students}))
    return (
        f"AP: mean ± standard error over the seeds. Gain: difference to '{lines[0]['baseline']}', "
        "seed by seed, with its 95 % interval (Student's t). Gains, tested: intervals and p of "
        "a paired t-test with Holm's correction for the number of methods; detectable: the "
        f"smallest true gain that so many seeds show in {100 * POWER:.0f} % of cases. Time a step: "
        "median; minutes: "
        f"training without evaluation, {threads} CPU thread(s) a run. Parameters added are trained "
        "in addition to the student and not kept."
    )


def write_markdown(lines: list[dict], output: Path, pictures: dict[str, str] | None = None) -> str:
    """Write report.md of the runs that finished; returns the tables.

    Args:
        pictures: title -> file in ``output``, to be shown after the tables.
    """
    text = markdown(lines)
    title = plain_markdown(lines[0]["suite"] if lines else "") or "Comparison"
    page = f"# {title}\n\n{text}\n"
    for title, name in (pictures or {}).items():
        page += f"\n![{title}]({name})\n"
    write_text(page, output / "report.md")
    return text
