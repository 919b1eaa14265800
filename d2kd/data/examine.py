"""The datasets of a config, read and checked together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from . import loading
from .catalog import is_evaluated_from_file, is_loaded_here, is_readable
from .check import Use
from .classes import different_names, list_of
from .keypoints import check_keypoint_names
from .loading import Answer, Question
from .model_classes import check_class_count, number_of_classes, trained_classes
from .report import DatasetReport, Finding, plural, some


def examine(cfg: CfgNode, uses: dict[str, Use]) -> list[DatasetReport]:
    """Reads and checks the datasets of ``uses``, training sets first, compares their classes, and
    writes their metadata. A report for each."""
    reference = None if any(use.train for use in uses.values()) else trained_classes(cfg)
    expected = number_of_classes(cfg)
    answers: dict[str, Answer] = {}
    reports: list[DatasetReport] = []
    counted: set[tuple[str, ...]] = set()
    keypoints: list[str] = []
    for name, use in uses.items():
        if is_readable(name) or (use.test and is_evaluated_from_file(name)):
            answers[name] = _examine_file(name, use, reference, expected)
            report, reading = answers[name].report, answers[name].reading
            report = replace(report, findings=list(report.findings))
            names = reading.classes.names if reading else None
        else:
            report = DatasetReport(name)
            names = MetadataCatalog.get(name).get("thing_classes")
            if reference is not None and names is not None and list(names) != list(reference):
                report.findings.append(_other_order(names, reference))
        if names is not None:
            reference = tuple(names) if reference is None else reference
            if tuple(names) not in counted:
                report.findings += check_class_count(cfg, expected, names)
            counted.add(tuple(names))
        if use.keypoints and name in answers:
            stated = MetadataCatalog.get(name).get("keypoint_names")
            keypoints = list(stated or answers[name].keypoint_names) or keypoints
            report.findings += check_keypoint_names(cfg, name, use, keypoints)
        reports.append(report)
    _choose_mask_format(cfg, answers, reports)
    _compare_images(uses, answers, reports)
    for name, answer in answers.items():
        if answer.reading is not None and is_readable(name):
            loading.describe(name, answer.reading.classes)
            if not is_loaded_here(name):  # of register_coco_instances: through this loader, too
                DatasetCatalog.remove(name)
                DatasetCatalog.register(name, partial(loading.load, name))
    return reports


def _examine_file(
    name: str, use: Use, reference: tuple[str, ...] | None, expected: int | None
) -> Answer:
    metadata = MetadataCatalog.get(name)
    owner = "the training set"
    if reference is None and not is_loaded_here(name):
        stated = metadata.get("thing_classes")
        reference = None if stated is None else tuple(stated)
        owner = f"what '{name}' is registered with"
    if not is_readable(name):  # its loader may filter, complete or convert what it likes
        use = replace(use, train=False, files=False)
    paths = str(metadata.json_file), str(metadata.image_root)
    return loading.inspect(name, Question(*paths, use, reference, owner, expected))


def _other_order(names: Sequence[str], reference: tuple[str, ...]) -> Finding:
    if set(names) != set(reference):
        return different_names(names, reference)
    return Finding(
        f"its classes have another order than those of the training set: {list_of(names)}",
        f"its own loader must number them {list_of(reference)}",
        fatal=True,
    )


def _choose_mask_format(
    cfg: CfgNode, answers: dict[str, Answer], reports: list[DatasetReport]
) -> None:
    """ "polygon" cannot take RLE; "bitmask" takes all."""
    if not cfg.MODEL.MASK_ON or cfg.INPUT.MASK_FORMAT != "polygon":
        return
    for report in reports:
        count = answers[report.name].rle if report.name in answers else 0
        if not count:
            continue
        remedy = "INPUT.MASK_FORMAT set to bitmask"
        if cfg.is_frozen():
            remedy = "set INPUT.MASK_FORMAT bitmask"
        else:
            cfg.INPUT.MASK_FORMAT = "bitmask"
        text = f"{plural(count, 'object')} with RLE masks"
        report.findings.append(Finding(text, remedy, fatal=cfg.is_frozen()))


def _compare_images(
    uses: dict[str, Use], answers: dict[str, Answer], reports: list[DatasetReport]
) -> None:
    """Says which images are trained on and evaluated on."""
    for report in reports:
        if not uses[report.name].test:
            continue
        for name, use in uses.items():
            if use.train and {name, report.name} <= answers.keys():
                both = loading.shared_images(answers[name], answers[report.name])
                if both:
                    text = f"{plural(len(both), 'image')} are also trained on in '{name}'"
                    remedy = "its AP is not one for unseen images"
                    report.findings.append(Finding(text, remedy, some(map(os.path.basename, both))))
