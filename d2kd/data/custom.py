"""Datasets named in a config: registering the user's own, and checking that all can be used."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ..errors import ConfigError
from ..keys import Options, config_keys, key
from . import loading
from .catalog import FORMAT_KEY, check_present, is_from_config, unknown_name
from .check import Use
from .examine import examine
from .keypoints import keypoint_metadata
from .loading import Question
from .report import DatasetReport, error_line, report_lines, shown

# What the last check had to say, until it is logged.
_reports: list[DatasetReport] = []


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


def register_coco_format_datasets(cfg: CfgNode) -> None:
    """Registers each entry of ``DATASETS.COCO_FORMAT``, once; the files are read on first use.

    Raises:
        ConfigError: in one line, for a malformed entry or a taken name.
    """
    entries = cfg.DATASETS.COCO_FORMAT
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"{FORMAT_KEY} is {shown(entries)}; it must be a list of lists")
    for entry in entries:
        name, json_file, image_root, keypoints = _parts(entry)
        metadata = MetadataCatalog.get(name)
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(loading.load, name))
            metadata.set(json_file=json_file, image_root=image_root)
            metadata.set(evaluator_type="coco", registered_by=FORMAT_KEY)
        known = metadata.get("json_file"), metadata.get("image_root")
        if not is_from_config(name) or known != (json_file, image_root):
            raise ConfigError(f"{FORMAT_KEY}: the name '{name}' is taken, choose another")
        loading.ask(name, Question(json_file, image_root, Use(masks=cfg.MODEL.MASK_ON)))
        loading.set_metadata(name, **keypoints)


def _parts(entry: Any) -> tuple[str, str, str, dict]:
    """Name, annotation file, image directory, and metadata of keypoints of an entry."""
    is_list = isinstance(entry, (list, tuple)) and len(entry) in (3, 4)
    if not is_list or not all(isinstance(item, str) and item for item in entry[:3]):
        raise ConfigError(
            f"{FORMAT_KEY}: {shown(entry, 120)} is not a list [name, annotation file, image "
            "directory]"
        )
    name, *paths = entry[:3]
    json_file, image_root = (str(Path(path).expanduser()) for path in paths)
    return name, json_file, image_root, keypoint_metadata(name, entry[3] if entry[3:] else {})


def dataset_uses(cfg: CfgNode, train: bool) -> dict[str, Use]:
    """Name -> use of each dataset of the config, training sets first, all of which must be
    registered."""
    trained = list(cfg.DATASETS.TRAIN) if train else []
    tested = list(cfg.DATASETS.TEST)
    for part, names in (("TRAIN", trained), ("TEST", tested)):
        for name in names:
            if name not in DatasetCatalog:
                raise ConfigError(f"DATASETS.{part}: {unknown_name(name)}")
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
