"""DISTILL.INHERIT: what a student copies from its teacher, when, and what it says about it."""

from __future__ import annotations

import logging

import pytest
import torch

from d2kd import ConfigError
from d2kd.detectors.inherit import plan_inheritance
from d2kd.engine.trainer import DistillTrainer

from . import build, detector_config, distiller_config, write_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(YAML, state dict) of a Mask R-CNN that is as wide as the students, with saved weights."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = detector_config("mask")
    model = build(cfg, seed=5)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += 0.5  # statistics of batch norm are inherited too
    cfg.MODEL.WEIGHTS = str(folder / "teacher.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return write_config(cfg, folder / "teacher.yaml"), model.state_dict()


def heir(teacher_file: str, parts: list[str], arch: str = "faster", heads=(), **kwargs):
    """Config of a student that inherits ``parts`` from the teacher's file and loaded weights."""
    opts = ("DISTILL.INHERIT", parts, "DISTILL.TEACHER.WEIGHTS", "")
    return distiller_config(detector_config(arch, **kwargs), list(heads), teacher_file, opts)


def test_copies_the_loaded_weights(teacher, caplog):
    """Named parts become the teacher's as loaded, its norms included; nothing else changes; the log
    says what was copied."""
    file, expected = teacher
    distiller = build(heir(file, ["fpn", "rpn", "roi_heads.box_head"]), 1)
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="d2kd"):
        distiller.start_from_weights()
    inherited = ("backbone.fpn_", "proposal_generator.", "roi_heads.box_head.")
    for key, value in distiller.state_dict().items():
        source = expected if key.startswith(inherited) else before
        assert torch.equal(value, source[key]), key
    assert not torch.equal(
        before["backbone.fpn_output2.weight"], expected["backbone.fpn_output2.weight"]
    )
    assert "fpn: 16 of 16 modules copied: backbone.fpn_lateral2" in caplog.text
    assert "roi_heads.box_head: 1 of 1 modules copied: roi_heads.box_head.fc1" in caplog.text


def test_what_does_not_fit_is_left_and_said(teacher):
    """Layers of other shapes or names stay as they are, whole; the report says why."""
    file, expected = teacher
    distiller = build(heir(file, ["box_head", "mask_head"], "mask", num_classes=5), 1)
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    distiller.start_from_weights()
    after = distiller.state_dict()
    assert torch.equal(
        after["roi_heads.box_head.fc1.weight"], expected["roi_heads.box_head.fc1.weight"]
    )
    for name in ("box_predictor.cls_score.weight", "mask_head.predictor.bias"):
        assert torch.equal(after[f"roi_heads.{name}"], before[f"roi_heads.{name}"])
    report = str(distiller._inheritance)
    assert "box_head: 1 of 3 modules copied: roi_heads.box_head.fc1\n" in report
    assert (
        "  not roi_heads.box_predictor.cls_score: weight is (6, 32), the teacher's (4, 32)"
        in report
    )
    assert "mask_head: 2 of 3 modules copied" in report


def test_a_layer_is_copied_whole_or_not_at_all():
    """A convolution without norm does not take the weight of one that has a norm in place of a
    bias, and names that the teacher lacks are said."""
    plain, normed = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1, bias=False)
    student = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"x": plain, "y": normed, "z": plain})})
    teacher = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"x": plain, "y": plain})})
    plan = plan_inheritance(student, teacher, ["a"])
    assert plan.copied == {"a": ["a.x"]}
    assert plan.refused["a"] == {
        "a.y": "it has weight, the teacher's weight, bias",
        "a.z": "the teacher has no such module",
    }


def test_dense_detectors_have_a_head(tmp_path):
    """RetinaNet's parts are its pyramid, with P6 and P7, and its head."""
    cfg = detector_config("retinanet")
    source = build(cfg, 5)
    cfg.MODEL.WEIGHTS = str(tmp_path / "teacher.pth")
    torch.save({"model": source.state_dict()}, cfg.MODEL.WEIGHTS)
    file = write_config(cfg, tmp_path / "teacher.yaml")
    distiller = build(heir(file, ["head", "fpn"], "retinanet"), 1)
    distiller.start_from_weights()
    for key in ("head.cls_score.bias", "backbone.top_block.p7.weight"):
        assert torch.equal(distiller.state_dict()[key], source.state_dict()[key])


@pytest.mark.parametrize("heads", [(), ("ToyMimic",)])
def test_a_teacher_that_no_head_reads_is_let_go(heads, teacher, tmp_path, monkeypatch):
    """It is there to be checked; in training it stays for heads only: a plain student need not pay
    for it."""
    file, expected = teacher
    cfg = heir(file, ["fpn"], heads=heads)
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert torch.equal(
        trainer.model.student.backbone.fpn_output2.weight, expected["backbone.fpn_output2.weight"]
    )
    assert trainer.model.teacher is not None
    monkeypatch.setattr(DistillTrainer, "_train", lambda self: None)
    trainer.train()
    assert (trainer.model.teacher is None) == (not heads)


@pytest.mark.parametrize(
    ("parts", "opts", "message"),
    [
        (["neck"], (), "no part 'neck'; valid: fpn, rpn, box_head, or the path of a module"),
        (["mask_head"], (), "no part 'mask_head'; valid: fpn, rpn"),
        (["fpn"], ("MODEL.FPN.OUT_CHANNELS", 8), "nothing of 'fpn'.* is .8, .* the teacher's .16"),
        (["fpn"], ("DISTILL.TEACHER.CONFIG_FILE", ""), "DISTILL.TEACHER.CONFIG_FILE is empty"),
    ],
)
def test_mistakes_are_refused_when_the_model_is_built(parts, opts, message, teacher):
    """An unknown part names the valid ones; a part of which nothing fits says why."""
    cfg = heir(teacher[0], parts)
    cfg.merge_from_list(list(opts))
    with pytest.raises(ConfigError, match=message) as error:
        build(cfg)
    assert "\n" not in str(error.value)


def test_at_the_start_of_a_training_only(teacher, tmp_path):
    """The trainer loads MODEL.WEIGHTS first and inherits then; a resumed run keeps its own."""
    file, expected = teacher
    weights = build(detector_config(), 2).state_dict()
    torch.save({"model": weights}, tmp_path / "start.pth")
    cfg = heir(file, ["fpn"], heads=["ToyMimic"])
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "start.pth"), str(tmp_path)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=True)  # there is nothing to resume yet
    state, fpn = trainer.model.state_dict(), "backbone.fpn_output2.weight"
    assert torch.equal(state[fpn], expected[fpn])
    stem = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(state[stem], weights[stem])

    with torch.no_grad():
        trainer.model.student.backbone.fpn_output2.weight.fill_(3)
    trainer.checkpointer.save("model_0000000", iteration=0)
    resumed = DistillTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert (resumed.model.state_dict()[fpn] == 3).all()


def test_weights_come_before_the_first_step(teacher):
    """The teacher's norms are folded then: what it was loaded with is no longer there to copy."""
    distiller = build(heir(teacher[0], ["fpn"], heads=["ToyMimic"]), 1)
    assert not distiller.teacher.is_prepared
    distiller.start_from_weights()
    distiller.before_training()
    assert distiller.teacher.is_prepared
    with pytest.raises(RuntimeError, match="before the first step"):
        distiller.start_from_weights()
