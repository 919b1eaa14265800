"""The registries that users extend, and the name of a head's config node.

Heads, detector parts and groups of config keys register themselves here, so that nothing below them
has to import them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from detectron2.utils.registry import Registry

DISTILL_HEAD_REGISTRY = Registry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Heads that ``DISTILL.HEADS`` can name. A head called ``MyHead`` is configured by the node
``DISTILL.MY_HEAD`` and is called as ``MyHead(cfg, student_spec, teacher_spec)``.
"""

DETECTOR_PART_REGISTRY = Registry("DETECTOR_PART")
DETECTOR_PART_REGISTRY.__doc__ = """
Parts of detectors that distillation can read, see :class:`d2kd.detectors.part.DetectorPart`.
"""

# Path of a config node, e.g. "MODEL.FCOS" -> the class that declares keys there; see d2kd.keys.
CONFIG_KEYS: dict[str, Any] = {}
# Functions that add keys to every config, see d2kd.keys.adds_config.
CONFIG_FUNCTIONS: list[Callable[[Any], Any]] = []


def node_name(head_name: str) -> str:
    """The config node of a head: ``FeatureMimic`` -> ``FEATURE_MIMIC``, ``SSIM`` -> ``SSIM``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", head_name).upper()
