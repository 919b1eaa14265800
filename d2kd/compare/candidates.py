"""What ``d2kd choose`` chooses from: the heads that a pair can serve, at a few weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..arguments import positive_number
from ..config import head_schedule, student_config
from ..config_files import BASE_KEY, close_to, resolve_config_file
from ..data.model_classes import trained_classes
from ..detectors.teacher import Teacher
from ..engine.setup import check_config, merged_config
from ..engine.teacher_check import check_teacher
from ..engine.trainer import DistillTrainer
from ..errors import ConfigError
from ..heads import build_head
from ..keys import node_at
from ..meta_arch import describe_pair
from ..registry import DISTILL_HEAD_REGISTRY, node_name
from .suite import as_list

BALANCED = "balanced"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A student with its teacher and data: a config, and overrides that make it a Distiller."""

    config: str
    opts: dict[str, Any]

    @classmethod
    def of(cls, config: str, opts: dict[str, Any], task: str = "bbox") -> Pair:
        """The pair of a config, be it a Distiller's or a plain student's, to choose for a task."""
        arch = merged_config(config, as_list(opts)).MODEL.META_ARCHITECTURE
        if arch != "Distiller":
            own = {"MODEL.META_ARCHITECTURE": "Distiller", "DISTILL.STUDENT_META_ARCH": arch}
            opts = {**opts, **own}
        pair = cls(config, {**opts, "DISTILL.HEADS": [], "TEST.EVAL_PERIOD": 0})
        cfg = pair.cfg()
        if not cfg.DISTILL.TEACHER.CONFIG_FILE:
            raise ConfigError("there is no teacher: give --teacher, or DISTILL.TEACHER.CONFIG_FILE")
        if len(cfg.DATASETS.TEST) != 1:
            raise ConfigError(
                f"DATASETS.TEST is {list(cfg.DATASETS.TEST)}: name one dataset, to choose by its AP"
            )
        if task == "segm" and not cfg.MODEL.MASK_ON:
            raise ConfigError("--task segm: the student has no masks (MODEL.MASK_ON is False)")
        return pair

    def cfg(self, opts: dict[str, Any] | None = None) -> CfgNode:
        """The merged config, with further overrides."""
        return merged_config(self.config, as_list({**self.opts, **(opts or {})}))


# --- heads and weights ----------------------------------------------------------------------------


def named_heads(names: Sequence[str] | None) -> list[str]:
    """The heads to choose from; default: each registered one.

    Args:
        names: heads, or several heads that act together, as in "DSIG+SSIM".
    """
    known = sorted(name for name, _ in DISTILL_HEAD_REGISTRY)
    for name in names or []:
        for part in name.split("+"):
            if part not in known:
                raise ConfigError(f"--heads: no head '{part}'; {close_to(part, known)}")
    return list(dict.fromkeys(names or known))


def candidates(cfg: CfgNode, heads: Sequence[str], weights: Sequence[str]) -> dict[str, dict]:
    """Label -> overrides of each head at each weight.

    Args:
        weights: factors of the config's own weight, or "balanced", for ``DISTILL.BALANCE``.

    Raises:
        ConfigError: a weight is neither.
    """
    found = {}
    for name in heads:
        parts = name.split("+")
        for weight in weights:
            opts: dict[str, Any] = {"DISTILL.HEADS": parts}
            is_balanced = weight == BALANCED
            if is_balanced != cfg.DISTILL.BALANCE.ENABLED:
                opts["DISTILL.BALANCE.ENABLED"] = is_balanced
            if is_balanced:
                label = f"{name} {BALANCED}"
            else:
                factor = _factor(weight)
                for node in map(node_name, parts):
                    opts[f"DISTILL.{node}.WEIGHT"] = factor * cfg.DISTILL[node].WEIGHT
                label = name if factor == 1 else f"{name} x{factor:g}"
            found[label] = opts
    return found


def _factor(weight: str) -> float:
    try:
        return positive_number(weight)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--weights: {error} or '{BALANCED}'") from error


# --- the models -----------------------------------------------------------------------------------


def examine(
    pair: Pair, heads: Sequence[str], output: Path
) -> tuple[dict[str, str], dict[str, dict]]:
    """Build student and teacher, ask which heads they can serve, and evaluate the teacher.

    Args:
        output: folder of the evaluation.

    Returns:
        head -> why it cannot be served, of those that cannot; and the teacher's results on
        ``DATASETS.TEST``, {} of a teacher of other classes.

    Raises:
        ConfigError: one cannot be built, or no head can be served.
    """
    cfg = pair.cfg({"OUTPUT_DIR": str(output)})
    check_config(cfg, train=True)
    student, teacher = build_model(student_config(cfg)), Teacher.from_config(cfg)
    specs = describe_pair(student, teacher, trained_classes(cfg))
    refused = {}
    for name in heads:
        try:
            for part in name.split("+"):
                head_schedule(cfg, part)
                build_head(part, cfg, *specs)
        except ConfigError as error:
            refused[name] = str(error)
    if len(refused) == len(heads):
        raise ConfigError(f"no head fits the pair: {next(iter(refused.values()))}")
    results = check_teacher(cfg, teacher, DistillTrainer)
    del student, teacher
    torch.cuda.empty_cache()  # the trainings need that memory
    return refused, results


# --- the config of the winner ---------------------------------------------------------------------


def winners_config(pair: Pair, opts: dict[str, Any], comment: str) -> str:
    """YAML of the pair with a candidate's overrides, on top of the pair's own config.

    Args:
        comment: one line for its head.
    """
    base = str(Path(resolve_config_file(pair.config)).resolve())
    cfg, tree = pair.cfg(opts), CfgNode({BASE_KEY: base})
    for key in {**pair.opts, **opts}:
        if key == "TEST.EVAL_PERIOD":  # is for choosing alone
            continue
        path, _, last = key.rpartition(".")
        node = node_at(tree, path, create=True) if path else tree
        node[last] = json.loads(json.dumps(node_at(cfg, key)))  # lists for tuples
    return f"# {comment}\n{tree.dump(sort_keys=False)}"
