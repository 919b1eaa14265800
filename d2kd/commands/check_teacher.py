"""Check a teacher before it teaches: what it knows, what it would teach wrongly, bad annotations.

    d2kd check-teacher --config-file my_distillation.yaml
    d2kd check-teacher --config-file my_distillation.yaml --images 0 --baseline student_final.pth

Runs DISTILL.TEACHER on images of DATASETS.TRAIN and DATASETS.TEST as the student gets them. The
first lines say what is wrong: classes that are swapped or taken for others, annotations that lie
off the teacher's boxes, classes on which it is worse than the baseline. Then AP by class and size,
and calibration. A sheet shows the images in which teacher and annotations disagree most: either
may be wrong. Nothing is trained.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes as D2Boxes
from detectron2.structures import Instances
from tabulate import tabulate
from torch import nn

from ..arguments import CommandParser, folder_to_write, natural
from ..compare.pictures import GREEN, RED, WHITE, draw, sheet, write_label
from ..config import student_config
from ..data.agreement import Boxes, Disagreement
from ..detectors.foreign import MapsDetector
from ..detectors.spec import describe_detector
from ..detectors.teacher import Teacher
from ..engine.checkpoint import AtomicCheckpointer
from ..engine.setup import add_import_argument, check_weights, read_config
from ..engine.teacher_check import OnStudentInput
from ..engine.teacher_health import METRICS, Examined, examine, findings
from ..errors import ConfigError
from ..files import shown, write_atomically, write_json, write_text

_ROWS = 20  # classes on the page; the file has all
_SHOWN, _TILE, _COLUMNS, _SHEET_ROWS = 12, 320, 4, 6

Results = Mapping[str, Mapping[str, Examined]]  # "teacher", "baseline" -> "train", "val" -> ...


def build_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of a distillation")
    add("--images", type=natural, default=500, help="of each dataset, 0: all (default: 500)")
    add("--baseline", default="", metavar="FILE", help="weights of the student without a teacher")
    add(
        "--confident",
        type=_share,
        default=0.5,
        help="score from which a detection contradicts an annotation (default: 0.5)",
    )
    add(
        "--output",
        type=folder_to_write,
        default="teacher_check",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add_import_argument(parser)
    # A training's, for read_config.
    parser.set_defaults(eval_only=False, resume=False, num_gpus=1, num_machines=1)
    return parser


def _share(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdecimal() else -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number between 0 and 1")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Check the teacher of a config, print the page, and write it with the sheet."""
    args = build_parser().parse_command(argv)
    cfg = _read_config(args)
    datasets = {"train": cfg.DATASETS.TRAIN[:1], "val": cfg.DATASETS.TEST[:1]}
    names = {split: found[0] for split, found in datasets.items() if found}
    results = _examine_all(cfg, names, args)
    text = page(cfg, results)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    _write_files(str(args.output), text, results)


def _examine_all(cfg: CfgNode, names: dict[str, str], args: argparse.Namespace) -> Results:
    teacher = Teacher.from_config(cfg)
    teacher.model.to(cfg.MODEL.DEVICE)
    if isinstance(teacher.model, MapsDetector):
        raise ConfigError(
            f"the teacher, a {teacher.model.meta_arch}, gives maps only: there are no predictions "
            "to check"
        )
    models, detectors = {"teacher": teacher.model}, {"teacher": OnStudentInput(teacher)}
    if args.baseline:
        models["baseline"] = detectors["baseline"] = _baseline(cfg, args.baseline)
    for who, model in models.items():
        known = describe_detector(model, who).num_classes
        for name in names.values():
            classes = len(MetadataCatalog.get(name).thing_classes)
            if known not in (None, classes):
                raise ConfigError(
                    f"the {who} predicts {known} classes, '{name}' has {classes}: what it predicts "
                    "cannot be checked there"
                )
    return {
        who: {
            split: examine(detect, cfg, name, args.images, args.confident)
            for split, name in names.items()
        }
        for who, detect in detectors.items()
    }


def _baseline(cfg: CfgNode, path: str) -> nn.Module:
    """The student with these weights, in evaluation."""
    model = build_model(student_config(cfg))
    AtomicCheckpointer(model).load_weights(path, complete=True)
    return model.eval()


def _read_config(args: argparse.Namespace) -> CfgNode:
    """The checked config; no weights of the student need be there."""
    args.opts += ["MODEL.WEIGHTS", ""]
    cfg = read_config(args)
    if not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError("DISTILL.TEACHER.CONFIG_FILE is empty: there is no teacher to check")
    if not (cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty: name a dataset")
    check_weights(args.baseline, "--baseline")
    return cfg


# --- the page -------------------------------------------------------------------------------------


def page(cfg: CfgNode, results: Results) -> str:
    """All that there is to read, what is wrong first."""
    teacher, options = results["teacher"], cfg.DISTILL.TEACHER
    looked = ", ".join(
        f"{len(one.records)} of {one.images} images of '{one.dataset}' ({split})"
        for split, one in teacher.items()
    )
    said = findings(teacher, results.get("baseline"))
    heading = "Nothing is wrong that this check can see."
    if said:
        heading = f"{len(said)} finding{'s' if len(said) > 1 else ''}, the worst first:"
    lines = [f"{number}. {text}" for number, text in enumerate(said, 1)]
    return "\n".join(
        [
            f"Teacher {options.CONFIG_FILE} {options.WEIGHTS} on {looked}",
            "",
            heading,
            *lines,
            "",
            _detectors_table(results),
            "",
            _classes_table(results),
        ]
    )


def _detectors_table(results: Results) -> str:
    rows = []
    for who, splits in results.items():
        for split, one in splits.items():
            error, bias = one.agreement.calibration()
            numbers = [*map(_points, one.mean_ap), int(one.objects.sum())]
            rows.append([f"{who}, {split}", *numbers, f"{error:.2f}", f"{bias:+.2f}"])
    headers = ["", *(name for name, _, _ in METRICS), "objects", "score error", "bias"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _classes_table(results: Results) -> str:
    """A row for each class, the worst first."""
    teacher = results["teacher"]
    splits = list(teacher)
    last = teacher[splits[-1]]
    columns = {f"AP {split}": one.ap[:, 0] for split, one in teacher.items()}
    columns |= {name: last.ap[:, 3 + at] for at, name in enumerate(("APs", "APm", "APl"))}
    if "baseline" in results:
        columns[f"baseline {splits[-1]}"] = results["baseline"][splits[-1]].ap[:, 0]
    confusion = sum(one.agreement.confusion for one in teacher.values())
    order = np.argsort(np.where(np.isfinite(last.ap[:, 0]), last.ap[:, 0], np.inf), kind="stable")
    rows = [
        [last.classes[c], int(confusion[c].sum()), *(_points(of[c]) for of in columns.values())]
        + [_found(confusion[c], c), _taken_for(confusion[c], c, last.classes)]
        for c in order[:_ROWS]
    ]
    headers = ["class", "objects", *columns, "found", "taken for"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    left = len(order) - len(rows)
    return table + (f"\n\n{left} better classes are in results.json." if left > 0 else "")


def _points(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def _found(row: np.ndarray, own: int) -> str:
    return f"{row[own] / row.sum():.0%}" if row.sum() else "-"


def _taken_for(row: np.ndarray, own: int, names: Sequence[str]) -> str:
    others = row[:-1].copy()
    others[own] = 0
    most = int(others.argmax())
    return f"{names[most]} ({others[most] / row.sum():.0%})" if others[most] else ""


# --- files ----------------------------------------------------------------------------------------


def _write_files(folder: str, text: str, results: Results) -> None:
    ranked = sorted(
        (
            (split, one, fault)
            for split, one in results["teacher"].items()
            for fault in one.agreement.disagreements()
        ),
        key=lambda item: -item[2].weight,
    )
    picture = "disagreements.jpg" if ranked else ""
    if ranked:
        image = draw_disagreements(ranked[:_SHOWN])
        data = cv2.imencode(".jpg", image)[1].tobytes()
        path = os.path.join(folder, picture)
        write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))
        text += f"\n\n![where teacher and annotations disagree most]({picture})"
    write_text(text + "\n", os.path.join(folder, "page.md"))
    numbers: dict[str, Any] = {
        who: {split: _numbers(one) for split, one in splits.items()}
        for who, splits in results.items()
    }
    numbers["disagreements"] = [
        {"split": split, "file": one.records[fault.image]["file_name"], "what": fault.words()}
        for split, one, fault in ranked
    ]
    write_json(numbers, os.path.join(folder, "results.json"))
    print(f"\nwrote {shown(folder)}: page.md, results.json {picture and f'and {picture}'}")


def _numbers(one: Examined) -> dict[str, Any]:
    names = [name for name, _, _ in METRICS]
    agreement = one.agreement
    return {
        "dataset": one.dataset,
        "images": len(one.records),
        "AP": dict(zip(names, one.mean_ap.tolist(), strict=True)),
        "classes": {
            name: dict(zip(names, row.tolist(), strict=True))
            for name, row in zip(one.classes, one.ap, strict=True)
        },
        "confusion": agreement.confusion.tolist(),
        "calibration": dict(zip(("error", "bias"), agreement.calibration(), strict=True)),
        "displaced": {"annotations": agreement.displaced, "of": agreement.paired},
    }


def draw_disagreements(ranked: Sequence[tuple[str, Examined, Disagreement]]) -> np.ndarray:
    """BGR: the annotations and the teacher's confident boxes of each image side by side, what
    disagrees in red."""
    panels: dict[str, list[np.ndarray]] = {}
    for number, (split, one, fault) in enumerate(ranked):
        record, (truth, found) = one.records[fault.image], one.agreement.image(fault.image)
        image = read_image(record["file_name"], format="BGR")
        zoom = _TILE / max(image.shape[:2])
        bad = {a for a, _ in (*fault.other_class, *fault.displaced)} | {*fault.missed}
        wrong = {b for _, b in (*fault.other_class, *fault.displaced)} | {*fault.extra}
        sure = np.flatnonzero(found.scores >= one.agreement.confident)
        left = _panel(image, truth, range(len(truth.classes)), bad, one.classes, zoom)
        right = _panel(image, found, sure, wrong, one.classes, zoom)
        name = os.path.basename(record["file_name"])
        write_label(left, f"{split}: {name}", (0, left.shape[0]), WHITE)
        write_label(right, fault.words(), (0, right.shape[0]), WHITE)
        block = " " * (number // _SHEET_ROWS)  # columns are known by their titles
        panels.setdefault(f"annotations{block}", []).append(left)
        panels.setdefault(f"teacher{block}", []).append(right)
    return sheet(panels, _COLUMNS)


def _panel(
    image: np.ndarray,
    boxes: Boxes,
    which: Iterable[int],
    red: set[int],
    names: Sequence[str],
    zoom: float,
) -> np.ndarray:
    places = list(which)
    shown_boxes = Instances(image.shape[:2])
    shown_boxes.pred_boxes = D2Boxes(torch.from_numpy(boxes.boxes[places]))
    shown_boxes.pred_classes = torch.from_numpy(boxes.classes[places])
    if (boxes.scores < 1).any():  # detections
        shown_boxes.scores = torch.from_numpy(boxes.scores[places])
    colours = [RED if at in red else GREEN for at in places]
    return draw(image, shown_boxes, list(names), colours, zoom)
