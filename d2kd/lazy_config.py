"""Reading LazyConfig files: Detectron2's configs that are Python, run as a program is.

``a.b=c`` changes them, as in Detectron2's ``lazyconfig_train_net.py``; a name that is not there is
an error here, and not a new key that is never read.
"""

from __future__ import annotations

import builtins
import inspect
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from .config_files import close_to
from .errors import ConfigError, first_line
from .files import shown


def is_lazy(name: str) -> bool:
    """Whether a config file of this name is a LazyConfig."""
    return name.endswith(".py")


def load_lazy(path: str) -> DictConfig:
    """The config objects of a LazyConfig file, by name. The file is run; a ConfigError names the
    line where it fails."""
    own_import = builtins.__import__
    try:
        return LazyConfig.load(path)
    except Exception as error:
        if isinstance(error.__cause__, SyntaxError):  # which does not know its file
            words = re.fullmatch("Config file (.*) has syntax error!", str(error))
            file, syntax = words.group(1) if words else path, error.__cause__
            raise ConfigError(f"{file}:{syntax.lineno}: {syntax.msg}") from error
        reason = line_of_module(error) or f"{path}: {type(error).__name__}: {first_line(error)}"
        raise ConfigError(reason) from error
    finally:
        builtins.__import__ = own_import  # which Detectron2 leaves replaced after an error


def line_of_module(error: Exception, which: int = -1) -> str:
    """What went wrong, and in which line of the last file that was run, or of the first one, which
    imports the others (``which`` 0); not of the functions that they call. "" if no line was run."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{shown(f.filename)}:{f.lineno}" for f in frames if f.name == "<module>"]
    return f"{lines[which]}: {type(error).__name__}: {first_line(error)}" if lines else ""


def override_lazy(
    cfg: DictConfig,
    overrides: Sequence[Any],
    source: str,
    *,
    trusted: bool = False,
    free: tuple[str, ...] = (),
) -> None:
    """Apply ``a.b=c`` to ``cfg``, in place.

    A key that is not there can be given where the thing that is built takes an argument of that
    name.

    Args:
        source: where they stand, for messages.
        trusted: they may say what is called (``_target_``), as those of a command line; those of a
            YAML file, which is data, may not.
        free: what keys begin with that may be new; others check them.
    """
    for item in overrides:
        if not isinstance(item, str) or "=" not in item:
            raise ConfigError(
                f"{source}: {item!r} changes no LazyConfig; give strings a.b=c, such as "
                "model.roi_heads.num_classes=7"
            )
        if "_target_" in item and not trusted:
            raise ConfigError(f"{source}: '{item}' is not read: a _target_ runs code")
        key = item.partition("=")[0].strip().lstrip("+")
        if not key.startswith(free):
            _check_key(cfg, key, source)
        try:
            LazyConfig.apply_overrides(cfg, [item])
        except Exception as error:
            raise ConfigError(f"{source}: '{item}': {first_line(error)}") from error


def _check_key(cfg: DictConfig, key: str, source: str) -> None:
    node: Any = cfg
    *above, last = key.split(".")
    for depth, name in enumerate([*above, last]):
        if isinstance(node, ListConfig):  # its items are numbered
            return
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{source}: '{key}': what is before '.{name}' has no keys")
        if name not in node:
            arguments = _arguments(node) if depth == len(above) else []
            if name in arguments or "**" in arguments:
                return
            valid = [str(known) for known in node if known != "_target_"] + arguments
            raise ConfigError(
                f"{source}: the LazyConfig has no key '{key}'; {close_to(name, valid)}"
            )
        node = node[name]


def _arguments(node: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that what ``node`` builds takes; "**" where it takes any."""
    target = node.get("_target_")
    try:
        target = locate(target) if isinstance(target, str) else target
        parameters = inspect.signature(target).parameters.values()
    except Exception:  # no target, or one without a signature
        return []
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


def build_lazy(cfg: DictConfig, key: str, source: str) -> Any:
    """What the config's ``key`` (such as "dataloader.train") describes; ``source`` is its file."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or name not in node:
        has = ", ".join(map(str, node if isinstance(node, DictConfig) else cfg)) or "none"
        raise ConfigError(f"{source} has no '{key}' among its config objects, which are: {has}")
    try:
        return instantiate(node[name])
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{source}: its '{key}' cannot be built: {reason}") from error
