"""Registers the datasets that come with d2kd. Costs nothing: files are made or read on first use.

As in Detectron2, the root of all datasets is read from the environment once, at import.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from . import digits
from .files import dataset_root

# Registered name -> directory, for the datasets that make themselves.
GENERATED: dict[str, Path] = {}


def register_builtin_datasets(root: Path) -> None:
    """Registers digits below `root`; names that are registered already are left alone."""
    for family in digits.SPECS:
        for split in digits.SPLITS:
            _register_digits(f"{family}_{split}", root / family, split)


def make_if_generated(name: str) -> None:
    """Makes the files of a dataset that d2kd can make; any other name is left alone."""
    if name in GENERATED:
        directory = GENERATED[name]
        digits.ensure_digits(directory, digits.SPECS[directory.name])


def _register_digits(name: str, directory: Path, split: str) -> None:
    if name in DatasetCatalog:
        return
    GENERATED[name] = directory
    DatasetCatalog.register(name, partial(_load_digits, name, directory, split))
    MetadataCatalog.get(name).set(
        json_file=str(digits.json_path(directory, split)),
        image_root=str(directory / split),
        thing_classes=digits.CLASSES,
        evaluator_type="coco",
    )


def _load_digits(name: str, directory: Path, split: str) -> list[dict]:
    make_if_generated(name)
    return load_coco_json(digits.json_path(directory, split), str(directory / split), name)


register_builtin_datasets(dataset_root())
