"""Values of Detectron2's own keys that it would fail on late, or not at all."""

from __future__ import annotations

import math

import pytest

from d2kd import ConfigError
from d2kd.config_rules import check_detectron2_keys
from d2kd.keys import node_at

from .detectors import detector_config


def valid_config():
    cfg = detector_config()
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    return cfg


BAD_VALUES = [
    ("SOLVER.BASE_LR", -1.0),
    ("SOLVER.BASE_LR", math.nan),
    ("SOLVER.BASE_LR", math.inf),
    ("SOLVER.CHECKPOINT_PERIOD", 0),
    ("SOLVER.LR_SCHEDULER_NAME", "Nope"),
    ("SOLVER.REFERENCE_WORLD_SIZE", -3),
    ("SOLVER.IMS_PER_BATCH", 0),
    ("SOLVER.IMS_PER_BATCH", -2),
    ("SOLVER.MAX_ITER", 0),
    ("SOLVER.MAX_ITER", None),
    ("SOLVER.STEPS", (-1,)),
    ("SOLVER.STEPS", ("a",)),
    ("SOLVER.MOMENTUM", 1.0),
    ("SOLVER.WARMUP_METHOD", "jump"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "hard"),
    ("DATALOADER.NUM_WORKERS", -1),
    ("DATALOADER.SAMPLER_TRAIN", "Nope"),
    ("INPUT.FORMAT", "XYZ"),
    ("INPUT.MIN_SIZE_TRAIN", (-64,)),
    ("INPUT.MIN_SIZE_TRAIN", ()),
    ("INPUT.MIN_SIZE_TEST", -1),
    ("INPUT.RANDOM_FLIP", "diagonal"),
    ("INPUT.MASK_FORMAT", "rle"),
    ("INPUT.CROP.TYPE", "round"),
    ("DATASETS.TRAIN", ()),
    ("DATASETS.TRAIN", None),
    ("DATASETS.TEST", None),
    ("DATASETS.TEST", (3,)),
    ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon"),
    ("MODEL.ROI_HEADS.NAME", "StandardROIHead"),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RPNN"),
    ("MODEL.META_ARCHITECTURE", "Generalized"),
    ("MODEL.RESNETS.DEPTH", 19),
    ("MODEL.DEVICE", "tpu"),
    ("MODEL.DEVICE", None),
    ("MODEL.PIXEL_STD", (0.0, 1.0, 1.0)),
    ("MODEL.PIXEL_MEAN", (1.0,)),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 0),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[]]),
    ("MODEL.RPN.NMS_THRESH", 7.0),
    ("TEST.EVAL_PERIOD", -1),
    ("TEST.DETECTIONS_PER_IMAGE", 0),
    ("SEED", 10**20),
    ("SEED", -2),
    ("OUTPUT_DIR", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_values(name, value):
    """One line that names the key, its value and what is valid."""
    cfg = valid_config()
    path, _, last = name.rpartition(".")
    (node_at(cfg, path) if path else cfg)[last] = value
    words = "close: |valid: |must be|empty|None"
    with pytest.raises(ConfigError, match=f"^{name} is .*({words})") as error:
        check_detectron2_keys(cfg)
    assert len(str(error.value)) <= 300


def test_close_names():
    """A typing error in a registered name is told from what it is close to."""
    cfg = valid_config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbon"
    with pytest.raises(ConfigError, match="close: .*build_resnet_fpn_backbone"):
        check_detectron2_keys(cfg)


@pytest.mark.parametrize("arch", ["faster", "cascade", "mask", "retinanet", "fcos"])
def test_valid_configs_pass(arch):
    """No rule refuses what works; evaluation needs no training set."""
    cfg = detector_config(arch)
    check_detectron2_keys(cfg, train=False)
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    check_detectron2_keys(cfg)
