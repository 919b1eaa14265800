"""Registers the datasets that come with d2kd. Costs nothing: files are made or read on first use.

As in Detectron2, the root of all datasets is read from the environment once, at import.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import ConfigError
from . import bccd, digits
from .files import dataset_root


def register_builtin_datasets(root: Path) -> None:
    """Registers digits and BCCD below `root`, or moves them there. Names that somebody else has
    registered are left alone."""
    for family in digits.SPECS:
        directory = root / family
        for split in digits.SPLITS:
            _register(
                f"{family}_{split}",
                partial(_load_digits, directory=directory, split=split),
                json_file=str(digits.json_path(directory, split)),
                image_root=str(directory / split),
                thing_classes=digits.CLASSES,
                made_on_first_use=True,
            )
    directory = root / "bccd"
    for split in bccd.SPLITS:
        _register(
            f"bccd_{split}",
            partial(_load_bccd, directory=directory, split=split),
            json_file=str(bccd.json_path(directory, split)),
            image_root=str(directory / "images"),
            thing_classes=bccd.CLASSES,
            prepare_command=bccd.PREPARE,
        )


def _register(name: str, load, **metadata) -> None:
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("registered_by") != "d2kd":
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(load, name=name))
    MetadataCatalog.get(name).set(evaluator_type="coco", registered_by="d2kd", **metadata)


def _load_digits(directory: Path, split: str, name: str) -> list[dict]:
    digits.ensure_digits(directory, digits.SPECS[directory.name])
    return load_coco_json(str(digits.json_path(directory, split)), str(directory / split), name)


def _load_bccd(directory: Path, split: str, name: str) -> list[dict]:
    path = bccd.json_path(directory, split)
    if not path.is_file():
        raise ConfigError(f"{name} is not prepared ({path} is missing): run '{bccd.PREPARE}'")
    return load_coco_json(str(path), str(directory / "images"), name)


register_builtin_datasets(dataset_root())
