"""What a run is: its settings, teacher and data, as ``run.json`` of the output folder keeps them.

So a run that is resumed otherwise than it was begun says so, and no number of one run is shown as
another's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from torch import nn

from ..config import add_distillation_config
from ..detectors.teacher import Teacher
from ..errors import one_line
from ..files import shown
from ..keys import flat_values

# Keys that change where or how fast a training runs, what it starts from or how it is watched, but
# not what it learns from here on; and names of files that are known by their content.
_NO_MATTER = (
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.COCO_FORMAT",
    "DATASETS.TEST",
    "DISTILL.INHERIT",
    "DISTILL.TEACHER.CHECK",
    "DISTILL.TEACHER.CONFIG_FILE",
    "DISTILL.TEACHER.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINT_KEEP",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.",
    "VIS_PERIOD",
)
_LAZY_CHECK = (("model", "teacher"), ("dataloader", "test"))
_CHUNK = 2**22


def describe_run(cfg: CfgNode, teacher: Teacher | None) -> dict[str, Any]:
    """The identity of a run, as it is written to ``run.json``.

    Returns:
        ``settings``, the keys that differ from their defaults; ``config``, their SHA-256;
        ``heads``; ``teacher``, see :func:`describe_teacher`; ``data``, dataset -> its annotation
        file and the file's SHA-256; ``versions``.
    """
    settings = changed_settings(cfg)
    text = json.dumps(settings, sort_keys=True, default=str)
    distils = cfg.MODEL.META_ARCHITECTURE == "Distiller"
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "heads": list(cfg.DISTILL.HEADS) if distils else [],
        "teacher": None if teacher is None else describe_teacher(cfg, teacher),
        "data": {name: describe_dataset(name) for name in cfg.DATASETS.TRAIN},
        "versions": versions(),
        "settings": settings,
    }


def changed_settings(cfg: CfgNode) -> dict[str, Any]:
    """The keys of ``cfg`` that differ from Detectron2's and d2kd's defaults, with their values.

    A version with more keys finds the same.
    """
    default = get_cfg()
    add_distillation_config(default)
    own, default = _values(cfg), _values(default)
    return {key: value for key, value in own.items() if key not in default or default[key] != value}


def _values(cfg: CfgNode) -> dict[str, Any]:
    """Key -> value, as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(flat_values(cfg), default=str))


def describe_teacher(cfg: CfgNode, teacher: Teacher) -> dict[str, str]:
    """Where the teacher comes from, and the SHA-256 of what it computes with."""
    return {
        "config_file": cfg.DISTILL.TEACHER.CONFIG_FILE,
        "weights": cfg.DISTILL.TEACHER.WEIGHTS,
        "sha256": fingerprint(teacher.model),
    }


def describe_check(cfg: CfgNode) -> dict[str, Any]:
    """What the evaluation of a teacher depends on besides its weights, as JSON gives it back."""
    node = cfg.DISTILL.TEACHER
    lazy = cfg.get("LAZY", {})  # a LazyConfig says it there
    return {
        "opts": [str(part) for part in node.OPTS],
        "lazy": [str(lazy[a].get(b)) for a, b in _LAZY_CHECK if a in lazy],
        "precision": node.PRECISION,
        "input": [cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST],
        "data": {name: describe_dataset(name)["sha256"] for name in cfg.DATASETS.TEST},
    }


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's class, parameters and buffers: of what was loaded, from any file."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def describe_dataset(name: str) -> dict[str, Any]:
    """The annotation file of a dataset, and its SHA-256; None where they are not known."""
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file", None)
    if path is None and metadata.get("dirname", None) is not None:  # PASCAL VOC
        path = os.path.join(metadata.dirname, "ImageSets", "Main", f"{metadata.split}.txt")
    # A dataset that is made on its first use may not be there yet.
    known = path is not None and os.path.isfile(path)
    return {"file": path, "sha256": file_sha256(path) if known else None}


def file_sha256(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a training depends on most."""
    try:
        own = importlib.metadata.version("d2kd")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        own = "unknown"
    return {
        "d2kd": own,
        "detectron2": getattr(detectron2, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a run's identity changed and matters to what it learns, in words.

    Args:
        before, now: of :func:`describe_run`; ``before`` may be of an older version.
    """
    changes = []
    old, new = before.get("settings", {}), now["settings"]
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(_NO_MATTER):
            was, is_now = (one_line(str(s.get(key, "its default")), 60) for s in (old, new))
            changes.append(f"{key} is {is_now} (was {was})")
    if same_teacher(before.get("teacher"), now["teacher"]) is False:
        changes.append(f"the teacher changed ({shown(now['teacher']['config_file'])})")
    for name, data in now["data"].items():
        was = (before.get("data") or {}).get(name) or {}
        if was.get("sha256") and data["sha256"] and was["sha256"] != data["sha256"]:
            changes.append(f"the annotations of '{name}' changed")
    return changes


def same_teacher(before: dict | None, now: dict | None) -> bool | None:
    """Whether two descriptions are of one teacher; None where there is none in one of them."""
    if not before or not now:
        return None
    return before.get("sha256") == now["sha256"]
