"""Random damage to annotation files: a refusal in one line, or a dataset that works to the end."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import random

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from d2kd import ConfigError
from d2kd.data.custom import check_datasets
from d2kd.data.loader import build_train_loader
from d2kd.data.report import MAX_LINES
from d2kd.engine.trainer import DistillTrainer

from .parts import Parts, forget_datasets

ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -3.0, float("nan"), float("inf"), 10**30, 10**400),
    *(128.0, 2**63, {"size": [96.0, 128.0], "counts": [96.0 * 128]}),
    *("", "x", "1", "nut", "../x.png", "\0", "a\nb", [], {}, [1], {"a": 1}, [None] * 4, ["a"] * 4),
    *([1, 2, 3, 4], [1e9, 1e9, 1, 1], [0, 0, 0, 0], [-5, -5, 3, 3], [1, 1, 1e-9, 5]),
    *([[1, 2, 3, 4, 5, 6]], [[1, 2]], [[]]),
    *({"size": [96, 128], "counts": c} for c in ([96 * 128], "abc", [])),
]
KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"),
    ),
    "categories": ("id", "name", "supercategory"),
}


def damage(content: dict, choose: random.Random) -> None:
    """Sets or removes one value of one entry, or of all."""
    part = choose.choice(("images", "annotations", "annotations", "annotations", "categories"))
    entries = content[part] if choose.random() < 0.2 else [choose.choice(content[part])]
    key, value = choose.choice(KEYS[part]), choose.choice(ODD_VALUES)
    remove = choose.random() < 0.15
    for entry in entries:
        if remove:
            entry.pop(key, None)
        else:
            entry[key] = copy.deepcopy(value)


def use(parts: Parts, arch: str) -> None:
    """An epoch of the training loader, and an evaluation."""
    cfg = parts.config(arch)
    check_datasets(cfg)
    list(itertools.islice(iter(build_train_loader(cfg, seed=0)), 4))
    evaluator = DistillTrainer.build_evaluator(cfg, "v")
    evaluator.reset()
    for record in DatasetCatalog.get("v"):
        out = Instances((record["height"], record["width"]))
        out.pred_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40], [10, 10, 60, 60]]))
        out.scores, out.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 2])
        if arch == "mask":
            out.pred_masks = torch.zeros(2, *out.image_size, dtype=torch.bool)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": out}])
    assert "bbox" in evaluator.evaluate()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_work(seed, tmp_path, capsys, monkeypatch):
    """15 files a seed: no other error than one line, after at most 20 of a report."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # only the report
    choose = random.Random(seed)
    whole = Parts(tmp_path)
    refused = 0
    for number in range(15):
        parts = copy.deepcopy(whole)
        for _ in range(choose.choice((1, 1, 2))):
            damage(choose.choice((parts.train, parts.val)), choose)
        parts.write()
        for _ in forget_datasets():
            try:
                use(parts, "mask" if number % 2 else "faster")
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) <= 300
                refused += 1
        assert len(capsys.readouterr().err.splitlines()) <= MAX_LINES
    assert 0 < refused < 15
    assert json.loads((tmp_path / "train.json").read_text())
