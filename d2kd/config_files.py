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
from detectron2.utils.registry import Registry

from .config_paths import SHIPPED, find_file, looked_in, shipped_config, shipped_names
from .errors import ConfigError, close_names, first_line
from .keys import all_keys, node_at

BASE_KEY = "_BASE_"
# Detectron2's own default, which makes all trainings share one folder.
SHARED_OUTPUT = "./output"
_ZOO = Path(os.path.abspath(model_zoo.__file__)).parent / "configs"


def resolve_config_file(
    name: str, key: str = "--config-file", folders: Sequence[str | os.PathLike[str]] = ()
) -> str:
    """Path of a config: a file, a config that d2kd ships, or a name in Detectron2's model zoo.

    Args:
        key: where the name stands, for the message.
        folders: where a relative path may start besides the working directory, which comes first.
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
        names = (*_zoo_names(), *shipped_names(), *_files_beside(name))
        known = [name for name in names if name.endswith((".yaml", ".py"))]
        raise ConfigError(
            f"{key}: '{name}' is neither a file nor a model-zoo name"
            f"{close_names(name, known, 0.5)}{looked_in(name, folders)}"
        ) from None


def foreign_teacher(name: str) -> tuple[str, str] | None:
    """Library and model of a teacher that no config file describes, such as "timm:resnet50"."""
    library, colon, model = name.partition(":")
    return (library, model) if colon and library in ("timm", "torchvision") else None


def resolve_teacher(name: str, folders: Sequence[str | os.PathLike[str]] = ()) -> str:
    """The path of ``DISTILL.TEACHER.CONFIG_FILE``, as :func:`resolve_config_file`'s; a model of
    another library keeps its name."""
    if foreign_teacher(name):
        return name
    return resolve_config_file(name, "DISTILL.TEACHER.CONFIG_FILE", folders)


def default_output_dir(name: str) -> str:
    """The ``OUTPUT_DIR`` of a config that names none: ``output/<path of the config>``.

    Of a shipped config or an entry of the zoo that is its whole name, of another file its path from
    the working directory, or only its name if it lies elsewhere.
    """
    path = Path(os.path.abspath(resolve_config_file(name)))
    for root in (SHIPPED, _ZOO, Path.cwd()):
        if path.is_relative_to(root):
            return str(Path("output") / path.relative_to(root).with_suffix(""))
    return str(Path("output") / path.stem)


def _zoo_names() -> list[str]:
    names = (path.relative_to(_ZOO).as_posix() for path in _ZOO.rglob("*/*"))
    return [name for name in names if not name.startswith("common/")]


def _files_beside(path: str) -> list[str]:
    """The files in the folder of ``path``, by that folder's name."""
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return [os.path.join(folder, name) for name in names]


def similar_files(path: str) -> str:
    """Files in the folder of ``path`` with a similar name, as a list for a message."""
    names = [os.path.basename(file) for file in _files_beside(path)]
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.4)
    return ", ".join(os.path.join(os.path.dirname(path), name) for name in close)


def load_config(cfg: CfgNode, name: str, key: str = "--config-file") -> str:
    """Merge a YAML file, a shipped config or a model-zoo entry into ``cfg``; returns its path.

    Files that ship with Detectron2 may contain Python expressions; a user's file is data, and so
    are the files that its ``_BASE_`` names.

    Raises:
        ConfigError: the file is missing or broken, has a key that does not exist, twice, or without
            a value; names the file and the line.
    """
    path = resolve_config_file(name, key)
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
    """Merge KEY VALUE pairs into ``cfg``; ``source`` is where they stand, for messages."""
    if len(opts) % 2:
        raise ConfigError(f"{source}: {list(opts)} is not a list of pairs; {opts[-1]!r} is left")
    for name, value in zip(opts[0::2], opts[1::2], strict=True):
        if not isinstance(name, str):
            raise ConfigError(f"{source}: {name!r} is no config key such as SOLVER.BASE_LR")
        if not _has_key(cfg, name):
            raise ConfigError(f"{source}: {_unknown_key(cfg, name)}")
        default = node_at(cfg, name)
        if value in (None, "None") and default is not None:
            raise ConfigError(f"{source}: {_empty(name, default)}")
        try:
            cfg.merge_from_list([name, value])
        except Exception as error:
            raise ConfigError(f"{source}: {_wrong_type(name, value, default)}") from error


def _has_key(cfg: CfgNode, name: str) -> bool:
    return name in dict(all_keys(cfg))


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
    """The content of a user's YAML file as plain data, and "A.B" -> line of each key.

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
    """Check a config file and those that its ``_BASE_`` names; key -> "file:line" where it stands,
    of the file that counts."""
    if Path(path).resolve().is_relative_to(_ZOO.resolve()):  # Detectron2's own are trusted
        return {}
    if os.path.realpath(path) in above:
        raise ConfigError(f"{path}: its _BASE_ leads back to itself")
    content, lines = read_yaml(path)
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: it is {found}; a config holds lines such as SOLVER: ...")
    places = {name: f"{path}:{line}" for name, line in lines.items()}
    where: dict[str, str] = {}
    for base in _bases(path, content.pop(BASE_KEY, []), places.pop(BASE_KEY, path)):
        where |= _checked_lines(base, cfg, (*above, os.path.realpath(path)))
    try:
        _check_values(content, path, dict(all_keys(cfg)), places)
    except RecursionError as error:
        raise ConfigError(f"{path}: it contains itself") from error
    return where | places


def _check_values(
    node: dict[Any, Any], path: str, known: dict[str, Any], places: dict[str, str], prefix: str = ""
) -> None:
    """Refuse what yacs does not know: keys that are no names, null, dates and other types."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        place = places.get(name, path)
        if not isinstance(key, str):
            raise ConfigError(f"{place}: {key!r} is no name of a config key, as SOLVER is")
        if isinstance(value, dict):
            _check_values(value, path, known, places, f"{name}.")
        elif value is None and known.get(name) is not None:
            raise ConfigError(f"{place}: {_empty(name, known[name])}")
        elif not isinstance(value, str | int | float | list | None):
            kind = type(value).__name__
            raise ConfigError(f"{place}: {name} is a {kind}, {value}; put it into quotes")


def _bases(path: str, bases: Any, place: str) -> list[str]:
    """The files that ``_BASE_`` names, found as fvcore finds them."""
    files = []
    for base in bases if isinstance(bases, list) else [bases]:
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


def _merge_error(cfg: CfgNode, error: Exception, lines: dict[str, str], path: str) -> str:
    """One line for what yacs says about a file."""
    text = str(error)
    found = re.search(r"config key: ([\w.]+)", text)
    if not found:
        return f"{path}: {type(error).__name__}: {first_line(error)}"
    name = found.group(1)
    place = lines.get(name, path)
    if isinstance(error, KeyError):
        return f"{place}: {_unknown_key(cfg, name)}"
    value = re.search(r"values \(.* vs\. (.*)\) for config", text, re.DOTALL)
    default = node_at(cfg, name) if _has_key(cfg, name) else ""
    return f"{place}: {_wrong_type(name, value.group(1) if value else '', default)}"


def _unknown_key(cfg: CfgNode, key: str) -> str:
    return f"no config key '{key}'{close_names(key, dict(all_keys(cfg)))}"


def check_registered(key: str, name: str, registry: Registry) -> None:
    """Refuse a value of ``key`` that the registry does not know."""
    if name not in registry:
        known = sorted(entry for entry, _ in registry)
        raise ConfigError(f"{key} is {name!r}; {close_to(name, known)}")


def close_to(name: str, valid: Sequence[str]) -> str:
    """Words for a message: the valid names that are close to ``name``, or else all of them."""
    return close_names(str(name), valid).removeprefix("; ") or f"valid: {', '.join(valid)}"
