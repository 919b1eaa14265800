"""Every key of every head refuses a value that makes no sense, in one line that names the key."""

from __future__ import annotations

import math

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from d2kd import ConfigError, add_distillation_config
from d2kd.config import validate_distillation_config
from d2kd.detectors.spec import describe_detector
from d2kd.heads import build_head
from d2kd.registry import DISTILL_HEAD_REGISTRY, node_name

from .detectors import DENSE_HEADS, detector_config, distiller_config

HEADS = [name for name, head in DISTILL_HEAD_REGISTRY if head.__module__.startswith("d2kd.")]


def leaf_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Dotted names of all values below ``node``."""
    keys = []
    for name, value in node.items():
        nested = isinstance(value, CfgNode)
        keys += leaf_keys(value, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def value_cases() -> list[tuple[str, str]]:
    """(head, key) of all keys of the built-in heads but their switches, which are bool."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cases = []
    for head in HEADS:
        node = cfg.DISTILL[node_name(head)]
        for key in leaf_keys(node):
            if not isinstance(nested(node, key), bool):
                cases.append((head, key))
    return cases


def nested(node: CfgNode, key: str):
    for name in key.split("."):
        node = node[name]
    return node


def nonsense(value):
    """A value of the same type that no key can have."""
    if isinstance(value, str):
        return "nonsense"
    if isinstance(value, (list, tuple)):
        return [-7]
    return -7.0 if isinstance(value, float) else -7


def describe_pair(arch: str):
    """Specs of a pair of small detectors."""
    student, teacher = (build_model(detector_config(arch, width=w)) for w in (16, 24))
    spec = describe_detector(student, "student")
    return spec, describe_detector(teacher, "teacher", spec)


@pytest.fixture(scope="module")
def specs():
    """Specs of a pair of small Mask R-CNNs."""
    return describe_pair("mask")


@pytest.mark.parametrize("head, key", value_cases())
def test_nonsense_is_refused(head, key, specs, teacher_files):
    """A negative number, or a word that is none of the choices, ends in one line."""
    name = f"DISTILL.{node_name(head)}.{key}"
    cfg = distiller_config(detector_config("mask"), [head], teacher_files["mask"])
    bad = nonsense(nested(cfg, name))
    cfg.merge_from_list([name, bad])
    # Strides are checked against the pair's.
    message = r"no level of stride \[-7\]" if key == "STRIDES" else name.replace(".", r"\.")
    with pytest.raises(ConfigError, match=message) as error:
        validate_distillation_config(cfg)
        build_head(head, cfg, *specs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "head, opts, message",
    [
        ("GlobalKnowledge", ("LOCAL.ADAPTER_KERNEL", 2), r"ADAPTER_KERNEL is 2; valid: \[1, 3\]"),
        ("GlobalKnowledge", ("PROTOTYPES.QUANTILE", 1.0), "QUANTILE is 1.0; .*from 0 to below 1"),
        ("GlobalKnowledge", ("PROTOTYPES.BATCH_SIZE", 0), "BATCH_SIZE is 0; .*at least 1"),
        ("DSIG", ("PREDICTIONS_PER_LEVEL", 0), "PREDICTIONS_PER_LEVEL is 0; .*at least 1"),
        ("DSIG", ("POOL_RESOLUTION", 0), "POOL_RESOLUTION is 0; .*at least 1"),
        ("DSIG", ("PREDICTIONS_NMS", 1.5), "PREDICTIONS_NMS is 1.5; .*from 0 to 1"),
        ("SSIM", ("WINDOW_SIZE", 10), "WINDOW_SIZE is 10; it must be odd and positive"),
        ("DRKD", ("PIXEL_WEIGHT", "much"), "PIXEL_WEIGHT is 'much'; .*0 or positive, or None"),
        ("MAR", ("RELATION.WEIGHT", [1.0]), r"WEIGHT is \[1.0\]; .*0 or positive, or None"),
        ("MAR", ("MASK.WEIGHT", 0.0, "RELATION.WEIGHT", 0.0), "all 0"),
        ("MAR", ("MASK.BACKGROUND", math.nan), "BACKGROUND is nan; it must be 0 or positive"),
    ],
)
def test_borders(head, opts, message, specs, teacher_files):
    """Values just outside of what is valid, of another type, and NaN."""
    prefix = f"DISTILL.{node_name(head)}."
    opts = [prefix + part if i % 2 == 0 else part for i, part in enumerate(opts)]
    cfg = distiller_config(detector_config("mask"), [head], teacher_files["mask"])
    cfg.merge_from_list(opts)
    with pytest.raises(ConfigError, match=message):
        build_head(head, cfg, *specs)


@pytest.mark.parametrize("head", ["DSIG", "GlobalKnowledge", "MaskMimic"])
def test_heads_without_a_term_are_refused(head, specs, teacher_files):
    """All weights 0 is a mistake, not a silent plain training."""
    prefix = f"DISTILL.{node_name(head)}"
    cfg = distiller_config(detector_config("mask"), [head], teacher_files["mask"])
    for key in leaf_keys(cfg.DISTILL[node_name(head)]):
        if key.endswith("WEIGHT") and key != "WEIGHT":
            cfg.merge_from_list([f"{prefix}.{key}", 0.0])
    with pytest.raises(ConfigError, match=prefix):
        build_head(head, cfg, *specs)


def test_defaults_are_valid(specs, teacher_files):
    """No rule refuses a default."""
    dense = describe_pair("retinanet")
    for head in HEADS:
        cfg = distiller_config(detector_config("mask"), [head], teacher_files["mask"])
        validate_distillation_config(cfg)
        build_head(head, cfg, *(dense if head in DENSE_HEADS else specs))
