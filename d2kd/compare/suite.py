"""Suites: which arms a comparison trains from which seeds, and the exact config of each run.

A suite is a YAML file::

    title: RetinaNet on digits
    teacher: {config: digits/retinanet_R34_teacher.yaml}  # trained first if it is not there
    start: {config: digits/retinanet_R18_distill.yaml, opts: {...}}    # then this one
    baseline: alone
    seeds: [1, 2, 3]
    opts: {SOLVER.MAX_ITER: 3000}                                 # of all arms
    arms:
      alone: {config: digits/retinanet_R18.yaml}
      SSIM: {config: digits/retinanet_R18_ssim.yaml, opts: {DISTILL.SSIM.WEIGHT: 2.0}}
      alone x1.5: {config: digits/retinanet_R18.yaml, times: 1.5}
      alone, time of SSIM: {config: digits/retinanet_R18.yaml, same_time_as: SSIM}

All arms start with the student that ``start`` trains, where there is one: it is their
``MODEL.WEIGHTS``. The last two arms are controls: they train ``times`` as many iterations, or as
many as fit into the wall time that the named arm took with the same seed. Paths start at the
working directory or, where nothing is there, at the suite's own folder; a config may also be one
that d2kd ships.
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode

from ..config import head_nodes
from ..config_files import foreign_teacher, read_yaml, resolve_config_file
from ..config_paths import PATH_KEYS, absolute_path, find_file
from ..engine.checkpoint import STUDENT_FILE
from ..engine.identity import file_sha256
from ..engine.setup import merged_config
from ..errors import ConfigError
from ..files import shown
from ..keys import flat_values
from ..lazy_config import is_lazy

PREPARED = ("teacher", "start")  # detectors that are trained once, before the arms
SUITE_KEYS = ("title", *PREPARED, "baseline", "seeds", "opts", "arms")
ARM_KEYS = ("config", "opts", "seeds", "times", "same_time_as")
PREPARED_KEYS = ("config", "opts")
MAX_LABEL = 60  # characters, of up to 4 bytes each: a file system takes names of 255 bytes
# Keys that say where and when something is written or checked, and change no result.
NO_SETTINGS = (
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "DATALOADER.NUM_WORKERS",
    "DISTILL.TEACHER.CHECK",
)


@dataclass(frozen=True)
class Arm:
    """One column of a comparison: a config, trained from several seeds.

    Args:
        opts: overrides of the config, key -> value.
        times: train so many times the iterations.
        same_time_as: label of the arm whose wall time to fill instead; "" for none.
    """

    label: str
    config: str
    seeds: tuple[int, ...]
    opts: dict = field(default_factory=dict)
    times: float = 1.0
    same_time_as: str = ""

    @property
    def slug(self) -> str:
        """The label as a name of files."""
        return re.sub(r"[^\w.+-]+", "_", self.label)


@dataclass(frozen=True)
class Suite:
    """Arms by label, in the order of the tables; ``prepared`` are what ``PREPARED`` names, as arms
    of no seed, in the order of their training."""

    title: str
    baseline: str
    arms: dict[str, Arm]
    prepared: tuple[Arm, ...] = ()

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for arm in self.arms.values() for seed in arm.seeds))


# --- reading ------------------------------------------------------------------------------------


def read_suite(path: Path, seeds: list[int] | None = None, opts: dict | None = None) -> Suite:
    """The suite of a YAML file.

    Args:
        seeds: besides the file's, of the arms that have none of their own.
        opts: overrides of all arms, after the file's.

    Raises:
        ConfigError: in one line that names what is valid.
    """
    data, _ = read_yaml(str(path))
    _check_keys(str(path), data, SUITE_KEYS, required=("baseline", "seeds", "arms"))
    _check_keys(f"{path}: arms", data["arms"])
    common, opts = _opts(str(path), data, path.parent), opts or {}
    prepared = []
    for label in PREPARED:
        if label in data:
            config, own = _entry(f"{path}: {label}", data[label], PREPARED_KEYS, path.parent)
            prepared.append(Arm(label, config, (), own))
            if label == "start":
                common = {"MODEL.WEIGHTS": weights_of(prepared[-1]), **common}
    arms = {}
    for label, entry in data["arms"].items():
        where = f"{path}: arm '{label}'"
        config, own = _entry(where, entry, ARM_KEYS, path.parent)
        of_arm = _seeds(where, entry.get("seeds", data["seeds"]))
        if "seeds" not in entry:
            of_arm = tuple(dict.fromkeys((*of_arm, *(seeds or ()))))
        control = entry.get("times", 1.0), str(entry.get("same_time_as", ""))
        arms[str(label)] = Arm(str(label), config, of_arm, {**common, **own, **opts}, *control)
    title = str(data.get("title", path.stem))
    suite = Suite(title, str(data["baseline"]), arms, tuple(prepared))
    check_suite(suite, str(path))
    return suite


def _entry(where: str, entry: dict, valid: tuple, folder: Path) -> tuple[str, dict]:
    """The config and the overrides of an entry: the config's name if it is found from the working
    directory, else its path in the suite's folder."""
    _check_keys(where, entry, valid, required=("config",))
    name = entry["config"]
    if not isinstance(name, str):
        raise ConfigError(f"{where}: config is {name!r}; it must be the name of a YAML file")
    in_folder = None if find_file(name) else find_file(name, [folder])
    resolve_config_file(name, f"{where}: config", [folder])
    config = os.path.abspath(in_folder) if in_folder else name
    return config, _opts(where, entry, folder)


def _opts(where: str, entry: dict, folder: Path) -> dict:
    """The overrides of an entry, in which the paths of files in the suite's folder are absolute."""
    opts = {} if entry.get("opts") is None else entry["opts"]
    _check_keys(f"{where}: opts", opts)
    for key, value in opts.items():
        if value is None:
            raise ConfigError(
                f"{where}: opts: {key} is empty (null); leave it out, or give a value"
            )
    in_folder = {
        key: absolute_path(value, [folder])
        for key, value in opts.items()
        if key in PATH_KEYS and isinstance(value, str) and not find_file(value)
    }
    return {**opts, **in_folder}


def weights_of(prepared: Arm) -> str:
    """Where the weights of a detector that is trained before the arms lie in the end, from the
    working directory if they lie below it: results say where they are, on any machine."""
    cfg = merged_config(prepared.config, as_list(prepared.opts))
    return shown(os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE))


def suite_of_configs(configs: list[str], seeds: list[int], opts: dict) -> Suite:
    """Configs as arms, labelled by their names; the first is the baseline."""
    arms = {
        Path(config).stem: Arm(Path(config).stem, config, tuple(seeds), opts) for config in configs
    }
    if len(arms) < len(configs):
        raise ConfigError("--configs: two configs share a name; use a suite with labels")
    suite = Suite("", next(iter(arms)), arms)
    check_suite(suite, "--configs")
    return suite


def check_suite(suite: Suite, where: str) -> None:
    """Check what the arms say of each other."""
    known = ", ".join(f"'{label}'" for label in suite.arms)
    if suite.baseline not in suite.arms:
        raise ConfigError(f"{where}: baseline '{suite.baseline}' is no arm; valid: {known}")
    slugs: dict[str, str] = {}
    for arm in suite.arms.values():
        place = f"{where}: arm {arm.label!r}"
        if slugs.setdefault(arm.slug.lower(), arm.label) != arm.label:
            raise ConfigError(f"{place} and '{slugs[arm.slug.lower()]}' would share a folder")
        if not arm.label.strip() or not arm.label.isprintable() or len(arm.slug) > MAX_LABEL:
            raise ConfigError(f"{place}: a label has 1 to {MAX_LABEL} printable characters")
        if type(arm.times) not in (int, float) or not 0 < arm.times < math.inf:
            raise ConfigError(f"{place}: times is {arm.times}; it must be a positive number")
        if not arm.same_time_as:
            continue
        base, other = suite.arms[suite.baseline], suite.arms.get(arm.same_time_as)
        if other is None or other.same_time_as:
            raise ConfigError(
                f"{place}: same_time_as '{arm.same_time_as}' is no arm, or one with "
                f"same_time_as itself; valid: {known}"
            )
        if arm is base:
            raise ConfigError(f"{place}: the baseline's time is its own; remove same_time_as")
        if (arm.config, arm.opts) != (base.config, base.opts) or arm.times != 1:
            raise ConfigError(
                f"{place}: same_time_as needs the config and opts of the baseline "
                f"'{base.label}'; remove times"
            )


def _check_keys(where: str, node, valid: tuple = (), required: tuple = ()) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: must be a mapping, is {node!r}")
    for key in node if valid else ():
        if key not in valid:
            raise ConfigError(f"{where}: unknown key '{key}'; valid: {', '.join(valid)}")
    for key in required:
        if not node.get(key):
            raise ConfigError(f"{where}: '{key}' is missing")


def _seeds(where: str, seeds) -> tuple[int, ...]:
    good = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
    if not seeds or not good:
        raise ConfigError(f"{where}: seeds is {seeds!r}; it must be a list of whole numbers from 0")
    return tuple(dict.fromkeys(seeds))


# --- the config of a run ------------------------------------------------------------------------


def as_list(opts: dict) -> list[str]:
    """Overrides as a command line has them."""
    return [str(part) for pair in opts.items() for part in pair]


def uses_teacher(cfg: CfgNode) -> bool:
    """Whether a run of ``cfg`` needs its teacher: to distil from or to inherit from."""
    inherits = cfg.MODEL.META_ARCHITECTURE == "Distiller" and cfg.DISTILL.INHERIT
    return bool(head_nodes(cfg) or inherits)


def settings_of(cfg: CfgNode) -> dict[str, str]:
    """All that decides the result of a run: every key it uses, and the weights it starts from.

    Two runs with equal settings are one run; keys of other heads than its own do not count.
    """
    kept = set()
    if uses_teacher(cfg):
        kept = {"HEADS", "INHERIT", "TEACHER", "STUDENT_META_ARCH", *head_nodes(cfg)}
        if cfg.DISTILL.BALANCE.ENABLED:
            kept.add("BALANCE")
    flat = {
        key: str(value)
        for key, value in flat_values(cfg).items()
        if key not in NO_SETTINGS and (key.split(".")[0] != "DISTILL" or key.split(".")[1] in kept)
    }
    _set_file(flat, "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    if uses_teacher(cfg):
        flat["DISTILL.BALANCE.ENABLED"] = str(cfg.DISTILL.BALANCE.ENABLED)
        node = cfg.DISTILL.TEACHER
        _set_file(flat, "DISTILL.TEACHER.WEIGHTS", node.WEIGHTS)
        if is_lazy(node.CONFIG_FILE) or foreign_teacher(node.CONFIG_FILE):
            return flat  # no YAML: its name and OPTS say what it is
        teacher = merged_config(node.CONFIG_FILE, list(node.OPTS))
        own = flat_values(teacher.MODEL, "MODEL.")
        flat |= {f"teacher's {key}": str(value) for key, value in own.items()}
        if node.WEIGHTS:  # the file says what weights it has; the keys below, what it is
            del flat["DISTILL.TEACHER.CONFIG_FILE"], flat["teacher's MODEL.WEIGHTS"]
    return flat


def _set_file(flat: dict[str, str], key: str, path: str) -> None:
    """Let a file's content stand for its path, which depends on the machine."""
    flat[f"file of {key}"] = fingerprint(path)
    if flat[f"file of {key}"]:
        del flat[key]


def fingerprint(path: str) -> str:
    """The start of a file's SHA-256; "" where there is no such file."""
    path = (path or "").partition("?")[0]
    if not path or not Path(path).is_file():
        return ""
    return _fingerprint(path, Path(path).stat().st_mtime_ns)


@functools.cache
def _fingerprint(path: str, changed: int) -> str:
    return file_sha256(path)[:16]


def first_difference(old: dict[str, str], new: dict[str, str]) -> str:
    """The first key that both have and that differs, with its values; "" if there is none.

    A key that only one has came or went with a version of the code.
    """
    for key, value in new.items():
        if key in old and old[key] != value:
            return f"{key} was {old[key] or 'none'} and is {value or 'none'}"
    return ""
