"""What the check of a dataset costs: memory, next to Detectron2's own reading of the file."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.data.datasets import load_coco_json
from PIL import Image

from d2kd.data.check import Use
from d2kd.data.loading import Question, inspect, load

from .parts import forget_datasets

IMAGES, ANNOTATIONS, CLASSES = 2000, 14_000, 80
WIDTH, HEIGHT = 640, 480
MOST_MEMORY = 1.2  # of d2kd, relative to Detectron2


def synthetic_file(folder: Path) -> Path:
    """A file like COCO's, with polygon masks; its images are links to a grey one."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / "grey.jpg")
    images, annotations = [], []
    for index in range(1, IMAGES + 1):
        name = f"{index:012d}.jpg"
        (folder / "images" / name).symlink_to("../grey.jpg")
        images.append({"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT})
    for number in range(1, ANNOTATIONS + 1):
        width, height = random.uniform(4, 200, 2)
        x, y = random.uniform(0, 1, 2) * [WIDTH - width, HEIGHT - height]
        points = random.uniform(0, 1, (random.integers(6, 31), 2)) * [width, height] + [x, y]
        annotation = {
            "segmentation": [np.round(points, 2).ravel().tolist()],
            "area": width * height,
            "iscrowd": 0,
            "image_id": int(random.integers(1, IMAGES + 1)),
            "bbox": [x, y, width, height],
            "category_id": int(random.integers(1, CLASSES + 1)),
            "id": number,
        }
        annotations.append(annotation)
    categories = [{"id": index, "name": f"class {index}"} for index in range(1, CLASSES + 1)]
    path = folder / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def peak_memory(read: Callable[[], list]) -> int:
    """By what Python and NumPy ask for."""
    tracemalloc.start()
    assert len(read()) == IMAGES
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_checking_needs_little_memory(tmp_path):
    """Reading and checking a file takes little more memory than reading it."""
    path, images = synthetic_file(tmp_path), str(tmp_path / "images")

    def check() -> list:
        question = Question(str(path), images, Use(train=True, test=True))
        assert not inspect("synthetic", question).report.fatal
        return load("synthetic")

    for _ in forget_datasets():
        plain = peak_memory(lambda: load_coco_json(str(path), images, "synthetic"))
        assert peak_memory(check) < MOST_MEMORY * plain
