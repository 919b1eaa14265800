"""The MaskMimic head: its terms, beside every method, and the pairs that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch, FeatureBundle, MaskView
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads import MaskMimic, build_head

from ..detectors import build, detector_config, distiller_config, make_batch, run_step, write_config

K = 3
METHODS = ("DSIG", "DRKD", "GlobalKnowledge", "SSIM", "MAR")
FIELDS = frozenset({"pyramid", "roi", "mask", "mask.features", "mask.logits"})


def spec(role: str, channels: int = 4, **kwargs) -> DetectorSpec:
    known = {"num_classes": K, "mask_strides": (4, 8), "mask_resolution": 3, "fields": FIELDS}
    return DetectorSpec(role, "GeneralizedRCNN", {4: channels, 8: channels}, **known | kwargs)


def make_head(student: DetectorSpec, teacher: DetectorSpec, **opts) -> MaskMimic:
    """The head as a config builds it."""
    cfg = detector_config("mask")
    for key, value in opts.items():
        cfg.DISTILL.MASK_MIMIC[key] = value
    torch.manual_seed(0)
    head = build_head("MaskMimic", cfg, student, teacher)
    assert isinstance(head, MaskMimic)
    return head


def bundles(rois: int, student: DetectorSpec, teacher: DetectorSpec, masks=(K, K), sides=(6, 6)):
    """Both bundles with random mask features and logits on ``rois`` RoIs."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(K, (rois,), generator=generator)
    return [
        FeatureBundle(
            s,
            mask=MaskView(
                s.role,
                labels=labels,
                features=torch.randn(
                    rois, s.channels[4], 3, 3, generator=generator
                ).requires_grad_(),
                logits=torch.randn(rois, n, side, side, generator=generator).requires_grad_(),
            ),
        )
        for s, n, side in zip((student, teacher), masks, sides, strict=True)
    ]


def bernoulli_kl(s: float, t: float) -> float:
    p, q = (1 / (1 + math.exp(-x)) for x in (t, s))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("agnostic", [False, True])
def test_terms_equal_loops(agnostic):
    """Both terms, with weights, temperature and a wider teacher, against loops over RoIs, channels
    and pixels; a class-agnostic teacher answers with its only mask."""
    pair = spec("student"), spec("teacher", 5, class_agnostic_mask=agnostic)
    head = make_head(*pair, LOGITS_WEIGHT=2.0, FEATURES_WEIGHT=0.5, TEMPERATURE=3.0)
    student, teacher = bundles(2, *pair, masks=(K, 1 if agnostic else K))
    terms = head(student, teacher, Batch([], []))

    mine, theirs = student.mask, teacher.mask
    logits, features = 0.0, 0.0
    weight, bias = head.adapter.weight.detach()[:, :, 0, 0], head.adapter.bias.detach()
    for roi, label in enumerate(mine.labels.tolist()):
        for y in range(6):
            for x in range(6):
                s = mine.logits[roi, label, y, x].item() / 3
                t = theirs.logits[roi, 0 if agnostic else label, y, x].item() / 3
                logits += 2.0 * 9 * bernoulli_kl(s, t) / (2 * 36)
        for c in range(5):
            for y in range(3):
                for x in range(3):
                    s = bias[c].item() + sum(
                        weight[c, i].item() * mine.features[roi, i, y, x].item() for i in range(4)
                    )
                    features += 0.5 * (s - theirs.features[roi, c, y, x].item()) ** 2 / (2 * 5 * 9)
    assert terms.keys() == {"logits", "features"}
    assert terms["logits"].item() == pytest.approx(logits, rel=1e-4)
    assert terms["features"].item() == pytest.approx(features, rel=1e-4)
    sum(terms.values()).backward()
    assert mine.logits.grad.any() and mine.features.grad.any()
    assert theirs.logits.grad is None and theirs.features.grad is None


def test_without_foreground():
    """No foreground RoI: zero, and connected to the student and the adapter."""
    pair = spec("student"), spec("teacher", 5)
    head = make_head(*pair)
    student, teacher = bundles(0, *pair)
    terms = head(student, teacher, Batch([], []))
    assert [terms[name].item() for name in ("logits", "features")] == [0, 0]
    sum(terms.values()).backward()
    assert student.mask.logits.grad is not None and student.mask.features.grad is not None
    assert not head.adapter.weight.grad.any()


def test_masks_of_another_size_are_resized():
    """Equal constant masks of 6 and 12 pixels agree."""
    pair = spec("student"), spec("teacher")
    student, teacher = bundles(2, *pair, sides=(6, 12))
    for bundle in (student, teacher):
        bundle.mask.logits.data.fill_(0.7)
    terms = make_head(*pair, FEATURES_WEIGHT=0.0)(student, teacher, Batch([], []))
    assert terms.keys() == {"logits"}
    assert terms["logits"].item() == pytest.approx(0, abs=1e-6)


def distiller(teacher_file: str, *heads: str, opts: tuple = ()):
    """A Mask R-CNN student in the middle of its schedule, when every head runs."""
    cfg = distiller_config(detector_config("mask"), list(heads), teacher_file, opts)
    for head in heads:
        if head in ("GlobalKnowledge", "MAR"):
            node = {"GlobalKnowledge": "GLOBAL_KNOWLEDGE", "MAR": "MAR"}[head]
            cfg.DISTILL[node].SCHEDULE.START_ITER = cfg.DISTILL[node].SCHEDULE.WARMUP_ITERS = 0
    return build(cfg)


def distillation(losses: dict) -> dict:
    return {name: loss for name, loss in losses.items() if name.startswith("loss_kd_")}


@pytest.mark.parametrize("method", METHODS)
def test_beside_every_method(method, teacher_files):
    """Mask R-CNN with a method and MaskMimic: together they give the losses that each gives alone,
    and the mask head learns from the teacher; without objects all is finite."""
    file = teacher_files["mask"]
    together = distiller(file, method, "MaskMimic")
    losses = run_step(together, make_batch())
    found = distillation(losses)
    for name in (method, "MaskMimic"):
        single = distiller(file, name)
        single.distill_heads[name].load_state_dict(together.distill_heads[name].state_dict())
        for key, loss in distillation(run_step(single, make_batch())).items():
            assert found.pop(key).item() == loss.item(), key
    assert not found
    sum(losses[f"loss_kd_mask_mimic_{term}"] for term in ("logits", "features")).backward()
    assert together.student.roi_heads.mask_head.predictor.weight.grad.any()
    assert together.student.backbone.fpn_output2.weight.grad.any()

    losses = run_step(distiller(file, method, "MaskMimic"), make_batch((0, 0)))
    assert losses["loss_kd_mask_mimic_logits"] == losses["loss_kd_mask_mimic_features"] == 0
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)


def other_build(arch: str = "mask"):
    """A teacher whose mask head is wider, deeper, and predicts smaller masks."""
    cfg = detector_config(arch, width=24)
    cfg.MODEL.MASK_ON = True
    mask_head = cfg.MODEL.ROI_MASK_HEAD
    mask_head.NAME, mask_head.NUM_CONV = "MaskRCNNConvUpsampleHead", 2
    mask_head.CONV_DIM, mask_head.POOLER_RESOLUTION = 24, 7
    return cfg


@pytest.mark.parametrize("arch", ["mask", "cascade"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_mask_heads_of_different_build(arch, agnostic, tmp_path):
    """Mask heads of other width, depth and size, class-agnostic or not, also of a cascade."""
    cfg = other_build(arch)
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    model = distiller(write_config(cfg, tmp_path / "teacher.yaml"), "MaskMimic")
    losses = run_step(model, make_batch())
    assert losses["loss_kd_mask_mimic_logits"] > 0 and losses["loss_kd_mask_mimic_features"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_a_teacher_without_masks_serves_features(teacher_files):
    """A Faster R-CNN teacher has the features that a mask head reads, but no masks."""
    off = ("DISTILL.MASK_MIMIC.LOGITS_WEIGHT", 0.0)
    losses = run_step(distiller(teacher_files["faster"], "MaskMimic", opts=off), make_batch())
    assert set(distillation(losses)) == {"loss_kd_mask_mimic_features"}
    with pytest.raises(ConfigError, match="mask.logits of the teacher.*MASK_MIMIC.LOGITS_WEIGHT 0"):
        distiller(teacher_files["faster"], "MaskMimic")


@pytest.mark.parametrize(
    ("student", "teacher", "opts", "message"),
    [
        (
            {"mask_strides": (), "fields": frozenset({"pyramid"})},
            {},
            {},
            "reads mask of the student, .*MASK_ON",
        ),
        ({}, {"num_classes": 5}, {}, r"\(student: 3, teacher: 5\); .*LOGITS_WEIGHT 0"),
        ({}, {"fields": FIELDS - {"mask.features"}}, {}, "mask.features of the teacher.*FEATURES_"),
        (
            {},
            {},
            {"LOGITS_WEIGHT": 0.0, "FEATURES_WEIGHT": 0.0},
            "nothing to distil, as LOGITS_WEIGHT, FEATURES_WEIGHT are all 0",
        ),
        ({}, {}, {"TEMPERATURE": 0.0}, "TEMPERATURE is 0.0; it must be positive"),
        ({}, {}, {"LOGITS_WEIGHT": -1.0}, "LOGITS_WEIGHT is -1.0"),
    ],
)
def test_refused_pairs(student, teacher, opts, message):
    """What cannot be compared is refused in one line that names the key to do without it."""
    with pytest.raises(ConfigError, match=message) as error:
        make_head(spec("student", **student), spec("teacher", **teacher), **opts)
    assert "\n" not in str(error.value)


def test_the_mask_of_a_single_class_is_not_for_all(tmp_path):
    """A teacher of one class has one mask too, but of that class only."""
    teacher = write_config(detector_config("mask", num_classes=1), tmp_path / "teacher.yaml")
    with pytest.raises(ConfigError, match=r"\(student: 3, teacher: 1\); .*LOGITS_WEIGHT 0"):
        distiller(teacher, "MaskMimic")


def test_classes_do_not_matter_to_one_mask_for_all():
    """A class-agnostic teacher may know other classes."""
    teacher = spec("teacher", num_classes=5, class_agnostic_mask=True)
    assert make_head(spec("student"), teacher).weights == {"logits": 1.0, "features": 1.0}
