"""Evaluating the teacher before it teaches, and keeping the result for that teacher only."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import inference_on_dataset

from ..detectors.foreign import MapsDetector
from ..detectors.spec import describe_detector
from ..detectors.teacher import Teacher
from ..files import null_to_nan, write_json
from .identity import describe_check, same_teacher

logger = logging.getLogger(__name__)

TEACHER_RESULTS = "teacher_results.json"


class OnStudentInput:
    """The teacher on images that were loaded for the student.

    Not a module: Detectron2's evaluation would put it back into "its" training mode afterwards, and
    the teacher's batch norm with it.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def __call__(self, inputs: list[dict]):
        if self.teacher.flip_channels:
            inputs = [{**item, "image": item["image"].flip(0)} for item in inputs]
        with self.teacher.context():
            return self.teacher.model(inputs)


def check_teacher(cfg: CfgNode, teacher: Teacher, trainer_class: type[DefaultTrainer]) -> dict:
    """Evaluate the teacher on ``DATASETS.TEST``, on the student's input.

    A teacher of other classes than the dataset's cannot be evaluated on it, but its features can
    be distilled: it is only named. So is one of another library.
    """
    results: dict[str, Any] = {}
    if isinstance(teacher.model, MapsDetector):
        logger.info("Not checking the teacher, a %s: it is not evaluated", teacher.model.meta_arch)
        return results
    known = describe_detector(teacher.model, "teacher").num_classes
    for name in cfg.DATASETS.TEST:
        names = tuple(MetadataCatalog.get(name).get("thing_classes", ()))
        if known is not None and names and known != len(names):
            words = "Not checking the teacher on %s: it predicts %d classes, the dataset has %d"
            logger.warning(words, name, known, len(names))
            continue
        if names and known == len(teacher.class_names or ()) and names != teacher.class_names:
            words = "Not checking the teacher on %s: its classes differ, or their order"
            logger.warning(words, name)
            continue
        logger.info("Checking the teacher on %s (DISTILL.TEACHER.CHECK)", name)
        loader = trainer_class.build_test_loader(cfg, name)  # first: it may make the dataset
        evaluator = trainer_class.build_evaluator(cfg, name)
        results[name] = inference_on_dataset(OnStudentInput(teacher), loader, evaluator) or {}
    return next(iter(results.values())) if len(results) == 1 else results


def write_teacher_results(folder: str, cfg: CfgNode, teacher: dict, results: dict) -> None:
    """Keep what :func:`check_teacher` found, with whose it is and how it was evaluated."""
    content = {
        "teacher": teacher,
        "datasets": list(cfg.DATASETS.TEST),
        "evaluation": describe_check(cfg),
        "results": results,
    }
    write_json(content, os.path.join(folder, TEACHER_RESULTS))


def read_teacher_results(folder: str, cfg: CfgNode, teacher: dict | None) -> dict[str, Any] | None:
    """What :func:`write_teacher_results` kept of this teacher, evaluated as ``cfg`` says; else
    None, as of a version that did not keep how."""
    try:
        with open(os.path.join(folder, TEACHER_RESULTS)) as file:
            found = json.load(file)
        is_same = same_teacher(found["teacher"], teacher)
        is_known = is_same and found["evaluation"] == describe_check(cfg)
        return null_to_nan(found["results"]) if is_known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
