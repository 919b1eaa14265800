"""Reading config files: safely, by zoo name too, with close names for typing errors."""

from __future__ import annotations

import difflib
import os

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from .errors import ConfigError, first_line


def resolve_config_file(name: str, key: str = "--config-file") -> str:
    """Path of a config: a file, or a name in Detectron2's model zoo.

    Raises:
        ConfigError: neither is there; names close matches.
    """
    if not name:
        raise ConfigError(f"{key} is empty: give a YAML file or a model-zoo name")
    if PathManager.isfile(name):
        return name
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        close = difflib.get_close_matches(name, _zoo_names() + _files_beside(name), n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(f"{key}: '{name}' is neither a file nor a model-zoo name{hint}") from None


def _zoo_names() -> list[str]:
    root = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    return [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith(".yaml") and folder != root
    ]


def _files_beside(path: str) -> list[str]:
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return [os.path.join(folder, name) for name in names if name.endswith(".yaml")]


def similar_files(path: str) -> str:
    """Files beside ``path`` with a name like it, as a list for a message."""
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.4)
    return ", ".join(os.path.join(folder, name) for name in close)


def load_config(cfg: CfgNode, name: str, key: str = "--config-file") -> None:
    """Merge a YAML file or model-zoo entry into ``cfg``.

    Files that ship with Detectron2 may contain Python expressions; a user's file is read safely.

    Raises:
        ConfigError: the file is missing or broken, or has a key that does not exist.
    """
    path = resolve_config_file(name, key)
    shipped = os.path.dirname(os.path.abspath(model_zoo.__file__))
    trusted = os.path.abspath(path).startswith(shipped + os.sep)
    try:
        cfg.merge_from_file(path, allow_unsafe=trusted)
    except KeyError as error:
        raise ConfigError(f"{path}: {unknown_key(cfg, error)}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {first_line(error)}") from error


def unknown_key(cfg: CfgNode, error: Exception) -> str:
    """One line for yacs' complaint about a key that does not exist, with the closest that do."""
    key = str(error.args[0]).rsplit(":", 1)[-1].strip()
    close = difflib.get_close_matches(key, _all_keys(cfg), n=3, cutoff=0.6)
    return f"no config key '{key}'" + (f"; close: {', '.join(close)}" if close else "")


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys
