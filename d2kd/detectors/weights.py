"""Where a teacher comes from: its config, and its weights, which load completely or not at all."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint_files import SafeCheckpointer
from ..config import add_distillation_config
from ..config_files import load_config, merge_overrides, similar_files
from ..config_paths import set_absolute_paths
from ..errors import ConfigError, first_line

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's full config: its file or zoo entry, then ``DISTILL.TEACHER.OPTS``.

    Raises:
        ConfigError: in one line, if the file, a key or the weights are not there.
    """
    node = cfg.DISTILL.TEACHER
    teacher_cfg = get_cfg()
    add_distillation_config(teacher_cfg)
    # How the teacher itself was distilled, perhaps with a head that is not imported, is no concern.
    teacher_cfg.DISTILL.set_new_allowed(True)
    path = load_config(teacher_cfg, node.CONFIG_FILE, key="DISTILL.TEACHER.CONFIG_FILE")
    merge_overrides(teacher_cfg, node.OPTS, "DISTILL.TEACHER.OPTS")
    set_absolute_paths(teacher_cfg, [os.path.dirname(path)])
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        # A distilled student can teach: its config says how it was trained, its weights are plain.
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.DISTILL.STUDENT_META_ARCH
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.WEIGHTS = find_teacher_weights(node, teacher_cfg)
    teacher_cfg.freeze()
    return teacher_cfg


def find_teacher_weights(node: CfgNode, teacher_cfg: CfgNode) -> str:
    """``DISTILL.TEACHER.WEIGHTS``, else the zoo's checkpoint, else the config's own."""
    weights = node.WEIGHTS
    if not weights:
        try:
            weights = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
        except RuntimeError:
            weights = teacher_cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(
            "the teacher has no weights: set DISTILL.TEACHER.WEIGHTS to a checkpoint of "
            f"'{node.CONFIG_FILE}' (or to '{RANDOM_WEIGHTS}' for a test without any)"
        )
    is_local = "://" not in weights and weights != RANDOM_WEIGHTS
    if is_local and not PathManager.isfile(weights):
        near = similar_files(weights)
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: no file '{weights}'" + (f"; there is {near}" if near else "")
        )
    return weights


class _StrictCheckpointer(SafeCheckpointer):
    """Loads weights, and raises where Detectron2 would only warn."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        misfits = {key for key, *_ in incompatible.incorrect_shapes}
        missing = set(incompatible.missing_keys) - misfits
        wrong = [f"{key} (not in the file)" for key in missing]
        wrong += [
            f"{key} ({tuple(found)} in the file, {tuple(wanted)} in the model)"
            for key, found, wanted in incompatible.incorrect_shapes
        ]
        if wrong:
            raise ConfigError(
                f"{len(wrong)} of the teacher's weights did not load: {', '.join(sorted(wrong))}"
            )
        ignored = [k for k in incompatible.unexpected_keys if not k.startswith("distill_heads.")]
        if ignored:
            logger.info("The teacher's file has keys that its model lacks: %s", ", ".join(ignored))


def load_teacher_weights(model: nn.Module, weights: str) -> None:
    """Load ``weights`` into ``model``, completely.

    Raises:
        ConfigError: the file cannot be read, or a weight of the model did not load (all are named).
    """
    if weights == RANDOM_WEIGHTS:
        logger.warning("The teacher has random weights: good for a test, not for distillation.")
        return
    try:
        _StrictCheckpointer(model).load(weights)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the teacher's weights '{weights}' cannot be read: {first_line(error)}"
        ) from error
