"""What the check of a dataset costs: time and memory of reading one annotation file, by Detectron2
by itself and by d2kd, which reads and checks it.

    python -m d2kd.benchmark.datasets

writes a synthetic file of COCO's size (118,000 images, 860,000 annotations) into a temporary folder
and reads it in new processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGES, ANNOTATIONS, CLASSES = 118_000, 860_000, 80
WIDTH, HEIGHT = 640, 480
WAYS = ("detectron2", "d2kd")
# Bounds that the project promises: of d2kd relative to Detectron2.
MOST_TIME, MOST_MEMORY = 1.3, 1.2


class Cost(NamedTuple):
    """What reading a file took.

    Attributes:
        seconds: CPU time from the path to Detectron2's records.
        peak: most memory of the process in MiB, beyond what it had before.
    """

    seconds: float
    peak: float


def write_synthetic(folder: Path, images: int = IMAGES, annotations: int = ANNOTATIONS) -> Path:
    """Writes a file in COCO format with polygon masks, and its images: links to a grey one.

    Returns:
        Path of the JSON file; the images are in ``images`` in its folder.
    """
    root = folder / "images"
    root.mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / "grey.jpg")
    names = [f"{index:012d}.jpg" for index in range(images)]
    for name in names:
        os.symlink("../grey.jpg", root / name)
    path = folder / "instances.json"
    with open(path, "w") as file:
        file.write('{"images": [')
        entries = (
            {"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT, "license": 3}
            for index, name in enumerate(names, start=1)
        )
        file.write(", ".join(map(json.dumps, entries)))
        file.write('], "annotations": [')
        for number, entry in enumerate(_annotations(images, annotations)):
            file.write((", " if number else "") + json.dumps(entry))
        categories = [{"id": index + 1, "name": f"class {index}"} for index in range(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return path


def _annotations(images: int, count: int) -> Iterator[dict]:
    """Objects of random place and class, with polygons of 6 to 30 points."""
    random = np.random.default_rng(0)
    for number in range(1, count + 1):
        width, height = np.round(random.uniform(4, 200, 2), 2)
        x, y = np.round(random.uniform(0, 1, 2) * [WIDTH - width, HEIGHT - height], 2)
        points = random.uniform(0, 1, (random.integers(6, 31), 2)) * [width, height] + [x, y]
        yield {
            "segmentation": [np.round(points, 2).ravel().tolist()],
            "area": round(float(width * height), 4),
            "iscrowd": 0,
            "image_id": int(random.integers(1, images + 1)),
            "bbox": [float(x), float(y), float(width), float(height)],
            "category_id": int(random.integers(1, CLASSES + 1)),
            "id": number,
        }


def read(way: str, json_file: Path) -> Cost:
    """Reads a file in this process, which should be a new one."""
    from ..data.check import Use
    from ..data.loading import Question, inspect, load

    root = str(json_file.parent / "images")
    before, start = _peak(), time.process_time()
    if way == "detectron2":
        from detectron2.data.datasets import load_coco_json

        records = load_coco_json(str(json_file), root, "synthetic")
    else:
        answer = inspect("synthetic", Question(str(json_file), root, Use(train=True, test=True)))
        if answer.report.fatal:
            raise RuntimeError(f"the synthetic file was refused: {answer.report.fatal}")
        records = load("synthetic")
    seconds = time.process_time() - start
    assert records
    return Cost(seconds, _peak() - before)


def _peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(json_file: Path, repeats: int = 3) -> dict[str, Cost]:
    """Cost of each way, in new processes that take turns; the lowest of each kind."""
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            command = [sys.executable, "-m", __spec__.name, "--read", way, str(json_file)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            costs[way].append(Cost(*json.loads(done.stdout.splitlines()[-1])))
    return {
        way: Cost(*(min(values) for values in zip(*found, strict=True)))
        for way, found in costs.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--annotations", type=int, default=ANNOTATIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", nargs=2, metavar=("WAY", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read:
        print(json.dumps(read(args.read[0], Path(args.read[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic(Path(folder) / "coco", args.images, args.annotations)
        print(f"{args.images:,} images, {args.annotations:,} annotations, ", end="")
        print(f"{path.stat().st_size / 2**20:.0f} MiB")
        costs = measure(path, args.repeats)
    for way, cost in costs.items():
        print(f"{way:12} {cost.seconds:7.2f} s {cost.peak:8.0f} MiB")
    ours, theirs = costs["d2kd"], costs["detectron2"]
    print(
        f"relative     {ours.seconds / theirs.seconds:7.2f} (at most {MOST_TIME}) "
        f"{ours.peak / theirs.peak:7.2f} (at most {MOST_MEMORY})"
    )


if __name__ == "__main__":
    main()
