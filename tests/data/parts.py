"""A small COCO-format dataset of coloured shapes, made on the fly, and what is done with it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from d2kd.data import custom, keypoints, loading
from d2kd.engine.trainer import DistillTrainer

from ..detectors import detector_config

CLASSES = ("nut", "bolt", "ring")
SIZE = (128, 96)
_COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


def make_split(folder: Path, name: str, images: int, seed: int, masks: bool = True) -> dict:
    """Draws ``images`` pictures with three rectangles each below ``folder/images``.

    Returns:
        COCO content with ids from 1, categories 1 to 3.
    """
    choose = random.Random(seed)
    noise = np.random.default_rng(seed)
    (folder / "images").mkdir(exist_ok=True)
    width, height = SIZE
    content = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": i + 1, "name": n, "supercategory": "x"} for i, n in enumerate(CLASSES)
        ],
    }
    for image_id in range(1, images + 1):
        pixels = noise.integers(90, 120, (height, width, 3), dtype=np.uint8)
        for _ in range(3):
            kind = choose.randrange(3)
            w, h = choose.randint(20, 44), choose.randint(20, 44)
            x, y = choose.randint(1, width - w - 1), choose.randint(1, height - h - 1)
            pixels[y : y + h, x : x + w] = _COLOURS[kind]
            entry = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": kind + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if masks:
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            content["annotations"].append(entry)
        file_name = f"{name}_{image_id}.png"
        Image.fromarray(pixels).save(folder / "images" / file_name)
        content["images"].append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height}
        )
    return content


class Parts:
    """A training and a validation set in one folder; change ``train`` and ``val``, then `write`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.train = make_split(folder, "train", 6, seed=0)
        self.val = make_split(folder, "val", 4, seed=5)
        self.truth = copy.deepcopy(self.val)

    def write(self) -> None:
        for name in ("train", "val"):
            (self.folder / f"{name}.json").write_text(json.dumps(getattr(self, name)))

    def config(self, arch: str = "faster", **values) -> CfgNode:
        """A small detector's config on these datasets, named t and v."""
        cfg = detector_config(arch, num_classes=len(CLASSES))
        files = [[n, str(self.folder / f"{p}.json"), str(self.folder / "images")] for n, p in PAIRS]
        cfg.DATASETS.COCO_FORMAT = files
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("t",), ("v",)
        cfg.INPUT.MASK_FORMAT = "polygon"
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
        cfg.OUTPUT_DIR = str(self.folder / "out")
        cfg.merge_from_list([item for key, value in values.items() for item in (key, value)])
        return cfg

    def files(self) -> set[Path]:
        """All files and folders there are, to see that nothing was written."""
        return set(self.folder.rglob("*"))


PAIRS = (("t", "train"), ("v", "val"))


def forget_datasets() -> Iterator[None]:
    """A fixture's body: what a test registers is gone after it."""
    saved = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    for known, data in zip((DatasetCatalog, MetadataCatalog), saved, strict=True):
        known.data.clear()
        known.data.update(data)
    for name in list(loading._answers):
        if name not in DatasetCatalog:
            del loading._answers[name]
    keypoints._pairs_by_name.intersection_update(DatasetCatalog.data)
    custom._reports.clear()


def perfect_results(
    cfg: CfgNode,
    truth: dict,
    names: tuple[str, ...] = CLASSES,
    dataset: str = "v",
    add: Callable[[Instances, list[dict]], None] = lambda out, found: None,
) -> dict:
    """What the evaluator says of the ground truth given as predictions.

    Args:
        truth: COCO content that is right, in whose images objects are found by file name.
        names: classes of the detector, in order.
        add: adds fields to the predictions of an image, from its annotations.
    """
    name_of = {category["id"]: category["name"] for category in truth["categories"]}
    by_file = {
        image["file_name"]: [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        for image in truth["images"]
    }
    evaluator = DistillTrainer.build_evaluator(cfg, dataset)
    evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        found = by_file[Path(record["file_name"]).name]
        out = Instances((record["height"], record["width"]))
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        out.pred_boxes = Boxes(torch.tensor(boxes).float().reshape(-1, 4))
        out.scores = torch.linspace(0.99, 0.9, len(found))
        classes = [names.index(name_of[a["category_id"]]) for a in found]
        out.pred_classes = torch.tensor(classes).long()
        add(out, found)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": out}])
    return evaluator.evaluate()


def add_masks(out: Instances, found: list[dict]) -> None:
    """Masks of :func:`perfect_results`, decoded by pycocotools itself."""
    height, width = out.image_size
    coco = COCO()
    coco.imgs = {a["image_id"]: {"height": height, "width": width} for a in found}
    masks = [coco.annToMask(a) for a in found]
    out.pred_masks = BitMasks(
        torch.tensor(np.array(masks).reshape(-1, height, width)).bool()
    ).tensor
