"""The Logits head: which outputs it compares on which boxes, and the pairs that it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch, DenseView, FeatureBundle, MaskView, RoIView
from d2kd.detectors.dense import flatten_maps
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads import Logits, build_head
from d2kd.losses import logits as losses

from ..detectors import build, detector_config, distiller_config, make_batch, run_step, write_config

K = 3
ROI_FIELDS = {"pyramid", "roi", "roi.logits", "roi.deltas"}
DENSE_FIELDS = {"pyramid", "dense.logits", "dense.deltas", "dense.labels", "dense.anchors"}


def two_stage_spec(role: str, **kwargs) -> DetectorSpec:
    known = {
        "num_classes": K,
        "num_stages": 2,
        "mask_resolution": 14,
        "box_coding": "Box2BoxTransform",
        "fields": frozenset(ROI_FIELDS | {"mask", "mask.logits"}),
    }
    return DetectorSpec(role, "GeneralizedRCNN", {4: 8}, **known | kwargs)


def dense_spec(role: str, **kwargs) -> DetectorSpec:
    known = {
        "num_classes": K,
        "anchors_per_location": 1,
        "box_coding": "Box2BoxTransform",
        "fields": frozenset(DENSE_FIELDS),
    }
    return DetectorSpec(role, "RetinaNet", {8: 8, 16: 8, 32: 8}, **known | kwargs)


def make_head(student: DetectorSpec, teacher: DetectorSpec, **opts) -> Logits:
    """The head as a config builds it."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.LOGITS[key] = value
    head = build_head("Logits", cfg, student, teacher)
    assert isinstance(head, Logits)
    return head


def two_stage_bundles() -> list[FeatureBundle]:
    """A cascade of two stages with masks; the teacher's deltas are in other units."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    labels = torch.tensor([0, K, 2, K])
    bundles = []
    for role, factor in (("student", 1.0), ("teacher", 3.0)):
        rois = [
            RoIView(
                role,
                labels=labels,
                logits=randn(4, K + 1),
                deltas=randn(4, 4 * K),
                delta_weights=(10 * factor, 10 * factor, 5 * factor, 5 * factor),
            )
            for _ in range(2)
        ]
        mask = MaskView(role, labels=labels[labels < K], logits=randn(2, K, 6, 6))
        bundles.append(FeatureBundle(two_stage_spec(role), rois=rois, mask=mask))
    return bundles


def dense_bundles(teacher_strides=(8, 16, 32)) -> list[FeatureBundle]:
    """Two images, three levels of 2 x 2, 1 x 2 and 1 x 1 locations with two anchors each."""
    generator = torch.Generator().manual_seed(0)
    sizes = {8: (2, 2), 16: (1, 2), 32: (1, 1)}
    labels = torch.tensor([K, 0, K, 1, -1, 2]).repeat(5)[:28].view(2, 14)
    bundles = []
    for role, strides in (("student", sizes), ("teacher", teacher_strides)):
        maps = {
            f"{name}_maps": {
                s: torch.randn(2, 2 * width, *sizes[s], generator=generator) for s in strides
            }
            for name, width in (("logit", K), ("delta", 4))
        }
        view = DenseView(role, labels=labels, delta_weights=(1.0,) * 4, **maps)
        bundles.append(FeatureBundle(dense_spec(role), dense=view))
    return bundles


def dense_losses(student, teacher, labels) -> dict[str, torch.Tensor]:
    """Both terms of flattened maps, (B, N, K) and (B, N, 4), one anchor a location."""
    foreground, count = (labels >= 0) & (labels < K), ((labels >= 0) & (labels < K)).sum()
    logits, deltas = (
        [flatten_maps(getattr(x, name), width) for x in (student.dense, teacher.dense)]
        for name, width in (("logit_maps", K), ("delta_maps", 4))
    )
    logits, deltas = (
        [torch.cat([x[s] for s in both[1]], dim=1).mT[:, None] for x in both]
        for both in (logits, deltas)
    )
    return {
        "cls": losses.dense_class_loss(*logits, (labels >= 0)[:, None], count),
        "box": losses.dense_box_loss(*deltas, foreground[:, None], count),
    }


def run(head: Logits, bundles: list[FeatureBundle]) -> dict[str, torch.Tensor]:
    return head(*bundles, Batch([], []))


def test_two_stage_terms():
    """Class and box terms add up over the stages of a cascade; weights and options apply."""
    student, teacher = bundles = two_stage_bundles()
    head = make_head(
        student.spec, teacher.spec, CLASS_WEIGHT=2.0, BOX_WEIGHT=0.5, MASK_WEIGHT=3.0,
        TEMPERATURE=2.0, BOX_BETA=0.2,
    )  # fmt: skip
    pairs = list(zip(student.rois, teacher.rois, strict=True))
    expected = {
        "cls": 2 * sum(losses.roi_class_loss(s.logits, t.logits, 2.0) for s, t in pairs),
        "box": 0.5
        * sum(
            losses.roi_box_loss(
                s.deltas, t.deltas, s.labels, K, s.delta_weights, t.delta_weights, 0.2
            )
            for s, t in pairs
        ),
        "mask": 3
        * losses.mask_loss(student.mask.logits, teacher.mask.logits, student.mask.labels, 2.0),
    }
    terms = run(head, bundles)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_dense_terms():
    """Levels are joined fine to coarse, each anchor with its own label."""
    student, teacher = bundles = dense_bundles()
    terms = run(make_head(student.spec, teacher.spec), bundles)
    expected = dense_losses(student, teacher, student.dense.labels)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_dense_levels_that_only_one_has_are_left_out():
    """Labels stay with their level when the teacher lacks the first one."""
    student, teacher = bundles = dense_bundles(teacher_strides=(16, 32))
    terms = run(make_head(student.spec, teacher.spec), bundles)
    expected = dense_losses(student, teacher, student.dense.labels[:, 8:])
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_different_anchors_are_refused():
    """Deltas with respect to other anchors cannot be compared."""
    mine, theirs = (
        dataclasses.replace(dense_spec(role), anchors={8: (0.0, -8.0, 8.0), 16: (0.0, -size, size)})
        for role, size in (("student", 16.0), ("teacher", 24.0))
    )
    with pytest.raises(
        ConfigError, match=r"same anchors \(MODEL.ANCHOR_GENERATOR\) \(different at stride 16\)"
    ):
        make_head(mine, theirs)


def test_only_what_is_weighted_is_read():
    """A weight of 0 drops the term, and with it what it reads."""
    student, teacher = two_stage_spec("student"), two_stage_spec("teacher")
    head = make_head(student, teacher, BOX_WEIGHT=0.0, MASK_WEIGHT=0.0)
    assert set(head.reads) == {"roi.logits"}
    assert run(head, two_stage_bundles()).keys() == {"cls"}
    assert set(make_head(student, teacher).reads) == {"roi.logits", "roi.deltas", "mask.logits"}
    dense = make_head(dense_spec("student"), dense_spec("teacher"), CLASS_WEIGHT=0.0)
    assert set(dense.reads) == {"dense.deltas"}
    assert run(dense, dense_bundles()).keys() == {"box"}


def test_sigmoid_box_heads():
    """Box heads that are trained with a sigmoid per class are compared class by class."""
    student, teacher = bundles = two_stage_bundles()
    specs = (two_stage_spec(role, sigmoid_classes=True) for role in ("student", "teacher"))
    terms = run(make_head(*specs), bundles)
    expected = sum(
        losses.roi_class_loss(s.logits, t.logits, sigmoid=True)
        for s, t in zip(student.rois, teacher.rois, strict=True)
    )
    torch.testing.assert_close(terms["cls"], expected)


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"TEMPERATURE": 0.0}, "LOGITS.TEMPERATURE is 0.0; it must be positive"),
        ({"BOX_WEIGHT": -1.0}, "LOGITS.BOX_WEIGHT is -1.0; it must be 0 or positive"),
        ({"DENSE_FOCUS": 0.5}, "LOGITS.DENSE_FOCUS is 0.5; it must be 0 or at least 1"),
        ({"CLASS_WEIGHT": 0.0, "BOX_WEIGHT": 0.0}, "nothing to distil"),
    ],
)
def test_bad_values_are_refused(opts, message):
    """One line names the key and what is valid."""
    with pytest.raises(ConfigError, match=message):
        make_head(dense_spec("student"), dense_spec("teacher"), **opts)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (
            two_stage_spec("student"),
            dense_spec("teacher"),
            r"one kind \(student: two-stage, teacher: one-stage\); .*FeatureMimic",
        ),
        (
            dense_spec("student"),
            dense_spec("teacher", num_classes=80),
            r"number of classes \(student: 3, teacher: 80\)",
        ),
        (
            dense_spec("student", head_strides=(8, 16)),
            dense_spec("teacher", head_strides=(32, 64)),
            r"same anchors .*student: at strides \[8, 16\], teacher: at \[32, 64\]",
        ),
        (
            two_stage_spec("student"),
            two_stage_spec("teacher", fields=frozenset(ROI_FIELDS)),
            "MASK_WEIGHT 0",
        ),
        (
            dense_spec("student"),
            dense_spec("teacher", box_coding="Box2BoxTransformLinear"),
            "BOX_WEIGHT 0",
        ),
        (
            two_stage_spec("student", sigmoid_classes=True),
            two_stage_spec("teacher"),
            r"student: sigmoids, teacher: softmax\); DISTILL.LOGITS.CLASS_WEIGHT 0",
        ),
        (
            dense_spec("student"),
            dense_spec("teacher", anchors_per_location=9),
            r"anchors per location \(student: 1, teacher: 9\)",
        ),
    ],
)
def test_pairs_that_cannot_be_compared(student, teacher, message):
    """Outputs that do not mean the same are refused when the head is built."""
    with pytest.raises(ConfigError, match=message):
        make_head(student, teacher)


@pytest.mark.parametrize("arch", ["faster", "cascade", "mask", "retinanet"])
@pytest.mark.parametrize("objects", [(2, 3), (0, 2), (0, 0)], ids=["full", "half", "none"])
def test_trains_a_detector(arch, objects, teacher_files):
    """In a Distiller all terms and gradients are finite, with and without objects."""
    model = build(distiller_config(detector_config(arch), ["Logits"], teacher_files[arch]))
    step = run_step(model, make_batch(objects))
    terms = {k.rsplit("_", 1)[1]: v for k, v in step.items() if k.startswith("loss_kd_logits_")}
    assert terms.keys() == {"cls", "box"} | ({"mask"} if arch == "mask" else set())
    sum(terms.values()).backward()
    assert all(loss.isfinite() for loss in terms.values())
    gradients = [p.grad for p in model.student.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
    if not any(objects):
        assert terms["box"] == 0
    assert terms["cls"] > 0


@pytest.mark.parametrize("student, teacher", [("faster", "cascade"), ("cascade", "faster")])
def test_box_heads_of_different_kinds(student, teacher, teacher_files):
    """Cascade teaches Faster and the reverse: class-agnostic against class-specific deltas."""
    model = build(distiller_config(detector_config(student), ["Logits"], teacher_files[teacher]))
    step = run_step(model, make_batch())
    assert step["loss_kd_logits_cls"].isfinite() and step["loss_kd_logits_box"] > 0


def test_retinanet_with_other_anchors(tmp_path):
    """A RetinaNet teacher with other anchor sizes is refused when the model is built."""
    teacher = detector_config("retinanet", width=24)
    teacher.MODEL.ANCHOR_GENERATOR.SIZES = [
        [2 * size for size in level] for level in teacher.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    file = write_config(teacher, tmp_path / "teacher.yaml")
    with pytest.raises(ConfigError, match="different at stride 8"):
        build(distiller_config(detector_config("retinanet"), ["Logits"], file))
