"""Towers of dense detectors: the student's maps on the way, and the rest of the teacher's head."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from torch import nn

from d2kd.detectors.spec import describe_detector
from d2kd.detectors.taps import Taps

from . import build, detector_config, make_batch
from .test_teacher import bundles

NAMES = {"cls": ("cls_subnet", "cls_score"), "box": ("bbox_subnet", "bbox_pred")}
# (meta-architecture, norm of its towers): none, shared by the levels, one per level.
HEADS = [("retinanet", ""), ("fcos", "GN"), ("retinanet", "BN"), ("fcos", "BN")]


def head_config(arch: str, norm: str, width: int = 16):
    """Three convolutions in each tower, of GN's smallest width at least."""
    cfg = detector_config(arch, width=max(width, 32) if norm == "GN" else width)
    node = cfg.MODEL.RETINANET if arch == "retinanet" else cfg.MODEL.FCOS
    node.NUM_CONVS, node.NORM = 3, norm
    return cfg


def build_teacher(arch: str, norm: str) -> nn.Module:
    """A teacher whose norms differ from level to level and from the identity."""
    model = build(head_config(arch, norm, 24), 1)
    for module in model.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.05)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def steps_of(tower: nn.Sequential) -> list[nn.Sequential]:
    """The tower cut before each convolution."""
    cuts = [i for i, layer in enumerate(tower) if isinstance(layer, nn.Conv2d)]
    return [tower[a:b] for a, b in zip(cuts, [*cuts[1:], len(tower)], strict=True)]


@pytest.mark.parametrize("arch, norm", HEADS)
def test_the_students_maps(arch, norm):
    """From the pyramid to the tower's output: each map is the next convolution's input, and what
    the student's own forward computed."""
    student, _, _ = bundles(arch, head_config(arch, norm), student_cfg=head_config(arch, norm))
    for branch, last in (("cls", student.dense.class_tower), ("box", student.dense.box_tower)):
        maps = student.dense.tower_maps[branch]
        assert list(maps) == list(student.pyramid) == [8, 16, 32, 64, 128]
        for stride, levels in maps.items():
            assert len(levels) == 1 + 3
            assert levels[0] is student.pyramid[stride] and levels[-1] is last[stride]
            assert [m.shape[1] for m in levels] == list(student.spec.tower_channels)
            assert all(m.requires_grad and (m >= 0).all() for m in levels[1:])


@pytest.mark.parametrize("arch, norm", HEADS)
@pytest.mark.parametrize("strides", [(8, 16, 32, 64, 128), (16, 64)])
def test_the_rest_of_the_teachers_head(arch, norm, strides):
    """On the teacher's own maps it gives the teacher's own predictions, from each position, also
    where levels are left out, and leaves the norms at the first level."""
    model = build_teacher(arch, norm)
    _, teacher, _ = bundles(arch, None, teacher_model=model)
    own = {"cls": teacher.dense.logit_maps, "box": teacher.dense.delta_maps}
    for branch, (tower, _) in NAMES.items():
        maps, steps = dict(teacher.pyramid), steps_of(getattr(model.head, tower))
        for count in (3, 2, 1, 0):
            found = teacher.dense.finish_tower(branch, {s: maps[s] for s in strides}, count)
            assert list(found) == list(strides)
            for stride in strides:
                torch.testing.assert_close(found[stride], own[branch][stride])
            for step in steps[:1]:  # to the next position, every level in order
                maps = {stride: step(level) for stride, level in maps.items()}
            steps = steps[1:]
    counters = [m for m in model.head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(counters) == (6 if norm == "BN" else 0) and all(m._pos == 0 for m in counters)


@pytest.mark.parametrize("arch, norm", HEADS)
def test_gradients_pass_the_teacher_and_stop_at_its_parameters(arch, norm):
    """The maps get those of the same layers by hand; parameters, frozen, get none."""
    model = build_teacher(arch, norm)
    _, teacher, _ = bundles(arch, None, teacher_model=model)
    width = teacher.spec.tower_channels[-2]
    mine = torch.randn(2, width, 4, 4, requires_grad=True)
    other = mine.detach().clone().requires_grad_()
    teacher.dense.finish_tower("box", {8: mine}, 1)[8].square().sum().backward()
    head = model.head
    head.bbox_pred(steps_of(head.bbox_subnet)[-1](other)).square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    assert mine.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "precision, dtype", [("", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_is_the_teachers(precision, dtype):
    """Whatever the type of the student's maps: DISTILL.TEACHER.PRECISION, or the student's."""
    batch = make_batch(size=(160, 160))
    with torch.autocast("cpu", torch.bfloat16):
        _, teacher, _ = bundles(
            "retinanet", head_config("retinanet", ""), batch, precision=precision
        )
        mine = torch.randn(2, 16, 4, 4, requires_grad=True)
        found = teacher.dense.finish_tower("cls", {8: mine.bfloat16()}, 1)[8]
    assert found.dtype == dtype
    found.float().sum().backward()
    assert mine.grad.dtype == torch.float32


class Doubled(nn.Module):
    """A tower that is no sequence."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return 2 * self.tower(x)


def test_towers_that_cannot_be_cut():
    """A head whose towers are no sequences of convolutions, or differ in width, has the outputs
    only; one activation behind all convolutions, as in detectors of users, is no obstacle."""
    fields = {"dense.tower_maps", "dense.finish_tower"}
    model = build(detector_config("retinanet"))
    spec = describe_detector(model, "student")
    assert fields & spec.fields == {"dense.tower_maps"}
    assert fields & describe_detector(model, "teacher", spec).fields == {"dense.finish_tower"}
    assert spec.tower_channels == (16, 16, 16)

    convolution, activation = model.head.cls_subnet[0], nn.ReLU(inplace=True)
    model.head.cls_subnet = nn.Sequential(convolution, activation, convolution, activation)
    assert not fields & describe_detector(model, "student").fields  # one convolution twice
    layers = [layer for _ in range(2) for layer in (nn.Conv2d(16, 16, 3, padding=1), activation)]
    model.head.cls_subnet = nn.Sequential(*layers)
    taps = Taps(model, describe_detector(model, "student"))
    assert {"head.cls_subnet.0", "head.cls_subnet.2"} <= tapped(taps)
    model.head.bbox_subnet = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 1))
    assert not fields & describe_detector(model, "student").fields  # of other widths
    model.head.bbox_subnet = Doubled(nn.Conv2d(16, 16, 3, padding=1))
    spec = describe_detector(model, "student")
    assert not fields & spec.fields and {"dense.logits", "dense.box_tower"} <= spec.fields


def tapped(taps: Taps) -> set[str]:
    """Paths that one forward of the student records."""
    from . import run_step

    with taps:
        run_step(taps.student, make_batch())
    return set(taps._calls)
