"""How long COCO metrics take, with faster-coco-eval and with pycocotools, on made-up detections.

    python -m d2kd.benchmark.evaluation --json docs/results/evaluation.json

Both compute the same numbers; the command says so, or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..arguments import CommandParser, file_to_write, positive
from ..data import coco_metrics
from ..files import write_json
from .machine import machine, machine_text

SIDE = 640
EVALUATORS: dict[str, Callable] = {
    "faster-coco-eval": coco_metrics.fast_evaluation,
    "pycocotools": COCOeval,
}


def random_truth(images: int, objects: int, classes: int, masks: bool, seed: int = 0) -> COCO:
    """Ground truth of all sizes, a tenth of it crowds; the last class and some images have none.

    Args:
        objects: per image on average.
        masks: with run-length encoded ellipses, else boxes only.
    """
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(1, images + 1):
        for _ in range(rng.poisson(objects) if image % 10 else 0):
            box = _random_box(rng)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(rng.integers(1, classes)),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(rng.random() < 0.1),
            }
            if masks:
                annotation["segmentation"] = mask = _ellipse(box)
                annotation["area"] = float(mask_util.area(mask))
            annotations.append(annotation)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, images + 1)],
        "categories": [{"id": c, "name": str(c)} for c in range(1, classes + 1)],
        "annotations": annotations,
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def random_detections(truth: COCO, per_image: int, seed: int = 1) -> list[dict[str, Any]]:
    """Detections near objects and elsewhere, with scores of which some are equal."""
    rng = np.random.default_rng(seed)
    classes, detections = truth.getCatIds(), []
    has_masks = any("segmentation" in a for a in truth.dataset["annotations"])
    for image in truth.getImgIds():
        objects = truth.imgToAnns[image]
        for _ in range(per_image if image % 7 else 0):
            box, category = _random_box(rng), int(rng.choice(classes))
            if objects and rng.random() < 0.5:
                near = objects[rng.integers(len(objects))]
                box, category = _moved(near["bbox"], rng), near["category_id"]
            detection = {"image_id": image, "category_id": category, "bbox": box}
            detection["score"] = round(float(rng.random()), 2)
            if has_masks:
                mask = _ellipse(box)
                detection["segmentation"] = {**mask, "counts": mask["counts"].decode()}
            detections.append(detection)
    return detections


def _random_box(rng: np.random.Generator) -> list[float]:
    width, height = np.exp(rng.uniform(np.log(6), np.log(300), 2))
    x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    return [x, y, float(width), float(height)]


def _moved(box: list[float], rng: np.random.Generator) -> list[float]:
    corner, size, shift = np.array(box[:2]), np.array(box[2:]), rng.normal(0, 0.1, 4)
    return np.concatenate([corner + shift[:2] * size, size * np.exp(shift[2:])]).tolist()


def _ellipse(box: list[float]) -> dict[str, Any]:
    """The ellipse inside ``box``, run-length encoded."""
    x, y, width, height = box
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse([x, y, x + width, y + height], fill=1)
    encoded: dict[str, Any] = mask_util.encode(np.asfortranarray(mask))
    return encoded


def evaluate(truth: COCO, detections: list[dict], task: str, evaluator: Callable) -> Any:
    """The metrics as Detectron2's evaluator gets them, in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        return _evaluate_predictions_on_coco(truth, detections, task, cocoeval_fn=evaluator)


def measure(task: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of both for ``task``."""
    truth = random_truth(args.images, args.objects, args.classes, task == "segm")
    detections = random_detections(truth, args.detections)
    seconds, metrics = {}, {}
    for name, evaluator in EVALUATORS.items():
        start = time.perf_counter()
        metrics[name] = evaluate(truth, [dict(d) for d in detections], task, evaluator).stats
        seconds[name] = time.perf_counter() - start
    if not np.array_equal(*metrics.values()):
        sys.exit(f"error: the numbers differ: {metrics}")
    return seconds


def markdown(measured: dict[str, Any]) -> str:
    """The table of a file that this command has written."""
    rows = [
        [task, *seconds.values(), seconds["faster-coco-eval"] / seconds["pycocotools"]]
        for task, seconds in measured["seconds"].items()
    ]
    header = ["", *(f"{name}, s" for name in EVALUATORS), "ratio"]
    text = tabulate(rows, header, tablefmt="pipe", floatfmt=("", ".1f", ".1f", ".2f"))
    of = f"{measured['images']} images, {measured['detections']} detections per image"
    return f"{text}\n\n{of}; {machine_text(measured['machine'])}."


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--images", type=positive, default=5000)
    add("--detections", type=positive, default=100, help="per image")
    add("--objects", type=positive, default=7, help="per image")
    add("--classes", type=positive, default=80)
    add("--tasks", nargs="+", default=["bbox", "segm"], choices=["bbox", "segm"])
    add("--json", type=file_to_write(), help="write the seconds to this file as well")
    args = parser.parse_args(argv)
    if not coco_metrics.has_fast_metrics():
        sys.exit("error: faster-coco-eval is not installed: pip install faster-coco-eval")
    measured = {"machine": machine(), "images": args.images, "detections": args.detections}
    measured["seconds"] = {task: measure(task, args) for task in args.tasks}
    print(markdown(measured))
    if args.json:
        write_json(measured, args.json)


if __name__ == "__main__":
    main()
