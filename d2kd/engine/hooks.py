"""Hooks of the trainer, and the check of the teacher before it starts."""

from __future__ import annotations

import json
import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from ..detectors.spec import describe_detector
from ..detectors.teacher import Teacher
from ..files import write_json
from .checkpoint import save_student
from .summary import summarise

logger = logging.getLogger(__name__)

TEACHER_RESULTS = "teacher_results.json"
STUDENT_FILE = "student_final.pth"


class FinishHook(HookBase):
    """At the end of a complete training: the student's file, the results, and a summary."""

    def after_train(self) -> None:
        trainer = self.trainer
        # Also called after a failure; Detectron2 counts once more after the last good step.
        if trainer.iter < trainer.max_iter or not comm.is_main_process():
            return
        output = trainer.cfg.OUTPUT_DIR
        save_student(trainer.checkpointer.model, os.path.join(output, STUDENT_FILE))
        cost, teacher_results = trainer.cost, read_teacher_results(output)
        write_json({"results": trainer.last_results, **cost}, os.path.join(output, "results.json"))
        logger.info("\n%s", summarise(trainer.cfg, trainer.last_results, teacher_results, cost))


class _OnStudentInput:
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


def read_teacher_results(output_dir: str) -> dict:
    """What :func:`check_teacher` found for this output folder; {} if it did not run."""
    path = os.path.join(output_dir, TEACHER_RESULTS)
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        return json.load(file)


def check_teacher(cfg: CfgNode, teacher: Teacher, trainer_class) -> None:
    """Evaluate the teacher on ``DATASETS.TEST``, on the student's input; keep the result.

    A teacher of other classes than the dataset's cannot be evaluated on it, but its features can
    be distilled: it is only named.
    """
    results = {}
    known = describe_detector(teacher.model, "teacher").num_classes
    for name in cfg.DATASETS.TEST:
        classes = len(MetadataCatalog.get(name).get("thing_classes", ()))
        if known is not None and classes and known != classes:
            logger.warning(
                "Not checking the teacher on %s: it predicts %d classes, the dataset has %d",
                name,
                known,
                classes,
            )
            continue
        logger.info("Checking the teacher on %s (DISTILL.TEACHER.CHECK)", name)
        loader = trainer_class.build_test_loader(cfg, name)  # first: it may make the dataset
        evaluator = trainer_class.build_evaluator(cfg, name)
        results[name] = inference_on_dataset(_OnStudentInput(teacher), loader, evaluator) or {}
    if comm.is_main_process():
        if len(results) == 1:
            results = next(iter(results.values()))
        write_json(results, os.path.join(cfg.OUTPUT_DIR, TEACHER_RESULTS))
