"""Checkpoints: which is gone on from, which are kept, and weights that do not fit."""

from __future__ import annotations

import os
import re
import zipfile

import pytest
import torch

from d2kd.engine.checkpoint import (
    AtomicCheckpointer,
    find_checkpoint,
    prune,
    read_checkpoint,
)
from d2kd.engine.step import check_optimizer
from d2kd.errors import ConfigError

from ..detectors import build, detector_config, distiller_config


def write_checkpoint(folder, name: str, iteration: int) -> None:
    state = {"iteration": iteration, "_trainer": {"optimizer": {}}}
    content = {"model": {"a": torch.zeros(1000)}, "trainer": state, "iteration": iteration}
    torch.save(content, folder / name)


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, of which model_0000029.pth is the last."""
    for name, iteration in (("0000009", 9), ("0000019", 19), ("0000029", 29)):
        write_checkpoint(tmp_path, f"model_{name}.pth", iteration)
    (tmp_path / "last_checkpoint").write_text("model_0000029.pth")
    return tmp_path


def test_the_last_checkpoint(run, tmp_path_factory):
    """It is the one that is named; without a name there is none."""
    path = find_checkpoint(str(run))
    assert path == str(run / "model_0000029.pth")
    assert read_checkpoint(path)["iteration"] == 29
    assert find_checkpoint(str(tmp_path_factory.mktemp("empty"))) == ""
    assert find_checkpoint(str(run / "nowhere")) == ""


def cut(path):
    os.truncate(path, 2000)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    path.write_text("something else")


@pytest.mark.parametrize("damage", [cut, empty, overwrite, os.remove])
def test_a_damaged_one_names_the_newest_that_are_whole(run, damage):
    """By iteration, not by name or time; damaged ones and the student's file are not among them."""
    write_checkpoint(run, "model_final.pth", 15)
    torch.save({"model": {}}, run / "student_final.pth")
    damage(run / "model_0000029.pth")
    state = "not there" if damage is os.remove else "damaged"
    newest = "model_0000019.pth, model_final.pth, model_0000009.pth"
    with pytest.raises(ConfigError, match=f"is {state}; the newest whole ones are {newest}: write"):
        find_checkpoint(str(run))
    cut(run / "model_0000019.pth")
    with pytest.raises(ConfigError, match="ones are model_final.pth, model_0000009.pth: write"):
        find_checkpoint(str(run))
    for name in ("model_final.pth", "model_0000009.pth"):
        (run / name).unlink()
    with pytest.raises(ConfigError, match="no other is whole: train from the start"):
        find_checkpoint(str(run))


def test_an_empty_name(run):
    """A file without a name is said to be empty."""
    (run / "last_checkpoint").write_text("")
    with pytest.raises(
        ConfigError, match="last_checkpoint' is empty; the newest whole ones are mo"
    ):
        find_checkpoint(str(run))


def test_bytes_that_changed_in_the_middle(run):
    """They show when the file is read, and are said in the same words."""
    path = run / "model_0000029.pth"
    content = bytearray(path.read_bytes())
    at = content.index(b"iteration")
    content[at - 20 : at + 20] = bytes(40)
    path.write_bytes(content)
    assert zipfile.is_zipfile(path)
    with pytest.raises(ConfigError, match="model_0000029.pth' (is damaged|holds no state)"):
        read_checkpoint(find_checkpoint(str(run)))


def test_weights_alone_are_not_resumed(run):
    """A file without the state of a training is not gone on from; it may be evaluated."""
    torch.save({"model": {"a": torch.zeros(3)}}, run / "student_final.pth")
    (run / "last_checkpoint").write_text("student_final.pth")
    with pytest.raises(
        ConfigError, match="holds no state of a training .* MODEL.WEIGHTS, in another"
    ):
        find_checkpoint(str(run))
    path = find_checkpoint(str(run), weights_only=True)
    assert path.endswith("student_final.pth")


def test_prune(tmp_path):
    """The last ones in order of writing stay, the best, and what is no checkpoint of the way."""
    names = [f"model_{i:07d}.pth" for i in (5000, 1000, 2000, 3000, 4000)]
    others = ["model_final.pth", "model_best.pth", "student_final.pth", "model_1.pth.tmp"]
    for age, name in enumerate([*others, *names]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (age, age))
    prune(str(tmp_path), 2, best="model_0001000.pth")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "model_0001000.pth", "model_0003000.pth", "model_0004000.pth"}


@pytest.mark.parametrize(
    ("saved", "own", "words"),
    [
        ([{"betas": 1}], [{"momentum": 1}], "by AdamW, this config's is by SGD: resume"),
        ([{"momentum": 1}], [{"betas": 1}], "by SGD, this config's is by AdamW: resume"),
        ([{"betas": 1}], [{"betas": 1}, {"betas": 1}], "by 1 groups .* is by 2 groups of param"),
        ([{"betas": 1}], [{"betas": 2}], None),
    ],
)
def test_the_state_of_another_optimiser(saved, own, words):
    """It is refused before it is loaded, where PyTorch would fail in the first step."""
    if words is None:
        check_optimizer(saved, own)
    else:
        with pytest.raises(ConfigError, match=words):
            check_optimizer(saved, own)


# --- weights to start from ----------------------------------------------------------------------


def load(tmp_path, state: dict, cfg=None, query: str = "", **kwargs):
    """Load ``state`` as MODEL.WEIGHTS into a detector; returns that."""
    torch.save({"model": state}, tmp_path / "weights.pth")
    model = build(detector_config() if cfg is None else cfg, 1)
    AtomicCheckpointer(model).load_weights(f"{tmp_path}/weights.pth{query}", **kwargs)
    return model


def backbone_of(model) -> dict:
    prefix = "backbone.bottom_up."
    state = model.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_weights_that_fit_nothing(tmp_path, teacher_files):
    """Names of a backbone alone find no place: an error with names of both; with Detectron2's
    '?matching_heuristics=True' they do, and heads do not take part."""
    weights = backbone_of(build(detector_config()))
    words = "has stem.conv1.weight, .* the model has backbone.bottom_up.res2.*matching_heuristics"
    with pytest.raises(ConfigError, match=words) as refused:
        load(tmp_path, weights)
    assert "\n" not in str(refused.value)
    distiller = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    for cfg in (detector_config(), distiller):
        model = load(tmp_path, weights, cfg, "?matching_heuristics=True")
        found = getattr(model, "student", model)
        for key, value in weights.items():
            assert torch.equal(found.state_dict()[f"backbone.bottom_up.{key}"], value), key


def test_weights_of_which_little_fits(tmp_path):
    """Another backbone of the same names, a ResNet-50's in a ResNet-18, is no start, though some
    shapes agree; names one with both shapes. Another pyramid on the same backbone is one."""
    words = r"does not fit the model: backbone.bottom_up.* is \(.*\) in it, \(.*\) in the model"
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, build(detector_config(depth=50)).state_dict())
    load(tmp_path, build(detector_config(width=48)).state_dict())


def test_weights_that_fit_in_part_start_a_training(tmp_path):
    """A backbone with a classifier, or a detector of other classes: loaded as by Detectron2."""
    model = build(detector_config())
    state = {f"backbone.bottom_up.{k}": v for k, v in backbone_of(model).items()}
    state["classifier.weight"] = torch.zeros(1000, 512)
    loaded = load(tmp_path, state)
    name = "backbone.bottom_up.res2.0.conv1.weight"
    assert torch.equal(loaded.state_dict()[name], state[name])
    loaded = load(tmp_path, build(detector_config(num_classes=5)).state_dict())
    with pytest.raises(ConfigError, match="lacks 4 weights .*bbox_pred.bias, .* this detector"):
        load(tmp_path, build(detector_config(num_classes=5)).state_dict(), complete=True)


def test_weights_of_a_model_in_data_parallel(tmp_path):
    """Detectron2 takes their prefix off."""
    state = build(detector_config()).state_dict()
    load(tmp_path, {f"module.{key}": value for key, value in state.items()}, complete=True)


def test_an_evaluation_needs_all_weights(tmp_path):
    """A backbone alone would be evaluated with heads at random."""
    model = build(detector_config())
    state = {f"backbone.bottom_up.{k}": v for k, v in backbone_of(model).items()}
    with pytest.raises(ConfigError, match=r"lacks \d+ weights of the model.*backbone.fpn_"):
        load(tmp_path, state, complete=True)
    load(tmp_path, model.state_dict(), complete=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>not found</html>"])
def test_a_file_that_holds_no_weights(tmp_path, content):
    """It is named, with the reason, in one line."""
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}' is not read: "):
        AtomicCheckpointer(build(detector_config())).load_weights(str(path))
