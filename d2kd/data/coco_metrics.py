"""COCO's metrics as fast as they are to be had.

Detectron2's compiled COCO evaluator is missing in its pure-Python install, and pycocotools takes a
minute for 5,000 images. Where ``faster-coco-eval`` is installed (the extra ``eval``), it computes
the same numbers, to the last digit, in a fraction of that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.evaluation import coco_evaluation
from pycocotools.cocoeval import COCOeval

from .coco import ID_LIMIT

try:
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster
except ImportError:
    COCOeval_faster = None


def fast_evaluation(truth: Any, detections: Any, kind: str) -> Any:
    """What evaluates ``detections`` against ``truth``, used as pycocotools' ``COCOeval``, which it
    is for keypoints, and for ids of images or classes that are text or too large for a double."""
    ids = [*truth.imgs, *truth.cats]
    if kind == "keypoints" or not all(isinstance(i, int) and abs(i) < ID_LIMIT for i in ids):
        return COCOeval(truth, detections, kind)
    return _exact_evaluation()(truth, detections, kind, print_function=print)


@functools.cache
def _exact_evaluation() -> Any:
    """faster-coco-eval's class, with the last bit of pycocotools.

    pycocotools adds 2^-52 to the number of detections that it divides by. That shows where it is
    one: where the first detection of a class is right and the second is not, the first one's
    precision is not 1, but the number before it. Whether the second is right too is the precision
    at a recall between that of one object and that of two.
    """

    class ExactEvaluation(COCOeval_faster):
        def evaluate(self) -> None:
            grid = self.params.recThrs
            counts = _object_counts(self.cocoGt, self.params)
            between = 1.5 / np.maximum(counts, 1)
            more, self._more_of = np.unique(between, return_inverse=True)
            self.params.recThrs = np.append(grid, more)
            super().evaluate()
            self.params.recThrs = grid

        def accumulate(self) -> None:
            super().accumulate()
            size = len(self.params.recThrs)
            precision = self.eval["precision"]  # (IoUs, recalls, classes, areas, detections)
            index = self._more_of.reshape(1, 1, *precision.shape[2:4], 1)
            of_two = np.take_along_axis(precision[:, size:], index, axis=1)
            precision = precision[:, :size]
            is_first = (precision == 1) & (of_two < 1)
            self.eval["precision"] = np.where(is_first, 1 / (1 + np.spacing(1)), precision)
            self.eval["scores"] = self.eval["scores"][:, :size]

    return ExactEvaluation


def _object_counts(truth: Any, params: Any) -> np.ndarray:
    """(classes, areas), the objects that are not ignored."""
    ids = truth.getAnnIds(imgIds=params.imgIds, catIds=params.catIds)
    objects = [a for a in truth.loadAnns(ids) if not a.get("iscrowd", 0)]
    places = {category: place for place, category in enumerate(np.unique(params.catIds))}
    classes = np.array([places[a["category_id"]] for a in objects], dtype=int)
    areas = np.array([a["area"] for a in objects])
    low, high = np.array(params.areaRng).T[..., None]
    counts = np.zeros((len(places), len(low)), dtype=int)
    kinds, inside = np.nonzero((areas >= low) & (areas <= high))
    np.add.at(counts, (classes[inside], kinds), 1)
    return counts


@contextlib.contextmanager
def fast_metrics() -> Iterator[None]:
    """Detectron2's evaluators that use its compiled metrics use these; there is no other way in
    than that name."""
    compiled = coco_evaluation.COCOeval_opt
    coco_evaluation.COCOeval_opt = fast_evaluation
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt = compiled


def has_fast_metrics() -> bool:
    """Whether faster-coco-eval is installed."""
    return COCOeval_faster is not None
