"""Registers the datasets that come with d2kd. Costs nothing: files are made or read on first use.

As in Detectron2, the root of all datasets is read from the environment once, at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import ConfigError
from . import bccd, digits, photographs
from .files import dataset_root, json_path


def register_builtin_datasets(root: Path) -> None:
    """Registers the built-in datasets below `root`, or moves them there. Names that somebody else
    has registered are not changed."""
    for family in digits.SPECS:
        directory = root / family
        for split in digits.SPLITS:
            _register(
                f"{family}_{split}",
                partial(_load_digits, directory=directory, split=split),
                json_file=str(json_path(directory, split)),
                image_root=str(directory / split),
                thing_classes=digits.CLASSES,
                made_on_first_use=True,
            )
    for split in bccd.SPLITS:
        path = json_path(root / "bccd", split)
        _register_prepared(f"bccd_{split}", path, bccd.CLASSES, bccd.PREPARE)
    for family in photographs.FAMILIES.values():
        for split in photographs.SPLITS:
            path = json_path(root / family.name, split)
            _register_prepared(f"{family.name}_{split}", path, family.classes, family.command)


def _register_prepared(name: str, path: Path, classes: Sequence[str], command: str) -> None:
    """A dataset that `command` makes: <folder>/annotations/<split>.json and <folder>/images."""
    images = path.parent.parent / "images"
    _register(
        name,
        partial(_load_prepared, path=path, images=images, command=command),
        json_file=str(path),
        image_root=str(images),
        thing_classes=list(classes),
        prepare_command=command,
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
    return load_coco_json(str(json_path(directory, split)), str(directory / split), name)


def _load_prepared(path: Path, images: Path, command: str, name: str) -> list[dict]:
    if not path.is_file():
        raise ConfigError(f"{name} is not prepared ({path} is missing): run '{command}'")
    return load_coco_json(str(path), str(images), name)


register_builtin_datasets(dataset_root())
