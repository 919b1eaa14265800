"""The configs of published pairs: one step of each in small, and what the table says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from d2kd.engine.setup import merged_config
from d2kd.registry import node_name
from tools import published

from .detectors import build, make_batch, run_step

ROOT = Path(__file__).parents[1]
ROWS = {row.name: row for row in published.published()}
each_row = pytest.mark.parametrize("name", ROWS)


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


def small_config(row) -> CfgNode:
    """The row's config with both detectors small and random."""
    cfg = merged_config(row.config, list(row.overrides))
    cfg.merge_from_list(shrink(cfg))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.INPUT.MASK_FORMAT = "bitmask"
    teacher = cfg.DISTILL.TEACHER
    teacher.WEIGHTS = "random"
    teacher.OPTS = [*teacher.OPTS, *shrink(published.read_teacher(cfg.clone()))]
    return cfg


@each_row
def test_trains_a_step(name, monkeypatch):
    """Every head that the row names gives finite, positive losses, and the student a gradient."""
    monkeypatch.chdir(ROOT)
    cfg = small_config(ROWS[name])
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


# --- the authors' settings ------------------------------------------------------------------------


@each_row
def test_trains_as_the_authors(name):
    """A setting of the training is the authors', or the header has it under "Differs"."""
    row = ROWS[name]
    assert {setting for setting in differences_of(row) if setting not in row.differs} == set()


def differences_of(row, *opts: str) -> dict[str, str]:
    """What the table would say of the row with these overrides."""
    cfg = merged_config(str(ROOT / row.config), [*row.overrides, *opts])
    return published.differences(row.method, cfg)


@pytest.mark.parametrize(
    ("config", "opts", "said"),
    [
        ("faster_rcnn_R18_R50_dsig", ("SOLVER.IMS_PER_BATCH", "16"), "images 16 (8)"),
        ("faster_rcnn_R18_R50_dsig", ("SOLVER.WARMUP_ITERS", "500"), "warm-up 500 (1000)"),
        ("retinanet_R18_R50_dsig", ("SOLVER.BASE_LR", "0.01"), "learning rate 0.01 (0.005)"),
        (
            "faster_rcnn_mobilenetv2_R50_dsig",
            ("MODEL.BACKBONE.FREEZE_AT", "2"),
            "frozen stages 2 (0)",
        ),
        (
            "retinanet_R50_X101_drkd",
            ("SOLVER.STEPS", "(120000, 160000)"),
            "steps (0.67, 0.89) ((0.67, 0.92))",
        ),
        (
            "faster_rcnn_R50_R101_global_knowledge",
            ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "35.0"),
            "gradient clipping 35.0 (None)",
        ),
        (
            "faster_rcnn_R50_R101_global_knowledge",
            ("INPUT.MIN_SIZE_TRAIN", "(640, 800)"),
            "short side (640, 800) ((800,))",
        ),
        (
            "retinanet_R50_X101_drkd",
            ("SOLVER.WEIGHT_DECAY_NORM", "0.0"),
            "weight decay of norms 0.0 (0.0001)",
        ),
    ],
)
def test_differences_are_seen(config, opts, said):
    """A setting that is not the authors' is said, and theirs with it."""
    (found,) = differences_of(ROWS[f"configs/coco/{config}.yaml"], *opts).items()
    assert " ".join(found) == said


# Weights of the released configs, for 2 images per GPU: foreground, background, edge, class, box,
# pyramid. None: the student has no such term.
DSIG_RELEASED = {
    "faster_rcnn_R18_R50_dsig": (0.5, 0.5, 2.0, 3.0, 1.0, 0.5),
    "faster_rcnn_mobilenetv2_R50_dsig": (0.5, 0.5, 2.0, 3.0, 1.0, 0.5),
    "faster_rcnn_efficientnet_b0_R101_dsig": (0.5, 0.5, 2.0, 3.0, 1.0, 0.5),
    "faster_rcnn_R50_R101_dsig": (0.5, 0.5, 1.0, 0.0, 0.0, 0.0),
    "faster_rcnn_R101_R152_dsig": (0.5, 0.0, 1.0, 0.0, 0.0, 0.0),
    "retinanet_R18_R50_dsig": (0.5, None, 1.0, 1.0, 1.0, 0.5),
    "retinanet_mobilenetv2_R50_dsig": (0.5, None, 1.0, 0.0, 0.0, 0.5),
    # Its edge weight has another key, which the released code does not know.
    "retinanet_efficientnet_b0_R101_dsig": (0.5, None, 1.0, 0.0, 0.0, 0.5),
}


@pytest.mark.parametrize("config", DSIG_RELEASED)
def test_dsig_has_the_released_weights(config):
    """Node and edge terms, averaged over images, have twice the weight of the authors' sums."""
    node = merged_config(str(ROOT / f"configs/coco/{config}.yaml"), []).DISTILL.DSIG
    foreground, background, edge, *others = DSIG_RELEASED[config]
    assert node.IMAGE_REDUCTION == "mean"
    assert (node.FOREGROUND_WEIGHT, node.EDGE_WEIGHT) == (2 * foreground, 2 * edge)
    assert background is None or node.BACKGROUND_WEIGHT == 2 * background
    assert [node.CLASS_WEIGHT, node.BOX_WEIGHT, node.PYRAMID_WEIGHT] == others
    assert (node.BACKGROUND_ALPHA, node.MINING_THRESHOLD, node.CLASS_TEMPERATURE) == (7.5, 0.6, 1.0)


@pytest.mark.parametrize("folder", ["coco", "voc"])
def test_global_knowledge_has_the_released_weights(folder):
    """Two-stage students have the released local weights; one-stage ones five times those, as our
    mean over five levels is a fifth of the released sum."""
    for student, times in (("faster_rcnn", 1), ("retinanet", 5)):
        path = ROOT / f"configs/{folder}/{student}_R50_R101_global_knowledge.yaml"
        node = merged_config(str(path), []).DISTILL.GLOBAL_KNOWLEDGE
        local = node.LOCAL.FOREGROUND_WEIGHT, node.LOCAL.BACKGROUND_WEIGHT
        assert local == (1.0 * times, 4.0 * times)
        assert (node.GLOBAL.WEIGHT, node.PROTOTYPES.COUNT, node.PROTOTYPES.ALPHA) == (5.0, 10, 10.0)
        assert (node.SOFT_LABELS.WEIGHT, node.SOFT_LABELS.TEMPERATURE) == (1.0, 2.0)


# --- headers and the table ------------------------------------------------------------------------


def test_headers_are_read(tmp_path, monkeypatch):
    """A header gives its rows; one in another form is an error that names the file."""
    row = ROWS["configs/coco/mask_rcnn_R18_R50_dsig.yaml"]
    assert row.method == "DSIG (ICCV 2021)" and row.row == "Mask R-CNN R18, 1x"
    assert row.scores == {"Box AP": ("33.89", "37.33"), "Mask AP": ("31.30", "33.90")}
    assert row.differs.startswith("neither config nor teacher") and row.differs.endswith("distil.")
    monkeypatch.setattr(published, "ROOT", tmp_path)
    path = tmp_path / "broken.yaml"
    for text in (
        "# Published: somewhere\n_BASE_: x\n",
        "# Published: A (B), c: d\n_BASE_: x\n",
        "# Published: A (B), c: d\n# Published: A (B), c: e\n# Box AP: - -> 1\n",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="broken.yaml: see tools/published.py"):
            published.read_header(path)
    path.write_text("# What it is.\n# Published: A (B), c: d\n")
    assert published.read_header(path) == []


def test_rows_of_one_config():
    """A config may train several rows, by overrides that it names."""
    config = "configs/coco/retinanet_R50_R101_ssim.yaml"
    rows = [row for row in ROWS.values() if row.config == config]
    assert len(rows) == 5 and rows[0].overrides == ()
    longer = ("SOLVER.MAX_ITER", "180000", "SOLVER.STEPS", "(120000, 165000)")
    (twice,) = [row for row in rows if row.overrides == longer]
    assert twice.scores == {"Box AP": ("37.4", "40.6")}
    assert published.describe_schedule(published.read(twice)) == "2x"


@pytest.mark.parametrize(
    ("config", "student", "teacher", "schedule"),
    [
        (
            "faster_rcnn_R50_cascade_mask_rcnn_X101_drkd",
            "Faster R-CNN R50",
            "Cascade Mask R-CNN X101-32x8d",
            "2x",
        ),
        ("retinanet_R18_R101_ssim", "RetinaNet R18", "RetinaNet R101", "1x"),
        ("faster_rcnn_R18_R50_dsig", "Faster R-CNN R18", "Faster R-CNN R50", "1x"),
    ],
)
def test_pairs_are_described(config, student, teacher, schedule):
    """Student, teacher and schedule of the table are those of the config."""
    cfg = published.read(ROWS[f"configs/coco/{config}.yaml"])
    assert published.describe_detector(cfg) == student
    assert published.describe_detector(published.read_teacher(cfg.clone())) == teacher
    assert published.describe_schedule(cfg) == schedule
    cfg.SOLVER.MAX_ITER = 100
    assert published.describe_schedule(cfg) == "100 iterations"


def test_table():
    """Each row has a line of the table, and each note that a line names is below it."""
    table, notes = published.markdown().split("\n\n")
    assert len(table.splitlines()) == 2 + sum(len(row.scores) for row in ROWS.values())
    said = {row.differs for row in ROWS.values()} - {""}
    assert sum(line[0].isdigit() for line in notes.splitlines()) == len(said)
    for number in range(1, len(said) + 1):
        assert f"note {number} " in table
