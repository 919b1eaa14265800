"""No key without effect: whatever d2kd adds to a config is read by what trains from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import sys

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model

from d2kd import DISTILL_HEAD_REGISTRY, add_distillation_config
from d2kd.data.custom import check_datasets
from d2kd.engine.trainer import DistillTrainer
from d2kd.keys import Options
from d2kd.registry import node_name

from .detectors import (
    DENSE_HEADS,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)

HAS_TIMM = importlib.util.find_spec("timm") is not None  # an optional extra
HEADS = [name for name, head in DISTILL_HEAD_REGISTRY if head.__module__.startswith("d2kd.")]
# To check a value is not to use it.
CHECKS = (
    *("validate_distillation_config", "validate_solver", "validate_loader_config"),
    "check_detectron2_keys",
)


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    """Names, with dots, of the values under ``node``."""
    names = set()
    for key, value in node.items():
        is_node = isinstance(value, CfgNode)
        names |= leaves(value, f"{prefix}{key}.") if is_node else {prefix + key}
    return names


class Recorder(CfgNode):
    """A config that notes which of its values are read; its clones note them in the same place."""

    noted: set[str] = set()
    is_checking = False

    @classmethod
    def of(cls, node: CfgNode, prefix: str = "") -> Recorder:
        recorder = cls()
        recorder.__dict__["prefix"] = prefix
        for key, value in node.items():
            is_node = isinstance(value, CfgNode)
            recorder[key] = cls.of(value, f"{prefix}{key}.") if is_node else value
        return recorder

    def __getitem__(self, key):
        if not Recorder.is_checking:
            self.noted.add(self.__dict__["prefix"] + key)
        return super().__getitem__(key)


@contextlib.contextmanager
def checking():
    """What is read meanwhile is not noted."""
    before, Recorder.is_checking = Recorder.is_checking, True
    try:
        yield
    finally:
        Recorder.is_checking = before


def as_check(function):
    """``function``, whose reads are not noted."""

    @functools.wraps(function)
    def check(*args, **kwargs):
        with checking():
            return function(*args, **kwargs)

    return check


@pytest.fixture(scope="module")
def recorded_options():
    """Options that :meth:`Options.read` returns note which of their values are used; checks note
    nothing."""
    read = Options.read.__func__

    def recording(cls, node, path):
        with checking():
            options = read(cls, node, path)
        if isinstance(node, Recorder):
            object.__setattr__(options, "__class__", recorder_of(type(options), path))
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "read", classmethod(recording))
        modules = [module for name, module in sys.modules.items() if name.startswith("d2kd.")]
        for module, name in itertools.product(modules, CHECKS):
            if name in vars(module):
                patch.setattr(module, name, as_check(getattr(module, name)))
        yield


def recorder_of(kind: type[Options], path: str) -> type[Options]:
    """A subclass of ``kind`` whose instances note the keys whose values are taken from them."""
    keys = {f.name: f"{path}.{f.name.rstrip('_').upper()}" for f in dataclasses.fields(kind)}

    def getattribute(self, name):
        if name in keys:
            Recorder.noted.add(keys[name])
        return super(kind, self).__getattribute__(name)

    return type(kind.__name__, (kind,), {"__getattribute__": getattribute})


@pytest.fixture(scope="module")
def noted(tmp_path_factory, digits_root, recorded_options) -> set[str]:
    """What is read when a Mask R-CNN is trained for two steps with all heads that it can have, and
    when a dense student and what d2kd adds to Detectron2's models are built."""
    folder = tmp_path_factory.mktemp("keys")
    teachers = {
        arch: write_config(detector_config(arch, num_classes=10), folder / f"{arch}.yaml")
        for arch in ("mask", "fcos")
    }
    student = detector_config("mask", num_classes=10)
    student.DATASETS.TRAIN = ("digits_tiny_train",)
    student.DATASETS.TEST = ("digits_tiny_val",)
    student.SOLVER.MAX_ITER = 2
    student.SOLVER.AMP.ENABLED, student.SOLVER.AMP.PRECISION = True, "bf16"
    student.SOLVER.EMA.ENABLED = True
    student.OUTPUT_DIR = str(folder / "out")
    heads = [head for head in HEADS if head not in DENSE_HEADS]
    balanced = ("DISTILL.BALANCE.ENABLED", True)
    cfg = distiller_config(student, heads, teachers["mask"], balanced)

    Recorder.noted.clear()
    cfg = Recorder.of(cfg)
    check_datasets(cfg, train=True)
    DistillTrainer(cfg).train()
    dense = detector_config("fcos", num_classes=10)
    opts = (*balanced, "DISTILL.GLOBAL_KNOWLEDGE.GLOBAL.RESPONSES", "projection")
    heads = ["DSIG", "Logits", "GlobalKnowledge", *DENSE_HEADS]
    model = build_model(Recorder.of(distiller_config(dense, heads, teachers["fcos"], opts)))
    run_step(model.train(), make_batch())
    if HAS_TIMM:
        light = detector_config()
        light.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
        light.MODEL.TIMM.NAME, light.MODEL.TIMM.PRETRAINED = "mobilenetv2_050", False
        build_backbone(Recorder.of(light))
    return set(Recorder.noted)


def test_every_key_is_read(noted):
    """Each key that d2kd adds to Detectron2's is read by a training or a build; checking its value
    does not count."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    ours = leaves(cfg) - leaves(get_cfg())
    of_tests = {name for name, _ in DISTILL_HEAD_REGISTRY} - set(HEADS)
    elsewhere = [f"DISTILL.{node_name(name)}." for name in of_tests]
    elsewhere += [] if HAS_TIMM else ["MODEL.TIMM."]
    assert {key for key in ours - noted if not key.startswith(tuple(elsewhere))} == set()


def test_the_recorder_sees_what_is_read():
    """It notes attributes, items and reads of a clone; not a check, nor what is not read."""
    Recorder.noted.clear()
    cfg = Recorder.of(detector_config()).clone()
    as_check(lambda: cfg.DISTILL.SSIM.K1)()
    assert cfg.DISTILL.SSIM.K2 == cfg["DISTILL"]["SSIM"]["K2"]
    assert "DISTILL.SSIM.K2" in Recorder.noted
    assert not {"DISTILL.SSIM.K1", "DISTILL.SSIM.SIGMA"} & Recorder.noted
