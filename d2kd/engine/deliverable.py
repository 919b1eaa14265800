"""What a training leaves for use: the plain student's weights, and a config that reads them."""

from __future__ import annotations

import os

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils.registry import Registry
from torch import nn

from ..config import declared_keys, student_config
from ..files import write_text
from ..keys import node_at
from .checkpoint import STUDENT_FILE, save_student

STUDENT_CONFIG = "student_config.yaml"

# Parts that a config names, and where their names are looked up.
_PARTS: dict[str, Registry] = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
}


def save_deliverable(cfg: CfgNode, model: nn.Module) -> None:
    """Write ``student_final.pth`` and ``student_config.yaml`` of a model that was trained.

    The config is one of plain Detectron2, if the student is made only of Detectron2's parts.
    """
    weights = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
    save_student(model, weights)
    config, foreign = deployable_config(cfg, weights)
    needs = "plain Detectron2"
    if foreign:
        needs = f"d2kd.add_distillation_config(cfg), and what defines {', '.join(foreign)},"
    header = f"# The student of {STUDENT_FILE}; {needs} can read it.\n"
    write_text(header + config.dump(), os.path.join(cfg.OUTPUT_DIR, STUDENT_CONFIG))


def deployable_config(cfg: CfgNode, weights: str) -> tuple[CfgNode, list[str]]:
    """The config of the student, without teacher, heads, or keys that it does not need.

    Args:
        weights: the student's file, which becomes ``MODEL.WEIGHTS``.

    Returns:
        The config, and the names of parts that are not Detectron2's; with none, it has no key that
        plain Detectron2 lacks.
    """
    plain = student_config(cfg).clone()
    plain.defrost()
    plain.MODEL.WEIGHTS = weights
    foreign = _foreign_parts(plain)
    del plain["DISTILL"]
    if not foreign:
        _keep_only(plain, get_cfg())
        return plain, []
    for info in declared_keys():
        if info.path.startswith("SOLVER."):
            node, _, key = info.path.rpartition(".")
            del node_at(plain, node)[key]
    plain.MODEL.TIMM.PRETRAINED = False
    return plain, foreign


def _foreign_parts(cfg: CfgNode) -> list[str]:
    """The names of parts that are not defined in Detectron2."""
    names = []
    for path, registry in _PARTS.items():
        node, _, key = path.rpartition(".")
        name = node_at(cfg, node)[key]
        if name in registry and not registry.get(name).__module__.startswith("detectron2."):
            names.append(name)
    return names


def _keep_only(node: CfgNode, like: CfgNode) -> None:
    """Remove the keys that ``like`` lacks."""
    for name in list(node):
        if name not in like:
            del node[name]
        elif isinstance(node[name], CfgNode):
            _keep_only(node[name], like[name])
