"""Datasets named in a config: registering the user's own, and checking that all can be used."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError
from ..keys import Options, config_keys, key
from . import loading
from .check import Use
from .classes import classes_of, different_names, list_of, read_categories
from .files import dataset_root
from .loading import Answer, Question
from .report import DatasetReport, Finding, error_line, plural, report_lines, shown, some

_KEY = "DATASETS.COCO_FORMAT"
_KEYPOINT_KEYS = ("keypoint_names", "keypoint_flip_map")


@config_keys("DATASETS")
@dataclass(frozen=True)
class DatasetOptions(Options):
    """Keys that d2kd adds to ``DATASETS``."""

    coco_format: tuple[Any, ...] = key(
        (),
        comment="Your own datasets in COCO format, a list [name, annotation file, image "
        "directory] each. The names can then be used in DATASETS.TRAIN and DATASETS.TEST. "
        "Relative paths start at the working directory. Datasets with keypoints may have a fourth "
        'item, {"keypoint_names": [...], "keypoint_flip_map": [[left, right], ...]}; without it '
        "the names are those of the annotation file.",
    )
    strict_paths: bool = key(
        False,
        comment="Refuse datasets whose image names lead out of their image directory, with '..' or "
        "as absolute paths. Set it for annotation files that you do not trust.",
    )


# Registered by this module: name -> (annotation file, image directory).
_registered: dict[str, tuple[str, str]] = {}
# What the last check had to say, until it is logged.
_reports: list[DatasetReport] = []


def check_datasets(cfg: CfgNode, train: bool = True) -> list[DatasetReport]:
    """Registers ``DATASETS.COCO_FORMAT`` and checks all datasets of ``cfg``, before any work.

    Datasets in COCO format are read here, once, and handed to the loader. Where objects have masks
    that ``INPUT.MASK_FORMAT`` "polygon" cannot take, it becomes "bitmask".

    Args:
        train: also check ``DATASETS.TRAIN``; False suits evaluation.

    Returns:
        What there is to say of each dataset; :func:`log_reports` logs it.

    Raises:
        ConfigError: in one line: an unknown name (with the closest that exist), a missing file, or
            a dataset that cannot be used. A report of all that is wrong with it is printed before.
    """
    register_coco_format_datasets(cfg)
    check_proposals(cfg)
    uses = dataset_uses(cfg, train)
    for name in uses:
        check_present(name)
    reports = examine(cfg, uses)
    _reports[:] = reports
    if any(report.fatal for report in reports):
        if comm.is_main_process():
            print("\n".join(report_lines(reports)), file=sys.stderr, flush=True)
        raise ConfigError(error_line(reports))
    return reports


def log_reports(logger: logging.Logger) -> None:
    """Logs what the last check of datasets found and did, once."""
    for report in _reports:
        for finding in report.findings:
            examples = f" ({'; '.join(finding.examples)})" if finding.examples else ""
            logger.warning("dataset '%s': %s%s", report.name, finding, examples)
    _reports.clear()


def check_proposals(cfg: CfgNode) -> None:
    """Refuses pre-computed proposals.

    Raises:
        ConfigError: names the key and what is valid.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS: d2kd does not load pre-computed proposals, as their files are "
            "pickles, which can run code; valid: False, with MODEL.PROPOSAL_GENERATOR.NAME RPN"
        )


# --- registering --------------------------------------------------------------------------------


def register_coco_format_datasets(cfg: CfgNode) -> None:
    """Registers each entry of ``DATASETS.COCO_FORMAT``; the files are read on first use.

    Registering the same once more changes nothing.

    Raises:
        ConfigError: in one line, for a malformed entry or a taken name.
    """
    entries = cfg.DATASETS.COCO_FORMAT
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"{_KEY} is {shown(entries)}; it must be a list of lists")
    for entry in entries:
        name, json_file, image_root, keypoints = _parts(entry)
        if _registered.get(name) != (json_file, image_root) or name not in DatasetCatalog:
            if name in DatasetCatalog:
                raise ConfigError(f"{_KEY}: the name '{name}' is taken, choose another")
            DatasetCatalog.register(name, partial(loading.load, name))
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=image_root, evaluator_type="coco"
            )
            _registered[name] = (json_file, image_root)
        loading.ask(name, Question(json_file, image_root, Use(masks=cfg.MODEL.MASK_ON)))
        loading.set_metadata(name, **keypoints)


def _parts(entry: Any) -> tuple[str, str, str, dict]:
    """Name, annotation file, image directory, and metadata of keypoints of an entry."""
    is_list = isinstance(entry, (list, tuple)) and len(entry) in (3, 4)
    if not is_list or not all(isinstance(item, str) and item for item in entry[:3]):
        raise ConfigError(
            f"{_KEY}: {shown(entry, 120)} is not a list [name, annotation file, image directory]"
        )
    name, *paths = entry[:3]
    json_file, image_root = (str(Path(path).expanduser()) for path in paths)
    return name, json_file, image_root, _keypoint_metadata(name, entry[3] if entry[3:] else {})


def _keypoint_metadata(name: str, stated: Any) -> dict:
    """The fourth item of an entry, checked."""
    where = f"{_KEY}: keypoints of '{name}'"
    if not isinstance(stated, dict) or not set(stated) <= set(_KEYPOINT_KEYS):
        raise ConfigError(f"{where}: {shown(stated, 100)} must have {' or '.join(_KEYPOINT_KEYS)}")
    names, pairs = (stated.get(key, ()) for key in _KEYPOINT_KEYS)
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f"{where}: keypoint_names must be a list of names, not {shown(names, 60)}"
        )
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise ConfigError(
            f"{where}: keypoint_flip_map must be a list of pairs of names, not {shown(pairs, 60)}"
        )
    unknown = [n for pair in pairs for n in pair if n not in names] if names else []
    if unknown:
        raise ConfigError(f"{where}: keypoint_flip_map names {shown(unknown[0])}; valid: {names}")
    metadata: dict = {"keypoint_names": list(names)} if names else {}
    if "keypoint_flip_map" in stated:
        metadata["keypoint_flip_map"] = [tuple(pair) for pair in pairs]
    return metadata


# --- examining ----------------------------------------------------------------------------------


def dataset_uses(cfg: CfgNode, train: bool) -> dict[str, Use]:
    """Name -> use of each dataset of the config, training sets first.

    Raises:
        ConfigError: a name is not registered.
    """
    trained = list(cfg.DATASETS.TRAIN) if train else []
    tested = list(cfg.DATASETS.TEST)
    for part, names in (("TRAIN", trained), ("TEST", tested)):
        for name in names:
            if name not in DatasetCatalog:
                raise ConfigError(f"DATASETS.{part}: {_unknown_name(name)}")
    head = cfg.MODEL.ROI_KEYPOINT_HEAD
    common = Use(
        masks=bool(cfg.MODEL.MASK_ON),
        keypoints=head.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        min_keypoints=head.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        keep_empty=not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        strict_paths=cfg.DATASETS.STRICT_PATHS,
    )
    return {
        name: replace(common, train=name in trained, test=name in tested)
        for name in dict.fromkeys([*trained, *tested])
    }


def examine(cfg: CfgNode, uses: dict[str, Use]) -> list[DatasetReport]:
    """Reads and checks datasets, compares their classes, and writes their metadata.

    Args:
        uses: name -> use, training sets first.

    Returns:
        A report for each.
    """
    reference = None if any(use.train for use in uses.values()) else trained_classes(cfg)
    expected = number_of_classes(cfg)
    answers: dict[str, Answer] = {}
    reports: list[DatasetReport] = []
    counted: set[tuple[str, ...]] = set()
    keypoints: list[str] = []
    for name, use in uses.items():
        if is_readable(name) or (use.test and _is_evaluated_from_file(name)):
            answers[name] = _examine_file(name, use, reference, expected)
            report, names = answers[name].report, _names_in(answers[name])
            report = replace(report, findings=list(report.findings))
        else:
            report = DatasetReport(name)
            names = MetadataCatalog.get(name).get("thing_classes")
            if reference is not None and names is not None and list(names) != list(reference):
                report.findings.append(_other_order(names, reference))
        if names is not None:
            reference = tuple(names) if reference is None else reference
            if tuple(names) not in counted:
                report.findings += _check_class_count(cfg, expected, names)
            counted.add(tuple(names))
        if use.keypoints and name in answers:
            stated = MetadataCatalog.get(name).get("keypoint_names")
            keypoints = list(stated or answers[name].keypoint_names) or keypoints
            report.findings += _check_keypoint_names(cfg, name, use, keypoints)
        reports.append(report)
    _choose_mask_format(cfg, answers, reports)
    _compare_images(uses, answers, reports)
    for name, answer in answers.items():
        if answer.reading is not None and is_readable(name):
            loading.describe(name, answer.reading.classes)
            if name not in _registered:  # of register_coco_instances: through this loader, too
                DatasetCatalog.remove(name)
                DatasetCatalog.register(name, partial(loading.load, name))
                _taken_over.add(name)
    return reports


# Datasets of others that are loaded by this package since they were checked.
_taken_over: set[str] = set()


def is_readable(name: str) -> bool:
    """Whether a dataset is a COCO-format file that is loaded just as Detectron2 loads it, so that
    it can be read here in its place."""
    metadata, function = MetadataCatalog.get(name), DatasetCatalog[name]
    if metadata.get("made_on_first_use") or not _has_local_file(name):
        return False
    by_detectron2 = "register_coco_instances.<locals>.<lambda>"
    return (
        (isinstance(function, partial) and function.func is loading.load)
        or metadata.get("registered_by") == "d2kd"
        or getattr(function, "__qualname__", "") == by_detectron2
    )


def _is_evaluated_from_file(name: str) -> bool:
    """Whether pycocotools reads the annotation file, whatever function loads the dataset."""
    made = MetadataCatalog.get(name).get("made_on_first_use")
    return not made and _has_local_file(name)


def _has_local_file(name: str) -> bool:
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key) for key in ("json_file", "image_root")]
    return metadata.get("evaluator_type") == "coco" and all(
        isinstance(path, (str, os.PathLike)) and "://" not in str(path) for path in paths
    )


def _examine_file(
    name: str, use: Use, reference: tuple[str, ...] | None, expected: int | None
) -> Answer:
    metadata = MetadataCatalog.get(name)
    owner = "the training set"
    if reference is None and name not in _registered and name not in _taken_over:
        stated = metadata.get("thing_classes")
        reference = None if stated is None else tuple(stated)
        owner = f"what '{name}' is registered with"
    if not is_readable(name):  # its loader may filter, complete or convert what it likes
        use = replace(use, train=False, files=False)
    paths = str(metadata.json_file), str(metadata.image_root)
    return loading.inspect(name, Question(*paths, use, reference, owner, expected))


def _names_in(answer: Answer) -> tuple[str, ...] | None:
    return answer.reading.classes.names if answer.reading else None


def trained_classes(cfg: CfgNode) -> tuple[str, ...] | None:
    """Names of the classes that a detector of ``cfg`` was trained on, in order.

    Returns:
        None where they are not known: the annotation file of the training set is not here, or they
        are not as many as the model has.
    """
    expected = number_of_classes(cfg)
    for name in cfg.DATASETS.TRAIN:
        names = _names_of(name, cfg, expected)
        if names is not None:
            return names if expected in (None, len(names)) else None
    return None


def _names_of(name: str, cfg: CfgNode, expected: int | None) -> tuple[str, ...] | None:
    """Class names of a dataset, from its annotation file or its metadata; None if not known."""
    entries = cfg.DATASETS.get("COCO_FORMAT", ())  # a teacher's, which is not checked yet
    files = {str(e[0]): str(e[1]) for e in entries if isinstance(e, (list, tuple)) and len(e) > 2}
    known = name in DatasetCatalog
    if name not in files and known and is_readable(name):
        files[name] = str(MetadataCatalog.get(name).json_file)
    path = os.path.expanduser(files.get(name, ""))
    if os.path.isfile(path):
        try:
            classes, _ = classes_of(read_categories(path), (), None, expected=expected)
        except ConfigError:
            return None
        return classes.names if classes else None
    stated = known and name not in _registered  # else by an earlier config, of another file
    names = MetadataCatalog.get(name).get("thing_classes") if stated else None
    return tuple(names) if names else None


def _other_order(names: Iterable[str], reference: tuple[str, ...]) -> Finding:
    names = list(names)
    if set(names) != set(reference):
        return different_names(names, reference)
    return Finding(
        f"its classes have another order than those of the training set: {list_of(names)}",
        f"its own loader must number them {list_of(reference)}",
        fatal=True,
    )


def number_of_classes(cfg: CfgNode) -> int | None:
    """The model's number of classes, where it is known which key says it."""
    node = _class_node(cfg)
    return cfg.MODEL[node].NUM_CLASSES if node else None


def _class_node(cfg: CfgNode) -> str | None:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "Distiller":
        architecture = cfg.DISTILL.STUDENT_META_ARCH
    nodes = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS"}
    nodes |= {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return nodes.get(architecture)


def _check_class_count(cfg: CfgNode, expected: int | None, names: Iterable[str]) -> list[Finding]:
    """With too few classes the last would quietly be background; with too many evaluation fails as
    soon as one of them is predicted."""
    names = list(names)
    if expected is None or expected == len(names):
        return []
    return [
        Finding(
            f"MODEL.{_class_node(cfg)}.NUM_CLASSES is {expected}, but it has "
            f"{plural(len(names), 'class')}: {list_of(names)}",
            f"set it to {len(names)}",
            fatal=True,
        )
    ]


def _check_keypoint_names(cfg: CfgNode, name: str, use: Use, names: list[str]) -> list[Finding]:
    """How many keypoints have names, which swap in a mirrored image, and the sigmas of evaluation.

    Args:
        names: of the dataset, or of the training set for one that states none.
    """
    metadata = MetadataCatalog.get(name)
    findings = []
    if len(names) != use.keypoints:
        found = f"there are {len(names)}: {list_of(names)}" if names else "there are none"
        findings.append(
            Finding(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {use.keypoints}, but of keypoint names "
                + found,
                f"state keypoint_names as fourth item of {_KEY}, or in 'categories'",
                fatal=True,
            )
        )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # pycocotools' own, of persons
    if use.test and sigmas != use.keypoints:
        findings.append(
            Finding(
                f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values for {use.keypoints} keypoints",
                "evaluation needs one for each, e.g. 0.05",
                fatal=True,
            )
        )
    pairs = metadata.get("keypoint_flip_map")
    if pairs is None or name in _pairs_by_name:
        _pairs_by_name.add(name)
        pairs = mirrored_pairs(names)
        if use.train and cfg.INPUT.RANDOM_FLIP == "horizontal":
            said = ", ".join(f"{a} and {b}" for a, b in pairs) or "no two"
            findings.append(
                Finding(
                    f"keypoints that swap in mirrored images: {said}",
                    f"by their names; keypoint_flip_map of {_KEY} states others",
                )
            )
    loading.set_metadata(name, keypoint_names=names, keypoint_flip_map=pairs)
    return findings


# Datasets whose pairs of keypoints were not stated.
_pairs_by_name: set[str] = set()


def mirrored_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in "left" and "right" only."""
    names = list(names)
    pairs = ((name, name.replace("left", "right")) for name in names if "left" in name)
    return [(left, right) for left, right in pairs if right in names]


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
        text = f"{plural(count, 'object')} with RLE masks"
        if cfg.is_frozen():
            report.findings.append(Finding(text, "set INPUT.MASK_FORMAT bitmask", fatal=True))
        else:
            report.findings.append(Finding(text, "INPUT.MASK_FORMAT set to bitmask"))
    if any(answer.rle for answer in answers.values()) and not cfg.is_frozen():
        cfg.INPUT.MASK_FORMAT = "bitmask"


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
                    text = f"{plural(len(both), 'image')} are trained on, too, in '{name}'"
                    remedy = "its AP says nothing about other images"
                    report.findings.append(Finding(text, remedy, some(map(os.path.basename, both))))


# --- files --------------------------------------------------------------------------------------


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, list(DatasetCatalog), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"register your own with {_KEY}"
    return f"there is no dataset {shown(name, 60)}; {hint}"


def check_present(name: str) -> None:
    """Checks that what the metadata of a COCO or VOC dataset points to exists."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("made_on_first_use"):
        return
    kinds = {"json_file": "file", "image_root": "directory", "dirname": "directory"}
    for attribute, kind in kinds.items():
        path = metadata.get(attribute)
        if path is None or "://" in str(path):
            continue
        if not PathManager.exists(path):
            if command := metadata.get("prepare_command"):
                hint = f"run '{command}'"
            elif name in _registered:
                hint = f"paths of {_KEY} start at {os.getcwd()}"
            else:
                hint = f"datasets lie in '{dataset_root()}', see datasets/README.md"
            raise ConfigError(f"dataset '{name}': {path} not found; {hint}")
        if (kind == "file") != PathManager.isfile(path):
            raise ConfigError(f"dataset '{name}': {attribute} {path} is not a {kind}")
