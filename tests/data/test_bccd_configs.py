"""BCCD's configs are digits' with other data: what a method does is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import get_cfg

from d2kd import add_distillation_config
from d2kd.config_files import default_output_dir, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
STUDENTS = sorted(path.name for path in (CONFIGS / "bccd").glob("faster_rcnn_R18*.yaml"))


def read(path: Path):
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(path))
    return cfg


@pytest.mark.parametrize("name", STUDENTS)
def test_methods_are_those_of_digits(name):
    """Heads and all their keys, the student and the optimiser are equal; the data is BCCD's."""
    mine, digits = read(CONFIGS / "bccd" / name), read(CONFIGS / "digits" / name)
    for part in ("RESNETS", "FPN", "ANCHOR_GENERATOR", "RPN", "ROI_BOX_HEAD", "WEIGHTS"):
        assert mine.MODEL[part] == digits.MODEL[part]
    for key in ("OPTIMIZER", "BASE_LR", "WEIGHT_DECAY", "LR_SCHEDULER_NAME"):
        assert mine.SOLVER[key] == digits.SOLVER[key]
    assert mine.DATASETS.TRAIN == ("bccd_train",) and mine.INPUT.RANDOM_FLIP == "horizontal"
    assert mine.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert "bccd" in mine.DISTILL.TEACHER.CONFIG_FILE and "bccd" in mine.DISTILL.TEACHER.WEIGHTS
    mine.DISTILL.TEACHER = digits.DISTILL.TEACHER
    assert mine.DISTILL == digits.DISTILL


def test_the_teacher_fits_its_students():
    """Bigger than the student and of the same classes; what it writes is what students load."""
    teacher = read(CONFIGS / "bccd" / "faster_rcnn_R34_teacher.yaml")
    student = read(CONFIGS / "bccd" / "faster_rcnn_R18_distill.yaml")
    assert teacher.MODEL.RESNETS.DEPTH > student.MODEL.RESNETS.DEPTH
    assert teacher.MODEL.ROI_HEADS.NUM_CLASSES == student.MODEL.ROI_HEADS.NUM_CLASSES
    folder = default_output_dir("bccd/faster_rcnn_R34_teacher.yaml")
    assert student.DISTILL.TEACHER.WEIGHTS == f"{folder}/student_final.pth"
