"""The teacher: frozen, hidden, lazy, and true to its own config."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from d2kd import ConfigError, Teacher
from d2kd.detectors.bundle import Batch
from d2kd.detectors.spec import describe_detector
from d2kd.detectors.taps import Taps
from d2kd.engine.teacher_check import check_teacher
from d2kd.engine.trainer import DistillTrainer

from . import build, detector_config, distiller_config, make_batch, run_step, write_config


def distil(student_arch: str, teacher_file: str, opts=()):
    return build(distiller_config(detector_config(student_arch), ["ToyMimic"], teacher_file, opts))


def bundles(
    student_arch: str,
    teacher_cfg,
    batch=None,
    teacher_model=None,
    student_cfg=None,
    **teacher_kwargs,
):
    """Both bundles of one step, and the teacher."""
    batch = batch or make_batch()
    student = build(student_cfg or detector_config(student_arch))
    spec = describe_detector(student, "student")
    taps = Taps(student, spec)
    teacher = Teacher(teacher_model or build(teacher_cfg, 1), **teacher_kwargs)
    with taps:
        run_step(student, batch)
    student_bundle = taps.bundle(Batch.from_inputs(batch, student.device))
    return (
        student_bundle,
        teacher.bundle(batch, teacher.describe(spec), student_bundle, taps),
        teacher,
    )


def test_always_in_eval_without_gradients(teacher_files):
    """train() leaves the teacher in eval mode; its weights and statistics never change."""
    distiller = distil("faster", teacher_files["faster"])
    assert distiller.train() is distiller and distiller.teacher.train() is distiller.teacher
    assert not any(m.training for m in distiller.teacher.model.modules())
    run_step(distiller, make_batch())  # the first step folds the norms
    before = {k: v.clone() for k, v in distiller.teacher.model.state_dict().items()}
    sum(run_step(distiller, make_batch()).values()).backward()
    for name, value in distiller.teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_the_check_leaves_the_teacher_in_eval(job_config, tmp_path):
    """DISTILL.TEACHER.CHECK evaluates, and leaves batch norm as it was; a teacher of other classes
    than the dataset's is not evaluated, be it a C4 detector, of which no RoIs can be read."""
    c4 = detector_config()
    c4.MODEL.BACKBONE.NAME, c4.MODEL.ROI_HEADS.NAME = "build_resnet_backbone", "Res5ROIHeads"
    c4.MODEL.RESNETS.OUT_FEATURES = c4.MODEL.RPN.IN_FEATURES = ["res4"]
    c4.MODEL.ROI_HEADS.IN_FEATURES, c4.MODEL.ANCHOR_GENERATOR.SIZES = ["res4"], [[16]]
    for model, checked in ((detector_config(num_classes=10), True), (c4, False)):
        cfg = job_config.clone()
        cfg.OUTPUT_DIR = str(tmp_path)
        teacher = Teacher(build(model))
        assert bool(check_teacher(cfg, teacher, DistillTrainer)) == checked
        assert not any(module.training for module in teacher.model.modules())
    names = tuple(map(str, range(10)))
    for order, checked in ((names, True), (names[::-1], False)):
        teacher = Teacher(build(detector_config(num_classes=10)), class_names=order)
        assert bool(check_teacher(cfg, teacher, DistillTrainer)) == checked


@pytest.fixture
def job_config(digits_root):
    """A config that tests on digits_tiny."""
    cfg = detector_config(num_classes=10)
    cfg.DATASETS.TEST = ("digits_tiny_val",)
    return cfg


def test_hidden_from_the_module_tree_but_moved(teacher_files):
    """No parameter, buffer or key of the teacher is visible; .to() reaches it all the same."""
    distiller = distil("faster", teacher_files["faster"])
    visible = {id(m) for m in distiller.modules()}
    assert not visible & {id(m) for m in distiller.teacher.model.modules()}
    distiller.to(torch.float64)
    assert next(distiller.teacher.model.parameters()).dtype == torch.float64


def test_normalisation_and_channel_order_reach_the_teacher(tmp_path):
    """Channels are reordered first, then normalised with the teacher's own mean and std."""
    cfg = detector_config()
    cfg.MODEL.PIXEL_MEAN = [10.0, 20.0, 30.0]
    cfg.MODEL.PIXEL_STD = [2.0, 4.0, 8.0]
    cfg.INPUT.FORMAT = "RGB"
    teacher = Teacher(build(cfg), input_format="RGB", student_format="BGR")
    image = torch.stack([torch.full((32, 32), value) for value in (1.0, 2.0, 3.0)])
    found = teacher.preprocess([{"image": image}], (32, 32))[0, :, 0, 0]
    assert found.tolist() == [(3 - 10) / 2, (2 - 20) / 4, (1 - 30) / 8]


def test_opts_change_the_teacher(teacher_files):
    """DISTILL.TEACHER.OPTS reach the teacher, not the student."""
    opts = ("DISTILL.TEACHER.OPTS", ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]])
    distiller = distil("faster", teacher_files["faster"], opts)
    assert distiller.teacher.model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert distiller.student.pixel_mean.flatten().tolist() != [1.0, 2.0, 3.0]


def test_only_what_is_read_is_computed(monkeypatch):
    """Reading the pyramid runs no RPN, no RoI head, no NMS; each part runs once when read twice."""
    model, calls = build(detector_config("mask", width=24), 1), []
    for name in ("backbone", "proposal_generator", "roi_heads.box_pooler", "roi_heads.box_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    student, teacher, _ = bundles("mask", None, teacher_model=model)
    assert calls == []
    assert teacher.pyramid is teacher.pyramid
    assert calls == ["backbone"]
    assert teacher.roi.logits.shape == student.roi.logits.shape
    assert teacher.roi.deltas.shape == student.roi.deltas.shape
    assert calls == ["backbone", "roi_heads.box_head"]  # pooled by the student's pooler, once
    assert teacher.mask.logits.shape == student.mask.logits.shape
    assert not teacher.roi.logits.requires_grad


def test_same_boxes_give_the_same_outputs():
    """A teacher that is the student reads the same pooled features, logits and mask logits."""
    cfg = detector_config("mask")
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "FrozenBN"
    torch.manual_seed(0)
    student = build(cfg)
    spec = describe_detector(student, "student")
    taps = Taps(student, spec)
    copy = build(cfg)
    copy.load_state_dict(student.state_dict())
    teacher = Teacher(copy)
    batch = make_batch()
    with taps:
        run_step(student, batch)
    mine = taps.bundle(Batch.from_inputs(batch, student.device))
    theirs = teacher.bundle(batch, teacher.describe(spec), mine, taps)
    for a, b in (
        (mine.roi.features, theirs.roi.features),
        (mine.roi.logits, theirs.roi.logits),
        (mine.roi.deltas, theirs.roi.deltas),
        (mine.mask.features, theirs.mask.features),
        (mine.mask.logits, theirs.mask.logits),
        (mine.rpn.features[8], theirs.rpn.features[8]),
    ):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("student_bf16, precision", [(False, "bf16"), (True, "fp32")])
def test_both_pool_the_same_boxes_in_any_precision(student_bf16, precision):
    """Where the precisions differ, the teacher's boxes are rounded as the student's: not at all,
    or to bf16. Maps of columns 0, 1, 0, 1 ... show where they were read."""
    batch = make_batch(size=(160, 160))
    with torch.autocast("cpu", torch.bfloat16, enabled=student_bf16):
        mine, theirs, _ = bundles("faster", detector_config(), batch, precision=precision)
    types = mine.pyramid[4].dtype, theirs.pyramid[4].dtype
    assert types[0] != types[1]
    for bundle, dtype in zip((mine, theirs), types, strict=True):
        bundle.pyramid = {
            stride: (torch.arange(level.shape[-1]) % 2).expand_as(level).to(dtype)
            for stride, level in bundle.pyramid.items()
        }
    pooler = build(detector_config()).roi_heads.box_pooler
    boxes = [Boxes(b) for b in mine.roi.boxes]
    with torch.autocast("cpu", torch.bfloat16, enabled=student_bf16):
        expected = pooler([mine.pyramid[s] for s in (4, 8, 16, 32)], boxes)
    assert theirs.roi.features.dtype == types[1]
    torch.testing.assert_close(theirs.roi.features, expected.to(types[1]))


def test_the_mask_branch_has_levels_of_its_own():
    """A mask branch that pools from other levels than the box branch is read on those."""
    cfg = detector_config("mask")
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "FrozenBN"
    student = build(cfg)
    heads = student.roi_heads
    heads.mask_in_features = ["p3", "p4"]
    heads.mask_pooler = ROIPooler(10, (1 / 8, 1 / 16), 0, "ROIAlignV2")
    spec = describe_detector(student, "student")
    assert spec.mask_strides == (8, 16) and spec.roi_strides == (4, 8, 16, 32)
    taps, teacher, batch = Taps(student, spec), Teacher(build(cfg)), make_batch()
    with taps:
        run_step(student, batch)
    mine = taps.bundle(Batch.from_inputs(batch, student.device))
    theirs = teacher.bundle(batch, teacher.describe(spec), mine, taps)
    assert theirs.mask.features.shape == (len(mine.mask.labels), 16, 10, 10)
    torch.testing.assert_close(mine.mask.features, theirs.mask.features, rtol=1e-4, atol=1e-5)
    assert theirs.mask.logits.shape[-1] == 28  # its own head, pooled as it expects


def test_maps_have_the_students_size(monkeypatch):
    """A teacher that pads more than the student is cropped to the student's maps."""
    model = build(detector_config(width=24), 1)
    monkeypatch.setattr(type(model.backbone), "size_divisibility", property(lambda self: 128))
    student, teacher, _ = bundles("faster", None, make_batch(size=(64, 96)), model)
    monkeypatch.undo()
    sizes = {s: tuple(m.shape[-2:]) for s, m in student.pyramid.items()}
    assert {s: tuple(m.shape[-2:]) for s, m in teacher.pyramid.items()} == sizes


def test_cascade_stages_keep_their_boxes_and_labels():
    """Each stage of a cascade student has its own boxes, and the labels its own matcher gives."""
    torch.manual_seed(0)
    student = build(detector_config("cascade"))
    spec = describe_detector(student, "student")
    taps = Taps(student, spec)
    seen = []
    match = student.roi_heads._match_and_label_boxes

    def spy(proposals, stage, targets):
        result = match(proposals, stage, targets)
        seen.append(torch.cat([p.gt_classes for p in result]))
        return result

    student.roi_heads._match_and_label_boxes = spy
    batch = make_batch((3, 0))
    with taps:
        run_step(student, batch)
    bundle = taps.bundle(Batch.from_inputs(batch, student.device))
    assert len(bundle.rois) == 3
    for stage, labels in enumerate(seen, start=1):
        assert torch.equal(bundle.rois[stage].labels, labels)
        assert len(torch.cat(bundle.rois[stage].boxes)) == len(labels)


def test_boxes_survive_train_on_pred_boxes():
    """The RoIs are those that were pooled, not the predictions that replace them afterwards."""
    cfg = detector_config("mask")
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    torch.manual_seed(0)
    student = build(cfg)
    pooled = []
    student.roi_heads.box_pooler.register_forward_pre_hook(
        lambda _, inputs: pooled.append([b.tensor.clone() for b in inputs[1]])
    )
    taps = Taps(student, describe_detector(student, "student"))
    batch = make_batch()
    with taps:
        run_step(student, batch)
    boxes = taps.bundle(Batch.from_inputs(batch, student.device)).roi.boxes
    assert all(torch.equal(a, b) for a, b in zip(boxes, pooled[0], strict=True))


def test_missing_weights_are_an_error_that_names_them(teacher_files, tmp_path):
    """A weight that does not load, or a file that is not there, is named in one line."""
    state = build(detector_config(width=24)).state_dict()
    name, shape = "roi_heads.box_predictor.cls_score.weight", "backbone.fpn_output2.weight"
    del state[name]
    state[shape] = state[shape][:3]
    path = tmp_path / "teacher.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ConfigError, match=f"2 of the teacher's weights.*{shape}.*{name}"):
        distil("faster", teacher_files["faster"], ("DISTILL.TEACHER.WEIGHTS", str(path)))
    with pytest.raises(ConfigError, match="no file .*teacher.pt'; there is .*teacher.pth"):
        distil("faster", teacher_files["faster"], ("DISTILL.TEACHER.WEIGHTS", str(path)[:-1]))
    with pytest.raises(ConfigError, match="has no weights: set DISTILL.TEACHER.WEIGHTS"):
        distil("faster", teacher_files["faster"], ("DISTILL.TEACHER.WEIGHTS", ""))


def test_a_distilled_checkpoint_can_teach(teacher_files, tmp_path):
    """A model_final.pth with heads, and its Distiller config, make a teacher."""
    cfg = distiller_config(detector_config(width=24), ["ToyMimic"], teacher_files["faster"])
    path = tmp_path / "model_final.pth"
    torch.save({"model": build(cfg).state_dict()}, path)
    file = write_config(cfg, tmp_path / "distilled.yaml")
    distiller = distil("faster", file, ("DISTILL.TEACHER.WEIGHTS", str(path)))
    assert type(distiller.teacher.model).__name__ == "GeneralizedRCNN"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(precision, teacher_files):
    """The teacher computes in its own precision, whatever the student's."""
    distiller = distil("faster", teacher_files["faster"], ("DISTILL.TEACHER.PRECISION", precision))
    seen = []
    distiller.teacher.model.backbone.register_forward_hook(lambda *a: seen.append(a[2]["p3"].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = run_step(distiller, make_batch())
    assert seen == [torch.float32 if precision == "fp32" else torch.bfloat16]
    assert losses["loss_kd_toy_mimic"].dtype == torch.float32
