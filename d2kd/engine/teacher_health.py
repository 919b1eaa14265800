"""How good a teacher is, class by class, and what it would teach wrongly.

A detector is run on images of the training and the test set as training would show them; its
detections are scored by COCO's metrics and compared with the annotations object by object.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.structures import BoxMode
from tqdm import tqdm

from ..data.agreement import Agreement, Boxes, wrong_classes
from ..data.evaluation import CocoEvaluator
from ..data.loader import NamingMapper

# (name, place in COCO's areas, IoU threshold or None for the mean over all).
METRICS = (
    ("AP", 0, None),
    ("AP50", 0, 0),
    ("AP75", 0, 5),
    ("APs", 1, None),
    ("APm", 2, None),
    ("APl", 3, None),
)
Detect = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]

# What is worth saying. Shares are parts of one, AP is in points.
_DISPLACED, _EXTRA, _MISCALIBRATED = 0.03, 0.1, 0.15
_RARELY_FOUND, _WEAK, _LEARNT_BY_HEART, _WORSE = 0.2, 5.0, 25.0, 2.0
_AT_LEAST = 5  # objects, to say something of a class
_NAMED = 6


@dataclass
class Examined:
    """A detector on images of one dataset.

    Attributes:
        dataset: its name. images: how many there are in it.
        records: those that were looked at.
        classes: names, in order.
        ap: (K, 6) in points, a column for each of ``METRICS``; NaN where there are no objects.
        agreement: with the annotations.
    """

    dataset: str
    images: int
    records: list[dict[str, Any]]
    classes: tuple[str, ...]
    ap: np.ndarray
    agreement: Agreement

    @property
    def mean_ap(self) -> np.ndarray:
        """(6,) over the classes that there are; NaN where there is none."""
        return np.ma.masked_invalid(self.ap).mean(0).filled(np.nan)

    @property
    def objects(self) -> np.ndarray:
        """(K,) annotations of each class."""
        return self.agreement.confusion.sum(1)


class _PrecisionByClass(CocoEvaluator):
    """Keeps what COCO's metrics are means of."""

    table: np.ndarray | None = None  # (IoUs, recalls, classes, areas, numbers of detections)
    order: Sequence[int] = ()  # the class of each row

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        if coco_eval is not None:
            numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
            ids = [int(category) for category in coco_eval.params.catIds]
            self.order = [numbers[category] for category in ids] if numbers else ids
            self.table = coco_eval.eval["precision"]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def by_class(self, num_classes: int) -> np.ndarray:
        """``ap`` of :class:`Examined`."""
        ap = np.full((num_classes, len(METRICS)), np.nan)
        for row, number in enumerate(self.order):
            for column, (_, area, threshold) in enumerate(METRICS):
                values = self.table[:, :, row, area, -1]
                values = values if threshold is None else values[threshold]
                if (values > -1).any():
                    ap[number, column] = 100 * values[values > -1].mean()
        return ap


def examine(
    detect: Detect, cfg: CfgNode, name: str, limit: int = 0, confident: float = 0.5
) -> Examined:
    """Run a detector on a dataset.

    Args:
        detect: Detectron2's ``batched_inputs`` of one image -> its outputs.
        cfg: the student's, for how images are read and resized.
        limit: of images, taken evenly from the dataset; 0: all.
        confident: score from which a detection contradicts an annotation.
    """
    records = get_detection_dataset_dicts(name, filter_empty=False)
    total = len(records)
    if limit and limit < total:
        records = [records[i] for i in np.linspace(0, total - 1, limit).round().astype(int)]
    classes = tuple(MetadataCatalog.get(name).thing_classes)
    agreement = Agreement(len(classes), confident)
    mapper = NamingMapper(DatasetMapper(cfg, False))
    loader = build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        evaluator = _PrecisionByClass(name, output_dir=folder)
        evaluator.reset()
        shown = zip(records, tqdm(loader, desc=name, disable=None, leave=False), strict=True)
        for record, inputs in shown:
            (output,) = detect(inputs)
            found = output["instances"].to("cpu")
            for other in found.get_fields().keys() - {"pred_boxes", "scores", "pred_classes"}:
                found.remove(other)  # masks need no comparison
            evaluator.process(inputs, [{"instances": found}])
            scores, labels = found.scores.float().numpy(), found.pred_classes.numpy()
            seen = Boxes.of(found.pred_boxes.tensor.numpy(), labels, scores)
            agreement.add(_annotated(record), seen)
        with _silent():
            evaluator.evaluate(img_ids=[record["image_id"] for record in records])
    return Examined(name, total, records, classes, evaluator.by_class(len(classes)), agreement)


def _annotated(record: dict[str, Any]) -> Boxes:
    objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd")]
    boxes = [BoxMode.convert(list(o["bbox"]), o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    return Boxes.of(boxes, [o["category_id"] for o in objects])


@contextlib.contextmanager
def _silent():
    """Without the tables that pycocotools prints and Detectron2 logs."""
    log = logging.getLogger("detectron2.evaluation.coco_evaluation")
    was, log.disabled = log.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.disabled = was


# --- what is worth saying -------------------------------------------------------------------------


def findings(
    splits: Mapping[str, Examined], baseline: Mapping[str, Examined] | None = None
) -> list[str]:
    """What is wrong, or may be, in a sentence each, the worst first.

    Args:
        splits: "train" and "val" -> the teacher there, or one of them only.
        baseline: the same of the student as it is without a teacher.
    """
    said = _of_classes(list(splits.values()))
    for split, examined in splits.items():
        said += _of_boxes(split, examined)
    last = list(splits)[-1]
    if baseline is not None:
        said += _against(splits[last], baseline[last], last)
    return said + _of_scores(splits)


def _of_classes(splits: list[Examined]) -> list[str]:
    names = splits[0].classes
    confusion = sum(examined.agreement.confusion for examined in splits)
    said, told = [], set()
    for wrong in wrong_classes(confusion, _AT_LEAST):
        this, other = names[wrong.name], names[wrong.taken_for]
        if wrong.swapped and wrong.taken_for not in told:
            said.append(
                f"the classes '{this}' and '{other}' are swapped in the teacher: it labels "
                f"{wrong.share:.0%} of the '{this}' that it finds as '{other}', and the other way "
                "round. Is the order of its classes the dataset's?"
            )
        elif not wrong.swapped:
            said.append(
                f"the teacher labels {wrong.share:.0%} of the '{this}' that it finds as '{other}'"
            )
        told.add(wrong.name)
    objects, right = confusion.sum(1), confusion.diagonal()
    rare = [
        names[c]
        for c in np.flatnonzero((objects >= _AT_LEAST) & (right < _RARELY_FOUND * objects))
        if c not in told
    ]
    if rare:
        said.append(
            f"it finds less than {_RARELY_FOUND:.0%} of the objects of {_list(rare)}: it has "
            "little to teach of them"
        )
    return said


def _of_boxes(split: str, examined: Examined) -> list[str]:
    agreement, said = examined.agreement, []
    paired, displaced = agreement.paired, agreement.displaced
    if displaced >= _AT_LEAST and displaced > _DISPLACED * paired:
        said.append(
            f"{split}: {displaced / paired:.1%} of the annotations ({displaced} of {paired} that "
            f"the teacher is sure of) differ from its box by more than {agreement.limit:.2f} of "
            "its size: shifted annotations, or a teacher with bad boxes; the sheet shows which"
        )
    objects = int(examined.objects.sum())
    extra = sum(len(one.extra) for one in agreement.disagreements())
    if extra >= _AT_LEAST and extra > _EXTRA * objects:
        said.append(
            f"{split}: it is sure of {extra} objects that are not annotated, next to the {objects} "
            "that are: missing annotations, or false alarms that it would teach"
        )
    return said


def _against(teacher: Examined, baseline: Examined, split: str) -> list[str]:
    own, other = teacher.mean_ap[0], baseline.mean_ap[0]
    said = []
    if not own > other:
        said.append(f"{split}: its AP is {own:.1f}, the baseline's {other:.1f}: too weak to teach")
    gap = teacher.ap[:, 0] - baseline.ap[:, 0]
    worse = [teacher.classes[c] for c in np.argsort(gap) if gap[c] < -_WORSE]
    if worse:
        said.append(f"{split}: it is worse than the baseline on {_list(worse)}")
    return said


def _of_scores(splits: Mapping[str, Examined]) -> list[str]:
    said = []
    split, examined = list(splits.items())[-1]
    _, bias = examined.agreement.calibration()
    if abs(bias) > _MISCALIBRATED:
        what = "high" if bias > 0 else "low"
        said.append(
            f"{split}: its scores are {abs(bias):.2f} too {what} on average; Logits has a "
            "TEMPERATURE"
        )
    ap = {name: float(one.mean_ap[0]) for name, one in splits.items()}
    if len(ap) > 1 and ap["train"] - ap["val"] > _LEARNT_BY_HEART:
        said.append(
            f"AP is {ap['train']:.1f} on train and {ap['val']:.1f} on val: it knows the training "
            "images by heart, and what it teaches there is little more than the annotations"
        )
    if ap[split] < _WEAK:
        said.append(f"{split}: AP {ap[split]:.1f} is that of a detector that has learnt little")
    return said


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
