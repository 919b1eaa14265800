"""Datasets in COCO format: each annotation file is read once, checked, and handed to the loader.

:func:`inspect` reads and checks a file; the records that it makes on the way are kept for the first
:func:`load` of the dataset, which is what Detectron2's catalog calls. A later load reads the file
once more, as Detectron2 does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from detectron2.data import MetadataCatalog

from ..errors import ConfigError
from .check import Use, check_links, check_repairs, check_structure
from .check_boxes import check_boxes
from .check_keypoints import check_keypoints
from .check_masks import check_masks, needs_bitmask
from .classes import Classes, check_category_ids, check_counts, classes_of
from .coco import Table, hashable, no_garbage_collection, read_json
from .image_files import check_files
from .masks import Masks
from .records import Reading, make_records
from .report import DatasetReport, Finding, error_line, plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked of one file. Equal questions about an unchanged file have one answer."""

    json_file: str
    root: str  # the image directory
    use: Use = field(default_factory=Use)
    reference: tuple[str, ...] | None = None  # names of the classes in the order that counts
    owner: str = "the training set"  # in words, what has them
    expected: int | None = None  # number of classes of the model


@dataclass
class Answer:
    """What :func:`inspect` found."""

    report: DatasetReport
    reading: Reading | None = None  # how to read the file; None where it cannot be read
    rle: int = 0  # objects whose masks INPUT.MASK_FORMAT "polygon" cannot take
    keypoint_names: tuple[str, ...] = ()  # as the file states them
    records: list[dict] | None = None  # for the first load, then None


_answers: dict[str, tuple[Question, tuple, Answer]] = {}


def inspect(name: str, question: Question) -> Answer:
    """Reads and checks the annotation file of a dataset, once for one question."""
    stamp = _stamp(question.json_file)
    if name in _answers and _answers[name][:2] == (question, stamp):
        return _answers[name][2]
    report = DatasetReport(name, question.json_file)
    try:
        table = Table(read_json(question.json_file))
    except ConfigError as error:
        report.findings.append(Finding(str(error), fatal=True))
        answer = Answer(report)
    else:
        answer = _inspect_table(table, question, report)
    _answers[name] = (question, stamp, answer)
    return answer


def _stamp(path: str) -> tuple:
    """Changes when the file does."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _inspect_table(table: Table, question: Question, report: DatasetReport) -> Answer:
    use = question.use
    used = set(hashable(table.category_ids))
    classes, about_classes = classes_of(
        table.categories, used, question.reference, question.owner, question.expected
    )
    images, annotations = len(table.images), len(table.annotations)
    report.counts = f"{plural(images, 'image')}, {plural(annotations, 'annotation')}"
    masks = Masks(table) if use.masks else None
    answer = Answer(report, keypoint_names=_keypoint_names(table.categories))
    if masks is not None and use.train:
        answer.rle = needs_bitmask(table, masks)
    report.findings += about_classes
    if classes is not None:
        report.findings += check_category_ids(table)
    report.findings += _findings(table, masks, question)
    if classes is not None:
        answer.reading = Reading(classes, use.masks, use.keypoints)
        if use.train:
            report.findings += check_counts(table, classes)
        if not report.fatal:
            with no_garbage_collection():
                answer.records = make_records(table, question.root, answer.reading)
    return answer


def _findings(table: Table, masks: Masks | None, question: Question) -> Iterator[Finding]:
    use = question.use
    yield from check_structure(table, strict_ids="minival" not in question.json_file)
    yield from check_links(table, use)
    yield from check_boxes(table, masks)
    if masks is not None:
        yield from check_masks(table, masks, use)
    if use.keypoints:
        yield from check_keypoints(table, use)
    yield from check_repairs(table, use)
    if use.files:
        yield from check_files(table, question.root, use)


def _keypoint_names(categories: list[dict]) -> tuple[str, ...]:
    """Names of the keypoints as the file states them, () where it does not."""
    for category in categories:
        names = category.get("keypoints")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def load(name: str) -> list[dict]:
    """The records of a dataset, for Detectron2's catalog.

    Raises:
        ConfigError: the file has become one that cannot be used.
    """
    question, _, known = _answers[name]
    answer = inspect(name, question)
    if answer is not known or answer.reading is None:  # it has changed, or was not read yet
        if answer.report.fatal:
            raise ConfigError(error_line([answer.report]))
        describe(name, answer.reading.classes)
    records, answer.records = answer.records, None
    if records is None:
        with no_garbage_collection():
            table = Table(read_json(question.json_file))
            records = make_records(table, question.root, answer.reading)
    logger.info(
        "Loaded %d images in COCO format from %s", len(records), os.path.abspath(question.json_file)
    )
    return records


def ask(name: str, question: Question) -> None:
    """Prepares a dataset for :func:`load` without reading it yet."""
    if name not in _answers or _answers[name][0].json_file != question.json_file:
        _answers[name] = (question, ("not read",), Answer(DatasetReport(name, question.json_file)))


def reading_of(name: str) -> Reading | None:
    """How the dataset was read, None if it was not, or not by this module."""
    return _answers[name][2].reading if name in _answers else None


def release() -> None:
    """Frees the records that no load has taken, in a process that will load no dataset."""
    for _, _, answer in _answers.values():
        answer.records = None


def describe(name: str, classes: Classes) -> None:
    """Writes the classes into the dataset's metadata, in place of those it may have."""
    set_metadata(
        name,
        thing_classes=list(classes.names),
        thing_dataset_id_to_contiguous_id=classes.number_of,
    )


def set_metadata(name: str, **values) -> None:
    """Detectron2's metadata, whose values can otherwise be set once only."""
    metadata = MetadataCatalog.get(name)
    for key, value in values.items():
        if hasattr(metadata, key) and getattr(metadata, key) != value:
            delattr(metadata, key)
        setattr(metadata, key, value)


def shared_images(first: Answer, second: Answer) -> list[str]:
    """Paths of images that two datasets share, as far as both are still in memory."""
    if first.records is None or second.records is None:
        return []
    paths = [{record["file_name"] for record in answer.records} for answer in (first, second)]
    return sorted(paths[0] & paths[1])
