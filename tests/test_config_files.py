"""Reading config files: one line that names file, line and what is valid; no code is run."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode, get_cfg

from d2kd import ConfigError, add_distillation_config
from d2kd.config_files import load_config, merge_overrides, read_yaml


def config() -> CfgNode:
    cfg = get_cfg()
    add_distillation_config(cfg)
    return cfg


BAD_FILES = {
    "a tab": ("SOLVER:\n\tMAX_ITER: 3\n", r"c.yaml:2: not valid YAML"),
    "open quote": ("MODEL:\n  WEIGHTS: 'a\n", r"c.yaml:\d: not valid YAML"),
    "empty": ("", "c.yaml: it is empty"),
    "list": ("- a\n", "c.yaml: it is a list"),
    "number": ("3\n", "c.yaml: it is a int"),
    "own base": ("_BASE_: c.yaml\n", "_BASE_ leads back to itself"),
    "URL base": ("_BASE_: https://x.org/y.yaml\n", r"c.yaml:1: _BASE_ is 'https"),
    "absent base": ("_BASE_: nope.yaml\n", r"c.yaml:1: _BASE_: no file '.*nope.yaml'"),
    "number base": ("_BASE_: 3\n", "c.yaml:1: _BASE_ is 3"),
    "null section": ("SOLVER:\nMODEL:\n  MASK_ON: True\n", r"c.yaml:1: SOLVER is empty \(null\)"),
    "null value": ("SOLVER:\n  MAX_ITER:\n", r"c.yaml:2: SOLVER.MAX_ITER is empty \(null\)"),
    "null list": ("DISTILL:\n  HEADS:\n", r"c.yaml:2: DISTILL.HEADS is empty \(null\)"),
    "twice": ("SEED: 1\nSEED: 2\n", "c.yaml:2: SEED stands there twice; the first is in line 1"),
    "twice inside": (
        "SOLVER:\n  MAX_ITER: 1\n  MAX_ITER: 2\n",
        "c.yaml:3: SOLVER.MAX_ITER stands there twice",
    ),
    "tag": ("SEED: !!python/object/apply:os.getpid []\n", "c.yaml:1: the tag .* could run code"),
    "own tag": ("SEED: !run 3\n", "c.yaml:1: the tag '!run'"),
    "unknown key": (
        "SOLVER:\n  MAX_ITERS: 3\n",
        "c.yaml:2: no config key .*close: SOLVER.MAX_ITER",
    ),
    "section for value": ("SOLVER:\n  MAX_ITER:\n    A: 1\n", "SOLVER.MAX_ITER is"),
    "value for section": ("SOLVER: 3\n", "c.yaml:1: SOLVER is '?3'?; it is a section of keys"),
    "word for number": ("SOLVER:\n  MAX_ITER: many\n", "c.yaml:2: SOLVER.MAX_ITER is '?many"),
    "integer for float": ("SOLVER:\n  BASE_LR: 1\n", "c.yaml:2: SOLVER.BASE_LR .* with a point"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    """Each mistake of a file ends in one line that names the file and, where there is one, the
    line."""
    text, message = BAD_FILES[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(config(), str(path))
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_base_is_named_there(tmp_path):
    """The message names the file in which the mistake stands."""
    (tmp_path / "base.yaml").write_text("SOLVER:\n  MAX_ITERS: 3\n")
    (tmp_path / "c.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(ConfigError, match="base.yaml:2: no config key 'SOLVER.MAX_ITERS'"):
        load_config(config(), str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x00\x01\x02\xff\xfe", "not a text file"), (b"\xff\xfe\xfa", "not a text file")],
)
def test_binary(content, message, tmp_path):
    """A file that is no text."""
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(config(), str(tmp_path / "c.yaml"))


def test_other_paths(tmp_path):
    """A folder, a URL, nothing, and a name that is close to a file."""
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    for name, message in (
        (str(tmp_path), "is a folder"),
        ("http://127.0.0.1:9/x.yaml", "is not read; give a file"),
        ("", "is empty"),
        (str(tmp_path / "confg.yaml"), "neither a file nor .*close: .*config.yaml"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(config(), name)


def test_detectron2s_own_files_may_compute():
    """A zoo config whose base holds a Python expression is read as before."""
    cfg = config()
    load_config(cfg, "COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5


def test_lists_may_repeat_keys(tmp_path):
    """Runs of a suite are mappings with the same keys; aliases are read once."""
    path = tmp_path / "suite.yaml"
    path.write_text("runs:\n- {name: a, opts: &o [1]}\n- {name: b, opts: *o}\n")
    content, _ = read_yaml(str(path))
    assert [run["name"] for run in content["runs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.MAX_ITER"], "is not a list of pairs"),
        (["SOLVER.MAX_ITERS", 3], "no config key 'SOLVER.MAX_ITERS'; close: SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER.X", 3], "no config key"),
        ([3, 3], "3 is no config key"),
        (["SOLVER.MAX_ITER", None], r"SOLVER.MAX_ITER is empty \(null\)"),
        (["SOLVER.MAX_ITER", "None"], r"SOLVER.MAX_ITER is empty \(null\)"),
        (["DISTILL.HEADS", "None"], r"DISTILL.HEADS is empty \(null\)"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER is 'many'; it must be a whole number"),
        (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR is '1'; it must be a number with a point"),
        (["SOLVER", "1"], "SOLVER is '1'; it is a section of keys"),
        (["_BASE_", "x.yaml"], "no config key '_BASE_'"),
    ],
)
def test_bad_overrides(opts, message):
    """KEY VALUE pairs end in one line too, and say where they stand."""
    with pytest.raises(ConfigError, match=f"^DISTILL.TEACHER.OPTS: .*{message}"):
        merge_overrides(config(), opts, "DISTILL.TEACHER.OPTS")


def test_none_where_it_is_the_default():
    """DRKD's weights may be None, which means the default."""
    cfg = config()
    merge_overrides(cfg, ["DISTILL.DRKD.PIXEL_WEIGHT", "None", "SOLVER.MAX_ITER", "7"])
    assert cfg.DISTILL.DRKD.PIXEL_WEIGHT is None and cfg.SOLVER.MAX_ITER == 7
