"""Terms that compare classes need the same names in the same order, where both are known."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from detectron2.modeling import build_model

from d2kd import ConfigError
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.needs import Need, check_needs

from ..data.parts import Parts, forget_datasets
from ..detectors import distiller_config, write_config


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


STUDENT = DetectorSpec(
    "student", "RetinaNet", {}, frozenset(), num_classes=2, class_names=("nut", "bolt")
)
TEACHER = replace(STUDENT, role="teacher")


@pytest.mark.parametrize("names", [("nut", "bolt"), None])
def test_the_same_or_unknown_names_are_accepted(names):
    """Names are not known of a teacher whose training set is elsewhere."""
    teacher = replace(TEACHER, class_names=names)
    check_needs("Logits", [Need("cls", same=("num_classes",))], STUDENT, teacher)
    check_needs("Logits", [Need("cls", same=("num_classes",))], teacher, TEACHER)


def test_other_names_are_refused():
    """The first that differs is named; a term that compares no classes does not ask."""
    teacher = replace(TEACHER, class_names=("nut", "ring"))
    with pytest.raises(ConfigError, match="class 1 of the student is 'bolt', of the teacher 'ring"):
        check_needs("Logits", [Need("cls", same=("num_classes",))], STUDENT, teacher)
    check_needs("SSIM", [Need("")], STUDENT, teacher)


def pair(parts: Parts, heads: list[str], names: list[str]):
    """A distillation whose teacher was trained on classes of these names."""
    other = copy.deepcopy(parts.train)
    for category, name in zip(other["categories"], names, strict=True):
        category["name"] = name
    (parts.folder / "teacher.json").write_text(json.dumps(other))
    parts.write()
    teacher = parts.config()
    teacher.DATASETS.COCO_FORMAT = [
        ["t", str(parts.folder / "teacher.json"), str(parts.folder / "images")]
    ]
    file = write_config(teacher, parts.folder / "teacher.yaml")
    return distiller_config(parts.config(), heads, file)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    """Its names are those of its own config, even where a dataset has the name of the student's."""
    parts = Parts(tmp_path)
    with pytest.raises(ConfigError, match="class 0 of the student is 'nut', of the teacher 'gear'"):
        build_model(pair(parts, ["GlobalKnowledge"], ["gear", "hub", "cog"]))
    build_model(pair(parts, ["GlobalKnowledge"], ["nut", "bolt", "ring"]))
    build_model(pair(parts, ["SSIM"], ["gear", "hub", "cog"]))
