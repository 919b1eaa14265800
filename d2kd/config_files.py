"""Reading config files: safely, by the names of shipped configs and of the zoo too, with close
names for typing errors."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from .config_paths import SHIPPED, find_file, looked_in, shipped_config, shipped_names
from .errors import ConfigError, first_line
from .keys import node_at

BASE_KEY = "_BASE_"
# Detectron2's own default, which makes all trainings share one folder.
SHARED_OUTPUT = "./output"
# Whose models can teach by name, "timm:resnet50".
FOREIGN_LIBRARIES = ("timm", "torchvision")


def resolve_config_file(
    name: str, key: str = "--config-file", folders: Sequence[str | os.PathLike[str]] = ()
) -> str:
    """Path of a config: a file, a config that d2kd ships, or a name in Detectron2's model zoo.

    Args:
        key: where the name stands, for the message.
        folders: where a relative path may start besides the working directory, which comes first.

    Raises:
        ConfigError: none is there; names close matches and the folders.
    """
    if not name:
        raise ConfigError(f"{key} is empty: give a config file or a model-zoo name")
    if "://" in name:
        raise ConfigError(f"{key}: '{name}' is not read; give a file or a model-zoo name")
    if os.path.isdir(name):
        raise ConfigError(f"{key}: '{name}' is a folder; give a config file or a model-zoo name")
    found = find_file(name, folders) or shipped_config(name)
    if found:
        return found
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        known = [*_zoo_names(), *shipped_names(), *_files_beside(name)]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(
            f"{key}: '{name}' is neither a file nor a model-zoo name{hint}"
            f"{looked_in(name, folders)}"
        ) from None


def foreign_teacher(name: str) -> tuple[str, str] | None:
    """Library and model of a teacher that no config file describes, such as "timm:resnet50"."""
    library, colon, model = name.partition(":")
    return (library, model) if colon and library in FOREIGN_LIBRARIES else None


def resolve_teacher(name: str, folders: Sequence[str | os.PathLike[str]] = ()) -> str:
    """The path of ``DISTILL.TEACHER.CONFIG_FILE``, as :func:`resolve_config_file`'s; a model of
    another library keeps its name."""
    if foreign_teacher(name):
        return name
    return resolve_config_file(name, "DISTILL.TEACHER.CONFIG_FILE", folders)


def default_output_dir(name: str) -> str:
    """The ``OUTPUT_DIR`` of a config that names none: ``output/<path of the config>``.

    Args:
        name: the config as the user named it. Of a shipped config or an entry of the zoo the whole
            name counts, of another file its path from the working directory, or only its name if
            it lies elsewhere.
    """
    path = Path(os.path.abspath(resolve_config_file(name)))
    zoo = Path(model_zoo.__file__).resolve().parent / "configs"
    for root in (SHIPPED, zoo, Path.cwd()):
        if path.is_relative_to(root):
            return str(Path("output") / path.relative_to(root).with_suffix(""))
    return str(Path("output") / path.stem)


def _zoo_names() -> list[str]:
    root = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    return [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith((".yaml", ".py")) and folder != root and "common" not in folder
    ]


def _files_beside(path: str) -> list[str]:
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return [os.path.join(folder, name) for name in names if name.endswith((".yaml", ".py"))]


def similar_files(path: str) -> str:
    """Files in the folder of ``path`` with a similar name, as a list for a message."""
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.4)
    return ", ".join(os.path.join(folder, name) for name in close)


def load_config(
    cfg: CfgNode,
    name: str,
    key: str = "--config-file",
    folders: Sequence[str | os.PathLike[str]] = (),
) -> str:
    """Merge a YAML file, a shipped config or a model-zoo entry into ``cfg``.

    Files that ship with Detectron2 may contain Python expressions; a user's file is data, and so
    are the files that its ``_BASE_`` names.

    Args:
        key, folders: as in :func:`resolve_config_file`.

    Returns:
        The path of the file that was read.

    Raises:
        ConfigError: the file is missing or broken, has a key that does not exist, twice, or without
            a value; names the file and the line.
    """
    path = resolve_config_file(name, key, folders)
    if path.endswith(".py"):
        raise ConfigError(
            f"{key}: '{name}' is a LazyConfig; d2kd train reads it, and it can teach, but here "
            "YAML is read"
        )
    lines = _checked_lines(path, cfg)
    try:
        # Every file that is not Detectron2's own was just found to be free of tags.
        cfg.merge_from_file(path, allow_unsafe=True)
    except Exception as error:
        raise ConfigError(_merge_error(cfg, error, lines, path)) from error
    return path


def merge_overrides(cfg: CfgNode, opts: Sequence[Any], source: str = "KEY VALUE") -> None:
    """Merge KEY VALUE pairs into ``cfg``.

    Args:
        source: where they stand, for messages, e.g. "DISTILL.TEACHER.OPTS".

    Raises:
        ConfigError: an odd number, an unknown key, or a value of another type or none at all.
    """
    if len(opts) % 2:
        raise ConfigError(f"{source}: {list(opts)} is not a list of pairs; {opts[-1]!r} is left")
    for name, value in zip(opts[0::2], opts[1::2], strict=True):
        if not isinstance(name, str):
            raise ConfigError(f"{source}: {name!r} is no config key such as SOLVER.BASE_LR")
        if not _has_key(cfg, name):
            raise ConfigError(f"{source}: {unknown_key(cfg, name)}")
        default = node_at(cfg, name)
        if value in (None, "None") and default is not None:
            raise ConfigError(f"{source}: {_empty(name, default)}")
        try:
            cfg.merge_from_list([name, value])
        except Exception as error:
            raise ConfigError(f"{source}: {_wrong_type(name, value, default)}") from error


def _has_key(cfg: CfgNode, name: str) -> bool:
    node: Any = cfg
    for part in name.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


def _empty(name: str, default: Any) -> str:
    kept = "a section of keys" if isinstance(default, CfgNode) else f"{default!r} now"
    return f"{name} is empty (null); leave it out, or give a value (it is {kept})"


def _wrong_type(name: str, value: Any, default: Any) -> str:
    if isinstance(default, CfgNode):
        return f"{name} is {value!r}; it is a section of keys: {', '.join(list(default)[:6])}, ..."
    example = repr(list(default) if isinstance(default, tuple) else default)
    words = {bool: "True or False", int: "a whole number", str: "a string", list: "a list"}
    words |= {float: "a number with a point", tuple: "a list"}
    return f"{name} is {value!r}; it must be {words.get(type(default), 'of a type')} like {example}"


# --- YAML ---------------------------------------------------------------------------------------


def read_yaml(path: str) -> tuple[Any, dict[str, int]]:
    """The content of a user's YAML file as plain data, and the line of each key.

    Returns:
        the content, and "A.B" -> line number for keys of nested mappings.

    Raises:
        ConfigError: it cannot be read, is not YAML, has a key twice, or a tag, which could run
            code; names the line.
    """
    try:
        with PathManager.open(path, "r") as file:
            text = file.read()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _walk(node, path, "", lines, set())
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a text file in YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: it contains itself") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or first_line(error)}") from error


def _walk(node: yaml.Node, path: str, prefix: str, lines: dict[str, int], seen: set[int]) -> None:
    """Note the line of each key below ``node``; refuse tags and double keys."""
    line = node.start_mark.line + 1
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise ConfigError(f"{path}:{line}: the tag '{node.tag}' is not read: it could run code")
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _walk(item, path, prefix + "[].", lines, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = prefix + str(key.value)
            if name in lines:
                raise ConfigError(
                    f"{path}:{key.start_mark.line + 1}: {name} stands there twice; the first is "
                    f"in line {lines[name]}"
                )
            if not prefix.endswith("[]."):  # items of lists may repeat each other's keys
                lines[name] = key.start_mark.line + 1
            _walk(value, path, name + ".", lines, seen)


def _checked_lines(path: str, cfg: CfgNode, above: tuple[str, ...] = ()) -> dict[str, str]:
    """Check a config file and those that its ``_BASE_`` names.

    Returns:
        key -> "file:line" where it stands, of the file that counts.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    if _is_detectron2s(path):
        return {}
    if os.path.realpath(path) in above:
        raise ConfigError(f"{path}: its _BASE_ leads back to itself")
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: it is {found}; a config holds lines such as SOLVER: ...")
    try:
        _refuse_other_types(content, path, lines)
    except RecursionError as error:
        raise ConfigError(f"{path}: it contains itself") from error
    where: dict[str, str] = {}
    for base in _bases(path, content.get(BASE_KEY, []), lines):
        where |= _checked_lines(base, cfg, (*above, os.path.realpath(path)))
    for name, line in lines.items():
        if name == BASE_KEY:
            continue
        place = where[name] = f"{path}:{line}"
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and _has_key(cfg, name) and node_at(cfg, name) is not None:
            raise ConfigError(f"{place}: {_empty(name, node_at(cfg, name))}")
    return where


def _refuse_other_types(node: Any, path: str, lines: dict[str, int], prefix: str = "") -> None:
    """yacs knows names as keys, and as values what a config has: no date, for one."""
    if isinstance(node, list):
        for item in node:
            _refuse_other_types(item, path, lines, prefix)
    elif isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                place = f"{path}:{lines.get(f'{prefix}{key}', 1)}"
                raise ConfigError(f"{place}: {key!r} is no name of a config key, as SOLVER is")
            _refuse_other_types(value, path, lines, f"{prefix}{key}.")
    elif not isinstance(node, str | int | float | None):
        name = prefix.rstrip(".")
        raise ConfigError(
            f"{path}:{lines.get(name, 1)}: {name} is a {type(node).__name__}, {node}; "
            "put it into quotes"
        )


def _bases(path: str, bases: Any, lines: dict[str, int]) -> list[str]:
    """The files that ``_BASE_`` names, found as fvcore finds them."""
    files = []
    for base in bases if isinstance(bases, list) else [bases]:
        place = f"{path}:{lines.get(BASE_KEY, 1)}"
        if not isinstance(base, str) or "://" in base:
            raise ConfigError(f"{place}: _BASE_ is {base!r}; it must be a file on this machine")
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(base):
            near = similar_files(base)
            raise ConfigError(
                f"{place}: _BASE_: no file '{base}'" + (f"; close: {near}" * bool(near))
            )
        files.append(base)
    return files


def _is_detectron2s(path: str) -> bool:
    """Whether a file ships with Detectron2, which is trusted."""
    shipped = os.path.dirname(os.path.abspath(model_zoo.__file__))
    return os.path.realpath(path).startswith(os.path.realpath(shipped) + os.sep)


def _merge_error(cfg: CfgNode, error: Exception, lines: dict[str, str], path: str) -> str:
    """One line for what yacs says about a file."""
    text = str(error)
    found = re.search(r"config key: ([\w.]+)", text)
    if not found:
        return f"{path}: {type(error).__name__}: {first_line(error)}"
    name = found.group(1)
    place = lines.get(name, path)
    if isinstance(error, KeyError):
        return f"{place}: {unknown_key(cfg, name)}"
    value = re.search(r"values \(.* vs\. (.*)\) for config", text, re.DOTALL)
    default = node_at(cfg, name) if _has_key(cfg, name) else ""
    return f"{place}: {_wrong_type(name, value.group(1) if value else '', default)}"


def unknown_key(cfg: CfgNode, key: str) -> str:
    """One line for a key that does not exist, with the closest that do."""
    close = difflib.get_close_matches(key, _all_keys(cfg), n=3, cutoff=0.6)
    return f"no config key '{key}'" + (f"; close: {', '.join(close)}" if close else "")


def close_to(name: str, valid: Sequence[str]) -> str:
    """Words for a message: the valid names that are close to ``name``, or else all of them."""
    close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.6)
    return f"close: {', '.join(close)}" if close else f"valid: {', '.join(valid)}"


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys
