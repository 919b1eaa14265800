"""Datasets by name: whose they are, how they are loaded, and whether their files are there."""

from __future__ import annotations

import difflib
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError
from . import loading
from .files import dataset_root
from .report import shown

FORMAT_KEY = "DATASETS.COCO_FORMAT"

# Registered by this module: name -> (annotation file, image directory).
registered: dict[str, tuple[str, str]] = {}
# Datasets of others that are loaded by this package since they were checked.
taken_over: set[str] = set()


def is_readable(name: str) -> bool:
    """Whether a dataset is a COCO-format file that is loaded just as Detectron2 loads it, so that
    it can be read here in its place."""
    metadata, function = MetadataCatalog.get(name), DatasetCatalog[name]
    if metadata.get("made_on_first_use") or not _has_local_file(name):
        return False
    by_detectron2 = "register_coco_instances.<locals>.<lambda>"
    return (
        (isinstance(function, partial) and function.func is loading.load)
        or metadata.get("registered_by") == "d2kd"
        or getattr(function, "__qualname__", "") == by_detectron2
    )


def is_evaluated_from_file(name: str) -> bool:
    """Whether pycocotools reads the annotation file, whatever function loads the dataset."""
    made = MetadataCatalog.get(name).get("made_on_first_use")
    return not made and _has_local_file(name)


def _has_local_file(name: str) -> bool:
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key) for key in ("json_file", "image_root")]
    return metadata.get("evaluator_type") == "coco" and all(
        isinstance(path, (str, os.PathLike)) and "://" not in str(path) for path in paths
    )


def unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, list(DatasetCatalog), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"register your own with {FORMAT_KEY}"
    )
    return f"there is no dataset {shown(name, 60)}; {hint}"


def check_present(name: str) -> None:
    """Checks that what the metadata of a COCO or VOC dataset points to exists."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("made_on_first_use"):
        return
    kinds = {"json_file": "file", "image_root": "directory", "dirname": "directory"}
    for attribute, kind in kinds.items():
        path = metadata.get(attribute)
        if path is None or "://" in str(path):
            continue
        if not PathManager.exists(path):
            if command := metadata.get("prepare_command"):
                hint = f"run '{command}'"
            elif name in registered:
                hint = f"paths of {FORMAT_KEY} start at {os.getcwd()}"
            else:
                hint = f"datasets lie in '{dataset_root()}', see datasets/README.md"
            raise ConfigError(f"dataset '{name}': {path} not found; {hint}")
        if (kind == "file") != PathManager.isfile(path):
            raise ConfigError(f"dataset '{name}': {attribute} {path} is not a {kind}")
