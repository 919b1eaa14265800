"""DistillTrainer in place of Detectron2's DefaultTrainer, in a program of a user's."""

from __future__ import annotations

import errno
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm

from d2kd.config import head_schedule
from d2kd.engine import deliverable, logs, output
from d2kd.engine.deliverable import STUDENT_CONFIG
from d2kd.engine.faults import TrainingError
from d2kd.engine.train import evaluate, train
from d2kd.engine.trainer import DistillTrainer

from ..detectors import detector_config, distiller_config

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


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_resuming_with_another_learning_rate(optimizer, cfg):
    """What of the optimiser's settings was changed holds from the first step on; momenta stay."""
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS, cfg.SOLVER.OPTIMIZER = 0, (3,), optimizer
    DistillTrainer(cfg).train()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 4, 0.5, 0.05
    cfg.SOLVER.BASE_LR /= 2
    trainer = DistillTrainer(cfg, resume=True)
    trainer.resume_or_load()
    group = trainer.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(cfg.SOLVER.BASE_LR) and group["weight_decay"] == 0.05
    assert group.get("momentum") == (0.5 if optimizer == "SGD" else None)
    assert trainer.scheduler.base_lrs == [cfg.SOLVER.BASE_LR] * len(trainer.scheduler.base_lrs)
    state = trainer.optimizer.state[group["params"][0]]
    assert state["momentum_buffer" if optimizer == "SGD" else "exp_avg"].any()
    trainer.train()
    last = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()[-1]
    assert json.loads(last)["lr"] == pytest.approx(cfg.SOLVER.BASE_LR / 10)


class Cycle(DistillTrainer):
    """Its scheduler changes the momentum too, and keeps in each group what it is made with."""

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.SOLVER.BASE_LR, total_steps=9)


def test_resuming_with_a_scheduler_of_the_users(cfg):
    """What it changed on the way is kept, but where the config changed."""
    Cycle(cfg).train()
    cfg.SOLVER.MAX_ITER, groups = 4, {}
    for factor in (1, 2):
        cfg.SOLVER.BASE_LR *= factor
        trainer = Cycle(cfg, resume=True)
        trainer.resume_or_load()
        groups[factor] = trainer.optimizer.param_groups[0]
        trainer.run.release()
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    kept = {key: value for key, value in groups[1].items() if key != "params"}
    assert kept.items() <= saved["param_groups"][0].items()
    assert groups[2]["lr"] == pytest.approx(2 * kept["lr"])
    assert groups[2]["momentum"] == kept["momentum"] != cfg.SOLVER.MOMENTUM


def test_each_process_changes_images_in_its_own_way(cfg, monkeypatch):
    """With a loader of the user's, which draws from the program's random numbers: no two processes
    draw the same, and one that goes on draws other numbers than at the start."""

    class Drawing(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [np.random.rand(), torch.rand(()).item()]

    trainer, drawn = Drawing(cfg), []
    for rank, start in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        drawn.append(trainer._make_loader(cfg.SEED, start))
    assert drawn[0] == drawn[3] and len(set(sum(drawn, []))) == 6


def test_schedules_are_scaled_with_the_training(cfg):
    """By SOLVER.REFERENCE_WORLD_SIZE, as MAX_ITER is; what is no iteration stays."""
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH = 900, 8, 8
    cfg = distiller_config(cfg, ["SSIM", "PKD"], "teacher.yaml")
    cfg.DISTILL.SSIM.SCHEDULE.STOP_ITER, cfg.DISTILL.SSIM.SCHEDULE.STEPS = 800, [600, 700]
    scaled = DistillTrainer.auto_scale_workers(cfg, 1)
    assert scaled.SOLVER.MAX_ITER == 7200 and head_schedule(scaled, "PKD").stop == 7200
    found = head_schedule(scaled, "SSIM")
    assert (found.start, found.stop, found.steps) == (0, 6400, (4800, 5600))
    assert scaled.DISTILL.BALANCE.FREEZE_ITER == -1
    assert DistillTrainer.auto_scale_workers(cfg, 8) is cfg


def test_the_students_file_cannot_be_written(cfg, monkeypatch):
    """The training says that it goes on from its last checkpoint, and not that the file is kept."""

    def full(model, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    cfg.SOLVER.MAX_ITER = 1
    monkeypatch.setattr(deliverable, "save_student", full)
    with pytest.raises(TrainingError, match="MiB free; --resume goes on from model_final.pth$"):
        train(cfg)


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


def test_an_evaluation_on_the_way(cfg):
    """It leaves the folder's lock and the log to the training that it is called from."""

    class Evaluating(HookBase):
        def after_step(self):
            own = self.trainer.cfg.clone()
            own.defrost()
            own.DATASETS.TEST, own.MODEL.WEIGHTS = ("digits_tiny_val",), weights
            evaluate(own)
            assert not output.lock(own.OUTPUT_DIR)

    weights, cfg.SOLVER.MAX_ITER = f"{cfg.OUTPUT_DIR}.pth", 1
    logs.start()
    trainer = DistillTrainer(cfg)
    torch.save({"model": trainer.model.state_dict()}, weights)
    trainer.register_hooks([Evaluating()])
    trainer.train()
    out = Path(cfg.OUTPUT_DIR)
    assert "distilled: nothing" in (out / "log.txt").read_text()
    assert not (out / "inference" / "log.txt").exists()


def test_an_evaluation_is_held_to_what_is_expected(cfg, monkeypatch):
    """TEST.EXPECTED_RESULTS, as in Detectron2's train_net.py."""
    cfg.TEST.EXPECTED_RESULTS, cfg.MODEL.WEIGHTS = (
        [["bbox", "AP", 30.0, 1.0]],
        f"{cfg.OUTPUT_DIR}.pth",
    )
    torch.save({"model": DistillTrainer.build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    for found in (30.5, 32.0):
        monkeypatch.setattr(DistillTrainer, "test", lambda *_, ap=found: {"bbox": {"AP": ap}})
        if found == 30.5:
            evaluate(cfg)
        else:
            with pytest.raises(SystemExit):
                evaluate(cfg)


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
