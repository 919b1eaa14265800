"""The average of the student's weights: evaluated, kept, and no matter to the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model

from d2kd.config import student_config
from d2kd.engine import train as train_net
from d2kd.engine.ema import EmaHook
from d2kd.engine.train import evaluate
from d2kd.engine.trainer import DistillTrainer
from d2kd.meta_arch import moments_of

from ..detectors import detector_config, distiller_config, write_config

DECAY = 0.3  # less than (1 + n) / (10 + n) from n = 3 on


class Recorder(HookBase):
    """The student's weights after each step."""

    def __init__(self):
        self.seen = []

    def before_train(self):
        self.seen.append(self._state())

    def after_step(self):
        self.seen.append(self._state())

    def _state(self):
        state = moments_of(self.trainer.model).student.state_dict()
        return {name: value.clone() for name, value in state.items()}


class Trainer(DistillTrainer):
    """Remembers the weights that were evaluated."""

    evaluated: list = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        student = moments_of(model).student
        cls.evaluated.append({name: v.clone() for name, v in student.state_dict().items()})
        return super().test(cfg, model, evaluators)


@pytest.fixture(scope="module")
def cfg(digits_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    teacher = write_config(detector_config(width=24, num_classes=10), folder / "teacher.yaml")
    student = detector_config(num_classes=10)
    student.DATASETS.TRAIN, student.DATASETS.TEST = ("digits_tiny_train",), ("digits_tiny_val",)
    student.SOLVER.MAX_ITER, student.SOLVER.CHECKPOINT_PERIOD = 6, 4
    student.SOLVER.BASE_LR, student.SEED = 1e-3, 3
    student.OUTPUT_DIR = str(folder / "ema")
    cfg = distiller_config(student, ["FeatureMimic"], teacher)
    cfg.DISTILL.TEACHER.CHECK = False
    cfg.SOLVER.EMA.ENABLED, cfg.SOLVER.EMA.DECAY = True, DECAY
    return cfg


@pytest.fixture(scope="module")
def run(cfg):
    """A training with the average, in its folder."""
    Trainer.evaluated = []
    Trainer(cfg).train()
    return Path(cfg.OUTPUT_DIR)


def load(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def student_of(checkpoint: dict) -> dict:
    items = checkpoint["model"].items()
    return {name: value for name, value in items if not name.startswith("distill_heads.")}


def assert_same(found: dict, expected: dict, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            assert torch.allclose(found[name], value, **tolerance), name
        else:
            assert torch.equal(found[name], value), name


def test_average_and_training(run, cfg, tmp_path):
    """What is kept is the average of the weights of the same training without it, step by step;
    the training itself is that one, to the last bit."""
    plain = cfg.clone()
    plain.SOLVER.EMA.ENABLED = False
    plain.OUTPUT_DIR, plain.DATASETS.TEST = str(tmp_path / "plain"), ()
    trainer, recorder = DistillTrainer(plain), Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    assert not any(isinstance(hook, EmaHook) for hook in trainer._hooks)
    assert "EmaHook" not in load(tmp_path / "plain/model_final.pth")["trainer"].get("hooks", {})

    def average_after(steps: int) -> dict:
        average = dict(recorder.seen[0])
        for n, state in enumerate(recorder.seen[1 : steps + 1]):
            decay = min(DECAY, (1 + n) / (10 + n))
            for name, value in state.items():
                if value.is_floating_point():
                    average[name] = decay * average[name] + (1 - decay) * value
                else:
                    average[name] = value
        return average

    final = load(run / "model_final.pth")
    assert_same(final["trainer"]["hooks"]["EmaHook"]["other"], floats(recorder.seen[-1]))
    for name, steps in (("model_final.pth", 6), ("model_0000003.pth", 4)):
        found = student_of(load(run / name))
        assert_same(found, average_after(steps), atol=1e-5, rtol=1e-5)
        name = "backbone.fpn_output2.weight"
        assert (found[name] - recorder.seen[steps][name]).abs().max() > 1e-6


def floats(state: dict) -> dict:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def test_the_average_is_evaluated_and_kept(run, cfg):
    """The last evaluation, student_final.pth and the checkpoint are one and the same student, which
    a plain Detectron2 model loads."""
    kept = load(run / "student_final.pth")["model"]
    assert_same(student_of(load(run / "model_final.pth")), kept)
    assert_same(Trainer.evaluated[-1], kept)
    assert build_model(student_config(cfg)).load_state_dict(kept).missing_keys == []


def test_resume_equals_no_stop(run, cfg, tmp_path):
    """Average and training, each to the last bit."""
    shutil.copy(run / "model_0000003.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    config = write_config(cfg, tmp_path / "config_of_run.yaml")
    train_net.main(["--config-file", config, "--resume", "OUTPUT_DIR", str(tmp_path)])
    expected, found = (load(folder / "model_final.pth") for folder in (run, tmp_path))
    assert_same(found["model"], expected["model"])
    ours, theirs = (run["trainer"]["hooks"]["EmaHook"] for run in (found, expected))
    assert ours["steps"] == theirs["steps"] == 6
    assert_same(ours["other"], theirs["other"])


def test_a_complete_training_is_evaluated_again(run, cfg, tmp_path):
    """Resumed without a step left, and by --eval-only --resume, it is the average."""
    again = cfg.clone()
    again.OUTPUT_DIR = str(tmp_path / "again")
    shutil.copytree(run, again.OUTPUT_DIR)
    (tmp_path / "again" / "student_final.pth").unlink()
    kept = load(run / "student_final.pth")["model"]
    Trainer.evaluated = []
    Trainer(again, resume=True).train()
    assert_same(load(tmp_path / "again" / "student_final.pth")["model"], kept)
    evaluate(again, resume=True, trainer_class=Trainer)
    assert len(Trainer.evaluated) == 2
    for state in Trainer.evaluated:
        assert_same(state, kept)
