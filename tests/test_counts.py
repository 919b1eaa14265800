"""What a training step costs a GPU, counted on a CPU: operators, waits for the device, and copies.

A step there is bound by how many kernels are launched and how often the host waits, which is the
same for every machine and every day, unlike seconds. Student and teacher are R18 of the zoo's
Faster R-CNN and RetinaNet on two images of 160 px; blocks have the sizes of a GPU.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn

from d2kd import add_distillation_config
from d2kd.benchmark.counts import Counts, count_operators
from d2kd.heads import dsig_nodes
from d2kd.losses import gaussian, ssim_fast

from .detectors import DENSE_HEADS, build, distiller_config, make_batch, run_step, write_config

ZOO = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
# The teacher's forward pass (about 60 operators for its pyramid alone) is part of each.
MOST_OPERATORS = {
    "FeatureMimic": 150,
    "CWD": 110,
    "PKD": 170,
    "Logits": 220,
    "SSIM": 290,
    "MAR": 330,
    "DSIG": 380,
    "GlobalKnowledge": 480,
    "DRKD": 580,
    "CrossKD": 450,
}
PAIRS = [
    (head, arch)
    for head in MOST_OPERATORS
    for arch in ZOO
    if arch == "retinanet" or head not in DENSE_HEADS
]
# How many nodes its graphs have.
MOST_WAITS = {"DSIG": 1}
# Functions that may wait: non-maximum suppression decides how many boxes are left, and on a CPU,
# where looking costs nothing, padding is cut off.
MAY_WAIT = ("nms", "pick_foreground")
# Past every warm-up, before the end.
ITERATION = 45000


def zoo_config(arch: str) -> CfgNode:
    """R18 with 3 classes, random weights."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(ZOO[arch]))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    return cfg


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str, str], nn.Module]:
    """(arch, head) -> a Distiller; head "": without any, which is the student alone."""
    folder = tmp_path_factory.mktemp("zoo")

    def model(arch: str, head: str) -> nn.Module:
        cfg = zoo_config(arch)
        file = write_config(cfg, folder / f"{arch}.yaml")
        return build(distiller_config(cfg, [head] if head else [], file))

    return model


@pytest.fixture
def gpu_blocks(monkeypatch):
    """Blocks as large as on a GPU, and graphs as large: nothing is left out by looking."""
    monkeypatch.setattr(dsig_nodes.Graph, "looks_are_free", False)
    monkeypatch.setattr(ssim_fast, "BLOCK_ELEMENTS_CPU", ssim_fast.BLOCK_ELEMENTS_GPU)
    monkeypatch.setattr(gaussian, "_TILE_CPU", gaussian._TILE_GPU)


def count(model: nn.Module) -> Counts:
    """Of a step's forward and backward pass, after a first one, which fills caches, folds norms."""

    batch = make_batch((4, 4), size=(160, 160))

    def step() -> None:
        sum(run_step(model, batch, ITERATION).values()).backward()

    step()
    model.zero_grad()  # else the gradients of two steps would be added
    return count_operators(step, model.student, MAY_WAIT)


@pytest.fixture(scope="module")
def student_alone(models):
    """arch -> the counts of the student's own step."""
    return functools.cache(lambda arch: count(models(arch, "")))


@pytest.mark.parametrize("head, arch", PAIRS)
def test_a_head_adds_few_operators_and_no_wait(head, arch, models, student_alone, gpu_blocks):
    """Both passes, the teacher's included; nothing is asked of the device but what is named."""
    alone = student_alone(arch)
    found = count(models(arch, head))
    assert found.operators - alone.operators <= MOST_OPERATORS[head]
    assert len(found.waits) <= MOST_WAITS.get(head, 0), found.waits
    assert found.student_waits == alone.student_waits


@pytest.mark.parametrize("head, arch", PAIRS)
def test_inputs_are_moved_once(head, arch, models, monkeypatch):
    """Each image and each tensor of the ground truth goes to the device as often as the student
    alone sends it: once."""
    alone = moves(models(arch, ""), monkeypatch)
    assert max(alone.values()) == 1
    assert moves(models(arch, head), monkeypatch) == alone


def moves(model: nn.Module, monkeypatch) -> Counter[str]:
    """Calls of ``.to(device)`` in a training step, by the input that they are made on."""
    batch = make_batch((2, 1), size=(160, 160))
    names = {}
    for i, item in enumerate(batch):
        fields = item["instances"].get_fields()
        tensors = {name: getattr(field, "tensor", field) for name, field in fields.items()}
        for name, tensor in {"image": item["image"], **tensors}.items():
            names[tensor.untyped_storage().data_ptr()] = f"{name} {i}"
    counted: Counter[str] = Counter()
    original = Tensor.to

    def to(tensor, *args, **kwargs):
        name = names.get(tensor.untyped_storage().data_ptr())
        where = [*args, kwargs.get("device")]
        if name and any(isinstance(value, torch.device | str) for value in where):
            counted[name] += 1
        return original(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", to)
        run_step(model, batch, ITERATION)
    return counted
