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
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from runs import ROOT, run_stage
from tabulate import tabulate

from d2kd import add_distillation_config
from d2kd.config import load_config, student_config
from d2kd.files import write_json

CONFIGS = "configs/digits"
STUDENT, TEACHER = "retinanet_R18", "retinanet_R34_teacher"
WHITE, GREEN, RED = (255, 255, 255), (80, 220, 80), (60, 60, 255)
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
        command = ["tools/pretrain_digits.py", "--config-file", f"{CONFIGS}/{STUDENT}.yaml"]
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
        command = ["train_net.py", "--resume", "--config-file", f"{CONFIGS}/{config}.yaml"]
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
            sys.exit(f"error: {self.output} holds a demo of other settings; give another --output")
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(settings, str(path))

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
        figures = {
            "iterations": {"teacher": self.teacher_iterations, "student": self.student_iterations},
            "seeds": self.seeds,
            "results": {name: [self.results(run) for run in group] for name, group in runs.items()},
        }
        print(f"\n{markdown(figures)}")
        write_json(figures, str(self.output / "demo.json"))
        picture = self.output / "demo.jpg"
        save_picture(
            {
                "alone": (f"{CONFIGS}/{STUDENT}.yaml", self.folder(runs["student alone"][0])),
                "SSIM": (f"{CONFIGS}/{STUDENT}.yaml", self.folder(runs["student + SSIM"][0])),
                "teacher": (f"{CONFIGS}/{TEACHER}.yaml", self.folder("teacher")),
            },
            picture,
        )
        print(f"picture: {picture}   figures: {self.output / 'demo.json'}")


def markdown(figures: dict) -> str:
    """The table of ``demo.json`` as Markdown, and the gain beside the noise of the seeds."""
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


def draw(image: np.ndarray, boxes, labels, colours, zoom: int = 2) -> np.ndarray:
    """``image`` enlarged, with labelled boxes."""
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    for box, label, colour in zip(boxes, labels, colours, strict=True):
        x0, y0, x1, y1 = (int(round(float(v) * zoom)) for v in box)
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)
        place = (x0 + 2, max(y0 - 3, 12))
        cv2.putText(image, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(image, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    return image


def draw_detections(model, image: np.ndarray, truth: Boxes, classes: list[int]) -> np.ndarray:
    """The model's most confident detections, as many as there are objects; green if right."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    with torch.no_grad():
        found = model([{"image": pixels}])[0]["instances"][: len(classes)]
    labels = found.pred_classes.tolist()
    overlap = pairwise_iou(found.pred_boxes, truth)
    same = found.pred_classes[:, None] == torch.tensor(classes)[None]
    right = ((overlap >= 0.5) & same).any(dim=1).tolist()
    colours = [GREEN if hit else RED for hit in right]
    return draw(image, found.pred_boxes.tensor.tolist(), [str(x) for x in labels], colours)


def save_picture(runs: dict[str, tuple[str, Path]], path: Path, count: int = 4) -> None:
    """Ground truth and each run's detections, a row an image."""
    records = [r for r in DatasetCatalog.get("digits_val") if len(r["annotations"]) == 5][:count]
    models = {name: load_detector(*where) for name, where in runs.items()}
    rows = []
    for record in records:
        image = cv2.imread(record["file_name"])
        xywh = np.array([a["bbox"] for a in record["annotations"]], np.float32)
        truth = Boxes(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
        classes = [a["category_id"] for a in record["annotations"]]
        names, colours = [str(c) for c in classes], [WHITE] * len(classes)
        panels = [draw(image, truth.tensor.tolist(), names, colours)]
        panels += [draw_detections(model, image, truth, classes) for model in models.values()]
        rows.append(np.hstack(panels))
    titles = ["ground truth", *models]
    width = rows[0].shape[1] // len(titles)
    header = np.full((26, rows[0].shape[1], 3), 255, np.uint8)
    for column, title in enumerate(titles):
        place = (column * width + 8, 18)
        cv2.putText(header, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.vstack([header, *rows]), [cv2.IMWRITE_JPEG_QUALITY, 75])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--teacher-iterations", type=int, default=450)
    parser.add_argument("--student-iterations", type=int, default=300)
    parser.add_argument("--pretraining", type=int, default=250, help="steps of the backbones")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    iterations = (args.teacher_iterations, args.student_iterations)
    Demo(args.output.resolve(), args.seeds, iterations, args.pretraining).run()


if __name__ == "__main__":
    main()
