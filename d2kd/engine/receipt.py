"""The receipt of a student, ``receipt.json`` next to it: what it is, and what it was made of."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import torch
from detectron2.utils import comm

from ..config import student_config
from ..files import write_json
from ..registry import node_name
from .checkpoint import STUDENT_FILE
from .deliverable import STUDENT_CONFIG
from .identity import describe_dataset, file_sha256
from .output import RECEIPT_FILE
from .run import Run


def write_receipt(run: Run, cost: dict, results: dict, seed: int) -> None:
    """Write the receipt of a complete training; its student's files are there.

    ``compared`` is filled by :mod:`d2kd.compare`, where the student is one of a comparison.

    Args:
        cost: see :meth:`~d2kd.engine.cost.TrainingCost.summary`. results: task -> metrics.
        seed: of the training.
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
