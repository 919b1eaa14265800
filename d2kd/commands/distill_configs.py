"""The configs of `d2kd distill`: data and classes written into them, weights that fit or not."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from ..config_files import merge_overrides
from ..config_paths import absolute_path, find_file, set_absolute_paths
from ..data.catalog import check_present, is_readable
from ..data.classes import list_of
from ..data.custom import dataset_uses, register_coco_format_datasets
from ..data.loader import validate_loader_config
from ..data.loading import Question, inspect
from ..data.report import error_line, plural
from ..detectors.weights import RANDOM_WEIGHTS, load_teacher_weights
from ..engine.checkpoint import AtomicCheckpointer, find_checkpoint
from ..engine.identity import changed_settings
from ..engine.setup import check_config, merged_config
from ..errors import ConfigError
from ..lazy_config import is_lazy


def read_config(
    config: str | CfgNode, opts: Sequence[Any], *, other_teacher: bool = False
) -> CfgNode:
    """The config of a file or name, or a copy of a config, with overrides merged; ``other_teacher``
    forgets the weights and overrides of the teacher that the config itself names."""
    if isinstance(config, str):
        if is_lazy(config):
            raise ConfigError(
                f"--student '{config}' is a LazyConfig, which d2kd train reads; "
                "here a student is YAML"
            )
        cfg = merged_config(config, [])
    else:
        cfg = config.clone()
        cfg.defrost()
    if "DISTILL" not in cfg:
        raise ConfigError("the config has no DISTILL: call d2kd.add_distillation_config(cfg) first")
    if other_teacher:
        cfg.DISTILL.TEACHER.WEIGHTS, cfg.DISTILL.TEACHER.OPTS = "", []
    merge_overrides(cfg, opts)
    set_absolute_paths(cfg)
    return cfg


def set_data(cfg: CfgNode, data: Sequence[str]) -> None:
    """Let ``cfg`` train and evaluate on ``data``; the datasets are registered."""
    if len(data) == 4:
        entries = []
        for json_file, images in (data[:2], data[2:]):
            paths = [absolute_path(path, is_there=os.path.exists) for path in (json_file, images)]
            digest = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:6]
            words = re.sub(r"\W+", "_", " ".join(Path(paths[0]).with_suffix("").parts[-2:]))
            entries.append([f"{words}_{digest}", *paths])
        cfg.DATASETS.COCO_FORMAT = [e for i, e in enumerate(entries) if e not in entries[:i]]
        data = [entry[0] for entry in entries]
    elif len(data) not in (0, 2):
        raise ConfigError(
            f"--data has {len(data)} items; it must be: train.json images val.json images, or two "
            "names of datasets"
        )
    if data:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (data[0],), (data[1],)
    if not (cfg.DATASETS.TRAIN and cfg.DATASETS.TEST):
        raise ConfigError("name data to train and evaluate on: --data, or the student's DATASETS")
    register_coco_format_datasets(cfg)
    for name in dataset_uses(cfg, train=True):
        check_present(name)


def class_names(cfg: CfgNode) -> tuple[str, ...]:
    """The classes of the first training set, in the order in which a detector numbers them."""
    name = cfg.DATASETS.TRAIN[0]
    metadata = MetadataCatalog.get(name)
    if is_readable(name):
        answer = inspect(name, Question(str(metadata.json_file), str(metadata.image_root)))
        if answer.reading is None:
            raise ConfigError(error_line([answer.report]))
        return answer.reading.classes.names
    if "thing_classes" not in metadata.as_dict():
        DatasetCatalog.get(name)  # which may state them
    if not metadata.get("thing_classes"):
        raise ConfigError(f"dataset '{name}' states no thing_classes in its metadata")
    return tuple(metadata.thing_classes)


def set_classes(cfg: CfgNode, count: int) -> None:
    """Write the number of classes of things into every part of the model that has one."""
    for name, node in cfg.MODEL.items():
        if isinstance(node, CfgNode) and "NUM_CLASSES" in node and name != "SEM_SEG_HEAD":
            node.NUM_CLASSES = count


def teacher_weights(teacher: str | CfgNode, cfg: CfgNode, stated: str) -> str:
    """``DISTILL.TEACHER.WEIGHTS``, else the zoo's checkpoint, else the teacher config's own."""
    if stated:
        return stated
    if isinstance(teacher, str) and not find_file(teacher):
        with contextlib.suppress(RuntimeError):
            return model_zoo.get_checkpoint_url(teacher)
    return cfg.MODEL.WEIGHTS


def why_train(
    cfg: CfgNode, weights: str, known: tuple[str, ...] | None, classes: tuple[str, ...]
) -> str:
    """Why ``weights`` are not a teacher for ``classes``, in words; "" where they are.

    Args:
        cfg: the teacher's, with the number of ``classes``.
        known: names of the classes that the teacher's own config was made for; None: not known.
    """
    if weights == RANDOM_WEIGHTS:
        return ""
    if not weights:
        return "it has no weights of a detector"
    if known is not None and known != classes:
        return f"its weights are for {plural(len(known), 'class')} ({list_of(known)})"
    if known is None or "://" not in weights:
        plain = cfg.clone()
        plain.MODEL.DEVICE, plain.MODEL.TIMM.PRETRAINED = "cpu", False
        try:
            load_teacher_weights(build_model(plain), weights)
        except ConfigError as error:
            if not find_file(weights.partition("?")[0]):
                raise
            why = str(error).partition(":")[0]
            return f"its weights are not for this model and these classes ({why})"
    return ""


def check_training(cfg: CfgNode, num_gpus: int) -> None:
    """Check all that can be checked of a training that may go on: config, data, pair, weights."""
    check_config(cfg, train=True, resume=True)
    validate_loader_config(cfg, max(num_gpus, 1))
    if not find_checkpoint(cfg.OUTPUT_DIR):
        cfg.MODEL.DEVICE, cfg.DISTILL.TEACHER.PRECISION = "cpu", ""
        model = build_model(cfg)
        AtomicCheckpointer(model).load_weights(cfg.MODEL.WEIGHTS)


@contextlib.contextmanager
def silent(name: str) -> Iterator[None]:
    """Without warnings of the logger ``name``."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def as_yaml(cfg: CfgNode) -> str:
    """The keys of ``cfg`` that differ from their defaults, as a config file."""
    nested: dict[str, Any] = {}
    for key, value in changed_settings(cfg).items():
        *path, last = key.split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return yaml.safe_dump(nested, default_flow_style=None, width=100)
