"""DistillTrainer in place of Detectron2's DefaultTrainer, in a program of a user's."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase

from d2kd.engine.deliverable import STUDENT_CONFIG
from d2kd.engine.train import evaluate, train
from d2kd.engine.trainer import DistillTrainer

from ..detectors import detector_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cfg(digits_root, tmp_path):
    """A detector on digits_tiny, trained for two iterations."""
    cfg = detector_config(num_classes=10)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_tiny_train",), ()
    cfg.SOLVER.MAX_ITER, cfg.SEED = 2, 5
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


class Seen(HookBase):
    def __init__(self):
        self.iterations, self.ends = [], 0

    def after_step(self):
        self.iterations.append(self.trainer.iter)

    def after_train(self):
        self.ends += 1


class Trainer(DistillTrainer):
    """Overrides what programs for Detectron2 override, with Detectron2's signatures."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return super().build_lr_scheduler(cfg, optimizer)

    def build_writers(self):
        return super().build_writers()


def test_a_program_for_default_trainer(cfg):
    """Built with a config alone, hooks added, weights loaded, trained; writers write."""
    trainer, seen = Trainer(cfg), Seen()
    trainer.register_hooks([seen])
    assert not Path(cfg.OUTPUT_DIR).exists()  # nothing is written before it is asked for
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {}
    assert seen.iterations == [0, 1] and seen.ends == 1
    out = Path(cfg.OUTPUT_DIR)
    assert {"metrics.json", "model_final.pth", "student_final.pth"} < {
        p.name for p in out.iterdir()
    }
    for name in ("model", "optimizer", "scheduler", "checkpointer", "cfg", "iter", "max_iter"):
        assert hasattr(trainer, name)


def test_what_can_be_overridden_is_detectron2s():
    """Each method of DefaultTrainer takes what Detectron2 gives it."""
    for name, method in inspect.getmembers(DefaultTrainer, inspect.isroutine):
        if name.startswith("_"):
            continue
        theirs = inspect.signature(method).parameters.values()
        own = inspect.signature(getattr(DistillTrainer, name)).parameters
        names = [p.name for p in theirs if p.kind is not p.VAR_KEYWORD]
        assert list(own)[: len(names)] == names, name
        more = [own[n] for n in list(own)[len(names) :]]
        assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in more), name


def test_the_seed_decides(cfg):
    """SEED alone decides the initial weights, as with default_setup in Detectron2."""
    states = []
    for seed in (5, 5, 6):
        cfg.SEED = seed
        torch.rand(3)
        states.append(DistillTrainer(cfg).model.state_dict())
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_one_call_from_python(cfg):
    """d2kd.train checks, trains and leaves the files; an evaluation leaves those alone."""
    cfg.DATASETS.TEST = ("digits_tiny_val",)
    results = train(cfg)
    assert "AP" in results["bbox"]
    assert not cfg.is_frozen()  # the caller's config stays the caller's
    out = Path(cfg.OUTPUT_DIR)
    assert (out / STUDENT_CONFIG).is_file() and "Starting training" in (out / "log.txt").read_text()
    cfg.MODEL.WEIGHTS = str(out / "student_final.pth")
    own = ("inference", ".lock")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name not in own}
    again = evaluate(cfg)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name in before}
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def test_train_net_is_short_and_does_what_the_command_does():
    """One can copy it: setup, main, launch on one screen; it and the command call the same."""
    text = (ROOT / "train_net.py").read_text()
    assert len(text.splitlines()) <= 45
    command = (ROOT / "d2kd" / "engine" / "train.py").read_text()
    for word in (
        "prepare(args",
        "evaluate(cfg, resume=args.resume",
        "resume=args.resume",
        "launch(",
    ):
        assert word in text and word in command, word
