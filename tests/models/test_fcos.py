"""FCOS from a YAML file is Detectron2's FCOS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos

from d2kd import ConfigError, add_distillation_config
from d2kd.config_files import load_config
from d2kd.data.custom import check_datasets

from ..detectors import build, detector_config, make_batch, run_step

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "num_classes",
    "head_in_features",
    "center_sampling_radius",
    "focal_loss_alpha",
    "focal_loss_gamma",
    "test_score_thresh",
    "test_topk_candidates",
    "test_nms_thresh",
    "max_detections_per_image",
)


def test_the_coco_config_is_detectron2s():
    """Weights and settings of configs/coco/fcos_R50.yaml are those of Detectron2's own config."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(ROOT / "configs/coco/fcos_R50.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours = build_model(cfg)
        theirs = instantiate(model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert str(ours.head) == str(theirs.head)
    for name in SETTINGS:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_its_losses_are_detectron2s():
    """In float32 the losses equal those of Detectron2's class, bit for bit."""
    found = run_step(build(detector_config("fcos")), make_batch())
    plain = build(detector_config("fcos"))
    plain.__class__ = fcos.FCOS
    expected = run_step(plain, make_batch())
    assert {n: v.item() for n, v in found.items()} == {n: v.item() for n, v in expected.items()}


def test_inference():
    """A model of random weights detects: boxes inside the image, with scores and classes."""
    cfg = detector_config("fcos")
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    with torch.no_grad():
        instances = build(cfg).eval()(make_batch())[0]["instances"]
    assert 0 < len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE
    assert instances.pred_boxes.inside_box((64, 64)).all()
    assert instances.pred_classes.max() < 3


def test_too_few_classes_are_refused():
    """A dataset with more classes than MODEL.FCOS.NUM_CLASSES is an error that names the key."""
    cfg = detector_config("fcos")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_tiny_train",), ()
    with pytest.raises(ConfigError, match="MODEL.FCOS.NUM_CLASSES is 3"):
        check_datasets(cfg, train=True)


def test_unknown_levels_are_refused():
    """A level that the backbone does not make is an error that names those it makes."""
    cfg = detector_config("fcos")
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p9"]
    with pytest.raises(ConfigError, match=r"MODEL.FCOS.IN_FEATURES: .*'p9'.*valid: .*'p3'"):
        build(cfg)
