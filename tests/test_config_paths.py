"""Where configs and the paths in them are found, whatever the working directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from d2kd import ConfigError
from d2kd.config_files import default_output_dir, resolve_config_file
from d2kd.config_paths import SHIPPED, absolute_path, shipped_config, shipped_names
from d2kd.detectors.source import teacher_config
from d2kd.engine.setup import merged_config, read_config
from d2kd.engine.train import build_parser

NAME = "digits/retinanet_R18_ssim.yaml"
ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, **content) -> Path:
    """A YAML file of nested keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


# --- configs ------------------------------------------------------------------------------------


def test_a_shipped_config_has_a_name(here):
    """That of the zoo's form, or its path in a clone; a file of that path comes first."""
    assert NAME in shipped_names()
    for name in (NAME, f"configs/{NAME}"):
        assert resolve_config_file(name) == str(SHIPPED / NAME)
    assert resolve_config_file(ZOO).endswith(ZOO)
    own = write(here / NAME, VERSION=2)
    assert resolve_config_file(NAME) == NAME and os.path.samefile(NAME, own)


@pytest.mark.parametrize("name", ["../README.md", "../d2kd/cli.py", "digits", "/etc/passwd"])
def test_other_files_are_not_shipped_configs(name):
    """A name does not climb out of the folder."""
    assert shipped_config(name) is None


def test_folders_are_tried_and_named(here, tmp_path):
    """The working directory comes before the folders that are given; a message names them all."""
    beside = write(tmp_path / "suite/a.yaml", VERSION=2)
    folders = [tmp_path / "suite"]
    assert resolve_config_file("a.yaml", "x", folders) == str(beside)
    write(here / "a.yaml", VERSION=2)
    assert resolve_config_file("a.yaml", "x", folders) == "a.yaml"
    with pytest.raises(ConfigError) as error:
        resolve_config_file("b.yaml", "x", folders)
    assert str(error.value).endswith(f"looked in {here} and {tmp_path / 'suite'}")
    with pytest.raises(ConfigError, match="close: .*retinanet_R18_ssim.yaml"):
        resolve_config_file("digits/retinanet_R18_sim.yaml")


def test_shipped_configs_are_read_safely(here, tmp_path, monkeypatch):
    """They hold no Python, and a tag in one would not be run."""
    monkeypatch.setattr("d2kd.config_paths.SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped/x").mkdir(parents=True)
    text = "MODEL:\n  WEIGHTS: !!python/object/apply:os.getcwd []\n"
    (tmp_path / "shipped/x/evil.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the tag .* could run code"):
        merged_config("x/evil.yaml", [])


# --- the output folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (NAME, "output/digits/retinanet_R18_ssim"),
        (f"configs/{NAME}", "output/digits/retinanet_R18_ssim"),
        (ZOO, "output/COCO-Detection/retinanet_R_50_FPN_1x"),
        ("mine/student.yaml", "output/mine/student"),
        ("../other/student.yaml", "output/student"),
    ],
)
def test_output_is_the_path_of_the_config(here, name, folder):
    """Below output/, unless the config or an override names a folder."""
    write(here / "mine/student.yaml", VERSION=2)
    write(here / "../other/student.yaml", VERSION=2)
    assert default_output_dir(name) == folder
    assert merged_config(name, []).OUTPUT_DIR == str(here / folder)
    assert merged_config(name, ["OUTPUT_DIR", "./output"]).OUTPUT_DIR == str(here / "output")


def test_a_config_may_name_its_output(here):
    """Then it is that, from the working directory."""
    write(here / "a.yaml", OUTPUT_DIR="runs/a")
    assert merged_config("a.yaml", []).OUTPUT_DIR == str(here / "runs/a")


# --- paths --------------------------------------------------------------------------------------


def test_absolute_path(here, tmp_path):
    """What is there becomes absolute, what follows a "?" and what is elsewhere stays."""
    (tmp_path / "w.pth").touch()
    assert absolute_path("w.pth", [tmp_path]) == str(tmp_path / "w.pth")
    assert absolute_path("w.pth?a=b", [tmp_path]) == f"{tmp_path / 'w.pth'}?a=b"
    (here / "w.pth").touch()
    assert absolute_path("w.pth", [tmp_path]) == str(here / "w.pth")
    for value in ("", "gone.pth", "random", "detectron2://w.pth", ZOO, "/gone/w.pth"):
        assert absolute_path(value, [tmp_path]) == value
    assert absolute_path("../here", []) == "../here"  # a folder
    assert absolute_path("../here", [], os.path.exists) == str(here)


DATA = "data/train.json", "images"
EARS = {"keypoint_names": ["tip", "base"]}


@pytest.fixture
def project(here, tmp_path) -> Path:
    """A folder elsewhere: student, teacher, weights and data beside each other."""
    folder = tmp_path / "project"
    write(folder / "teacher.yaml", MODEL={"WEIGHTS": "weights/start.pth"})
    for name in ("weights/start.pth", "weights/teacher.pth", "data/train.json", "images/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    teacher = {"CONFIG_FILE": "teacher.yaml", "WEIGHTS": "weights/teacher.pth"}
    write(
        folder / "student.yaml",
        MODEL={"META_ARCHITECTURE": "Distiller", "WEIGHTS": "weights/start.pth"},
        DISTILL={"HEADS": ["SSIM"], "TEACHER": teacher},
        DATASETS={"COCO_FORMAT": [["mine", *DATA], ["ears", *DATA, EARS]], "TRAIN": ["mine"]},
    )
    return folder


def test_paths_start_beside_the_config_too(project, here):
    """So that a project's folder works from any directory; what is dumped is absolute."""
    cfg = merged_config(str(project / "student.yaml"), [])
    again = yaml.safe_load(cfg.dump())
    assert again["MODEL"]["WEIGHTS"] == str(project / "weights/start.pth")
    assert again["DISTILL"]["TEACHER"]["WEIGHTS"] == str(project / "weights/teacher.pth")
    assert again["DISTILL"]["TEACHER"]["CONFIG_FILE"] == str(project / "teacher.yaml")
    data = [str(project / path) for path in DATA]
    assert again["DATASETS"]["COCO_FORMAT"] == [["mine", *data], ["ears", *data, EARS]]
    assert again["OUTPUT_DIR"] == str(here / "output/student")
    # The teacher's own weights lie beside the teacher's file.
    cfg.DISTILL.TEACHER.WEIGHTS = ""
    assert teacher_config(cfg).MODEL.WEIGHTS == str(project / "weights/start.pth")
    cfg.DISTILL.TEACHER.WEIGHTS = f"{project}/weights/teacher.pth?matching_heuristics=True"
    assert teacher_config(cfg).MODEL.WEIGHTS == cfg.DISTILL.TEACHER.WEIGHTS


def test_the_working_directory_comes_first(project, here):
    """As it did in version 0.1."""
    (here / "weights").mkdir()
    (here / "weights/start.pth").touch()
    cfg = merged_config(str(project / "student.yaml"), [])
    assert cfg.MODEL.WEIGHTS == str(here / "weights/start.pth")
    assert cfg.DISTILL.TEACHER.WEIGHTS == str(project / "weights/teacher.pth")


@pytest.mark.parametrize(
    "key", ["MODEL.WEIGHTS", "DISTILL.TEACHER.WEIGHTS", "DISTILL.TEACHER.CONFIG_FILE"]
)
def test_a_missing_file_is_named_with_its_folders(project, here, key):
    """Both folders, in the one line."""
    argv = ["--config-file", str(project / "student.yaml"), key, "gone.file"]
    with pytest.raises(ConfigError) as error:
        read_config(build_parser().parse_args(argv))
    message = str(error.value)
    assert message.startswith(f"{key}: ") and "'gone.file'" in message
    assert message.endswith(f"looked in {here} and {project}")
