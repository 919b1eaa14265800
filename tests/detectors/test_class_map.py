"""DISTILL.TEACHER.CLASS_MAP: terms of classes act on those that student and teacher share."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from d2kd import ConfigError
from d2kd.detectors.class_map import ClassMap, match_classes
from d2kd.losses.logits import binary_kl, mask_loss, roi_box_loss, roi_class_loss

from ..data.parts import CLASSES, Parts, forget_datasets
from . import build, distiller_config, make_batch, run_step, write_config

MINE, THEIRS = ("cat", "van", "dog"), ("dog", "tree", "cat", "sky")
SHARED = ClassMap((2, -1, 0), 4)


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "expected"),
    [
        (MINE, THEIRS, (), (2, -1, 0)),
        (MINE, THEIRS, [["van", "sky"], ["cat", 1]], (1, 3, 0)),
        (MINE, THEIRS, [["dog", ""]], (2, -1, -1)),
        (MINE, 4, [["van", 3]], (-1, 3, -1)),
        (3, 4, [[2, 0]], (-1, -1, 0)),
        (MINE, ("dog", "N/A", "N/A", "cat"), (), (3, -1, 0)),
        (MINE, MINE[::-1], (), (2, 1, 0)),
        (MINE, MINE, (), None),
        (MINE, ("a", "b", "c"), (), None),
        (3, 3, (), None),
        (3, 4, (), None),
        (MINE, None, (), None),
    ],
)
def test_matching(student, teacher, pairs, expected):
    """Names that are equal, and pairs; nothing where the classes are the same or unknown."""
    found = match_classes(student, teacher, pairs)
    assert (found and found.numbers) == expected
    assert found is None or found.width == (teacher if teacher == 4 else len(teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "message"),
    [
        (
            MINE,
            THEIRS,
            [["car", "sky"]],
            "the student has no class 'car'; its classes are cat, van, dog",
        ),
        (MINE, THEIRS, [["van", 4]], "the teacher has no class 4; .*; numbers go from 0 to 3"),
        (MINE, 4, [["van", "sky"]], "no class 'sky'.*no known names"),
        (MINE, THEIRS, ["van"], "'van' is not a pair"),
        (MINE, None, [["van", "sky"]], "the teacher predicts no classes"),
        (
            MINE,
            THEIRS,
            [["van", "sky"], [1, "tree"]],
            "class 1 is paired with 'sky' and 'tree', .*",
        ),
        (MINE, THEIRS, [["van", "cat"]], "class 'cat' is paired with 'cat' and 'van' .* with \"\""),
        (3, 4, [[0, 3], [2, 3]], "class 3 is paired with 0 and 2 of the student"),
    ],
)
def test_wrong_pairs(student, teacher, pairs, message):
    with pytest.raises(ConfigError, match=f"^DISTILL.TEACHER.CLASS_MAP: .*{message}"):
        match_classes(student, teacher, pairs)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_loss_is_that_of_the_shared_classes():
    """(1 - the student's belief in its own classes) times the KL divergence between the shared
    classes and background, which for the teacher has its other classes; no gradient elsewhere."""
    mine, theirs = logits(5, 4).requires_grad_(), logits(5, 5, seed=1)
    filled = SHARED.roi_logits(theirs, mine, sigmoid=False)
    roi_class_loss(mine, filled).backward()
    probability = theirs.softmax(1)
    target = torch.stack(
        [probability[:, 2], probability[:, 0], probability[:, [1, 3, 4]].sum(1)], dim=1
    )
    shared = mine.detach()[:, [0, 2, 3]]
    rest = 1 - mine.detach().softmax(1)[:, 1]
    expected = (rest * (target * (target.log() - shared.log_softmax(1))).sum(1)).mean()
    assert roi_class_loss(mine.detach(), filled).item() == pytest.approx(expected.item(), rel=1e-5)
    assert mine.grad[:, 1].abs().max() < 1e-6 < mine.grad[:, 0].abs().max()


def test_a_sigmoid_of_an_unknown_class_has_no_loss():
    """Each class is a distribution of its own: the shared ones are compared, no other."""
    mine, theirs = logits(5, 4), logits(5, 5, seed=1)
    filled = SHARED.roi_logits(theirs, mine, sigmoid=True)
    expected = (binary_kl(mine[:, 0], theirs[:, 2]) + binary_kl(mine[:, 2], theirs[:, 0])).mean()
    found = roi_class_loss(mine, filled, sigmoid=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("agnostic_teacher", [False, True])
@pytest.mark.parametrize("agnostic_student", [False, True])
def test_boxes_and_masks_of_shared_labels(agnostic_student, agnostic_teacher):
    """RoIs of the label "van" have no loss and no gradient; those of the others have the teacher's
    of their class, in other units and sizes too."""
    labels = torch.tensor([0, 1, 2, 3])
    width, other = (1 if agnostic_student else 3), (1 if agnostic_teacher else 4)
    mine, theirs = logits(4, 4 * width).requires_grad_(), logits(4, 4 * other, seed=1)
    own, weights = (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)
    filled = SHARED.roi_deltas(theirs, mine, weights, own)
    loss = roi_box_loss(mine, filled, labels, 3, weights, weights)
    loss.backward()
    rows = mine.detach().view(4, width, 4)
    gaps = [
        (rows[roi, label % width] - 3 * theirs[roi].view(other, 4)[number % other]).abs()
        for roi, label, number in ((0, 0, 2), (2, 2, 0))
    ]
    assert loss.item() == pytest.approx((sum(gaps).sum() / 4).item(), rel=1e-5)
    assert not mine.grad[1].any() and mine.grad[0].any()

    masks, theirs = logits(3, width, 4, 4).requires_grad_(), logits(3, other, 2, 2, seed=1)
    loss = mask_loss(masks, SHARED.masks(theirs, masks), labels[:3])
    loss.backward()
    assert masks.grad[1].abs().max() < 1e-7 < masks.grad[0].abs().max()
    assert math.isfinite(loss.item())


HEADS = {
    "mask": ("Logits", "DSIG", "MaskMimic", "GlobalKnowledge"),
    "retinanet": ("Logits", "DSIG", "GlobalKnowledge", "CrossKD"),
}


@pytest.mark.parametrize("arch", HEADS)
def test_a_teacher_of_other_classes_teaches(arch, tmp_path):
    """From files: a teacher that knows two of the student's three classes, and others. Terms of
    classes have a gradient, but none for the class that it does not know."""
    parts = Parts(tmp_path)
    other = json.loads(json.dumps(parts.train))
    names = ["ring", "gear", "nut", "wheel", "hub"]
    other["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    (tmp_path / "teacher.json").write_text(json.dumps(other))
    parts.write()
    student, teacher = (parts.config(arch) for _ in range(2))
    paths = str(tmp_path / "teacher.json"), str(tmp_path / "images")
    teacher.DATASETS.COCO_FORMAT = [["t", *paths]]
    teacher.DATASETS.TRAIN = ("t",)
    for node in (teacher.MODEL.ROI_HEADS, teacher.MODEL.RETINANET):
        node.NUM_CLASSES = len(names)
    opts = ("DISTILL.DSIG.MASK_WEIGHT", 1.0 if arch == "mask" else 0.0)
    file = write_config(teacher, tmp_path / "teacher.yaml")
    distiller = build(distiller_config(student, list(HEADS[arch]), file, opts))
    assert CLASSES == ("nut", "bolt", "ring")
    assert distiller.teacher_spec.class_map == ClassMap((2, -1, 0), len(names))
    losses = run_step(distiller, make_batch())
    terms = {name: loss for name, loss in losses.items() if "_kd_" in name}
    assert all(torch.isfinite(loss) for loss in terms.values())
    assert all(terms[f"loss_kd_{name}"] > 0 for name in ("logits_cls", "dsig_class"))
    if arch == "retinanet":
        bias = distiller.student.head.cls_score.bias
        for name in ("logits_cls", "dsig_class", "global_knowledge_soft"):
            (gradient,) = torch.autograd.grad(terms[f"loss_kd_{name}"], bias, retain_graph=True)
            nut, bolt, ring = gradient.view(-1, len(CLASSES)).abs().amax(0)
            assert bolt == 0 < min(nut, ring), name
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in distiller.student.backbone.parameters())


def test_classes_that_are_not_shared_stay_refused(tmp_path):
    """Without a common name the message says what pairs classes; with pairs it builds."""
    parts = Parts(tmp_path)
    parts.write()
    teacher = parts.config()
    teacher.DATASETS.TRAIN = ("t",)
    teacher.MODEL.ROI_HEADS.NUM_CLASSES = teacher.MODEL.RETINANET.NUM_CLASSES = 5
    file = write_config(teacher, tmp_path / "teacher.yaml")
    with pytest.raises(ConfigError, match="same number of classes .*CLASS_MAP pairs classes"):
        build(distiller_config(parts.config(), ["Logits"], file))
    opts = ("DISTILL.TEACHER.CLASS_MAP", [["nut", 4]])
    distiller = build(distiller_config(parts.config(), ["Logits"], file, opts))
    assert distiller.teacher_spec.class_map == ClassMap((4, -1, -1), 5)
