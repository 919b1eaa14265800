"""Declared keys: defaults into a config, values back, checked and typed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from detectron2.config import CfgNode

from d2kd.config import declared_keys
from d2kd.errors import ConfigError
from d2kd.keys import COUNT, POSITIVE, Options, config_keys, group, key, node_at, one_of, or_none
from d2kd.registry import CONFIG_KEYS


@dataclass(frozen=True)
class Inner(Options):
    """A nested node."""

    count: int = key(1, COUNT, "How many.")
    kind: str = key("y", one_of("yz"), "Which.")


@dataclass(frozen=True)
class Outer(Options):
    """A node."""

    scale: float = key(1.0, POSITIVE, "A factor.")
    sizes: tuple[int, ...] = key((1, 2), comment="Sizes.")
    switch: bool = key(False, comment="On or off.")
    weight: float | None = key(None, or_none(POSITIVE), "A weight, or the default.")
    global_: Inner = group(Inner(count=3))


def node() -> CfgNode:
    out = CfgNode()
    Outer.add_to(out)
    return out


def test_defaults_and_back():
    """What is written is read again; a nested group may have defaults of its own."""
    cfg = node()
    assert cfg.SIZES == [1, 2] and cfg.GLOBAL.COUNT == 3 and cfg.GLOBAL.KIND == "y"
    assert Outer.read(cfg, "N") == Outer()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SCALE", 0.0, "N.SCALE is 0.0; it must be positive"),
        ("SCALE", math.nan, "N.SCALE is nan; it must be positive"),
        ("SCALE", math.inf, "N.SCALE is inf; it must be positive"),
        ("SCALE", None, "N.SCALE is None; it must be positive"),
        ("SCALE", True, "N.SCALE is True; it must be positive"),
        ("SIZES", None, "N.SIZES is None; it must be a list, each of it a whole number"),
        ("SIZES", [1, 2.5], r"N.SIZES is \[1, 2.5\]; it must be a list, each of it a whole"),
        ("SWITCH", None, "N.SWITCH is None; it must be True or False"),
        ("WEIGHT", -1.0, "N.WEIGHT is -1.0; it must be positive, or None"),
        ("GLOBAL.COUNT", 0, "N.GLOBAL.COUNT is 0; it must be at least 1"),
        ("GLOBAL.KIND", "x", r"N.GLOBAL.KIND is 'x'; valid: \['y', 'z'\]"),
        ("GLOBAL", None, "N.GLOBAL is None; it must be a section of keys"),
    ],
)
def test_one_line_for_a_wrong_value(name, value, message):
    """The message names the key, its value and what is valid."""
    cfg = node()
    *path, last = name.split(".")
    parent = node_at(cfg, ".".join(path)) if path else cfg
    parent[last] = value
    with pytest.raises(ConfigError, match=f"^{message}"):
        Outer.read(cfg, "N")


def test_whole_numbers_pass_for_numbers():
    """WEIGHT: 2 means 2.0."""
    cfg = node()
    cfg.SCALE = 2
    assert Outer.read(cfg, "N").scale == 2


def test_a_missing_node_is_named():
    """A config without the keys says which function adds them."""
    with pytest.raises(ConfigError, match="no N.SCALE: leave N to d2kd.add_distillation_config"):
        Outer.read(CfgNode(), "N")


def test_keys_of_a_user():
    """A group that is registered stands in every config that is made afterwards."""
    from detectron2.config import get_cfg

    from d2kd import add_distillation_config

    config_keys("MODEL.TEST_PART.DEEP")(Inner)
    try:
        cfg = get_cfg()
        add_distillation_config(cfg)
    finally:
        del CONFIG_KEYS["MODEL.TEST_PART.DEEP"]
    assert cfg.MODEL.TEST_PART.DEEP.COUNT == 1


def test_every_key_has_a_comment():
    """The reference page has a sentence for each key."""
    assert not [info.path for info in declared_keys() if not info.comment]
