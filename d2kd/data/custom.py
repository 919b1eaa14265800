"""Datasets named in a config: registering the user's own, and checking that all are there."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError
from ..keys import Options, config_keys, key
from .files import dataset_root

_KEY = "DATASETS.COCO_FORMAT"


@config_keys("DATASETS")
@dataclass(frozen=True)
class DatasetOptions(Options):
    """Keys that d2kd adds to ``DATASETS``."""

    coco_format: tuple[Any, ...] = key(
        (),
        comment="Your own datasets in COCO format, a list [name, annotation file, image "
        "directory] each. The names can then be used in DATASETS.TRAIN and DATASETS.TEST. "
        "Relative paths start at the working directory.",
    )


# Registered by this module: name -> (annotation file, image directory).
_registered: dict[str, tuple[str, str]] = {}


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Registers `DATASETS.COCO_FORMAT` and checks all datasets that `cfg` uses, before any work.

    Args:
        train: also check `DATASETS.TRAIN`; False suits evaluation.

    Raises:
        ConfigError: in one line, for an unknown name (with the closest ones that exist), for a
            missing file, or for a model with fewer classes than the dataset.
    """
    register_coco_format_datasets(cfg)
    for part in ("TRAIN", "TEST") if train else ("TEST",):
        for name in cfg.DATASETS[part]:
            if name not in DatasetCatalog:
                raise ConfigError(f"DATASETS.{part}: {_unknown_name(name)}")
            _check_files(name)
            _check_class_count(cfg, name)


def register_coco_format_datasets(cfg: CfgNode) -> None:
    """Registers each `[name, annotations.json, image directory]` of `DATASETS.COCO_FORMAT`.

    Registering the same once more changes nothing.

    Raises:
        ConfigError: in one line, for a malformed entry, a missing or broken file, or a taken name.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        is_list = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_list or not all(isinstance(item, str) and item for item in entry):
            raise ConfigError(
                f"{_KEY}: {entry!r} is not a list [name, annotation file, image directory]"
            )
        name, *paths = entry
        json_file, image_root = (str(Path(path).expanduser()) for path in paths)
        if _registered.get(name) == (json_file, image_root):
            continue
        if name in DatasetCatalog:
            raise ConfigError(f"{_KEY}: the name '{name}' is taken, choose another")
        classes = _read_classes(name, json_file, image_root)
        register_coco_instances(name, {"thing_classes": classes}, json_file, image_root)
        _registered[name] = (json_file, image_root)


def _read_classes(name: str, json_file: str, image_root: str) -> list[str]:
    """Class names of an annotation file, by category id, once its structure has been checked."""
    if not Path(json_file).is_file():
        raise ConfigError(f"{_KEY}: annotation file of '{name}' not found: {json_file}")
    if not Path(image_root).is_dir():
        raise ConfigError(f"{_KEY}: image directory of '{name}' not found: {image_root}")
    try:
        content = json.loads(Path(json_file).read_text())
        images = [image["file_name"] for image in content["images"]]
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{_KEY}: {json_file} of '{name}' is not in COCO format "
            f"({type(error).__name__}: {error})"
        ) from error
    if not images or not classes:
        raise ConfigError(f"{_KEY}: {json_file} of '{name}' has no images or no categories")
    if not (Path(image_root) / images[0]).is_file():  # the usual slip: one directory too high
        raise ConfigError(f"{_KEY}: '{name}' has no image '{images[0]}' in {image_root}")
    return classes


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, list(DatasetCatalog), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"register your own with {_KEY}"
    return f"there is no dataset '{name}'; {hint}"


def _check_files(name: str) -> None:
    """Checks that what the metadata of a COCO or VOC dataset points to exists."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("made_on_first_use"):
        return
    for attribute in ("json_file", "image_root", "dirname"):
        path = metadata.get(attribute)
        if path is not None and not PathManager.exists(path):
            if command := metadata.get("prepare_command"):
                hint = f"run '{command}'"
            else:
                hint = f"datasets lie in '{dataset_root()}', see datasets/README.md"
            raise ConfigError(f"dataset '{name}': {path} not found; {hint}")


def _check_class_count(cfg: CfgNode, name: str) -> None:
    """Too few classes would not fail but quietly train the last classes as background."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "Distiller":
        architecture = cfg.DISTILL.STUDENT_META_ARCH
    nodes = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}
    classes = MetadataCatalog.get(name).get("thing_classes")
    if architecture not in nodes or classes is None:
        return
    node = nodes[architecture]
    count = cfg.MODEL[node].NUM_CLASSES
    if count < len(classes):
        raise ConfigError(
            f"MODEL.{node}.NUM_CLASSES is {count}, but dataset '{name}' has {len(classes)} classes"
        )
