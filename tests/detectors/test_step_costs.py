"""What a step asks of the device: nothing is copied, matched or computed twice, nothing waits."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import BitMasks, Boxes, Keypoints, PolygonMasks

from d2kd import DISTILL_HEAD_REGISTRY, DistillHead, Teacher
from d2kd.benchmark.counts import count_operators
from d2kd.config import HeadOptions
from d2kd.detectors.inputs import to_device
from d2kd.geometry.anchors import grid_anchors

from . import (
    ARCHS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)


class ReadsAll(DistillHead):
    """Reads each field that the pair can serve, and pools boxes of its own from both pyramids."""

    reads = ()

    @configurable
    def __init__(self, *, specs):
        super().__init__()
        self.specs = specs

    @classmethod
    def from_config(cls, cfg, student_spec, teacher_spec):
        return {"specs": (student_spec, teacher_spec)}

    def forward(self, student, teacher, batch):
        total = 0.0
        for bundle, spec in zip((student, teacher), self.specs, strict=True):
            for field in spec.fields:
                part, _, name = field.partition(".")
                value = getattr(bundle, part)
                total = total + tensor_sum(getattr(value, name) if name else value)
            common = [s for s in self.specs[0].strides if s in self.specs[1].strides]
            total = total + bundle.pool(batch.gt_boxes, strides=common).float().sum()
        for view in student.rois if "roi" in self.specs[0].fields else ():
            total = total + view.labels.sum() + view.image_index.sum()
        return {"": total * 1e-9}


def tensor_sum(value):
    if isinstance(value, torch.Tensor):
        return value.float().sum()
    if hasattr(value, "values"):  # maps by stride
        return tensor_sum(list(value.values()))
    if isinstance(value, list):
        return sum(tensor_sum(item) for item in value)
    return 0.0  # a function, or a view, whose fields have names of their own


@pytest.fixture(autouse=True)
def reads_all():
    DISTILL_HEAD_REGISTRY.register(ReadsAll)
    yield
    del DISTILL_HEAD_REGISTRY._obj_map["ReadsAll"]


def distiller(student_cfg, teacher_file: str, *heads: str, opts=()):
    HeadOptions.add_to(student_cfg.DISTILL.setdefault("READS_ALL", CfgNode()))
    return build(distiller_config(student_cfg, list(heads), teacher_file, opts))


PAIRS = [(arch, arch) for arch in ARCHS] + [
    ("retinanet", "faster"),
    ("faster", "retinanet"),
    ("fcos", "retinanet"),
    ("mask", "cascade_mask"),
    ("cascade", "faster"),
]


def waits_of_a_step(model, batch) -> list[str]:
    """Places that wait for the device outside of the student's own passes."""

    def step():
        sum(run_step(model, batch).values()).backward()

    step()  # the first step prepares the teacher
    return count_operators(step, model.student).waits


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_bundles_never_wait(student, teacher, teacher_files):
    """Reading all fields of both detectors asks nothing of the device, in the backward pass
    neither."""
    model = distiller(detector_config(student), teacher_files[teacher], "ReadsAll")
    assert not waits_of_a_step(model, make_batch())


def test_anchors_of_other_numbers_do_not_wait_either(tmp_path):
    """Where the teacher has anchors of its own they are made on the device."""
    cfg = detector_config("retinanet", width=24)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size] for size in (20, 40, 80, 160, 320)]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0]]
    file = write_config(cfg, tmp_path / "teacher.yaml")
    model = distiller(detector_config("retinanet"), file, "ReadsAll")
    seen = {}
    head = model.distill_heads["ReadsAll"]
    head.register_forward_hook(lambda _, inputs, __: seen.update(inputs[1].dense.anchors))
    assert not waits_of_a_step(model, make_batch(size=(64, 96)))
    maps = [torch.zeros(1, 1, 64 // s or 1, -(-96 // s)) for s in (8, 16, 32)]
    expected = model.teacher.model.anchor_generator(
        [*maps, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)]
    )
    for stride, boxes in zip((8, 16, 32), expected, strict=False):
        assert torch.equal(seen[stride], boxes.tensor)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_equal_detectron2s(offset):
    """All cells, to the last bit, on maps that are not square."""
    generator = DefaultAnchorGenerator(
        sizes=[[10.5, 21.0]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8], offset=offset
    )
    (expected,) = generator([torch.zeros(1, 1, 5, 7)])
    found = grid_anchors(next(iter(generator.cell_anchors)), (5, 7), 8, offset)
    assert torch.equal(found, expected.tensor)


def test_the_students_own_results_are_taken(teacher_files, monkeypatch):
    """Matching, anchors, labels and flattened predictions are what the student computed, and equal
    what computing them again gives."""
    model = distiller(detector_config("retinanet"), teacher_files["retinanet"], "ReadsAll")
    own, views = [], []
    label = type(model.student).label_anchors

    def counted(self, *args):
        own.append(label(self, *args))
        return own[-1]

    monkeypatch.setattr(type(model.student), "label_anchors", counted)
    head = model.distill_heads["ReadsAll"]

    def keep(_, inputs, __):
        student, teacher, _ = inputs
        predicted = student.dense.logits, student.dense.anchors, teacher.dense.anchors
        views.append((student.dense.labels, student.dense.matched_boxes, *predicted))

    head.register_forward_hook(keep)
    run_step(model, make_batch())
    ((labels, matched, logits, anchors, teachers),) = views
    assert len(own) == 1
    assert torch.equal(labels, torch.stack(own[0][0]))
    assert torch.equal(matched, torch.stack(own[0][1]))
    assert all(teachers[stride] is anchors[stride] for stride in anchors)
    assert logits[8].shape == (2, len(anchors[8]), 3)


def test_inputs_go_to_the_device_whole():
    """Tensors, boxes, masks and points are there; polygons stay, and so does what no model reads;
    the original is as it was. What lies there already is not touched."""
    batch = make_batch((2, 1))
    for item in batch:
        count = len(item["instances"])
        item["instances"].gt_keypoints = Keypoints(torch.zeros(count, 5, 3))
        item["instances"].polygons = PolygonMasks([[[0.0, 0, 4, 0, 4, 4]]] * count)
        item["notes"] = torch.zeros(3)
    moved = to_device(batch, torch.device("meta"))
    for item, original in zip(moved, batch, strict=True):
        instances = item["instances"]
        assert item["image"].is_meta and not original["image"].is_meta
        assert instances.image_size == original["instances"].image_size
        kinds = {"gt_boxes": Boxes, "gt_masks": BitMasks, "gt_keypoints": Keypoints}
        for name, kind in kinds.items():
            assert type(instances.get(name)) is kind and instances.get(name).tensor.is_meta
            assert not original["instances"].get(name).tensor.is_meta
        assert instances.gt_classes.is_meta
        assert instances.polygons.device.type == "cpu" and len(instances.polygons) == len(instances)
        assert item["notes"] is original["notes"] and item["height"] == original["height"]
    same = to_device(batch, torch.device("cpu"))
    for item, original in zip(same, batch, strict=True):
        assert item["image"] is original["image"]
        assert item["instances"].gt_boxes is original["instances"].gt_boxes


def test_a_step_that_is_drawn_gets_its_inputs_as_they_are(teacher_files, monkeypatch):
    """Detectron2's VIS_PERIOD draws boxes that it expects on the CPU."""
    cfg = detector_config("faster")
    cfg.VIS_PERIOD = 2
    model, seen = distiller(cfg, teacher_files["faster"], "ReadsAll"), []
    monkeypatch.setattr("d2kd.meta_arch.to_device", lambda inputs, _: [dict(i) for i in inputs])
    monkeypatch.setattr(type(model.student), "visualize_training", lambda *_: None)
    model.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    batch = make_batch()
    for iteration in (0, 1, 2):
        run_step(model, batch, iteration=iteration)
    assert [item is batch[0] for item in seen] == [True, False, True]


# --- the teacher's images -------------------------------------------------------------------------


def images_of(teacher: Teacher) -> list[torch.Tensor]:
    """What the teacher's backbone reads, from now on."""
    seen: list[torch.Tensor] = []
    teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_equal_normalisation_is_done_once(teacher_files):
    """The teacher reads the student's own batch of images; with other numbers it makes its own."""
    for opts, is_shared in (
        ((), True),
        (("MODEL.PIXEL_STD", [2.0, 2.0, 2.0]), False),
        (("INPUT.FORMAT", "RGB"), False),
    ):
        opts = ("DISTILL.TEACHER.OPTS", list(opts))
        model = distiller(detector_config(), teacher_files["faster"], "ToyMimic", opts=opts)
        mine, theirs = [], images_of(model.teacher)
        model.student.backbone.register_forward_pre_hook(lambda _, inputs, m=mine: m.append(inputs))
        run_step(model, make_batch())
        assert (theirs[0] is mine[0][0]) == is_shared


@pytest.mark.parametrize("square", [0, 96])
@pytest.mark.parametrize("flip", [False, True])
def test_images_are_detectron2s(square, flip):
    """Normalised and padded as the model itself does it, on images of other sizes, and larger where
    the student's batch is larger."""
    cfg = detector_config()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    cfg.INPUT.FORMAT = "RGB" if flip else "BGR"
    model = build(cfg)
    model.backbone._square_pad = square
    teacher = Teacher(model, input_format=cfg.INPUT.FORMAT)
    batch = [*make_batch((1,), size=(64, 90)), *make_batch((1,), size=(40, 33), seed=1)]
    own = [{"image": item["image"].flip(0) if flip else item["image"]} for item in batch]
    expected = model.preprocess_image(own).tensor
    for least in ((1, 1), (128, 96), (32, 200)):
        found = teacher.preprocess(batch, least)
        height, width = expected.shape[-2:]
        assert torch.equal(found[..., :height, :width], expected)
        assert found.shape[-2:] >= (max(height, least[0]), max(width, least[1]))
        assert found[..., height:, :].count_nonzero() == found[..., width:].count_nonzero() == 0
        assert all(side % 32 == 0 for side in found.shape[-2:])


# --- the teacher's pyramid ------------------------------------------------------------------------


def test_levels_that_no_head_reads_are_not_finished(teacher_files):
    """A dense student has no level of stride 4: the last convolution of the teacher's is not run;
    those of the other levels are, once."""
    model, calls = distiller(detector_config("retinanet"), teacher_files["faster"], "ToyMimic"), []
    for level in range(2, 6):
        module = model.teacher.model.backbone.get_submodule(f"fpn_output{level}")
        module.register_forward_hook(lambda *_, level=level: calls.append(level))
    run_step(model, make_batch())
    assert sorted(calls) == [3, 4, 5]


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_lazy_levels_are_the_backbones_own(arch, teacher_files):
    """Equal to the last bit, coarse to fine or fine to coarse."""
    model = distiller(detector_config(arch), teacher_files[arch], "ToyMimic")
    images, pyramids = images_of(model.teacher), []
    model.distill_heads["ToyMimic"].register_forward_pre_hook(
        lambda _, inputs: pyramids.append({s: inputs[1].pyramid[s] for s in (32, 8, 16)})
    )
    run_step(model, make_batch())
    with torch.no_grad():
        expected = model.teacher.model.backbone(images[0])
    for stride, level in pyramids[0].items():
        assert torch.equal(level, expected[f"p{stride.bit_length() - 1}"])
    assert all(isinstance(c, torch.nn.Conv2d) for c in model.teacher.model.backbone.output_convs)


# --- a teacher without norms, in the precision of the step ----------------------------------------


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
def test_norms_are_folded(norm):
    """Into the convolutions before them; the outputs stay equal to 1e-5. Group norm has no fixed
    statistics, and stays."""
    cfg = detector_config("mask", width=32)
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = norm
    cfg.MODEL.ROI_MASK_HEAD.NORM = norm
    model = randomised(build_model(cfg)).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.backbone(images)
        teacher = Teacher(model)
        teacher.prepare()
        found = model.backbone(images)
    kinds = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds == ({"GroupNorm"} if norm == "GN" else set())
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level, rtol=1e-5, atol=1e-5 * level.abs().max())
    assert not any(p.requires_grad for p in model.parameters())


def randomised(model):
    """Norms with statistics of their own."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and tensor.dim():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(0.5 + noise if "var" in name or "weight" in name else noise - 0.5)
    return model


@pytest.mark.parametrize("arch", ["faster", "fcos"])
def test_half_precision_is_autocasts(arch, teacher_files):
    """Weights that are cast beforehand give autocast's own result, to the last bit, also where a
    head reads the field with autocast off; in float32 the teacher computes with its own weights."""
    model = distiller(detector_config(arch), teacher_files[arch], "ToyMimic")
    images, pyramids = images_of(model.teacher), []

    def read(_, inputs):
        with torch.autocast("cpu", enabled=False):
            pyramids.append(inputs[1].pyramid[8])

    model.distill_heads["ToyMimic"].register_forward_pre_hook(read)
    with torch.autocast("cpu", torch.bfloat16):
        run_step(model, make_batch())
    run_step(model, make_batch())
    with torch.no_grad():
        for level, dtype in zip(pyramids, (torch.bfloat16, torch.float32), strict=True):
            is_half = dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                expected = model.teacher.model.backbone(images[0])["p3"]
            assert level.dtype == dtype and torch.equal(level, expected)
    weights = {p.dtype for p in model.teacher.model.parameters()}
    assert weights == {torch.float32}
    model.to(torch.float64)
    assert next(model.teacher.model.parameters()).dtype == torch.float64
