"""Where a teacher comes from: a YAML config, a LazyConfig, or a model of another library."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import add_distillation_config
from ..config_files import (
    foreign_teacher,
    load_config,
    merge_overrides,
    resolve_teacher,
    similar_files,
)
from ..config_paths import absolute_path, set_absolute_paths
from ..config_rules import check_model_keys
from ..data.model_classes import trained_classes
from ..errors import ConfigError
from ..lazy_config import build_lazy, is_lazy, load_lazy, override_lazy
from .building import building
from .foreign import GivesMaps, MapsDetector, as_detector
from .weights import RANDOM_WEIGHTS

logger = logging.getLogger(__name__)

KEY = "DISTILL.TEACHER.CONFIG_FILE"
_OPTS = "DISTILL.TEACHER.OPTS"


@dataclass(frozen=True)
class Source:
    """A teacher that is built, and what is known of it.

    Attributes:
        model: on the device of the config.
        weights: still to be loaded into it; "" if it has them.
        input_format: "BGR" or "RGB", the order of channels that it expects.
        class_names: of the classes that it predicts, in order, where they are known.
    """

    model: nn.Module
    weights: str
    input_format: str
    class_names: tuple[str, ...] | None = None


def build_source(cfg: CfgNode) -> Source:
    """Build the teacher that ``cfg.DISTILL.TEACHER`` names.

    Raises:
        ConfigError: in one line, if the file, a key or the weights are not there.
    """
    name = cfg.DISTILL.TEACHER.CONFIG_FILE
    if foreign_teacher(name):
        return _foreign_source(cfg)
    if is_lazy(name):
        return _lazy_source(cfg)
    teacher_cfg = teacher_config(cfg)
    with building("the teacher"):
        model = build_model(teacher_cfg)
    return Source(
        model,
        teacher_cfg.MODEL.WEIGHTS,
        teacher_cfg.INPUT.FORMAT,
        trained_classes(teacher_cfg),
    )


# --- YAML ----------------------------------------------------------------------------------------


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's full config: its YAML file or zoo entry, then ``DISTILL.TEACHER.OPTS``.

    Raises:
        ConfigError: in one line, if the file, a key or the weights are not there.
    """
    node = cfg.DISTILL.TEACHER
    teacher_cfg = get_cfg()
    add_distillation_config(teacher_cfg)
    # How the teacher itself was distilled, perhaps with a head that is not imported, is no concern.
    teacher_cfg.DISTILL.set_new_allowed(True)
    path = load_config(teacher_cfg, node.CONFIG_FILE, key=KEY)
    merge_overrides(teacher_cfg, node.OPTS, _OPTS)
    set_absolute_paths(teacher_cfg, [os.path.dirname(path)])
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        # A distilled student can teach: its config says how it was trained, its weights are plain.
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.DISTILL.STUDENT_META_ARCH
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    try:
        check_model_keys(teacher_cfg)
    except ConfigError as error:
        raise ConfigError(f"the teacher's {error}") from error
    teacher_cfg.MODEL.WEIGHTS = find_teacher_weights(node, teacher_cfg.MODEL.WEIGHTS)
    teacher_cfg.freeze()
    return teacher_cfg


def find_teacher_weights(node: CfgNode, own: str) -> str:
    """``DISTILL.TEACHER.WEIGHTS``, else the zoo's checkpoint, else those that its config names.

    Raises:
        ConfigError: none is named, or the file is not there.
    """
    weights = node.WEIGHTS
    if not weights:
        try:
            weights = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
        except RuntimeError:
            weights = own
    if not weights:
        raise ConfigError(
            "the teacher has no weights: set DISTILL.TEACHER.WEIGHTS to a checkpoint of "
            f"'{node.CONFIG_FILE}' (or to '{RANDOM_WEIGHTS}' for a test without any)"
        )
    is_local = "://" not in weights and weights != RANDOM_WEIGHTS
    if is_local and not PathManager.isfile(weights.partition("?")[0]):
        near = similar_files(weights)
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: no file '{weights}'" + (f"; there is {near}" if near else "")
        )
    return weights


# --- LazyConfig ----------------------------------------------------------------------------------


def _lazy_source(cfg: CfgNode) -> Source:
    """A LazyConfig's ``model``: a detector of Detectron2, or a module that gives maps."""
    node = cfg.DISTILL.TEACHER
    path = resolve_teacher(node.CONFIG_FILE)
    logger.info("Running the teacher's LazyConfig %s", path)
    lazy = load_lazy(path)
    override_lazy(lazy, node.OPTS, _OPTS)
    own = OmegaConf.select(lazy, "train.init_checkpoint") or ""
    own = absolute_path(own, [os.path.dirname(path)])
    model = build_lazy(lazy, "model", f"{KEY} '{node.CONFIG_FILE}'")
    if isinstance(model, GivesMaps) and not (node.WEIGHTS or own):
        weights = ""  # such a module brings its own
    else:
        weights = find_teacher_weights(node, own)
    model = as_detector(model)
    names = OmegaConf.select(lazy, "dataloader.train.dataset.names")
    return Source(model.to(cfg.MODEL.DEVICE), weights, _format(model, lazy), _class_names(names))


def _format(model: Any, lazy: DictConfig) -> str:
    """What the model says of its input, else what its images are loaded as."""
    for part in ("train", "test"):
        loaded = OmegaConf.select(lazy, f"dataloader.{part}.mapper.image_format")
        if getattr(model, "input_format", None) is None and loaded:
            return str(loaded)
    return getattr(model, "input_format", None) or "BGR"


def _class_names(datasets: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of the classes of the first of some datasets, where they are known."""
    names = [datasets] if isinstance(datasets, str) else list(datasets or ())
    found = MetadataCatalog.get(names[0]).get("thing_classes") if names else None
    return tuple(found) if found else None


# --- other libraries -----------------------------------------------------------------------------


def _foreign_source(cfg: CfgNode) -> Source:
    """A model of timm or torchvision."""
    node = cfg.DISTILL.TEACHER
    library, name = foreign_teacher(node.CONFIG_FILE) or ("", "")
    options, weights = _options(node.OPTS), node.WEIGHTS
    if library == "timm":
        from .timm_teacher import TimmTeacher

        is_random = weights == RANDOM_WEIGHTS
        module: Any = TimmTeacher(name, pretrained=not is_random, weights=weights, **options)
        weights = weights if is_random else ""
    else:
        from .torchvision_teacher import TorchvisionTeacher

        module = TorchvisionTeacher(name, pretrained=not weights, **options)
    model = MapsDetector(module, f"{name} of {library}").to(cfg.MODEL.DEVICE)
    names = getattr(module, "class_names", None)
    return Source(model, weights, module.pixels.order, names)


def _options(opts: Sequence[Any]) -> dict[str, Any]:
    """KEY VALUE pairs as arguments."""
    if len(opts) % 2 or not all(isinstance(key, str) for key in opts[0::2]):
        raise ConfigError(
            f"{_OPTS}: {list(opts)} is not a list of pairs, such as ['num_classes', 11]"
        )
    options = dict(zip(opts[0::2], opts[1::2], strict=True))
    for key in options:
        if key.startswith(("pretrained", "checkpoint", "weights")):
            raise ConfigError(f"{_OPTS}: '{key}': weights are named by DISTILL.TEACHER.WEIGHTS")
    return options
