"""Choosing a head and its weight for a pair: rungs of short trainings, a confirmation, a verdict.

Each rung trains the baseline and the candidates that are left from one seed, the same start and
data order, and keeps the better half; a later rung trains for longer, with another seed. The winner
is then trained with fresh seeds, and with it the baseline and the control of equal time. All
trainings are comparisons (:mod:`d2kd.compare.comparison`), so that what was stopped goes on; what
was decided is in ``choose.json``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import stretched
from ..engine.setup import merged_config
from ..errors import ConfigError
from ..files import read_json, write_json, write_text
from .candidates import Pair, candidates, examine, winners_config
from .comparison import Comparison
from .halving import Pace, fitting_iterations, kept_of, seconds_of, stages
from .processes import lock_file
from .report import write_report
from .suite import Arm, Suite, as_list, check_suite, first_difference, settings_of
from .tables import (
    POWER,
    TASKS,
    Table,
    by_arm,
    counted,
    detectable_gain,
    gain_text,
    half_interval,
    mean_of,
    paired_gains,
    plain_markdown,
)

BASELINE, CONTROL = "baseline", "baseline, equal time"
PROBE, CONFIRMATION = "pace", "confirmation"
PROBE_ITERATIONS = 20
MIN_ITERATIONS = 40  # of the longest trainings: below that no AP says anything
MIN_AP = 5.0  # of the baseline: below that gains are mostly noise
STATE_KEYS = ("settings", "seconds", "candidates", "refused", "teacher", "stages")


@dataclass(frozen=True)
class Limits:
    """What a choice may cost, and how it judges.

    Args:
        minutes: of wall time, in all.
        seeds: of the confirmation.
        jobs: runs at a time; ``threads``: CPU threads of each.
        task: the task whose AP decides, "bbox" or "segm".
        any_teacher: go on with a teacher that is not ahead of the baseline.
        imports: modules that the trainings import first.
    """

    minutes: float = 30.0
    seeds: int = 3
    jobs: int = 1
    threads: int = 1
    task: str = "bbox"
    any_teacher: bool = False
    imports: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        beats: whether the winner is above the baseline in equal time, with 95 % confidence.
        text: in a sentence.
        winner: its label; "" where nothing was confirmed.
    """

    beats: bool
    text: str
    winner: str = ""


class Choice:
    """A choice in one output folder, from where it was left.

    Args:
        pair: student, teacher and data.
        heads: names to choose from; weights: see :func:`~d2kd.compare.candidates.candidates`.
        output: folder of all that is written.
        limits: what it may cost.

    Raises:
        ConfigError: in one line, before anything is trained.
    """

    def __init__(
        self, pair: Pair, heads: list[str], weights: list[str], output: Path, limits: Limits
    ):
        self.pair, self.output, self.limits = pair, output, limits
        self.path, self.read_at = output / "choose.json", time.monotonic()
        known = candidates(pair.cfg(), heads, weights)
        settings = settings_of(pair.cfg(next(iter(known.values()))))
        settings |= {"--heads, --weights": ", ".join(known), "--task": limits.task}
        self.state = read_json(self.path, STATE_KEYS) if self.path.is_file() else {}
        difference = first_difference(self.state.get("settings", {}), settings)
        if difference and self.state["stages"].keys() - {PROBE}:
            raise ConfigError(
                f"{output} holds a choice made with other settings: {difference}; "
                "give another --output"
            )
        if difference or not self.state:
            refused, teacher = examine(pair, heads, output)
            served = [head for head in heads if head not in refused]
            self.state = {
                "settings": settings,
                "seconds": 0.0,
                "candidates": list(candidates(pair.cfg(), served, weights)),
                "refused": refused,
                "teacher": {t: m["AP"] for t, m in counted(teacher).items() if t in TASKS},
                "stages": {},
            }
        self.opts = {label: known[label] for label in self.state["candidates"]}

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> Verdict:
        """Train what there is to train, judge, and write the report.

        Raises:
            ConfigError: the time is too short, the baseline cannot be trained, or another process
                is at work in the folder.
            KeyboardInterrupt: what was done is kept.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with lock_file(self.output / ".choose.lock", str(self.output)):
            try:
                verdict = self._run()
            finally:
                self.save()
            self.report(verdict)
        return verdict

    def _run(self) -> Verdict:
        limits = self.limits
        left, to_do = list(self.opts), stages(len(self.opts), limits.seeds)
        probe = [self.arm(BASELINE, PROBE_ITERATIONS, range(1, limits.jobs + 1))]
        lines = self.stage(PROBE, probe)
        for number in range(1, len(to_do)):
            if verdict := self.teacher_is_behind(lines):
                return verdict
            name = f"rung {number}"
            iterations = self.length(name, to_do[number - 1 :], lines)
            arms = [self.arm(label, iterations, [number]) for label in (BASELINE, *left)]
            lines = self.stage(name, arms)
            left = self.ranked(left)[: kept_of(len(left))]
            for path in self.folder(name).glob("*/*.pth"):
                path.unlink()  # the weights of a hundred runs would fill a disk
        if verdict := self.teacher_is_behind(lines):
            return verdict
        (winner,) = left
        iterations = self.length(CONFIRMATION, to_do[-1:], lines)
        seeds = range(len(to_do), len(to_do) + limits.seeds)
        arms = [self.arm(label, iterations, seeds) for label in (BASELINE, winner)]
        control = Arm(CONTROL, arms[0].config, tuple(seeds), arms[0].opts, same_time_as=winner)
        lines = self.stage(CONFIRMATION, [*arms, control])
        return self.teacher_is_behind(lines) or self.judge(lines, winner)

    def folder(self, stage: str) -> Path:
        return self.output / stage.replace(" ", "_")

    def arm(self, label: str, iterations: int, seeds: Iterable[int]) -> Arm:
        """The baseline or a candidate, trained for so many iterations; schedules keep their
        proportions."""
        opts = {**self.pair.opts, **self.opts.get(label, {})}
        own = stretched(merged_config(self.pair.config, as_list(opts)), iterations)
        return Arm(label, self.pair.config, tuple(seeds), {**opts, **own})

    def length(self, name: str, to_do: list, lines: list[dict]) -> int:
        """Iterations of a stage, such that it and all that follow fit into the time that is left.

        Args:
            lines: of the stage before, by whose pace this one is planned.

        Raises:
            ConfigError: they do not fit, and nothing but the pace was trained yet.
        """
        if name in self.state["stages"]:
            return self.state["stages"][name]["iterations"]
        pace, jobs = self.pace(lines), self.limits.jobs
        self.save()
        seconds = 60 * self.limits.minutes - self.state["seconds"]
        longest = fitting_iterations(to_do, seconds, pace, jobs)
        if longest < MIN_ITERATIONS and len(self.state["stages"]) == 1:
            needed = self.state["seconds"] + seconds_of(to_do, MIN_ITERATIONS, pace, jobs)
            raise ConfigError(
                f"--minutes {self.limits.minutes:g} are too few for {len(self.opts)} candidates: "
                f"about {math.ceil(needed / 60)} are needed at least; name fewer --heads or "
                "--weights"
            )
        longest = min(max(longest, MIN_ITERATIONS), self.pair.cfg().SOLVER.MAX_ITER)
        return max(round(to_do[0].share * longest), 1)

    def pace(self, lines: list[dict]) -> Pace:
        """What runs cost, by those of the last stage."""
        arms = by_arm(lines)
        alone = arms.pop(BASELINE)
        step = mean_of(alone, "step_seconds")
        overheads = [s["overhead"] for s in self.state["stages"].values() if "overhead" in s]
        pace = Pace(step, overheads[-1] if overheads else 0.0)
        if not arms:
            return pace

        def each(run: dict) -> float:
            return run["train_seconds"] / run["iterations"]

        distilled = [each(run) for runs in arms.values() for run in runs.values()]
        return pace._replace(ratio=float(np.mean(distilled)) / each(next(iter(alone.values()))))

    def stage(self, name: str, arms: list[Arm]) -> list[dict]:
        """Train arms, from where it was left; the lines of what finished."""
        folder, limits = self.folder(name), self.limits
        suite = Suite(name, BASELINE, {arm.label: arm for arm in arms})
        check_suite(suite, "d2kd choose")
        comparison = Comparison(
            suite, folder, jobs=limits.jobs, threads=limits.threads, imports=limits.imports
        )
        record = self.state["stages"].setdefault(
            name,
            {
                "arms": [arm.label for arm in arms],
                "iterations": arms[0].opts["SOLVER.MAX_ITER"],
                "seeds": list(arms[0].seeds),
            },
        )
        is_new = not folder.exists()
        self.save()
        runs = comparison.runs()
        if any(comparison.results(*run) is None for run in runs):
            print(f"{name}: {record['iterations']} iterations, {len(runs)} x", flush=True)
        failed = comparison.run()
        for run, why in failed.items():
            if run.startswith(f"{BASELINE} "):
                raise ConfigError(why)
        lines = comparison.lines()
        lines = [{**line, "results": counted(line["results"])} for line in lines]
        seconds = self.save()
        if is_new:
            waves = math.ceil(len(runs) / limits.jobs)
            training = np.mean([line["train_seconds"] for line in lines])
            record["overhead"] = max(seconds / waves - float(training), 0.0)
        trained = by_arm(lines)
        base = trained.pop(BASELINE)
        record["gains"] = {
            label: paired_gains(runs, base, limits.task).tolist() for label, runs in trained.items()
        }
        record["baseline"] = self.baseline_ap(lines)
        if name != PROBE and record["baseline"] < MIN_AP:
            print(_TOO_EARLY.format(record["baseline"]), flush=True)
        self.save()
        return lines

    def save(self) -> float:
        """Write ``choose.json``; the seconds since the last time."""
        now = time.monotonic()
        seconds, self.read_at = now - self.read_at, now
        self.state["seconds"] += seconds
        write_json(self.state, self.path)
        return seconds

    # --- judging ----------------------------------------------------------------------------------

    def score(self, label: str) -> float:
        """Mean gain over the rungs so far, each as much as it is long; -inf for one that failed."""
        rungs = [rung for rung in self.rungs().values() if label in rung["arms"]]
        gains = [np.mean(rung["gains"].get(label) or [-math.inf]) for rung in rungs]
        return float(np.average(gains, weights=[rung["iterations"] for rung in rungs]))

    def ranked(self, labels: list[str]) -> list[str]:
        return sorted(labels, key=self.score, reverse=True)

    def teacher_is_behind(self, lines: list[dict]) -> Verdict | None:
        """NO GAIN where the teacher's AP is not above the baseline's: of weights that do not fit,
        classes in another order, or one that was hardly trained, nothing can be learned."""
        teacher, alone = self.state["teacher"].get(self.limits.task), self.baseline_ap(lines)
        if teacher is None or self.limits.any_teacher or teacher > alone:
            return None
        return Verdict(
            False,
            f"NO GAIN: the teacher has {teacher:.1f} AP, the baseline {alone:.1f} after a short "
            "training: check the teacher's weights, classes and INPUT.FORMAT (--any-teacher goes "
            "on with it)",
        )

    def baseline_ap(self, lines: list[dict]) -> float:
        runs = by_arm(lines)[BASELINE].values()
        return float(np.mean([run["results"][self.limits.task]["AP"] for run in runs]))

    def judge(self, lines: list[dict], winner: str) -> Verdict:
        """The verdict of the confirmation: the winner must be above the baseline with its time, and
        with less, where that is better."""
        arms, task = by_arm(lines), self.limits.task
        if winner not in arms or CONTROL not in arms:
            return Verdict(False, f"NO GAIN: the confirmation of {winner} failed", winner)

        def surely(gains: np.ndarray) -> float:
            """The lower end of their interval, which a single seed does not have."""
            return gains.mean() - half_interval(gains) if len(gains) > 1 else -math.inf

        both = [paired_gains(arms[winner], arms[other], task) for other in (CONTROL, BASELINE)]
        gains = min(both, key=surely)
        if surely(gains) > 0:
            gain = gain_text(gains).removeprefix("+")
            return Verdict(True, f"{winner} BEATS the baseline by {gain} AP in equal time", winner)
        least = detectable_gain([gains], len(gains))
        shows = f"{len(gains)} seeds would detect {least:.1f} AP in {100 * POWER:.0f} % of cases"
        return Verdict(
            False,
            f"NO GAIN: {winner}, the best of {len(self.opts)}, has {gain_text(gains)} AP over the "
            f"baseline in equal time; {shows if len(gains) > 1 else 'one seed shows none'}",
            winner,
        )

    # --- the report -------------------------------------------------------------------------------

    def report(self, verdict: Verdict) -> None:
        """Write choose.md, winner.yaml, and the report of the confirmation."""
        self.state["verdict"] = asdict(verdict)
        self.save()
        parts = [f"# d2kd choose\n\n**{plain_markdown(verdict.text)}**\n"]
        for task, ap in self.state["teacher"].items():
            parts.append(f"The teacher has {ap:.1f} AP ({TASKS[task].lower()}).\n")
        if verdict.winner:
            text = winners_config(self.pair, self.opts[verdict.winner], verdict.text)
            write_text(text, self.output / "winner.yaml")
            parts += [
                f"The config to train with: [winner.yaml](winner.yaml). The confirmation, with "
                f"pictures: [{CONFIRMATION}/report.html]({CONFIRMATION}/report.html).\n",
                write_report(self.folder(CONFIRMATION)),
            ]
        table = self.table()
        if len(table.rows) > 1:
            parts.append(f"## {table.title}\n\n{table.markdown()}\n\n{_NOTES}\n")
            lowest = min(rung["baseline"] for rung in self.rungs().values())
            if lowest < MIN_AP:
                parts.append(_TOO_EARLY.format(lowest) + "\n")
        if self.state["refused"]:
            lines = (f"* {plain_markdown(why)}" for why in self.state["refused"].values())
            parts.append("## What the pair cannot serve\n\n" + "\n".join(lines) + "\n")
        write_text("\n".join(parts), self.output / "choose.md")

    def table(self) -> Table:
        """Gains of all candidates, rung by rung, the best first."""
        rungs = self.rungs()
        depth = {c: sum(c in rung["arms"] for rung in rungs.values()) for c in self.opts}
        labels = sorted(self.ranked(list(self.opts)) if rungs else [], key=depth.get, reverse=True)
        rows = [["(baseline: AP)", *(f"{rung['baseline']:.1f}" for rung in rungs.values()), ""]]
        for label in labels:
            cells = ["" for _ in rungs]
            for place, rung in enumerate(rungs.values()):
                if label in rung["arms"]:
                    gains = rung["gains"].get(label)
                    cells[place] = f"{np.mean(gains):+.1f}" if gains else "failed"
            score = self.score(label)
            rows.append([label, *cells, f"{score:+.1f}" if math.isfinite(score) else "failed"])
        headers = [f"{name}: {rung['iterations']} iterations" for name, rung in rungs.items()]
        return Table(f"The {len(labels)} candidates", ["gain in AP", *headers, "mean"], rows)

    def rungs(self) -> dict[str, dict[str, Any]]:
        """The rungs that are finished, by name."""
        stages = self.state["stages"].items()
        return {name: s for name, s in stages if name.startswith("rung ") and "gains" in s}


_TOO_EARLY = (
    "With a baseline of {:.1f} AP gains are mostly noise: start from a trained student "
    "(MODEL.WEIGHTS), give more --minutes, or name fewer --heads and --weights."
)
_NOTES = (
    "One seed a rung, the same for all of a rung; the better half goes on. A rung's gains chose, "
    "so they flatter the winner; the confirmation has seeds that chose nothing. It has the same "
    "validation images, though: a figure to publish wants images that were in neither."
)
