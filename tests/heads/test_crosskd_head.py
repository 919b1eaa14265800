"""The CrossKD head: its terms by hand and by loops, its position, its gradients, its pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch, DenseView, FeatureBundle
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads import CrossKD, build_head

from ..detectors import build, detector_config, distiller_config, make_batch, run_step, write_config

FIELDS = {"dense.logits", "dense.deltas", "dense.labels", "dense.tower_maps", "dense.finish_tower"}


def make_spec(role: str, **kwargs) -> DetectorSpec:
    """Two levels, towers of two convolutions and two channels."""
    known = {
        "fields": frozenset({"pyramid", *FIELDS}),
        "num_classes": 1,
        "tower_channels": (2, 2, 2),
        "head_strides": (8, 16),
    }
    return DetectorSpec(role, "RetinaNet", {8: 2, 16: 2}, **known | kwargs)


def make_head(student: DetectorSpec, teacher: DetectorSpec, **opts) -> CrossKD:
    """The head as a config builds it."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.CROSS_KD[key] = value
    head = build_head("CrossKD", cfg, student, teacher)
    assert isinstance(head, CrossKD)
    return head


def one_location(value: float = 0.0) -> tuple[FeatureBundle, FeatureBundle]:
    """One image, a level of one location and one of two, one anchor, one class.

    The towers are the identity. The teacher predicts from a map (a, b) the logit a and the deltas
    (b, 0, 0, 0); of its own maps it predicts log 3 and zeros. The student's map is (0, value).
    """
    sizes = {8: (1, 2), 16: (1, 1)}
    maps = {s: torch.tensor([0.0, value]).view(1, 2, 1, 1).repeat(1, 1, *sizes[s]) for s in sizes}
    maps = {s: level.requires_grad_() for s, level in maps.items()}

    def finish(branch: str, maps, convolutions: int) -> dict[int, Tensor]:
        assert convolutions == 1
        if branch == "cls":
            return {s: level[:, :1] for s, level in maps.items()}
        return {s: nn.functional.pad(level[:, 1:], (0, 0, 0, 0, 0, 3)) for s, level in maps.items()}

    student = DenseView(
        "student",
        tower_maps={
            branch: {s: [None, m, None] for s, m in maps.items()} for branch in ("cls", "box")
        },
        labels=torch.tensor([[1, 0, 0]]),  # background and two of the foreground
    )
    teacher = DenseView(
        "teacher",
        finish_tower=finish,
        logit_maps={s: torch.full((1, 1, *sizes[s]), math.log(3)) for s in sizes},
        delta_maps={s: torch.zeros(1, 4, *sizes[s]) for s in sizes},
        decode=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)).apply_deltas,
    )
    return (
        FeatureBundle(make_spec("student"), dense=student, pyramid=maps),
        FeatureBundle(make_spec("teacher"), dense=teacher, pyramid=maps),
    )


def run(head: CrossKD, bundles) -> dict[str, Tensor]:
    return head(*bundles, Batch([], []))


@pytest.mark.parametrize("focus, weight", [(0.0, None), (1.0, 0.25), (2.0, 0.0625)])
def test_class_term_by_hand(focus, weight):
    """q = 1/2, p = 3/4 at three locations, two foreground anchors: 3/2 |p - q|^f BCE(q, p), and
    BCE = log 2; with focus 0 the entropy of p is taken off."""
    bundles = one_location()
    head = make_head(*(b.spec for b in bundles), FOCUS=focus, BOX_WEIGHT=0.0)
    terms = run(head, bundles)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    distance = math.log(2) - entropy if weight is None else weight * math.log(2)
    assert terms.keys() == {"cls"}
    assert terms["cls"].item() == pytest.approx(3 * distance / 2)


@pytest.mark.parametrize(
    "shift, expected",
    # One anchor to the side they touch; half of it: I 1/2, U = H = 3/2; two: U 2, H 3.
    [(0.0, 0.0), (1.0, 1.0), (0.5, 1 - 1 / 3), (-2.0, 1 + 1 / 3)],
)
def test_box_term_by_hand(shift, expected):
    """The student's boxes, as the teacher's head sees them, are moved by so many anchors."""
    bundles = one_location(shift)
    head = make_head(*(b.spec for b in bundles), CLASS_WEIGHT=0.0, BOX_WEIGHT=2.0)
    terms = run(head, bundles)
    assert terms.keys() == {"box"}
    assert terms["box"].item() == pytest.approx(2 * expected, abs=1e-5)


def test_without_foreground_it_divides_by_one():
    """And is finite without locations that are matched."""
    student, teacher = one_location()
    student.dense.labels = torch.tensor([[1, -1, 1]])
    terms = run(make_head(student.spec, teacher.spec, BOX_WEIGHT=0.0), (student, teacher))
    assert terms["cls"].item() == pytest.approx(3 * 0.25 * math.log(2))


# --- in real detectors ----------------------------------------------------------------------------

NAMES = {"cls": ("cls_subnet", "cls_score"), "box": ("bbox_subnet", "bbox_pred")}


def built(student: str, teacher_file: str, *opts) -> nn.Module:
    return build(distiller_config(detector_config(student), ["CrossKD"], teacher_file, opts))


def through(tower: nn.Sequential, level: Tensor, first: int, last: int) -> Tensor:
    """What the convolutions ``first`` to ``last`` of a tower make of a map, ReLUs included."""
    for layer in tower[2 * first : 2 * last]:
        level = layer(level)
    return level


def expected_terms(model, student, teacher, position: int) -> dict[str, float]:
    """Both terms, level by level, with boxes decoded at their anchors; ``position`` is i."""
    mine, theirs, head = model.student.head, model.teacher.model, model.distill_heads["CrossKD"]
    classes, boxes = 0.0, []
    all_anchors = theirs.anchor_generator(list(teacher.pyramid.values()))
    for stride, anchors in zip(teacher.pyramid, all_anchors, strict=True):
        maps = {}
        for branch, (name, prediction) in NAMES.items():
            level = through(getattr(mine, name), student.pyramid[stride], 0, position)
            level = head.adapters[branch](level)
            crossed = through(getattr(theirs.head, name), level, position, 2)
            own = getattr(theirs.head, name)(teacher.pyramid[stride])
            predict = getattr(theirs.head, prediction)
            maps[branch] = predict(crossed), predict(own)
        q, p = (x.sigmoid() for x in maps["cls"])
        entropy = nn.functional.binary_cross_entropy(q, p, reduction="none")
        classes += ((p - q).abs() * entropy).sum().item()
        rows = (m.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4) for m in maps["box"])
        decode, anchors = theirs.box2box_transform.apply_deltas, anchors.tensor.repeat(2, 1)
        boxes.append([decode(deltas, anchors) for deltas in rows])
    labels = student.dense.labels
    foreground = ((labels >= 0) & (labels < 3)).sum().item()
    s, t = (torch.cat(one) for one in zip(*boxes, strict=True))
    return {
        "cls": classes / max(foreground, 1),
        "box": generalized_box_iou_loss(s, t, reduction="mean").item(),
    }


@pytest.mark.parametrize("convs", [0, 1, 2])
@pytest.mark.parametrize(
    "student, teacher",
    [("retinanet", "retinanet"), ("fcos", "fcos"), ("fcos", "retinanet"), ("retinanet", "fcos")],
)
def test_equals_loops_over_levels(student, teacher, convs, teacher_files, monkeypatch):
    """Any two one-stage detectors, from any position: anchors, classes and coding of boxes are the
    teacher's on both sides."""
    model = built(student, teacher_files[teacher], "DISTILL.CROSS_KD.TEACHER_CONVS", convs)
    head, found = model.distill_heads["CrossKD"], {}
    # FCOS's boxes at random weights have no area to speak of.
    nn.init.constant_(model.teacher.model.head.bbox_pred.bias, 0.3)
    forward = head.forward

    def spy(mine, theirs, batch):
        terms = forward(mine, theirs, batch)
        found.update({name: loss.item() for name, loss in terms.items()})
        with torch.no_grad():
            expected = expected_terms(model, mine, theirs, 2 - convs)
        assert found == pytest.approx(expected, rel=1e-4)
        return terms

    monkeypatch.setattr(head, "forward", spy)
    run_step(model, make_batch())
    assert found.keys() == {"cls", "box"} and all(value > 0 for value in found.values())


def test_the_students_last_layers_are_left_to_the_labels(teacher_files):
    """Gradients reach the backbone, the first convolution of each tower and the adapters; not the
    layers that the teacher's replace, and no parameter of the teacher."""
    model = built("retinanet", teacher_files["retinanet"])
    losses = run_step(model, make_batch())
    sum(loss for name, loss in losses.items() if name.startswith("loss_kd")).backward()
    head = model.student.head
    for tower, prediction in (
        (head.cls_subnet, head.cls_score),
        (head.bbox_subnet, head.bbox_pred),
    ):
        assert tower[0].weight.grad.abs().sum() > 0
        assert all(p.grad is None for layer in (tower[2], prediction) for p in layer.parameters())
    assert model.student.backbone.fpn_output3.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.distill_heads.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_no_adapter_for_equal_channels(tmp_path):
    """Then the head has no parameters."""
    file = write_config(detector_config("retinanet"), tmp_path / "teacher.yaml")
    assert not list(built("retinanet", file).distill_heads.parameters())


def test_other_classes_and_fewer_levels(tmp_path):
    """A teacher of other classes that reads two levels only: what both heads read is compared."""
    cfg = detector_config("retinanet", num_classes=7)
    cfg.MODEL.RETINANET.IN_FEATURES = ["p4", "p5"]
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    model = built("retinanet", write_config(cfg, tmp_path / "teacher.yaml"))
    assert model.distill_heads["CrossKD"].strides == (16, 32)
    losses = run_step(model, make_batch())
    assert losses["loss_kd_cross_kd_cls"] > 0 and losses["loss_kd_cross_kd_box"] > 0
    fewer = dataclasses.replace(model.teacher_spec, head_strides=(256,))
    with pytest.raises(ConfigError, match=r"no level is read by both heads: .* \[256\]"):
        build_head("CrossKD", detector_config(), model.taps.spec, fewer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teachers_own_precision(precision, teacher_files):
    """It may differ from the student's mixed precision; losses are float32."""
    model = built("fcos", teacher_files["fcos"], "DISTILL.TEACHER.PRECISION", precision)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run_step(model, make_batch(size=(160, 160)))
    terms = [loss for name, loss in losses.items() if name.startswith("loss_kd")]
    assert len(terms) == 2 and all(x.dtype == torch.float32 and x.isfinite() for x in terms)
    sum(terms).backward()


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"TEACHER_CONVS": 3}, "CROSS_KD.TEACHER_CONVS is 3, but the towers of the student have 2"),
        ({"TEACHER_CONVS": -1}, "CROSS_KD.TEACHER_CONVS is -1; it must be 0 or positive"),
        ({"FOCUS": 0.5}, "CROSS_KD.FOCUS is 0.5; it must be 0 or at least 1"),
        ({"CLASS_WEIGHT": 0.0, "BOX_WEIGHT": 0.0}, "nothing to distil"),
    ],
)
def test_bad_values_are_refused(opts, message):
    """One line names the key and what is valid."""
    with pytest.raises(ConfigError, match=message):
        make_head(make_spec("student"), make_spec("teacher"), **opts)


@pytest.mark.parametrize(
    "student, teacher",
    [p for p in itertools.product(("faster", "retinanet"), repeat=2) if "faster" in p],
)
def test_two_stage_detectors_are_refused(student, teacher, teacher_files):
    """The message says which one, and what works."""
    with pytest.raises(ConfigError, match="CrossKD is for one-stage .*heads on the pyramid"):
        built(student, teacher_files[teacher])


def test_heads_without_towers_are_refused():
    """As a detector of a user's may have."""
    spec = make_spec("teacher", fields=frozenset({"pyramid", "dense.logits", "dense.deltas"}))
    with pytest.raises(ConfigError, match="CrossKD reads dense.finish_tower of the teacher"):
        make_head(make_spec("student"), dataclasses.replace(spec, tower_channels=()))
