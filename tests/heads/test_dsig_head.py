"""The DSIG head on small detectors: what it reads and computes, limits, pairs and their errors."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from d2kd.detectors.bundle import FeatureBundle, RoIView
from d2kd.detectors.dense import flatten_maps
from d2kd.detectors.spec import DetectorSpec, describe_detector
from d2kd.detectors.teacher import Teacher
from d2kd.errors import ConfigError
from d2kd.heads import DSIG, build_head
from d2kd.heads.dsig_nodes import Graph, TopPredictions
from d2kd.losses import dsig as losses
from d2kd.meta_arch import Distiller
from d2kd.numerics import Ragged
from d2kd.schedules import Schedule

from ..detectors import build, detector_config, distiller_config, make_batch, run_step, write_config

NUM_CLASSES = 3
TWO_STAGE_TERMS = {"foreground", "background", "edge", "class", "box", "pyramid"}
DENSE_TERMS = TWO_STAGE_TERMS - {"background"}


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    """A config file of a small teacher of each architecture."""
    folder = tmp_path_factory.mktemp("teachers")

    def write(arch: str, **kwargs) -> str:
        name = "_".join([arch, *(f"{k}{v}" for k, v in kwargs.items())])
        return write_config(detector_config(arch, **kwargs), folder / f"{name}.yaml")

    return write


def make_distiller(teacher_file: str, arch: str = "faster", opts: tuple = (), **kwargs):
    """A distiller of a small student with the DSIG head."""
    keys = [f"DISTILL.DSIG.{key}" if i % 2 == 0 else key for i, key in enumerate(opts)]
    student = detector_config(arch, **kwargs)
    return build(distiller_config(student, ["DSIG"], teacher_file, tuple(keys)))


def kd_terms(losses_of_step: dict) -> dict[str, torch.Tensor]:
    """The head's terms among all losses of a step."""
    prefix = "loss_kd_dsig_"
    return {k.removeprefix(prefix): v for k, v in losses_of_step.items() if k.startswith(prefix)}


def assert_healthy(model, terms: dict[str, torch.Tensor]) -> None:
    """Terms are finite, and each has a finite gradient on the student; the teacher has none."""
    parameters = list(model.student.backbone.parameters())
    for loss in terms.values():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        gradients = [g for g in gradients if g is not None]
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)
        largest = max(g.abs().max() for g in gradients)
        assert largest > 0 if loss > 1e-12 else largest < 1e-5  # zero but for rounding
    sum(terms.values()).backward()
    assert all(p.grad is None for p in model.teacher.model.parameters())


# ----------------------------------------------------------- hand-made bundles of a two-stage pair


def two_stage_spec(role: str, channels: int = 4) -> DetectorSpec:
    return DetectorSpec(
        role,
        "GeneralizedRCNN",
        {4: channels, 8: channels},
        frozenset({"pyramid", "roi", "roi.features", "roi.logits", "roi.deltas"}),
        num_classes=NUM_CLASSES,
        roi_strides=(4, 8),
        roi_resolution=2,
        num_stages=1,
        box_coding="Box2BoxTransform",
    )


def make_bundles(labels_per_image: list[list[int]], seed: int = 0, scale: float = 1.0):
    """Bundles of both detectors whose RoIs have the given labels, ``NUM_CLASSES`` = background."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label for image in labels_per_image for label in image])
    index = torch.tensor([i for i, image in enumerate(labels_per_image) for _ in image])
    labels, index = labels.long(), index.long()
    bundles = []
    for role in ("student", "teacher"):
        shapes = {"features": (4, 2, 2), "logits": (NUM_CLASSES + 1,), "deltas": (4 * NUM_CLASSES,)}
        fields = {
            name: scale * torch.randn(len(labels), *shape, generator=generator)
            for name, shape in shapes.items()
        }
        pyramid = {
            stride: scale * torch.randn(2, 4, 16 // stride, 16 // stride, generator=generator)
            for stride in (4, 8)
        }
        if role == "student":
            for tensor in (*fields.values(), *pyramid.values()):
                tensor.requires_grad_()
        roi = RoIView(
            role,
            boxes=[torch.zeros(len(image), 4) for image in labels_per_image],
            labels=labels,
            image_index=index,
            delta_weights=(10.0, 10.0, 5.0, 5.0),
            **fields,
        )
        sizes = [(16, 16)] * len(labels_per_image)
        bundles.append(
            FeatureBundle(two_stage_spec(role), rois=[roi], pyramid=pyramid, image_sizes=sizes)
        )
    return bundles


def make_head(**opts) -> DSIG:
    """The head as a config builds it for a hand-made two-stage pair."""
    cfg = detector_config()
    for key, value in opts.items():
        cfg.DISTILL.DSIG[key] = value
    head = build_head("DSIG", cfg, two_stage_spec("student"), two_stage_spec("teacher"))
    assert isinstance(head, DSIG)
    return head


def run_head(head: DSIG, bundles) -> dict[str, torch.Tensor]:
    return head(*bundles, SimpleNamespace())


def test_terms_equal_the_formulas():
    """Every two-stage term, from the head, equals the formula written out for each image."""
    labels = [[0, 2, 3, 3, 3, 3], [3, 1, 3, 3]]
    student, teacher = bundles = make_bundles(labels, seed=0)
    terms = run_head(make_head(MINING_THRESHOLD=1.2, IMAGE_REDUCTION="sum"), bundles)

    mine, theirs = student.roi, teacher.roi
    error = (mine.features - theirs.features).square().mean(dim=(1, 2, 3))
    hardness = -theirs.logits.log_softmax(1)[:, -1]
    foreground = background = edge = 0.0
    for image in range(2):
        here = mine.image_index == image
        fg, bg = here & (mine.labels < NUM_CLASSES), here & (mine.labels == NUM_CLASSES)
        foreground += error[fg].mean()
        background += 7.5 * fg.sum() / bg.sum() * error[bg].mean()
        nodes = fg | (bg & (hardness >= 1.2))
        assert fg.sum() < nodes.sum() < here.sum()  # the case mines some and drops some
        unit_s, unit_t = (
            torch.nn.functional.normalize(x.features[nodes].flatten(1)) for x in (mine, theirs)
        )
        edge += 0.5 * (unit_s @ unit_s.T - unit_t @ unit_t.T).square().mean()
    p_t, p_s = theirs.logits.softmax(1), mine.logits.softmax(1)
    rows = torch.arange(10)[mine.labels < NUM_CLASSES]
    columns = mine.labels[rows]
    gaps = (mine.deltas - theirs.deltas).view(10, NUM_CLASSES, 4)[rows, columns]
    expected = {
        "foreground": 1.0 * foreground,
        "background": 1.0 * background,
        "edge": 4.0 * edge,
        "class": 3.0 * (p_t * (p_t / p_s).log()).mean(),
        "box": 1.0 * gaps.abs().sum() / 10,
        "pyramid": 0.5
        * sum((student.pyramid[s] - teacher.pyramid[s]).square().mean() for s in (4, 8)),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_default_strength_is_the_published_one():
    """At 2 images the default, a mean, equals the authors' sum with their published weights."""
    bundles = make_bundles([[0, 1, 3, 3], [2, 3, 3, 3, 3]])
    default = run_head(make_head(), bundles)
    official = make_head(
        IMAGE_REDUCTION="sum", FOREGROUND_WEIGHT=0.5, BACKGROUND_WEIGHT=0.5, EDGE_WEIGHT=2.0
    )
    for name, loss in run_head(official, bundles).items():
        torch.testing.assert_close(default[name], loss)


@pytest.mark.parametrize(
    "labels",
    [
        [[3, 3, 3], [3, 3]],
        [[0, 1], [2]],
        [[1], []],
        [[], [3]],
        [[], []],
    ],
    ids=["no foreground", "no background", "one node", "one background", "no RoI"],
)
@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["random features", "zero features"])
def test_degenerate_rois(labels, scale):
    """Through the head: all terms and gradients are finite, no gradient is None."""
    bundles = make_bundles(labels, scale=scale)
    terms = run_head(make_head(), bundles)
    assert terms.keys() == TWO_STAGE_TERMS
    assert all(torch.isfinite(loss) for loss in terms.values())
    sum(terms.values()).backward()
    for tensor in (bundles[0].roi.features, bundles[0].roi.logits, bundles[0].roi.deltas):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_mining_decides_who_has_edges():
    """T_mine 0 gives all RoIs edges, no mining the foreground only; other terms stay."""
    bundles = make_bundles([[0, 1, 3, 3, 3], [2, 1, 3, 3]], seed=2)
    everyone = run_head(make_head(MINING_THRESHOLD=0.0), bundles)
    foreground = run_head(make_head(MINE_BACKGROUND=False), bundles)
    nobody_mined = run_head(make_head(MINING_THRESHOLD=1e6), bundles)
    assert not torch.isclose(everyone["edge"], foreground["edge"])
    torch.testing.assert_close(nobody_mined["edge"], foreground["edge"])
    for name in TWO_STAGE_TERMS - {"edge"}:
        torch.testing.assert_close(everyone[name], foreground[name])


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    ("labels", "threshold", "counts"),
    [
        ([[0, 3, 3], [1, 2, 3]], 0.0, (3, 3)),
        ([[0, 3, 3], [1, 2]], 0.0, (3, 2)),
        ([[0, 3, 1, 3], []], 1e6, (2, 0)),
    ],
    ids=["all of equal images", "all of unequal images", "half of one image"],
)
def test_nodes_without_edges(monkeypatch, on_cpu, labels, threshold, counts):
    """A CPU leaves them out of the graph, a GPU does not ask how many there are: one loss."""
    student, teacher = bundles = make_bundles(labels, seed=4)
    head, seen = make_head(MINING_THRESHOLD=threshold), []
    monkeypatch.setattr(Graph, "looks_are_free", property(lambda _: on_cpu))
    loss = losses.edge_loss
    monkeypatch.setattr(losses, "edge_loss", lambda *a, **k: seen.append(a) or loss(*a, **k))
    edge = run_head(head, bundles)["edge"]
    ((_, _, valid),) = seen
    assert tuple(valid.sum(1).tolist()) == counts
    assert valid.shape[1] == (max(counts) if on_cpu else max(map(len, labels)))
    mine, theirs = student.roi, teacher.roi
    chosen = (mine.labels < NUM_CLASSES) | (threshold == 0.0)
    layout = Ragged.of(mine.boxes)
    expected = loss(
        *(layout.pad(x) for x in (mine.features.flatten(1), theirs.features.flatten(1), chosen))
    )
    torch.testing.assert_close(edge, 4.0 * expected)


def test_deltas_of_differing_weights_are_compared_in_the_students():
    """A teacher whose deltas are scaled differently is not told apart from one that agrees."""
    student, teacher = make_bundles([[0, 1, 2, 3]], seed=3)
    head = make_head()
    expected = run_head(head, (student, teacher))["box"]
    roi = teacher.roi
    scaled = roi.deltas.view(4, -1, 4) * torch.tensor([2.0, 2.0, 3.0, 3.0])
    other = RoIView(
        "teacher",
        **{k: getattr(roi, k) for k in ("features", "logits", "labels", "boxes", "image_index")},
        deltas=scaled.flatten(1),
        delta_weights=(20.0, 20.0, 15.0, 15.0),
    )
    rescaled = FeatureBundle(
        teacher.spec, rois=[other], pyramid=teacher.pyramid, image_sizes=teacher.image_sizes
    )
    torch.testing.assert_close(run_head(head, (student, rescaled))["box"], expected)


# ------------------------------------------------------------------------------- whole detectors


@pytest.mark.parametrize(
    ("arch", "terms"),
    [
        ("faster", TWO_STAGE_TERMS),
        ("cascade", TWO_STAGE_TERMS),
        ("mask", TWO_STAGE_TERMS),
        ("retinanet", DENSE_TERMS),
    ],
)
@pytest.mark.parametrize("objects", [(2, 3), (0, 3), (0, 0)], ids=["normal", "half", "none"])
def test_a_step(teacher_files, arch, terms, objects):
    """Each architecture, with and without ground truth: expected terms, sound gradients."""
    model = make_distiller(teacher_files(arch), arch)
    step = kd_terms(run_step(model, make_batch(objects)))
    assert step.keys() == terms
    assert_healthy(model, step)


def test_dense_terms_equal_the_formulas(teacher_files):
    """Every term of a RetinaNet pair equals the formula written out for each image or anchor."""
    model = make_distiller(teacher_files("retinanet"), "retinanet")
    head = model.distill_heads["DSIG"]
    forward, expected = head.forward, {}

    def spy(student, teacher, batch):
        # Lazy fields are computed here, while the step is alive.
        boxes = head.predictions(student.dense, student.image_sizes)
        nodes = [x.pool(boxes, 7).split([len(b) for b in boxes]) for x in (student, teacher)]
        pairs = list(zip(*nodes, strict=True))
        units = [[torch.nn.functional.normalize(v.flatten(1)) for v in pair] for pair in pairs]
        gaps = [s @ s.T - t @ t.T for s, t in units]
        expected["foreground"] = sum((s - t).square().mean() for s, t in pairs) / len(pairs)
        expected["edge"] = 4.0 * sum(0.5 * gap.square().mean() for gap in gaps) / len(pairs)
        z_s, z_t = (torch.cat(list(x.dense.logits.values()), 1) for x in (student, teacher))
        d_s, d_t = (torch.cat(list(x.dense.deltas.values()), 1) for x in (student, teacher))
        labels = student.dense.labels
        divergence = z_t.softmax(-1) * (z_t.log_softmax(-1) - z_s.log_softmax(-1))
        expected["class"] = 3.0 * divergence[labels >= 0].mean()
        foreground = (labels >= 0) & (labels < NUM_CLASSES)
        assert (labels < 0).any() and foreground.sum() > 1
        expected["box"] = (d_s - d_t).abs().sum(-1)[foreground].mean()
        levels = zip(student.pyramid.values(), teacher.pyramid.values(), strict=True)
        expected["pyramid"] = 0.5 * sum((s - t).square().mean() for s, t in levels)
        return forward(student, teacher, batch)

    head.forward = spy
    terms = kd_terms(run_step(model, make_batch()))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("heads", [["DSIG", "Logits"], ["Logits", "DSIG"]])
def test_reading_predictions_leaves_gradients_to_other_heads(teacher_files, heads):
    """Nodes are chosen without gradients; a head that reads the same outputs later has its own."""
    opts = ("DISTILL.DSIG.CLASS_WEIGHT", 0.0, "DISTILL.DSIG.BOX_WEIGHT", 0.0)
    student, teacher = detector_config("retinanet"), teacher_files("retinanet")
    model = build(distiller_config(student, heads, teacher, opts))
    losses_of_step = run_step(model, make_batch())
    for term in ("cls", "box"):
        loss = losses_of_step[f"loss_kd_logits_{term}"]
        (gradient,) = torch.autograd.grad(
            loss, model.student.backbone.fpn_output3.weight, retain_graph=True
        )
        assert gradient.abs().max() > 0


def test_predictions_that_overflow_are_boxes():
    """An infinite delta is the trainer's to report: boxes stay in the image."""
    anchors = {8: torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]])}
    deltas = torch.tensor([[float("inf"), 0.0, 0.0, 0.0], [0.0, float("nan"), 0.0, 0.0]])
    view = SimpleNamespace(
        logit_maps={8: torch.ones(1, 3, 1, 2)},
        delta_maps={8: deltas.T.view(1, 4, 1, 2)},
        anchors=anchors,
        decode=lambda deltas, anchors: anchors + deltas,
    )
    (boxes,) = TopPredictions()(view, [(32, 48)])
    assert (boxes >= 0).all() and (boxes <= torch.tensor([48, 32, 48, 32])).all()


def test_dense_boxes_of_other_classes(teacher_files):
    """Box deltas of dense detectors have no class: detectors of other classes can compare them."""
    teacher = teacher_files("retinanet", num_classes=4)
    with pytest.raises(ConfigError, match="'class' needs the same number of classes"):
        make_distiller(teacher, "retinanet")
    model = make_distiller(teacher, "retinanet", ("CLASS_WEIGHT", 0.0))
    assert "box" in kd_terms(run_step(model, make_batch()))


def test_one_class(teacher_files, caplog):
    """A softmax over one sigmoid is constant: a dense student has no class term, and says so."""
    caplog.set_level("INFO", "d2kd")
    teacher = teacher_files("retinanet", num_classes=1)
    model = make_distiller(teacher, "retinanet", num_classes=1)
    assert "DSIG's term 'class' is off" in caplog.text
    batch = make_batch(num_classes=1)
    assert kd_terms(run_step(model, batch)).keys() == DENSE_TERMS - {"class"}
    keys = "FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "EDGE_WEIGHT", "BOX_WEIGHT", "PYRAMID_WEIGHT"
    opts = tuple(x for key in keys for x in (key, 0.0))
    with pytest.raises(ConfigError, match="are all 0; this pair has no term 'class'$"):
        make_distiller(teacher, "retinanet", opts, num_classes=1)


def test_mask_terms(teacher_files):
    """Mask R-CNN: mask logits and mask nodes reach the mask branch, also without foreground."""
    model = make_distiller(teacher_files("mask"), "mask", ("MASK_WEIGHT", 1.0, "MASK_NODES", True))
    for objects in ((2, 3), (0, 0)):
        terms = kd_terms(run_step(model, make_batch(objects)))
        assert terms.keys() == TWO_STAGE_TERMS | {"mask", "mask_node"}
        assert_healthy(model, terms)
        assert (terms["mask"] > 0) == (terms["mask_node"] > 0) == (sum(objects) > 0)


@pytest.mark.parametrize("arch", ["faster", "mask", "retinanet"])
def test_different_widths(teacher_files, arch):
    """Nodes and levels go through adapters that learn; edges need none."""
    opts = ("MASK_NODES", True) if arch == "mask" else ()
    model = make_distiller(teacher_files(arch, width=24), arch, opts, width=16)
    adapters = list(model.distill_heads["DSIG"].parameters())
    assert adapters
    assert_healthy(model, kd_terms(run_step(model, make_batch())))
    assert all(p.grad is not None and p.grad.any() for p in adapters)

    edges_only = make_distiller(
        teacher_files(arch, width=24),
        arch,
        ("FOREGROUND_WEIGHT", 0.0, "BACKGROUND_WEIGHT", 0.0, "PYRAMID_WEIGHT", 0.0),
        width=16,
    )
    assert not list(edges_only.distill_heads["DSIG"].parameters())
    assert kd_terms(run_step(edges_only, make_batch()))["edge"] > 0


def test_equal_widths_add_no_parameters(teacher_files):
    """DSIG itself has nothing to learn."""
    model = make_distiller(teacher_files("faster"))
    assert not list(model.distill_heads["DSIG"].parameters())


def count_calls(model, monkeypatch) -> Counter:
    """Counts RoIAligns of the finest level, backbones and heads of both detectors from now on."""
    calls: Counter = Counter()
    forward = ROIAlign.forward

    def counted(self, maps, rois):
        if self.spatial_scale == max(scales):
            calls[f"pool {self.output_size[0]}"] += 1
        return forward(self, maps, rois)

    scales = [1 / stride for stride in model.taps.spec.strides]
    monkeypatch.setattr(ROIAlign, "forward", counted)
    pool = FeatureBundle.pool

    def pooled(bundle, boxes, size, **options):
        calls[f"pool {size}"] += 1
        return pool(bundle, boxes, size, **options)

    monkeypatch.setattr(FeatureBundle, "pool", pooled)
    for role, detector in (("student", model.student), ("teacher", model.teacher.model)):
        for part in ("backbone", "head", "proposal_generator", "roi_heads.box_head"):
            try:
                module = detector.get_submodule(part)
            except AttributeError:
                continue
            module.register_forward_hook(
                lambda *_, name=f"{role} {part}": calls.update([name]),
            )
    return calls


def test_two_stage_work_is_done_once(teacher_files, monkeypatch):
    """Pooling and box head run once a model a step, and nothing else of the teacher but its
    backbone."""
    model = make_distiller(teacher_files("mask"), "mask", ("MASK_WEIGHT", 1.0, "MASK_NODES", True))
    calls = count_calls(model, monkeypatch)
    run_step(model, make_batch())
    assert calls == {
        "pool 7": 2,
        "pool 14": 2,
        "student backbone": 1,
        "student proposal_generator": 1,
        "student roi_heads.box_head": 1,
        "teacher backbone": 1,
        "teacher roi_heads.box_head": 1,
    }


def test_dense_work_is_done_once(teacher_files, monkeypatch):
    """RetinaNet: each model pools the predictions once; without outputs to compare, the teacher
    runs its backbone only."""
    opts = ("CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0)
    model = make_distiller(teacher_files("retinanet"), "retinanet", opts)
    calls = count_calls(model, monkeypatch)
    run_step(model, make_batch())
    assert calls == {
        "pool 7": 2,
        "student backbone": 1,
        "student head": 1,
        "teacher backbone": 1,
    }


def test_without_mining_the_teacher_runs_no_box_head(teacher_files, monkeypatch):
    """Graph terms without mining need the teacher's pooled features only."""
    opts = ("CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0, "MINE_BACKGROUND", False)
    model = make_distiller(teacher_files("faster"), "faster", opts)
    calls = count_calls(model, monkeypatch)
    run_step(model, make_batch())
    assert calls["teacher roi_heads.box_head"] == 0 and calls["pool 7"] == 2


def test_a_weight_of_zero_switches_a_term_off(teacher_files):
    """Terms without weight are not computed and not reported."""
    opts = ("BACKGROUND_WEIGHT", 0.0, "PYRAMID_WEIGHT", 0.0, "CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0)
    model = make_distiller(teacher_files("faster"), "faster", opts)
    assert kd_terms(run_step(model, make_batch())).keys() == {"foreground", "edge"}


def test_cascade_stage(teacher_files):
    """STAGE chooses the RoIs of a later stage of a cascade; a Faster R-CNN may teach it."""
    values = []
    for stage in (0, 2):
        model = make_distiller(teacher_files("cascade"), "cascade", ("STAGE", stage))
        values.append(kd_terms(run_step(model, make_batch()))["foreground"])
    assert not torch.isclose(*values)
    model = make_distiller(teacher_files("faster"), "cascade", ("STAGE", 1))
    assert_healthy(model, kd_terms(run_step(model, make_batch())))


def test_bfloat16(teacher_files):
    """Under autocast the terms are float32 and their gradients sound."""
    # Large enough that RetinaNet's p6 is not 1 x 1: of its convolution to p7, 3 x 3 with stride 2,
    # oneDNN's bfloat16 gradient then reads uninitialised memory.
    batch = make_batch(size=(128, 128))
    for arch in ("faster", "retinanet"):
        model = make_distiller(teacher_files(arch), arch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = kd_terms(run_step(model, batch))
        assert {loss.dtype for loss in terms.values()} == {torch.float32}
        assert_healthy(model, terms)


# --------------------------------------------------------------------------- predictions as nodes


@pytest.fixture(scope="module")
def retinanet():
    """A RetinaNet with a wide range of scores, and its raw outputs on two images."""
    cfg = detector_config("retinanet")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.3)
    images = model.preprocess_image(make_batch())
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    return model, model.anchor_generator(features), model.head(features)


def dense_view(model, anchors, outputs):
    """A stand-in for the student's DenseView."""
    strides = [8, 16, 32, 64, 128]
    return SimpleNamespace(
        logit_maps=dict(zip(strides, outputs[0], strict=True)),
        delta_maps=dict(zip(strides, outputs[1], strict=True)),
        anchors={s: a.tensor for s, a in zip(strides, anchors, strict=True)},
        decode=model.box2box_transform.apply_deltas,
    )


@pytest.mark.parametrize(
    ("per_level", "threshold", "per_image"),
    [(40, 0.5, 20), (1000, 0.5, 20), (1000, 0.02, 60)],
    ids=["few", "the first are enough", "the first are not enough"],
)
def test_top_predictions_equal_detectron2s_inference(retinanet, per_level, threshold, per_image):
    """The nodes of a dense student are what Detectron2's own inference finds at threshold 0."""
    model, anchors, outputs = retinanet
    dense = dense_view(model, anchors, outputs)
    found = TopPredictions(per_level, threshold, per_image)(dense, [(64, 64), (64, 64)])
    model.test_score_thresh, model.test_nms_thresh = 0.0, threshold
    model.test_topk_candidates, model.max_detections_per_image = per_level, per_image
    assert (min(map(len, found)) == per_image) == (threshold == 0.5)
    for image, boxes in enumerate(found):
        expected = model.inference_single_image(
            anchors,
            [x[image].detach().sigmoid() for x in flatten_maps(dense.logit_maps, 3).values()],
            [x[image].detach() for x in flatten_maps(dense.delta_maps, 4).values()],
            (64, 64),
        ).pred_boxes
        expected.clip((64, 64))
        torch.testing.assert_close(boxes, expected.tensor)


def test_top_predictions_leave_the_logits_alone(retinanet):
    """Decoding changes no logit in place, and its boxes are constants."""
    model, anchors, outputs = retinanet
    dense = dense_view(model, anchors, outputs)
    before = {s: x.detach().clone() for s, x in dense.logit_maps.items()}
    versions = {s: x._version for s, x in dense.logit_maps.items()}
    boxes = TopPredictions()(dense, [(64, 64), (64, 64)])
    assert not any(b.requires_grad for b in boxes)
    for stride, logits in dense.logit_maps.items():
        assert torch.equal(logits, before[stride]) and logits._version == versions[stride]


def test_duplicate_predictions(teacher_files):
    """One box predicted for several classes is several equal nodes: finite, and no edge error."""
    model = make_distiller(teacher_files("retinanet"), "retinanet")
    head = model.distill_heads["DSIG"]
    head.predictions = lambda dense, sizes: [torch.tensor([[4.0, 4.0, 40.0, 40.0]] * 3)] * 2
    terms = kd_terms(run_step(model, make_batch()))
    assert terms["edge"] < 1e-6
    assert_healthy(model, terms)


# ------------------------------------------------------------------------------ pairs and mistakes


def test_dense_student_of_a_two_stage_teacher(teacher_files):
    """Nodes are pooled from the levels that both have."""
    model = make_distiller(
        teacher_files("faster"), "retinanet", ("CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0)
    )
    assert model.distill_heads["DSIG"].node_strides == (8, 16, 32, 64)
    terms = kd_terms(run_step(model, make_batch()))
    assert terms.keys() == {"foreground", "edge", "pyramid"}
    assert_healthy(model, terms)


def test_two_stage_student_of_a_dense_teacher(teacher_files):
    """A teacher without a box head serves the graph terms, without mining."""
    opts = ("CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0, "MINE_BACKGROUND", False)
    model = make_distiller(teacher_files("retinanet"), "faster", opts)
    terms = kd_terms(run_step(model, make_batch()))
    assert terms.keys() == {"foreground", "background", "edge", "pyramid"}
    assert_healthy(model, terms)


def fcos() -> FCOS:
    """A small anchor-free detector."""
    backbone = build_model(detector_config("retinanet")).backbone
    shapes = list(backbone.output_shape().values())
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=NUM_CLASSES, conv_dims=[16]),
        head_in_features=list(backbone.output_shape()),
        num_classes=NUM_CLASSES,
        pixel_mean=[100.0] * 3,
        pixel_std=[50.0] * 3,
    )


def test_anchor_free_students():
    """FCOS learns from FCOS: its best predictions are nodes like RetinaNet's."""
    torch.manual_seed(0)
    student, teacher = fcos().train(), Teacher(fcos())
    student_spec = describe_detector(student, "student")
    head = build_head("DSIG", detector_config(), student_spec, teacher.describe(student_spec))
    schedule = {"DSIG": Schedule(weight=1.0, start=0, stop=10)}
    model = Distiller(student=student, teacher=teacher, heads={"DSIG": head}, schedules=schedule)
    terms = kd_terms(run_step(model, make_batch()))
    assert terms.keys() == DENSE_TERMS
    assert_healthy(model, terms)


@pytest.mark.parametrize(
    ("student", "teacher", "kwargs", "opts", "message"),
    [
        ("faster", "faster", {}, ("IMAGE_REDUCTION", "max"), "IMAGE_REDUCTION is 'max'; valid"),
        ("faster", "faster", {}, ("EDGE_WEIGHT", -1.0), "EDGE_WEIGHT is -1.0"),
        ("faster", "faster", {}, ("CLASS_TEMPERATURE", 0.0), "must be positive"),
        ("cascade", "cascade", {}, ("STAGE", 3), r"stages \[0, 1, 2\]"),
        ("faster", "faster", {"num_classes": 4}, (), r"classes \(student: 3, teacher: 4\)"),
        ("retinanet", "faster", {}, (), "DISTILL.DSIG.CLASS_WEIGHT 0 switches it off"),
        ("faster", "mask", {}, ("MASK_WEIGHT", 1.0), "mask.logits of the student"),
        ("mask", "faster", {}, ("MASK_WEIGHT", 1.0), "DISTILL.DSIG.MASK_WEIGHT 0"),
        (
            "faster",
            "retinanet",
            {},
            ("CLASS_WEIGHT", 0.0, "BOX_WEIGHT", 0.0),
            "DISTILL.DSIG.MINE_BACKGROUND False",
        ),
    ],
)
def test_mistakes_are_named(teacher_files, student, teacher, kwargs, opts, message):
    """A bad value, or a term that the pair cannot serve, is refused with its key."""
    with pytest.raises(ConfigError, match=message):
        make_distiller(teacher_files(teacher, **kwargs), student, opts)


@pytest.mark.parametrize("sigmoid", ["student", "teacher"])
def test_sigmoid_box_heads_are_refused(tmp_path, sigmoid):
    """A box head that is trained with sigmoids is not read as softmax; without the terms that
    read it, the pair works."""
    student, teacher = detector_config(), detector_config(width=24)
    cfg = student if sigmoid == "student" else teacher
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    file = write_config(teacher, tmp_path / "teacher.yaml")
    opts = ()
    for key, value in (("CLASS_WEIGHT", 0.0), ("MINE_BACKGROUND", False)):
        if key == "CLASS_WEIGHT" or sigmoid == "teacher":
            with pytest.raises(ConfigError, match=f"the {sigmoid}'s box head.*DSIG.{key}"):
                build(distiller_config(student, ["DSIG"], file, opts))
        opts = (*opts, f"DISTILL.DSIG.{key}", value)
    terms = kd_terms(run_step(build(distiller_config(student, ["DSIG"], file, opts)), make_batch()))
    assert "class" not in terms and terms["edge"] > 0


def test_every_node_loss_option_reaches_the_loss(monkeypatch):
    """ALPHA and the reduction are passed on, not merely stored."""
    seen = {}
    original = losses.node_losses

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(losses, "node_losses", spy)
    head = make_head(BACKGROUND_ALPHA=2.0, IMAGE_REDUCTION="sum")
    run_head(head, make_bundles([[0, 3], [1, 3]]))
    assert seen == {"alpha": 2.0, "image_reduction": "sum"}
