"""Programs of users: their own trainer, RoI heads, mapper and keys; projects of Detectron2."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.engine.train_loop import SimpleTrainer
from detectron2.utils.events import EventStorage

import d2kd
from d2kd.engine import train as train_net
from d2kd.engine.own_trainer import add_distillation_hooks
from d2kd.engine.setup import import_user_module
from d2kd.engine.step import StepTrainer
from d2kd.engine.trainer import DistillTrainer
from d2kd.meta_arch import moments_of
from d2kd.registry import CONFIG_FUNCTIONS

from ..detectors import detector_config, distiller_config, make_batch, write_config

PAGE = Path(__file__).parents[2] / "docs" / "own_trainer.md"


@pytest.fixture(autouse=True)
def _forget_keys():
    """Keys that a test adds to all configs are gone after it, and so is what default_setup logs;
    a program begins without logging."""
    known = list(CONFIG_FUNCTIONS)
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "d2kd")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    yield
    CONFIG_FUNCTIONS[:] = known
    for logger, (handlers, logger.propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)


def set_up(student, tmp_path, iterations=2):
    """``student`` on digits_tiny, into ``tmp_path``/out."""
    student.DATASETS.TRAIN, student.DATASETS.TEST = ("digits_tiny_train",), ("digits_tiny_val",)
    student.SOLVER.MAX_ITER = iterations
    student.OUTPUT_DIR = str(tmp_path / "out")
    return student


def read(folder, name):
    return torch.load(folder / name, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("base", ["DefaultTrainer", "d2kd.DistillTrainer"])
def test_the_program_of_the_page(base, digits_root, tmp_path):
    """docs/own_trainer.md as it stands, and with the other base class: it trains with its mapper,
    RoI heads and keys in both models, evaluates, and leaves the student."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    name = f"my_train_net_{base.rpartition('.')[2].lower()}"
    program = program.replace("(DefaultTrainer)", f"({base})")
    program = program.replace("MyROIHeads", f"MyROIHeads{name}")  # registered once each
    (tmp_path / f"{name}.py").write_text(program)
    import_user_module(str(tmp_path / f"{name}.py"))
    module = sys.modules[name]
    teacher = detector_config(width=24, num_classes=10)
    teacher.MODEL.ROI_HEADS.NAME = f"MyROIHeads{name}"
    student = set_up(detector_config(num_classes=10), tmp_path)
    student.MODEL.ROI_HEADS.NAME = f"MyROIHeads{name}"
    student.MODEL.ROI_HEADS.DROPOUT, teacher.MODEL.ROI_HEADS.DROPOUT = 0.3, 0.7
    file = write_config(teacher, tmp_path / "teacher.yaml")
    cfg = distiller_config(student, ["SSIM", "DSIG"], file)
    config = write_config(cfg, tmp_path / "student.yaml")
    built = []
    build_model = module.Trainer.build_model
    record = lambda cfg: built.append(build_model(cfg)) or built[-1]  # noqa: E731
    module.Trainer.build_model = staticmethod(record)
    parse = default_argument_parser().parse_args
    module.main(parse(["--config-file", config]))
    (distiller,) = built
    assert distiller.student.roi_heads.dropout.p == 0.3
    assert distiller.teacher.model.roi_heads.dropout.p == 0.7
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    metrics = {name: value for line in lines for name, value in line.items()}
    assert metrics["total_kd_loss"] > 0
    assert "AP" in json.loads((out / "teacher_results.json").read_text())["results"]["bbox"]
    # The log of default_setup is the run's, and no run was there before.
    assert "Starting training" in (out / "log.txt").read_text()
    assert not (out / "earlier_1").exists()
    weights = str(out / "student_final.pth")
    opts = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path / "again")]
    results = module.main(parse(["--config-file", config, "--eval-only", *opts]))
    assert results["bbox"]["AP"] == pytest.approx(metrics["bbox/AP"])


class Plain(DefaultTrainer):
    """Detectron2's, with data of its own and no evaluation."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [make_batch(seed=seed) for seed in range(8)]

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return []


class PlainDistill(Plain, DistillTrainer):
    pass


def distilled(tmp_path, teacher_files, heads, *opts, arch="faster"):
    student = detector_config(arch)
    student.SOLVER.MAX_ITER, student.SEED = 4, 3
    student.DATASETS.TRAIN, student.DATASETS.TEST = ("digits_tiny_train",), ()
    student.OUTPUT_DIR = str(tmp_path / "out")
    Path(student.OUTPUT_DIR).mkdir(exist_ok=True)
    return distiller_config(student, heads, teacher_files[arch], opts)


def train_plainly(cfg, add_hooks=True):
    torch.manual_seed(cfg.SEED)
    trainer = Plain(cfg)
    if add_hooks:
        add_distillation_hooks(trainer)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_one_call_adds_what_default_trainer_drops(teacher_files, digits_root, tmp_path):
    """AdamW, INHERIT, precision, EMA and the student's files, in a DefaultTrainer."""
    opts = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.AMP.ENABLED", True]
    opts += ["SOLVER.AMP.PRECISION", "bf16", "SOLVER.EMA.ENABLED", True]
    opts += ["DISTILL.INHERIT", ["fpn"], "DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 2]
    opts += ["SOLVER.BASE_LR", 1e-6, "MODEL.FPN.OUT_CHANNELS", 24]
    cfg = distilled(tmp_path, teacher_files, ["ToyMimic", "SSIM"], *opts)
    seen = []
    trainer = Plain(cfg)
    add_distillation_hooks(trainer)
    distiller = trainer.model
    theirs = distiller.teacher.model.backbone.fpn_output2.weight.clone()
    assert not torch.allclose(distiller.student.backbone.fpn_output2.weight, theirs, atol=1e-4)
    distiller.student.backbone.fpn_output2.register_forward_hook(
        lambda _, __, output: seen.append(output.dtype)
    )
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.scheduler.optimizer is trainer.optimizer
    assert set(seen) == {torch.bfloat16}
    inherited = read(tmp_path / "out", "student_final.pth")["model"]
    assert torch.allclose(inherited["backbone.fpn_output2.weight"], theirs, atol=1e-4)
    assert not any(key.startswith("distill_heads") for key in inherited)
    hooks = read(tmp_path / "out", "model_final.pth")["trainer"]["hooks"]
    assert hooks["EmaHook"]["steps"] == 4


def test_resting_heads_stay_in_a_step_of_the_users(teacher_files, digits_root, tmp_path):
    """A run_step of the user's is kept; its optimiser does not move a head that is at rest."""

    class Own(Plain):
        def run_step(self):
            self._trainer.iter = self.iter
            data = next(self._trainer._data_loader_iter)
            losses = self.model(data)
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            for parameter in moments_of(self.model).trained_beside:
                if parameter.grad is None:  # as DistributedDataParallel leaves it
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()

    opts = ["DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 3, "SOLVER.MAX_ITER", 2]
    cfg = distilled(tmp_path, teacher_files, ["ToyMimic"], *opts, "SOLVER.WEIGHT_DECAY", 0.5)
    cfg.DISTILL.TOY_MIMIC.SCHEDULE.STOP_ITER = 4
    for added in (True, False):
        trainer = Own(cfg)
        if added:
            add_distillation_hooks(trainer)
        assert type(trainer._trainer) is SimpleTrainer
        before = [p.clone() for p in trainer.model.trained_beside]
        trainer.train()
        after = trainer.model.trained_beside
        assert all(map(torch.equal, before, after)) == added and before


def test_the_step_is_detectron2s(teacher_files, digits_root, tmp_path):
    """With the call, and the same data, a plain student's weights are Detectron2's."""
    states = []
    for add_hooks in (False, False, True):  # PyTorch compiles as the first training goes on
        cfg = distilled(tmp_path, teacher_files, [], arch="retinanet")
        states.append(train_plainly(cfg, add_hooks).model.state_dict())
    _, theirs, ours = states
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


def test_going_on_from_a_checkpoint_of_detectron2(teacher_files, digits_root, tmp_path):
    """With its momenta, and with the learning rate of the config where that is another."""
    cfg = distilled(tmp_path, teacher_files, [], "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)
    train_plainly(cfg, add_hooks=False)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, cfg.SOLVER.BASE_LR / 2
    for base in (Plain, PlainDistill):
        trainer = base(cfg)
        add_distillation_hooks(trainer)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 1 and len(trainer.optimizer.state)
        (tmp_path / "out" / "model_final.pth").rename(tmp_path / "final.pth")
        trainer.train()
        (tmp_path / "final.pth").rename(tmp_path / "out" / "model_final.pth")
        rate = trainer.storage.history("lr").latest()
        assert rate == trainer.scheduler.base_lrs[0] == cfg.SOLVER.BASE_LR


def test_prototypes_are_made(teacher_files, digits_root, tmp_path):
    """Global Knowledge's global term is 0 without the call, and the first step says so."""
    heads, loss = ["GlobalKnowledge"], "loss_kd_global_knowledge_global"
    cfg = set_up(detector_config("faster", num_classes=10), tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 1, ()
    (tmp_path / "out").mkdir()
    teacher = write_config(detector_config(width=24, num_classes=10), tmp_path / "teacher.yaml")
    cfg = distiller_config(cfg, heads, teacher)
    for added in (True, False):
        trainer = train_plainly(cfg, added)
        value = trainer.storage.history(loss).latest()
        assert (value > 0) == added


def test_a_distiller_without_its_hooks_says_so(teacher_files, caplog):
    """Once, at the first step, with what is dropped; not where a trainer told it of the start."""
    opts = ("DISTILL.INHERIT", ["fpn"], "MODEL.FPN.OUT_CHANNELS", 24)
    cfg = distiller_config(detector_config(), ["GlobalKnowledge"], teacher_files["faster"], opts)
    for told in (False, True):
        caplog.clear()
        distiller = d2kd.Distiller(cfg).train()
        if told:
            distiller.before_training()
        for iteration in range(2):
            with EventStorage(iteration):
                distiller(make_batch())
        found = [r.getMessage() for r in caplog.records if "runs no hooks" in r.getMessage()]
        assert len(found) == (not told)
        for message in found:
            assert "DISTILL.INHERIT, what heads do between steps" in message


# --- --import -----------------------------------------------------------------------------------


@pytest.fixture
def pointrend():
    """A small PointRend; its keys are there while the fixture is."""
    pytest.importorskip("detectron2.projects.point_rend")
    import_user_module("detectron2.projects.point_rend")

    def config(width: int):
        cfg = detector_config("mask", width=width, num_classes=10)
        cfg.MODEL.ROI_HEADS.NAME = "PointRendROIHeads"
        head = cfg.MODEL.ROI_MASK_HEAD
        head.NAME, head.POOLER_TYPE, head.POINT_HEAD_ON = "PointRendMaskHead", "", True
        head.FC_DIM, head.NUM_FC = 32, 1
        cfg.MODEL.POINT_HEAD.NUM_CLASSES, cfg.MODEL.POINT_HEAD.FC_DIM = 10, 16
        return cfg

    return config


@pytest.mark.parametrize("role", ["student", "teacher", "both"])
def test_pointrend(role, pointrend, digits_root, tmp_path):
    """Detectron2's PointRend teaches and is taught, by --import alone."""
    mask = detector_config("mask", width=24, num_classes=10)
    teacher = pointrend(24) if role != "student" else mask
    student = pointrend(16) if role != "teacher" else detector_config("mask", num_classes=10)
    file = write_config(teacher, tmp_path / "teacher.yaml")
    opts = ("DISTILL.LOGITS.MASK_WEIGHT", 0.0)
    heads = ["SSIM", "DSIG", "Logits"]
    cfg = distiller_config(set_up(student, tmp_path), heads, file, opts)
    config = write_config(cfg, tmp_path / "student.yaml")
    CONFIG_FUNCTIONS.clear()
    command = ["--config-file", config, "--import", "detectron2.projects.point_rend"]
    train_net.main(command)
    out = tmp_path / "out"
    text = (out / "metrics.json").read_text()
    assert "loss_kd_logits_box" in text and "loss_kd_dsig" in text
    assert ("loss_mask_point" in text) == (role != "teacher")
    plain = get_cfg()
    if role != "teacher":
        from detectron2.projects.point_rend import add_pointrend_config

        add_pointrend_config(plain)
        header = (out / "student_config.yaml").read_text().splitlines()[0]
        assert "plain Detectron2, and what defines PointRendROIHeads" in header
    plain.merge_from_file(str(out / "student_config.yaml"))  # without a key of d2kd's
    model = DefaultTrainer.build_model(plain)
    assert model.load_state_dict(read(out, "student_final.pth")["model"]).missing_keys == []
    if role == "teacher":  # to whose mask head no logits of a box can be compared
        more = ["DISTILL.LOGITS.MASK_WEIGHT", "1.0", "OUTPUT_DIR", str(tmp_path / "more")]
        with pytest.raises(SystemExit, match="error: Logits.*mask.*MASK_WEIGHT 0"):
            train_net.main([*command, *more])


def test_keys_of_an_imported_file(digits_root, tmp_path):
    """--import adds keys before any config is read; without it they are unknown, in one line."""
    (tmp_path / "my_keys.py").write_text(
        "def add_my_config(cfg):\n    cfg.MODEL.MINE = 1\n\ndef add_other(cfg):\n    1 / 0\n"
    )
    student = set_up(detector_config(num_classes=10), tmp_path)
    teacher = write_config(detector_config(width=24, num_classes=10), tmp_path / "teacher.yaml")
    cfg = distiller_config(student, ["SSIM"], teacher)
    cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 1, ()
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.MINE", 3]
    config = write_config(cfg, tmp_path / "student.yaml")
    opts = ["--config-file", config, "MODEL.MINE", "2"]
    with pytest.raises(SystemExit, match="error: .*no config key 'MODEL.MINE'"):
        train_net.main(opts)
    train_net.main(["--import", str(tmp_path / "my_keys.py"), *opts])
    assert "MINE: 2" in (tmp_path / "out" / "config.yaml").read_text()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["MODEL.MINE"] == 2


def test_step_trainer_is_used(teacher_files, digits_root, tmp_path):
    """A DistillTrainer has all hooks already: the call leaves it alone."""
    trainer = PlainDistill(distilled(tmp_path, teacher_files, ["SSIM"]))
    hooks = list(trainer._hooks)
    add_distillation_hooks(trainer)
    assert trainer._hooks == hooks and isinstance(trainer._trainer, StepTrainer)
