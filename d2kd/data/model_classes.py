"""The classes of a model: how many it has, and the names that its training set gives them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError
from .catalog import is_from_config, is_readable
from .classes import classes_of, list_of, read_categories
from .coco import Table, hashable, read_json
from .report import Finding, plural


def trained_classes(cfg: CfgNode) -> tuple[str, ...] | None:
    """Names of the classes that a detector of ``cfg`` was trained on, in order.

    Returns:
        None where they are not known: the annotation file of the training set is not here, or they
        are not as many as the model has.
    """
    expected = number_of_classes(cfg)
    for name in cfg.DATASETS.TRAIN:
        names = _names_of(name, cfg, expected)
        if names is not None:
            return names if expected in (None, len(names)) else None
    return None


def _names_of(name: str, cfg: CfgNode, expected: int | None) -> tuple[str, ...] | None:
    """Class names of a dataset, from its annotation file or its metadata; None if not known."""
    entries = cfg.DATASETS.get("COCO_FORMAT", ())  # a teacher's, which is not checked yet
    files = {str(e[0]): str(e[1]) for e in entries if isinstance(e, (list, tuple)) and len(e) > 2}
    known = name in DatasetCatalog
    if name not in files and known and is_readable(name):
        files[name] = str(MetadataCatalog.get(name).json_file)
    path = os.path.expanduser(files.get(name, ""))
    if os.path.isfile(path):
        try:
            used = set() if expected else _used_categories(path)
            classes, _ = classes_of(read_categories(path), used, None, expected=expected)
        except ConfigError:
            return None
        return classes.names if classes else None
    stated = known and not is_from_config(name)  # else by an earlier config, of another file
    names = MetadataCatalog.get(name).get("thing_classes") if stated else None
    return tuple(names) if names else None


def _used_categories(path: str) -> set[object]:
    """Ids of the categories of a file's objects, which tell a root from a class where no number of
    classes does."""
    return set(hashable(Table.column(read_json(path).get("annotations", []), "category_id")))


def number_of_classes(cfg: CfgNode) -> int | None:
    """The model's number of classes, where it is known which key says it."""
    node = _class_node(cfg)
    return cfg.MODEL[node].NUM_CLASSES if node else None


def architecture(cfg: CfgNode) -> str:
    """The meta-architecture of the detector itself, where ``cfg`` is of a Distiller."""
    is_distiller = cfg.MODEL.META_ARCHITECTURE == "Distiller"
    return cfg.DISTILL.STUDENT_META_ARCH if is_distiller else cfg.MODEL.META_ARCHITECTURE


def _class_node(cfg: CfgNode) -> str | None:
    nodes = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS"}
    nodes |= {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return nodes.get(architecture(cfg))


def check_class_count(
    cfg: CfgNode, expected: int | None, names: Sequence[str]
) -> Iterator[Finding]:
    """With too few classes the last would quietly be background; with too many evaluation fails as
    soon as one of them is predicted."""
    if expected not in (None, len(names)):
        yield Finding(
            f"MODEL.{_class_node(cfg)}.NUM_CLASSES is {expected}, but it has "
            f"{plural(len(names), 'class')}: {list_of(names)}",
            f"set it to {len(names)}",
            fatal=True,
        )
