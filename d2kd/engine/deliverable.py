"""What a training leaves for use: the plain student's weights, a config that reads them, and a
receipt of what they are and what they were made of."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from torch import nn

from ..config import declared_keys, student_config
from ..config_rules import PARTS
from ..files import write_json, write_text
from ..keys import node_at
from ..registry import CONFIG_FUNCTIONS, node_name
from .checkpoint import STUDENT_FILE, save_student
from .identity import describe_dataset, file_sha256
from .output import RECEIPT_FILE, Run

STUDENT_CONFIG = "student_config.yaml"
_PROJECTS = "detectron2.projects."


def save_deliverable(cfg: CfgNode, model: nn.Module) -> None:
    """Write ``student_final.pth`` and ``student_config.yaml`` of a model that was trained.

    The config is one of plain Detectron2, if the student is made only of Detectron2's parts.
    """
    weights = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
    save_student(model, weights)
    config, foreign = deployable_config(cfg, weights)
    needs = "plain Detectron2"
    if foreign:
        base = needs if _are_projects(foreign) else "d2kd.add_distillation_config(cfg)"
        needs = f"{base}, and what defines {', '.join(foreign)} and its keys,"
    header = f"# The student of {STUDENT_FILE}; {needs} can read it.\n"
    write_text(header + config.dump(), os.path.join(cfg.OUTPUT_DIR, STUDENT_CONFIG))


def deployable_config(cfg: CfgNode, weights: str) -> tuple[CfgNode, dict[str, str]]:
    """The config of the student with its ``weights``, without teacher, heads, or keys that it does
    not need; and the parts that are not Detectron2's, name -> module.

    Without such parts it has no key that plain Detectron2 lacks, with those of Detectron2's
    projects alone no key of d2kd's.
    """
    plain = student_config(cfg)
    plain.defrost()
    plain.MODEL.WEIGHTS = weights
    foreign = _foreign_parts(plain)
    del plain["DISTILL"]
    if _are_projects(foreign):
        like = get_cfg()
        for add in CONFIG_FUNCTIONS if foreign else ():
            add(like)
        _keep_only(plain, like)
        return plain, foreign
    for info in declared_keys():
        if info.path.startswith("SOLVER."):
            node, _, key = info.path.rpartition(".")
            del node_at(plain, node)[key]
    plain.MODEL.TIMM.PRETRAINED = False
    return plain, foreign


def _foreign_parts(cfg: CfgNode) -> dict[str, str]:
    """Name -> module of the parts that plain Detectron2 does not define."""
    parts = {}
    for path, (registry, _) in PARTS.items():
        name = node_at(cfg, path)
        module = registry.get(name).__module__ if name in registry else ""
        if module and (not module.startswith("detectron2.") or module.startswith(_PROJECTS)):
            parts[name] = module
    return parts


def _are_projects(foreign: dict[str, str]) -> bool:
    """Whether all parts are of projects that ship with Detectron2."""
    return all(module.startswith(_PROJECTS) for module in foreign.values())


def _keep_only(node: CfgNode, like: CfgNode) -> None:
    """Remove the keys that ``like`` lacks."""
    for name in list(node):
        if name not in like:
            del node[name]
        elif isinstance(node[name], CfgNode):
            _keep_only(node[name], like[name])


def write_receipt(run: Run, cost: dict, results: dict, seed: int) -> None:
    """Write ``receipt.json`` of a complete training, whose student's files are there.

    ``compared`` is filled by :mod:`d2kd.compare`, where the student is one of a comparison.
    """
    cfg, record = run.cfg, run.record
    teacher = record["teacher"]
    device = "cpu" if cost["memory_of"] == "process" else torch.cuda.get_device_name()
    receipt: dict[str, Any] = {
        "student": {
            "architecture": student_config(cfg).MODEL.META_ARCHITECTURE,
            "parameters": cost["student_parameters"],
            "weights": _file(run.folder, STUDENT_FILE),
            "config": _file(run.folder, STUDENT_CONFIG),
            "results": results,
        },
        "teacher": None if teacher is None else {**teacher, "results": run.teacher_results},
        "heads": {name: cfg.DISTILL[node_name(name)].WEIGHT for name in record["heads"]},
        "compared": None,
        "data": {
            "trained_on": record["data"],
            "evaluated_on": {name: describe_dataset(name) for name in cfg.DATASETS.TEST},
        },
        "command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",
        "seed": seed,
        "processes": comm.get_world_size(),
        "settings": {"sha256": record["config"], "changed": record["settings"]},
        "resumed_with_other_settings": record["changes"],
        "cost": {**cost, "device": device},
        "versions": record["versions"],
    }
    write_json(receipt, os.path.join(run.folder, RECEIPT_FILE))


def _file(folder: str, name: str) -> dict[str, str]:
    return {"file": name, "sha256": file_sha256(os.path.join(folder, name))}
