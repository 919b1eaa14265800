"""The runs of a suite in one output folder: what there is to do, to keep and to refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ..config import stretched, student_config
from ..data.loading import release
from ..detectors.weights import RANDOM_WEIGHTS, load_teacher_weights
from ..engine.setup import build_parser, merged_config, read_config
from ..engine.trainer import DistillTrainer
from ..errors import ConfigError
from ..files import read_json, write_json, write_text
from .processes import LocalProcesses, run_in_order
from .ray_processes import RayProcesses
from .receipts import complete_receipts
from .suite import (
    Arm,
    Suite,
    as_list,
    fingerprint,
    first_difference,
    settings_of,
    uses_teacher,
    weights_of,
)
from .tables import read_lines, write_markdown

# What a finished run says at least.
RESULT_KEYS = ("results", "iterations", "step_seconds", "hook_seconds")
# Overrides of all trainings, before an arm's own.
DEFAULTS = {"DATALOADER.NUM_WORKERS": 0, "DISTILL.TEACHER.CHECK": False}


class Comparison:
    """The runs of a suite in one output folder.

    Args:
        suite: what to train.
        output: folder of the runs; ``<arm>_<seed>`` each.
        jobs: runs at a time; ``threads``: CPU threads of each.
        keep_checkpoints: leave a finished run's checkpoints of the way.
        imports: modules that the trainings import first.
        processes: where trainings run; default: on this machine.
    """

    def __init__(
        self,
        suite: Suite,
        output: Path,
        *,
        jobs: int,
        threads: int,
        keep_checkpoints: bool = False,
        imports: Sequence[str] = (),
        processes: RayProcesses | None = None,
    ):
        self.suite, self.output, self.jobs, self.threads = suite, output, jobs, threads
        self.keep_checkpoints = keep_checkpoints
        self.imports = [f"--import={name}" for name in imports]
        self.processes = processes or LocalProcesses(jobs)

    # --- what there is to do -----------------------------------------------------------------

    def runs(
        self, labels: list[str] | None = None, seeds: list[int] | None = None
    ) -> list[tuple[Arm, int]]:
        """Arms and seeds, seed by seed, so that what is there at any time can be compared."""
        arms = [arm for arm in self.suite.arms.values() if labels is None or arm.label in labels]
        wanted = self.suite.seeds if seeds is None else seeds
        return [(arm, s) for s in wanted for arm in arms if s in arm.seeds]

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.output / f"{arm.slug}_{seed}"

    def results(self, arm: Arm, seed: int) -> dict | None:
        """What results.json of a run says; None as long as there is none."""
        path = self.folder(arm, seed) / "results.json"
        return read_json(path, RESULT_KEYS) if path.is_file() else None

    def own_opts(self, arm: Arm, seed: int) -> dict:
        return {"SEED": seed, "OUTPUT_DIR": str(self.folder(arm, seed))}

    def needs(self, arm: Arm) -> list[Arm]:
        """The arms whose times decide how long ``arm`` trains."""
        labels = [self.suite.baseline, arm.same_time_as] if arm.same_time_as else []
        return [self.suite.arms[label] for label in labels]

    def ready(self, run: tuple[Arm, int]) -> bool:
        arm, seed = run
        return all(self.results(other, seed) is not None for other in self.needs(arm))

    def config(self, arm: Arm, seed: int) -> tuple[CfgNode, dict]:
        """The config of a run, which is :meth:`ready`, and all overrides that make it."""
        opts = {**DEFAULTS, **arm.opts, **self.own_opts(arm, seed)}
        cfg = merged_config(arm.config, as_list(opts))
        iterations = round(cfg.SOLVER.MAX_ITER * arm.times)
        if arm.same_time_as:
            base, other = (self.results(a, seed) for a in self.needs(arm))
            iterations = same_time_iterations(base, other)
        if iterations != cfg.SOLVER.MAX_ITER:
            opts |= stretched(cfg, iterations)
            cfg = merged_config(arm.config, as_list(opts))
        return cfg, opts

    # --- checks before anything runs -----------------------------------------------------------

    def check(self, runs: list[tuple[Arm, int]]) -> None:
        """Check the config of each arm that is not finished, and that no run waits in vain."""
        todo = [(arm, seed) for arm, seed in runs if self.results(arm, seed) is None]
        for arm, seed in todo:
            for other in self.needs(arm):
                if (other, seed) not in runs and self.results(other, seed) is None:
                    raise ConfigError(
                        f"arm '{arm.label}' needs a run of '{other.label}' with seed {seed}"
                    )
        prepared = self.suite.prepared if todo else ()
        to_check = [(arm, arm.opts) for arm in prepared if not Path(weights_of(arm)).is_file()]
        first_runs = {arm.label: (arm, seed) for arm, seed in reversed(todo)}.values()
        to_check += [(arm, {**arm.opts, **self.own_opts(arm, seed)}) for arm, seed in first_runs]
        for arm, opts in to_check:
            try:
                self.check_config(arm, dict(opts))
            except ConfigError as error:
                raise ConfigError(f"arm '{arm.label}': {error}") from error
        release()  # the datasets that the check read; the runs are processes of their own

    def check_config(self, arm: Arm, opts: dict) -> None:
        """Check what a training would, and that the weights are there or will be."""
        made = [weights_of(prepared) for prepared in self.suite.prepared]
        if opts.get("MODEL.WEIGHTS") in made:
            opts["MODEL.WEIGHTS"] = ""
        cfg = merged_config(arm.config, as_list(opts))
        weights = cfg.DISTILL.TEACHER.WEIGHTS
        if os.path.abspath(weights) in map(os.path.abspath, made):
            opts["DISTILL.TEACHER.WEIGHTS"] = RANDOM_WEIGHTS  # not read yet
        elif uses_teacher(cfg) and weights.endswith(".pth") and not PathManager.exists(weights):
            raise ConfigError(
                f"DISTILL.TEACHER.WEIGHTS: no file '{weights}', and it is not what the suite's "
                f"teacher writes ({made[0] if made else 'the suite trains none'})"
            )
        read_config(build_parser().parse_args(self.arguments(arm, opts)))

    def check_kept_runs(self) -> None:
        """Check that all runs in the output folder are of the suite's settings."""
        for run in self.runs():
            if self.folder(*run).exists() and self.ready(run):
                self.check_settings(*run, settings_of(self.config(*run)[0]))

    def check_settings(self, arm: Arm, seed: int, settings: dict[str, str]) -> None:
        """Check that a run's folder is new or of these settings."""
        folder = self.folder(arm, seed)
        path = folder / "settings.json"
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not path.is_file():
            raise ConfigError(f"{folder} was not made by d2kd compare; give another --output")
        check_same(folder, settings, "remove it or give another --output")

    # --- running -------------------------------------------------------------------------------

    def run(
        self, labels: list[str] | None = None, seeds: list[int] | None = None
    ) -> dict[str, str]:
        """Train what the arms need, then the runs, writing results and report after each.

        Args:
            labels, seeds: train only these; what is finished of others is in the report too.

        Returns:
            "arm seed" -> why, of the runs that failed.

        Raises:
            ConfigError: before anything is trained, or of the teacher or start.
        """
        runs = self.runs(labels, seeds)
        self.check(runs)
        self.output.mkdir(parents=True, exist_ok=True)
        for arm in self.suite.prepared:
            self.prepare(arm, self.threads * self.jobs)
        self.check_kept_runs()
        self.save()
        failed = run_in_order(
            runs,
            lambda run: self.train(*run),
            jobs=self.jobs,
            ready=self.ready,
            finished=lambda run: self.save(),
            processes=self.processes,
        )
        return {f"{arm.label} {seed}": why for (arm, seed), why in failed}

    def train(self, arm: Arm, seed: int) -> None:
        """One run, from where it was left."""
        cfg, opts = self.config(arm, seed)
        settings, folder = settings_of(cfg), self.folder(arm, seed)
        self.check_settings(arm, seed, settings)
        record = {"arm": arm.label, "seed": seed, "threads": self.threads, "settings": settings}
        self.start(f"{arm.label} {seed}", self.arguments(arm, opts), folder, record, self.threads)

    def arguments(self, arm: Arm, opts: dict) -> list[str]:
        """Those of a training that goes on where it was left."""
        return ["--resume", *self.imports, "--config-file", arm.config, *as_list(opts)]

    def start(
        self, name: str, arguments: list[str], folder: Path, record: dict, threads: int
    ) -> None:
        """Run a training, after writing down what it is if it is new."""
        command = ["-m", "d2kd", "train", *arguments]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "settings.json").is_file():
            write_json({**record, "command": command}, folder / "settings.json")
        self.stage(name, command, folder, threads)

    def stage(self, name: str, command: list[str], folder: Path, threads: int) -> None:
        logs = self.output / "logs"
        self.processes.run_stage(name, command, folder / "results.json", logs, threads)
        if not self.keep_checkpoints:
            for path in folder.glob("model_[0-9]*.pth"):
                path.unlink()

    def prepare(self, arm: Arm, threads: int) -> None:
        """Train the teacher, or the student that all arms start with, if its weights are not there,
        and evaluate it if that was not done before.

        Args:
            threads: CPU threads of the training.

        Raises:
            ConfigError: it was trained here with other settings, of which the first is named, or
                otherwise begun, or its weights are gone.
        """
        weights, opts = Path(weights_of(arm)), {**DEFAULTS, **arm.opts}
        folder = weights.parent
        settings = settings_of(merged_config(arm.config, as_list(opts)))
        is_own = (folder / "settings.json").is_file()
        if is_own:  # else it was trained by hand, and is taken as it is
            check_same(folder, settings, f"name another OUTPUT_DIR for the {arm.label}")
        if not weights.is_file():
            for left in ("results.json", *(() if is_own else ("last_checkpoint",))):
                if (folder / left).is_file():
                    raise ConfigError(
                        f"{folder} has a {left} but no {weights.name}: put that back, remove the "
                        "folder or name another OUTPUT_DIR in the suite"
                    )
            record = {"arm": arm.label, "settings": settings}
            self.start(arm.label, self.arguments(arm, opts), folder, record, threads)
        known, own = self.output / f"{arm.label}.json", folder / "results.json"
        if known.is_file() and read_json(known, ["file"])["file"] == fingerprint(str(weights)):
            return
        results = read_json(own, ["results"]) if own.is_file() else evaluate(arm, str(weights))
        write_json({"file": fingerprint(str(weights)), **results}, known)

    # --- results -------------------------------------------------------------------------------

    def lines(self) -> list[dict]:
        """One JSON line a finished run, those of teacher and start first, in the order of
        :meth:`runs`."""
        common, lines = {"suite": self.suite.title, "baseline": self.suite.baseline}, []

        def add(role: str, arm: Arm, results: dict, **of_run) -> None:
            about = {"role": role, "arm": arm.label, "config": arm.config, "opts": arm.opts}
            lines.append({**common, **about, **of_run, **results})

        for arm in self.suite.prepared:
            add(arm.label, arm, read_json(self.output / f"{arm.label}.json", ["results"]))
        for arm, seed in self.runs():
            folder, results = self.folder(arm, seed), self.results(arm, seed)
            if results is not None:
                settings = read_json(folder / "settings.json", ["settings", "threads"])
                control = {"times": arm.times, "same_time_as": arm.same_time_as}
                where = {"threads": settings["threads"], "folder": folder.name}
                add("student", arm, results, seed=seed, **control, **where)
        return lines

    def save(self) -> None:
        """Write results.jsonl, the tables, and what they say into the receipts of the students."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines())
        write_text(text, self.output / "results.jsonl")
        lines = read_lines(self.output / "results.jsonl")
        write_markdown(lines, self.output)
        complete_receipts(lines, self.output)


def check_same(folder: Path, settings: dict[str, str], remedy: str) -> None:
    """Check that what was trained in ``folder`` had these settings."""
    made_with = read_json(folder / "settings.json", ["settings"])["settings"]
    difference = first_difference(made_with, settings)
    if difference:
        raise ConfigError(f"{folder} was made with other settings: {difference}; {remedy}")


def same_time_iterations(base: dict, other: dict) -> int:
    """How many steps of the run ``base`` take as long as all of the run ``other``.

    Times are those of medians, which a busy machine disturbs least, and what heads did between
    steps.
    """
    # Runs of earlier versions know their median step only.
    steps = other.get("typical_seconds") or other["iterations"] * other["step_seconds"]
    return max(round((steps + other["hook_seconds"]) / base["step_seconds"]), 1)


def evaluate(arm: Arm, weights: str) -> dict:
    """Results of a detector that was not trained here, on its own ``DATASETS.TEST``."""
    print(f"{arm.label}: evaluating", flush=True)
    cfg = merged_config(arm.config, as_list(arm.opts))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(student_config(cfg))
    load_teacher_weights(model, weights)
    return {"results": DistillTrainer.test(cfg, model)}
