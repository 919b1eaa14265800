"""The demo: a teacher, a student alone and a distilled student on handwritten digits, compared.

    d2kd demo

It makes the data, trains the three in a few minutes on a CPU, prints their AP with the gain, and
saves a picture of detections side by side. Finished stages are kept: a second call, or a call after
a kill, goes on where the last one ended. In a clone, `make demo` does the same, set-up included.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from ..arguments import CommandParser, natural, positive
from ..compare.pictures import save_picture
from ..compare.processes import run_stage
from ..engine.setup import merged_config
from ..errors import ConfigError
from ..files import null_to_nan, write_json

CONFIGS = "digits"
STUDENT, TEACHER = "retinanet_R18", "retinanet_R34_teacher"
METRICS = ("AP", "AP50", "AP75", "APs", "APm")


class Demo:
    """The stages of the demo, in ``output``.

    Args:
        output: folder of weights, logs and results.
        seeds: seeds of the two students; each is trained alone and distilled.
        iterations: of the teacher and of each student.
        pretraining: steps of pre-training the backbones.
    """

    def __init__(
        self, output: Path, seeds: list[int], iterations: tuple[int, int], pretraining: int
    ):
        self.output, self.seeds, self.pretraining = output, seeds, pretraining
        self.teacher_iterations, self.student_iterations = iterations

    # --- running ---------------------------------------------------------------------------------

    def stage(self, name: str, command: list[str], done: Path, threads: int) -> None:
        run_stage(name, command, done, self.output / "logs", threads)

    def pretrain(self, threads: int) -> None:
        """The student's backbone, and the teacher's grown from it."""
        done = self.weights("R18")
        command = ["-m", "d2kd", "pretrain", "--config-file", f"{CONFIGS}/{STUDENT}.yaml"]
        command += ["--output", str(done), "--steps", str(self.pretraining)]
        command += ["--grow", f"{CONFIGS}/{TEACHER}.yaml", str(self.weights("R34"))]
        self.stage("backbone", command, done, threads)

    def weights(self, depth: str) -> Path:
        return self.output / f"{depth}_backbone.pth"

    def folder(self, run: str) -> Path:
        return self.output / run

    def train(self, run: str, config: str, iterations: int, seed: int, threads: int, *opts) -> None:
        depth = re.search(r"R\d+", config)[0]
        folder = self.folder(run)
        command = ["-m", "d2kd", "train", "--resume", "--config-file", f"{CONFIGS}/{config}.yaml"]
        command += ["SOLVER.MAX_ITER", str(iterations), "SOLVER.WARMUP_ITERS", "30"]
        command += ["SOLVER.CHECKPOINT_PERIOD", "100", "SEED", str(seed)]
        command += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(folder)]
        command += ["MODEL.WEIGHTS", str(self.weights(depth)), *opts]
        self.stage(run.replace("_", " "), command, folder / "results.json", threads)

    def run(self) -> None:
        """All stages; two at a time, on one thread each, where they do not need each other."""
        threads = max((os.cpu_count() or 2) // 2, 1)
        self.keep_settings()
        DatasetCatalog.get("digits_train")
        DatasetCatalog.get("digits_val")
        teacher = [
            "DISTILL.TEACHER.CHECK",
            "False",
            "DISTILL.TEACHER.WEIGHTS",
            str(self.folder("teacher") / "student_final.pth"),
        ]

        def train_teacher() -> None:
            self.train("teacher", TEACHER, self.teacher_iterations, 1, threads)

        def train_alone() -> None:
            for seed in self.seeds:
                self.train(f"alone_{seed}", STUDENT, self.student_iterations, seed, threads)

        def train_distilled(seed: int) -> None:
            config, iterations = f"{STUDENT}_ssim", self.student_iterations
            self.train(f"ssim_{seed}", config, iterations, seed, threads, *teacher)

        self.pretrain(2 * threads)
        with ThreadPoolExecutor(2) as pool:
            wait(pool, train_teacher, train_alone)
            wait(pool, *(lambda s=s: train_distilled(s) for s in self.seeds))
        self.report()

    def keep_settings(self) -> None:
        """Finished stages are kept, so the settings of a folder must stay the same."""
        settings = {
            "pretraining": self.pretraining,
            "teacher_iterations": self.teacher_iterations,
            "student_iterations": self.student_iterations,
        }
        path = self.output / "settings.json"
        if path.is_file() and json.loads(path.read_text()) != settings:
            raise ConfigError(f"{self.output} holds a demo of other settings: name another folder")
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(settings, str(path))

    # --- showing ---------------------------------------------------------------------------------

    def results(self, run: str) -> dict:
        results = json.loads((self.folder(run) / "results.json").read_text())["results"]
        return null_to_nan(results)["bbox"]

    def report(self) -> None:
        """Print the table, with the gain and the noise of the seeds, and save table and picture."""
        runs = {
            "student alone": [f"alone_{seed}" for seed in self.seeds],
            "student + SSIM": [f"ssim_{seed}" for seed in self.seeds],
            "teacher": ["teacher"],
        }
        figures = {
            "iterations": {"teacher": self.teacher_iterations, "student": self.student_iterations},
            "seeds": self.seeds,
            "results": {name: [self.results(run) for run in group] for name, group in runs.items()},
        }
        print(f"\n{markdown(figures)}")
        write_json(figures, str(self.output / "demo.json"))
        picture = self.output / "demo.jpg"
        records = [r for r in DatasetCatalog.get("digits_val") if len(r["annotations"]) == 5]
        student, teacher = f"{CONFIGS}/{STUDENT}.yaml", f"{CONFIGS}/{TEACHER}.yaml"
        save_picture(
            {
                "alone": picture_of(student, self.folder(runs["student alone"][0])),
                "SSIM": picture_of(student, self.folder(runs["student + SSIM"][0])),
                "teacher": picture_of(teacher, self.folder("teacher")),
            },
            picture,
            records=records[:4],
        )
        print(f"picture: {picture}   figures: {self.output / 'demo.json'}")


def markdown(figures: dict) -> str:
    """The table of ``demo.json`` as Markdown, and the gain with the spread of the seeds."""
    results = figures["results"]
    rows = [
        [name, len(group), *(f"{np.mean([run[m] for run in group]):.1f}" for m in METRICS)]
        for name, group in results.items()
    ]
    headers = ["", "seeds", *METRICS]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    alone, distilled = ([run["AP"] for run in group] for group in list(results.values())[:2])
    gains = [b - a for a, b in zip(alone, distilled, strict=True)]
    each = ", ".join(f"{gain:+.1f}" for gain in gains)
    return (
        f"{table}\n\nGain of SSIM: {np.mean(gains):+.1f} AP (seed by seed {each}); the student "
        f"alone varies by {max(alone) - min(alone):.1f} AP between the seeds."
    )


def wait(pool: ThreadPoolExecutor, *jobs) -> None:
    """Run jobs in the pool; a failure of one ends the demo."""
    futures = [pool.submit(job) for job in jobs]
    for future in futures:
        future.result()


def picture_of(config: str, folder: Path) -> tuple[CfgNode, Path]:
    """What :func:`~d2kd.compare.pictures.save_picture` needs of a run."""
    return merged_config(config, []), folder / "student_final.pth"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet, and report.

    Raises:
        ConfigError: in one line.
    """
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seeds", type=natural, nargs="+", default=[1, 2])
    parser.add_argument("--teacher-iterations", type=positive, default=450)
    parser.add_argument("--student-iterations", type=positive, default=300)
    parser.add_argument("--pretraining", type=positive, default=500, help="steps of the backbones")
    args = parser.parse_args(argv)
    iterations = (args.teacher_iterations, args.student_iterations)
    Demo(args.output.resolve(), args.seeds, iterations, args.pretraining).run()
