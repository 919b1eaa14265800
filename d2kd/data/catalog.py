"""Datasets by name: whose they are, how they are loaded, and whether their files are there."""

from __future__ import annotations

import difflib
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError
from . import loading
from .files import dataset_root
from .report import shown

FORMAT_KEY = "DATASETS.COCO_FORMAT"


def is_from_config(name: str) -> bool:
    """Whether a dataset is one of ``DATASETS.COCO_FORMAT``, of this or an earlier config."""
    return MetadataCatalog.get(name).get("registered_by") == FORMAT_KEY


def is_loaded_here(name: str) -> bool:
    """Whether :func:`~d2kd.data.loading.load` loads a dataset: one of ``DATASETS.COCO_FORMAT``, or
    one of others that was checked."""
    return getattr(DatasetCatalog[name], "func", None) is loading.load


def is_readable(name: str) -> bool:
    """Whether a dataset is a COCO-format file that is loaded just as Detectron2 loads it, so that
    it can be read here in its place."""
    by_detectron2 = "register_coco_instances.<locals>.<lambda>"
    return is_evaluated_from_file(name) and (
        is_loaded_here(name)
        or MetadataCatalog.get(name).get("registered_by") == "d2kd"
        or getattr(DatasetCatalog[name], "__qualname__", "") == by_detectron2
    )


def is_evaluated_from_file(name: str) -> bool:
    """Whether pycocotools reads the annotation file, whatever function loads the dataset."""
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key) for key in ("json_file", "image_root")]
    return (
        not metadata.get("made_on_first_use")
        and metadata.get("evaluator_type") == "coco"
        and all(isinstance(p, (str, os.PathLike)) and "://" not in str(p) for p in paths)
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
            elif is_from_config(name):
                hint = f"paths of {FORMAT_KEY} start at {os.getcwd()}"
            else:
                hint = f"datasets lie in '{dataset_root()}', see datasets/README.md"
            raise ConfigError(f"dataset '{name}': {path} not found; {hint}")
        if (kind == "file") != PathManager.isfile(path):
            raise ConfigError(f"dataset '{name}': {attribute} {path} is not a {kind}")
