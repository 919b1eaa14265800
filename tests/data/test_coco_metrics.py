"""COCO metrics: the fast evaluator and pycocotools agree to the last digit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools.cocoeval import COCOeval

from d2kd.benchmark.evaluation import evaluate, random_detections, random_truth
from d2kd.data import coco_metrics
from d2kd.data.evaluation import CocoEvaluator

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval (the extra 'eval')")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_numbers_are_pycocotools(task, seed):
    """Objects of all sizes, crowds, equal scores, more than 100 detections, empty images and a
    class without objects: precision, recall and score of every threshold, class and area."""
    truth = random_truth(30, 6, 5, masks=task == "segm", seed=seed)
    detections = random_detections(truth, 130, seed=seed + 10)
    assert {a["iscrowd"] for a in truth.dataset["annotations"]} == {0, 1}
    found, expected = (
        evaluate(copy.deepcopy(truth), copy.deepcopy(detections), task, evaluator)
        for evaluator in (coco_metrics.fast_evaluation, COCOeval)
    )
    assert found.stats[0] > 0.05
    assert np.array_equal(found.stats, expected.stats)
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(found.eval[name], expected.eval[name]), name


def process(evaluator, dataset: str) -> dict:
    """What the evaluator says of detections near the objects of the dataset."""
    rng = np.random.default_rng(0)
    evaluator.reset()
    for item in DatasetCatalog.get(dataset):
        size = item["height"], item["width"]
        boxes = np.array([a["bbox"] for a in item["annotations"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances(size)
        found.pred_boxes = Boxes(boxes + rng.normal(0, 1, boxes.shape))
        found.scores = torch.as_tensor(rng.random(len(boxes)))
        found.pred_classes = torch.as_tensor([a["category_id"] for a in item["annotations"]])
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        found.pred_masks = BitMasks.from_polygon_masks([[c] for c in corners], *size).tensor
        evaluator.process([item], [{"instances": found}])
    return evaluator.evaluate()


@pytest.mark.parametrize("installed", [True, False])
def test_the_evaluator_of_a_dataset(installed, digits_root, tmp_path, monkeypatch):
    """With or without faster-coco-eval, the results of Detectron2's own evaluator."""
    if not installed:
        monkeypatch.setattr(coco_metrics, "COCOeval_faster", None)
    compiled, name = coco_evaluation.COCOeval_opt, "digits_tiny_val"
    DatasetCatalog.get(name)  # made when it is first read
    evaluator = CocoEvaluator(name, str(tmp_path))
    assert evaluator._use_fast_impl is installed
    found = process(evaluator, name)
    # As text, in which NaN, the metric of sizes that no object has, equals itself.
    assert str(found) == str(process(COCOEvaluator(name, use_fast_impl=False), name))
    assert found["bbox"]["AP"] > 1 and found["segm"]["AP"] > 1
    assert coco_evaluation.COCOeval_opt is compiled


def test_detectron2s_compiled_evaluator_is_used(digits_root, tmp_path, monkeypatch):
    """Where there is one."""
    DatasetCatalog.get("digits_tiny_val")
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", object())
    evaluator = CocoEvaluator("digits_tiny_val", str(tmp_path))
    assert evaluator._use_fast_impl and not evaluator._lends_metrics


def test_keypoints_stay_with_pycocotools():
    """Their similarity is not compared here."""
    truth = random_truth(1, 1, 2, masks=False)
    assert type(coco_metrics.fast_evaluation(truth, truth, "keypoints")) is COCOeval
