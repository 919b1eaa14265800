#!/usr/bin/env python
"""The demo: a teacher, a student alone and a distilled student on handwritten digits, compared.

    make demo

It makes the data, trains the three in a few minutes on a CPU, prints their AP with the gain, and
saves a picture of detections side by side. Finished stages are kept: a second call, or a call after
a kill, goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from tabulate import tabulate

from d2kd import add_distillation_config
from d2kd.config import load_config, student_config
from d2kd.engine.hooks import write_json

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = "configs/digits"
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
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}

    # --- running ---------------------------------------------------------------------------------

    def stage(self, name: str, command: list[str], done: Path, threads: int) -> None:
        """Run ``command``, showing its progress, unless the file ``done`` is there."""
        if done.exists():
            print(f"{name}: done before", flush=True)
            return
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        log = self.output / "logs" / f"{name.replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**self.environment, "OMP_NUM_THREADS": str(threads)}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for line in process.stdout:
                file.write(line)
                progress = progress_of(line)
                if progress:
                    print(f"  {name}: {progress}", flush=True)
        if process.wait() != 0 or not done.exists():
            sys.exit(f"{name} failed; its output is in {log}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    def pretrain(self, config: str, threads: int) -> None:
        depth = re.search(r"R\d+", config)[0]
        done = self.weights(depth)
        command = ["tools/pretrain_digits.py", "--config-file", f"{CONFIGS}/{config}.yaml"]
        command += ["--output", str(done), "--steps", str(self.pretraining)]
        self.stage(f"backbone {depth}", command, done, threads)

    def weights(self, depth: str) -> Path:
        return self.output / f"{depth}_backbone.pth"

    def folder(self, run: str) -> Path:
        return self.output / run

    def train(self, run: str, config: str, iterations: int, seed: int, threads: int, *opts) -> None:
        depth = re.search(r"R\d+", config)[0]
        folder = self.folder(run)
        command = ["train_net.py", "--resume", "--config-file", f"{CONFIGS}/{config}.yaml"]
        command += ["SOLVER.MAX_ITER", str(iterations), "SOLVER.WARMUP_ITERS", "30"]
        command += ["SOLVER.CHECKPOINT_PERIOD", "100", "SEED", str(seed)]
        command += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(folder)]
        command += ["MODEL.WEIGHTS", str(self.weights(depth)), *opts]
        self.stage(run.replace("_", " "), command, folder / "results.json", threads)

    def run(self) -> None:
        """All stages; two at a time, on one thread each, where they do not need each other."""
        threads = max((os.cpu_count() or 2) // 2, 1)
        DatasetCatalog.get("digits_train")
        DatasetCatalog.get("digits_val")
        teacher = [
            "DISTILL.TEACHER.CHECK",
            "False",
            "DISTILL.TEACHER.WEIGHTS",
            str(self.folder("teacher") / "student_final.pth"),
        ]

        def alone(seed: int) -> None:
            self.train(f"alone_{seed}", "faster_rcnn_R18", self.student_iterations, seed, threads)

        def distilled(seed: int) -> None:
            config = "faster_rcnn_R18_ssim"
            iterations = self.student_iterations
            self.train(f"ssim_{seed}", config, iterations, seed, threads, *teacher)

        with ThreadPoolExecutor(2) as pool:
            wait(pool, lambda: self.pretrain("faster_rcnn_R18", threads), self.train_teacher)
            jobs = [lambda s=s: alone(s) for s in self.seeds]
            jobs += [lambda s=s: distilled(s) for s in self.seeds]
            wait(pool, *jobs)
        self.report()

    def train_teacher(self) -> None:
        threads = max((os.cpu_count() or 2) // 2, 1)
        config = "mask_rcnn_R34_teacher"
        self.pretrain(config, threads)
        self.train("teacher", config, self.teacher_iterations, 1, threads)

    # --- showing ---------------------------------------------------------------------------------

    def results(self, run: str) -> dict:
        return json.loads((self.folder(run) / "results.json").read_text())["results"]["bbox"]

    def report(self) -> None:
        """Print the table, with the gain and the noise of the seeds, and save table and picture."""
        runs = {
            "student alone": [f"alone_{seed}" for seed in self.seeds],
            "student + SSIM": [f"ssim_{seed}" for seed in self.seeds],
            "teacher": ["teacher"],
        }
        means = {
            name: {m: float(np.mean([self.results(run)[m] for run in group])) for m in METRICS}
            for name, group in runs.items()
        }
        rows = [[name, *(f"{mean[m]:.1f}" for m in METRICS)] for name, mean in means.items()]
        table = tabulate(rows, headers=["", *METRICS], disable_numparse=True)
        gains = [
            self.results(f"ssim_{seed}")["AP"] - self.results(f"alone_{seed}")["AP"]
            for seed in self.seeds
        ]
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        alone = [self.results(run)["AP"] for run in runs["student alone"]]
        verdict = (
            f"gain of SSIM: {np.mean(gains):+.1f} AP (seed by seed: {each}); "
            f"the student alone varies by {max(alone) - min(alone):.1f} AP between the seeds"
        )
        print(f"\n{table}\n\n{verdict}")
        write_json({"means": means, "gains": gains, "alone": alone}, str(self.output / "demo.json"))
        picture = self.output / "demo.png"
        save_picture(
            {
                "alone": (f"{CONFIGS}/faster_rcnn_R18.yaml", self.folder(runs["student alone"][0])),
                "SSIM": (f"{CONFIGS}/faster_rcnn_R18.yaml", self.folder(runs["student + SSIM"][0])),
                "teacher": (f"{CONFIGS}/mask_rcnn_R34_teacher.yaml", self.folder("teacher")),
            },
            picture,
        )
        print(f"picture: {picture}   figures: {self.output / 'demo.json'}")


def wait(pool: ThreadPoolExecutor, *jobs) -> None:
    """Run jobs in the pool; a failure of one ends the demo."""
    futures = [pool.submit(job) for job in jobs]
    for future in futures:
        future.result()


def progress_of(line: str) -> str | None:
    """What a line of a training's or pre-training's log says of its progress."""
    if line.startswith("pre-training"):
        return (
            line.split(":", 1)[0].removeprefix("pre-training ") + line.rsplit(",", 1)[-1].rstrip()
        )
    match = re.search(r"eta: (\S+)\s+iter: (\d+)\s+total_loss: (\S+)", line)
    return f"iteration {match[2]}, loss {match[3]}, {match[1]} to go" if match else None


# --- the picture --------------------------------------------------------------------------------


def load_detector(config: str, folder: Path) -> torch.nn.Module:
    """The trained detector of a run, for evaluation on the CPU."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(ROOT / config))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(student_config(cfg)).eval()
    DetectionCheckpointer(model).load(str(folder / "student_final.pth"))
    return model


def draw(image: np.ndarray, boxes, labels, colour, zoom: int = 2) -> np.ndarray:
    """``image`` enlarged, with labelled boxes."""
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    for box, label in zip(boxes, labels, strict=True):
        x0, y0, x1, y1 = (int(round(float(v) * zoom)) for v in box)
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 1, cv2.LINE_AA)
        place = (x0 + 1, max(y0 - 2, 10))
        cv2.putText(image, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(image, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
    return image


def save_picture(runs: dict[str, tuple[str, Path]], path: Path, count: int = 4) -> None:
    """Ground truth and each run's detections (score over 0.5), a row an image."""
    names = MetadataCatalog.get("digits_val").thing_classes
    records = sorted(DatasetCatalog.get("digits_val"), key=lambda r: -len(r["annotations"]))[:40:10]
    models = {name: load_detector(*where) for name, where in runs.items()}
    rows = []
    for record in records[:count]:
        image = cv2.imread(record["file_name"])
        truth = [(a["bbox"], names[a["category_id"]]) for a in record["annotations"]]
        boxes = [(x, y, x + w, y + h) for (x, y, w, h), _ in truth]
        panels = [draw(image, boxes, [label for _, label in truth], (255, 255, 255))]
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        for model in models.values():
            with torch.no_grad():
                found = model([{"image": pixels}])[0]["instances"]
            found = found[found.scores > 0.5]
            labels = [names[c] for c in found.pred_classes.tolist()]
            panels.append(draw(image, found.pred_boxes.tensor.tolist(), labels, (80, 255, 255)))
        rows.append(np.hstack(panels))
    titles = ["ground truth", *models]
    width = rows[0].shape[1] // len(titles)
    header = np.full((26, rows[0].shape[1], 3), 255, np.uint8)
    for column, title in enumerate(titles):
        place = (column * width + 8, 18)
        cv2.putText(header, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.vstack([header, *rows]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--teacher-iterations", type=int, default=260)
    parser.add_argument("--student-iterations", type=int, default=150)
    parser.add_argument("--pretraining", type=int, default=120, help="steps of the backbones")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    iterations = (args.teacher_iterations, args.student_iterations)
    Demo(args.output.resolve(), args.seeds, iterations, args.pretraining).run()


if __name__ == "__main__":
    main()
