"""The head MAR (reconstruction) on small detectors: terms, gradients, sites, advice, bad values."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes, Instances

from d2kd import ConfigError, Distiller, Teacher
from d2kd.commands import show
from d2kd.detectors.spec import describe_detector
from d2kd.heads import build_head
from d2kd.heads.mar import Advice, advise
from d2kd.losses.mar import mask_guided_loss, pixel_weights, relation_loss
from d2kd.schedules import Schedule
from tests.detectors import (
    ARCHS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)

TERMS = ("loss_kd_mar_mask", "loss_kd_mar_relation")


@pytest.fixture
def distiller(tmp_path):
    """Function (arch, opts, teacher_width) -> a Distiller with the head MAR from iteration 0."""

    def make(arch: str = "faster", opts: tuple = (), width: int = 24):
        teacher = write_config(detector_config(arch, width=width), tmp_path / "teacher.yaml")
        opts = ("DISTILL.MAR.SCHEDULE.WARMUP_ITERS", 0, *opts)
        return build(distiller_config(detector_config(arch), ["MAR"], teacher, opts))

    return make


def backward(model, losses: dict) -> None:
    model.zero_grad()
    sum(losses.values()).backward()


def gradient(module) -> float:
    """Sum of the absolute gradients of a module's parameters, all of which must have one."""
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    assert gradients and all(g is not None for g in gradients)
    assert all(torch.isfinite(g).all() for g in gradients)
    return float(sum(g.abs().sum() for g in gradients))


def replace_boxes(batch: list[dict], boxes: torch.Tensor) -> list[dict]:
    """Give the first image of ``batch`` other boxes, all of class 0."""
    instances = Instances(batch[0]["instances"].image_size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return [{**batch[0], "instances": instances}, *batch[1:]]


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients(distiller, arch):
    """Adapters, FPN and class tower learn from MAR alone; the teacher does not."""
    model = distiller(arch)
    losses = run_step(model, make_batch())
    backward(model, {name: losses[name] for name in TERMS})
    assert all(losses[name] > 0 for name in TERMS)
    assert gradient(model.distill_heads) > 0
    assert sum(float(p.grad.abs().sum()) for p in model.student.backbone.parameters()) > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())
    if arch == "retinanet":
        backward(model, {"relation": run_step(model, make_batch())[TERMS[1]]})
        assert gradient(model.student.head.cls_subnet) > 0


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
@pytest.mark.parametrize("objects", [(0, 0), (0, 3), (300, 1)])
def test_number_of_objects(distiller, arch, objects):
    """No objects, none in one image, and 300 of them: finite losses, no gradient missing."""
    model = distiller(arch)
    losses = run_step(model, make_batch(objects))
    assert all(torch.isfinite(loss) for loss in losses.values())
    backward(model, losses)
    learned = gradient(model.distill_heads)
    assert learned == 0 if objects == (0, 0) else learned > 0
    if objects == (0, 0):
        assert losses["loss_kd_mar_mask"] == 0


def test_degenerate_boxes(distiller):
    """Boxes without area give the masks nothing: the term and its gradients are zero."""
    model = distiller("faster", ("DISTILL.MAR.RELATION.WEIGHT", 0.0))
    boxes = torch.tensor([[5.0, 5, 5, 30], [8, 9, 20, 9], [3, 3, 3, 3]])
    losses = run_step(model, replace_boxes(make_batch((1, 0)), boxes))
    assert losses["loss_kd_mar_mask"] == 0
    backward(model, {"mask": losses["loss_kd_mar_mask"]})
    assert gradient(model.distill_heads) == 0


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_zero_maps(distiller, arch):
    """A student whose FPN gives nothing but zeros has finite losses and gradients."""
    model = distiller(arch)
    with torch.no_grad():
        for name, parameter in model.student.backbone.named_parameters():
            if name.startswith(("fpn_output", "top_block")):
                parameter.zero_()
    losses = run_step(model, make_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    backward(model, losses)
    assert gradient(model.distill_heads) > 0


@pytest.mark.parametrize("site", ["roi_pixels", "rpn_dense", "roi_vectors"])
@pytest.mark.parametrize("arch", ["faster", "cascade"])
def test_two_stage_sites(distiller, arch, site):
    """Each two-stage relation site gives a positive, finite term, also without objects."""
    model = distiller(arch, ("DISTILL.MAR.RELATION.SITE", site, "DISTILL.MAR.MASK.WEIGHT", 0.0))
    losses = run_step(model, make_batch())
    assert TERMS[0] not in losses
    assert 0 < losses[TERMS[1]] < float("inf")
    without = run_step(model, make_batch((0, 0)))[TERMS[1]]
    assert torch.isfinite(without)
    assert without == 0 if site == "roi_pixels" else without > 0


def test_roi_vectors_keep_images_apart(distiller):
    """The relation between RoI vectors is the mean of the images' own, whatever their numbers."""
    model = distiller("faster", ("DISTILL.MAR.RELATION.SITE", "roi_vectors"))
    seen = {}
    head = model.distill_heads["MAR"]
    head.register_forward_pre_hook(
        lambda _, inputs: (
            seen.update(s=inputs[0].roi.hidden, t=inputs[1].roi.hidden)
            or seen.update(counts=[len(b) for b in inputs[0].roi.boxes])
        )
    )
    model.student.roi_heads.batch_size_per_image = 16
    value = run_step(model, make_batch((1, 4)))[TERMS[1]]
    student, teacher = seen["s"].split(seen["counts"]), seen["t"].split(seen["counts"])
    each = [relation_loss(s.T[None], t.T[None]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(value, sum(each) / 2)


def test_identical_teacher_at_the_start(distiller):
    """Identity adapters change nothing: a teacher equal to the student gives a loss of zero, but
    for the rounding of its folded norms."""
    model = distiller("retinanet", ("DISTILL.MAR.RELATION.SITE", "class_tower"), width=16)
    model.student.backbone.eval()  # BN as in the teacher
    model.student.head.eval()
    model.teacher.model.load_state_dict(model.student.state_dict())
    losses = run_step(model, make_batch())
    assert losses[TERMS[0]].item() == pytest.approx(0, abs=1e-6)
    assert losses[TERMS[1]].item() == pytest.approx(0, abs=1e-4)


def test_terms_are_the_losses(distiller):
    """The mask term is 3 times the loss on the pyramid; doubling WEIGHT doubles it."""
    seen = {}
    for weight in (1.0, 2.0):
        model = distiller("faster", ("DISTILL.MAR.WEIGHT", weight))
        head = model.distill_heads["MAR"]

        def record(head, inputs):
            student, teacher, batch = inputs
            masks = head.build_masks(student, batch.gt_boxes)
            seen["loss"] = mask_guided_loss(
                [head.adapters(s, student.pyramid[s]) for s in head.strides],
                [teacher.pyramid[s] for s in head.strides],
                [masks[s] for s in head.strides],
            )

        head.register_forward_pre_hook(record)
        value = run_step(model, make_batch())[TERMS[0]].item()
        assert value == pytest.approx(3 * weight * seen["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["balanced", "uniform"])
def test_relation_on_the_class_tower(distiller, mode):
    """On maps: 10 times the mean over levels, with the masks' weights of the configured mode."""
    model = distiller("retinanet", ("DISTILL.MAR.RELATION.PIXEL_WEIGHTS", mode))
    seen = {}

    def record(head, inputs):
        student, teacher, batch = inputs
        masks = head.build_masks(student, batch.gt_boxes)
        seen["losses"] = [
            relation_loss(
                student.dense.class_tower[s].flatten(2),
                teacher.dense.class_tower[s].flatten(2),
                pixel_weights(masks[s].flatten(1), [masks[s][0].numel()], mode),
            )
            for s in (8, 16, 32, 64, 128)
        ]

    model.distill_heads["MAR"].register_forward_pre_hook(record)
    value = run_step(model, make_batch())[TERMS[1]]
    torch.testing.assert_close(value, 10 * sum(seen["losses"]) / 5)


@pytest.mark.parametrize(
    "arch, site, needed",
    [
        ("faster", "roi_pixels", False),
        ("faster", "roi_vectors", False),
        ("faster", "rpn_dense", True),
        ("retinanet", "class_tower", True),
    ],
)
def test_masks_are_built_where_they_are_read(distiller, arch, site, needed, monkeypatch):
    """Without the mask-guided term, relations inside RoIs need neither masks nor anchors."""
    opts = ("DISTILL.MAR.MASK.WEIGHT", 0.0, "DISTILL.MAR.RELATION.SITE", site)
    model = distiller(arch, opts)
    head = model.distill_heads["MAR"]
    assert bool(head.student_reads) == needed
    built, build_masks = [], head.build_masks
    monkeypatch.setattr(head, "build_masks", lambda *args: built.append(1) or build_masks(*args))
    losses = run_step(model, make_batch())
    assert bool(built) == needed
    assert losses["loss_kd_mar_relation"] > 0 and "loss_kd_mar_mask" not in losses


def test_relation_on_roi_pixels(distiller):
    """On RoIs: the mean over those that the student's sampler matched to an object."""
    model = distiller("faster")
    seen = {}

    def record(head, inputs):
        student, teacher, _ = inputs
        positive = [i for i, label in enumerate(student.roi.labels.tolist()) if label < 3]
        seen["losses"] = [
            relation_loss(
                student.roi.features[i : i + 1].flatten(2),
                teacher.roi.features[i : i + 1].flatten(2),
            )
            for i in positive
        ]
        seen["rois"] = len(student.roi.labels)

    model.distill_heads["MAR"].register_forward_pre_hook(record)
    value = run_step(model, make_batch())[TERMS[1]]
    assert 0 < len(seen["losses"]) < seen["rois"]
    torch.testing.assert_close(value, sum(seen["losses"]) / len(seen["losses"]))


def test_pseudo_anchors(distiller):
    """Pseudo-anchors, and all mask kinds, work with every detector."""
    for arch in ("faster", "retinanet"):
        model = distiller(arch, ("DISTILL.MAR.MASK.ANCHORS", "pseudo"))
        assert model.distill_heads["MAR"].anchors == ""
        for kind in ("count", "binary", "iou", "gauss", "zones", "roi_level"):
            opts = ("DISTILL.MAR.MASK.ANCHORS", "pseudo", "DISTILL.MAR.MASK.KIND", kind)
            assert 0 < run_step(distiller(arch, opts), make_batch())[TERMS[0]] < float("inf")


def fcos() -> FCOS:
    """An anchor-free detector on the small RetinaNet's backbone."""
    backbone = build_backbone(detector_config("retinanet"))
    names = ["p3", "p4", "p5", "p6", "p7"]
    shapes = [backbone.output_shape()[name] for name in names]
    head = FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[16, 16])
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=names,
        num_classes=3,
        pixel_mean=[100.0, 110.0, 120.0],
        pixel_std=[57.0, 57.0, 57.0],
    )


def test_anchor_free():
    """FCOS distils from FCOS: its points are no anchors, so pseudo-anchors make the masks."""
    torch.manual_seed(0)
    student, teacher = fcos(), Teacher(fcos())
    spec = describe_detector(student, "student")
    head = build_head("MAR", detector_config("retinanet"), spec, teacher.describe(spec))
    assert head.anchors == ""
    schedules = {"MAR": Schedule(weight=1.0, start=0, stop=10)}
    model = Distiller(student=student, teacher=teacher, heads={"MAR": head}, schedules=schedules)
    losses = run_step(model.train(), make_batch())
    assert all(0 < losses[name] < float("inf") for name in TERMS)


def test_default_weights(distiller):
    """RELATION.WEIGHT None is 10 on maps and 1 on RoIs; a number is taken as it is."""
    for arch, opts, expected in (
        ("faster", (), {"mask": 3, "relation": 1}),
        ("retinanet", (), {"mask": 3, "relation": 10}),
        ("retinanet", ("DISTILL.MAR.RELATION.WEIGHT", 2.5), {"mask": 3, "relation": 2.5}),
        ("retinanet", ("DISTILL.MAR.RELATION.WEIGHT", 0.0), {"mask": 3}),
    ):
        assert distiller(arch, opts).distill_heads["MAR"].weights == expected


@pytest.mark.parametrize(
    "arch, key, value, said",
    [
        ("faster", "MASK.KIND", "counts", "'count', 'binary'"),
        ("faster", "RELATION.SITE", "neck", "'roi_pixels'"),
        ("faster", "RELATION.SITE", "class_tower", "dense.class_tower"),
        ("retinanet", "RELATION.SITE", "rpn_dense", "rpn.features"),
        ("retinanet", "RELATION.PIXEL_WEIGHTS", "even", "'uniform'"),
        ("retinanet", "STRIDES", [4], r"no level of stride \[4\]"),
        ("retinanet", "ADAPTER", "maybe", "'always'"),
        ("retinanet", "ADAPTER_KERNEL", 2, r"valid: \[1, 3\]"),
        ("retinanet", "MASK.IOU_RATIO", 1.0, "below 1"),
    ],
)
def test_bad_values(distiller, arch, key, value, said):
    """A wrong value, or one the pair cannot serve, fails at build and says what is valid."""
    with pytest.raises(ConfigError, match=said):
        distiller(arch, (f"DISTILL.MAR.{key}", value))


def test_advice(distiller, caplog):
    """The advice comes once, after ADVICE_ITER iterations, and changes no weight."""
    opts = ("DISTILL.MAR.ADVICE_ITER", 4, "SOLVER.MAX_ITER", 20)
    model = distiller("faster", opts)
    logger = logging.getLogger("d2kd.heads.mar")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="d2kd.heads.mar"):
            for iteration in range(7):
                run_step(model, make_batch(), iteration=iteration)
    finally:
        logger.removeHandler(caplog.handler)
    lines = sorted({r.message for r in caplog.records if "MAR (reconstruction)" in r.message})
    assert len(lines) == 2
    assert "mask term" in lines[0] and "relation term" in lines[1]
    assert model.distill_heads["MAR"].weights["mask"] == 3


@pytest.mark.parametrize("arch, stride", [("faster", 16), ("retinanet", 32)])
def test_masks_do_not_depend_on_the_levels_in_use(distiller, arch, stride):
    """An object takes part in a level by the best anchor of all levels, those out of use too."""
    masks = []
    for strides in ([], [stride]):
        model = distiller(arch, ("DISTILL.MAR.STRIDES", strides))
        head = model.distill_heads["MAR"]
        build = head.build_masks
        head.build_masks = lambda *args, build=build: masks.append(build(*args)) or masks[-1]
        run_step(model, make_batch())
    every, one = masks
    assert one.keys() == {stride} and len(every) == 5
    torch.testing.assert_close(one[stride], every[stride])


def test_relations_need_a_level_of_the_head(distiller):
    """STRIDES without a level of the relation's maps is refused when the head is built."""
    with pytest.raises(ConfigError, match=r"on the levels of stride \[8, 16, 32, 64\].*\[4\]"):
        opts = ("DISTILL.MAR.STRIDES", [4], "DISTILL.MAR.RELATION.SITE", "rpn_dense")
        levels = ("MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"])
        sizes = ("MODEL.ANCHOR_GENERATOR.SIZES", [[16]])
        distiller("faster", (*opts, *levels, *sizes))


@pytest.mark.parametrize(
    "share, expected",
    [(0.2, "stays at 3"), (0.02, "WEIGHT 30 would"), (2.0, "WEIGHT 0.3 would"), (0.0, "stays")],
)
def test_advice_arithmetic(share, expected):
    """The advised weight brings a term of the given share to the middle of 10 to 40 %."""
    assert expected in advise("mask", share, 3.0)


def test_advice_speaks_for_the_reconstruction():
    """The ranges are this project's: the line gives them to no paper."""
    for term, span in (("mask", "10% to 40%"), ("relation", "5% to 20%")):
        line = advise(term, 1.0, 1.0)
        assert line.startswith("MAR (reconstruction): ")
        assert f"this reconstruction aims at {span}" in line


def test_advice_window():
    """The advice averages the second half of its window and speaks of full weight."""

    class Step:
        def __init__(self, iteration):
            self.iteration, self.student_losses = iteration, {"loss": torch.tensor(2.0)}

    advice, said = Advice(4, start_iter=10, weight=2.0), []
    advice._log = lambda sums, weights: said.append(sums)
    for iteration in range(10, 18):
        advice.update(Step(iteration), {"mask": torch.tensor(float(iteration))}, {"mask": 3.0})
    assert said == [{"mask": 2.0 * (12 + 13), "detection": 4.0}]
    # A head that stops with the window has spoken.
    advice = Advice(4)
    advice._log = lambda sums, weights: said.append(sums)
    for iteration in range(4):
        advice.update(Step(iteration), {"mask": torch.tensor(1.0)}, {"mask": 3.0})
    assert len(said) == 2


def test_tool_draws_the_masks(tmp_path, digits_root):
    """d2kd show writes a picture, and needs neither teacher nor weights."""
    cfg = distiller_config(detector_config("retinanet", num_classes=10), ["MAR"], "missing.yaml")
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    config, picture = write_config(cfg, tmp_path / "mar.yaml"), tmp_path / "masks.png"
    show.main(["--config-file", config, "--kinds", "count", "gauss", "--output", str(picture)])
    assert picture.stat().st_size > 10_000
