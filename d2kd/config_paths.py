"""Where files lie that a config names: in the working directory, in its own folder, or shipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

_PACKAGE = Path(__file__).resolve().parent
# Installed, configs/ is a folder of the package; in a clone it lies next to it.
SHIPPED = next(
    (path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()),
    _PACKAGE / "configs",
)
# Keys that hold paths of files, among other things: names of packages, addresses.
PATH_KEYS = (
    "MODEL.WEIGHTS",
    "MODEL.TIMM.WEIGHTS",
    "DISTILL.TEACHER.CONFIG_FILE",
    "DISTILL.TEACHER.WEIGHTS",
    "DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE",
)


def shipped_config(name: str) -> str | None:
    """Path of a config that d2kd ships: ``digits/retinanet_R18_ssim.yaml``, or the same with
    ``configs/`` before it, as in a clone; None if there is none."""
    path = os.path.normpath(os.path.join(SHIPPED, name.removeprefix("configs/")))
    inside = path.startswith(f"{SHIPPED}{os.sep}")
    return path if inside and path.endswith(".yaml") and os.path.isfile(path) else None


def shipped_names() -> list[str]:
    """Names of all configs that d2kd ships, suites included."""
    return sorted(path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.yaml"))


def find_file(name: str, folders: Sequence[str | os.PathLike[str]] = ()) -> str | None:
    """``name`` where it is a file, from the working directory or, relative, from ``folders``."""
    if PathManager.isfile(name):
        return name
    if "://" in name or os.path.isabs(name):
        return None
    paths = (os.path.join(folder, name) for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def looked_in(name: str, folders: Sequence[str | os.PathLike[str]]) -> str:
    """Where :func:`find_file` looked for a relative ``name``, as words of a message."""
    if "://" in name or os.path.isabs(name):
        return ""
    places = dict.fromkeys([os.getcwd(), *map(os.path.abspath, folders)])
    return f"; looked in {' and '.join(places)}"


def set_absolute_paths(cfg: CfgNode, folders: Sequence[str | os.PathLike[str]] = ()) -> None:
    """Make the paths of ``cfg`` absolute, so that it means the same from any directory.

    A relative path starts at the working directory or, if there is nothing, at one of ``folders``.
    One that is nowhere stays as it is: what it names may be made later, or not be needed. Names of
    shipped configs and of the model zoo stay too.
    """
    for key in PATH_KEYS:
        *path, last = key.split(".")
        node = cfg
        for name in path:
            node = node.get(name, {})
        if isinstance(node.get(last), str):
            node[last] = absolute_path(node[last], folders)
    cfg.DATASETS.COCO_FORMAT = [
        [entry[0], *(absolute_path(p, folders, os.path.exists) for p in entry[1:3]), *entry[3:]]
        if isinstance(entry, list | tuple) and all(isinstance(item, str) for item in entry[:3])
        else entry
        for entry in cfg.DATASETS.COCO_FORMAT
    ]
    # What is no folder stays as it is, to be refused by the name that it was given.
    if isinstance(cfg.OUTPUT_DIR, str) and cfg.OUTPUT_DIR.strip() and "://" not in cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = os.path.abspath(cfg.OUTPUT_DIR)


def absolute_path(
    value: str,
    folders: Sequence[str | os.PathLike[str]] = (),
    is_there: Callable[[str], bool] = os.path.isfile,
) -> str:
    """The absolute path of the file that ``value`` names, in the working directory or in one of
    ``folders``, and ``value`` if there is none. What follows a "?" is Detectron2's and stays."""
    name, mark, query = value.partition("?")
    if not name or "://" in name:
        return value
    for folder in ("", *(() if os.path.isabs(name) else folders)):
        path = os.path.join(folder, os.path.expanduser(name))
        if is_there(path):
            return os.path.abspath(path) + mark + query
    return value
