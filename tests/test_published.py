"""The configs of published pairs train: one step each, in small, without weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from d2kd import add_distillation_config
from d2kd.config_files import load_config
from d2kd.registry import node_name

from .detectors import build, make_batch, run_step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import published  # noqa: E402

ROWS = {row.config: row for row in published.published()}


def shrink(cfg: CfgNode) -> list:
    """KEY VALUE pairs that make a detector of ``configs/`` small: widths, never its structure.

    Group norm keeps a deep backbone's activations in bounds at random weights.
    """
    resnet = cfg.MODEL.RESNETS
    opts = ["MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 32]
    if resnet.DEPTH >= 50:  # Detectron2 fixes the width of R18 and R34
        opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32]
        opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", max(32 // resnet.NUM_GROUPS, 1)]
    opts += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]
    opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16]
    return [*opts, "MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.NORM", "BN"]


def small_config(path: str) -> CfgNode:
    """The config with both detectors small and random."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, path)
    cfg.merge_from_list(shrink(cfg))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.INPUT.MASK_FORMAT = "bitmask"
    teacher = cfg.DISTILL.TEACHER
    teacher.WEIGHTS = "random"
    teacher.OPTS = [*teacher.OPTS, *shrink(published.read_teacher(cfg.clone()))]
    return cfg


@pytest.mark.parametrize("path", ROWS)
def test_trains_a_step(path, monkeypatch):
    """Every head that the file names gives finite, positive losses, and the student a gradient."""
    monkeypatch.chdir(ROOT)
    cfg = small_config(path)
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        pytest.importorskip("timm", reason="light students need the optional extra timm")
    nodes = [cfg.DISTILL[node_name(name)] for name in cfg.DISTILL.HEADS]
    iteration = max(node.SCHEDULE.START_ITER for node in nodes)
    model = build(cfg)
    losses = run_step(model, make_batch((3,), size=(64, 64)), iteration)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    for name in cfg.DISTILL.HEADS:
        prefix = f"loss_kd_{node_name(name).lower()}"
        terms = [loss for key, loss in losses.items() if key.startswith(prefix)]
        assert terms and sum(terms) > 0, losses
    kd = sum(loss for key, loss in losses.items() if key.startswith("loss_kd_"))
    kd.backward()
    gradients = [p.grad for p in model.student.backbone.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_headers_are_read(tmp_path):
    """A header gives its row and scores; one in another form is an error that names the file."""
    row = ROWS["configs/coco/mask_rcnn_R18_R50_dsig.yaml"]
    assert row.method == "DSIG (ICCV 2021)" and row.row == "Mask R-CNN R18, 1x"
    assert row.scores == {"Box AP": ("33.89", "37.33"), "Mask AP": ("31.30", "33.90")}
    broken = tmp_path / "broken.yaml"
    broken.write_text("# Published: somewhere\n_BASE_: x\n")
    with pytest.raises(ValueError, match="broken.yaml: see tools/published.py"):
        published.read_header(broken)


@pytest.mark.parametrize(
    ("config", "student", "teacher", "schedule"),
    [
        (
            "coco/faster_rcnn_R50_cascade_mask_rcnn_X101_drkd",
            "Faster R-CNN R50",
            "Cascade Mask R-CNN X101-32x8d",
            "2x",
        ),
        ("coco/retinanet_R18_R101_ssim", "RetinaNet R18", "RetinaNet R101", "1x"),
        (
            "voc/faster_rcnn_R50_R101_global_knowledge",
            "Faster R-CNN R50",
            "Faster R-CNN R101",
            "18,000 iterations",
        ),
    ],
)
def test_pairs_are_described(config, student, teacher, schedule):
    """Student, teacher and schedule of the table are those of the config."""
    cfg = published.read(f"configs/{config}.yaml")
    assert published.describe_detector(cfg) == student
    assert published.describe_detector(published.read_teacher(cfg)) == teacher
    assert published.describe_schedule(cfg) == schedule
