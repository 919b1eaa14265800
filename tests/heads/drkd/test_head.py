"""The head DRKD on small detectors: terms, gradients, degenerate batches, precision, bad values."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from d2kd import ConfigError
from d2kd.detectors.bundle import Batch, FeatureBundle
from d2kd.detectors.spec import DetectorSpec
from d2kd.heads.drkd import DRKD, DRKDOptions
from d2kd.heads.drkd.head import choose_boxes
from d2kd.heads.drkd.instances import refine_instances, relation_matrices
from d2kd.numerics import Ragged
from tests.detectors import (
    ARCHS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)

from .test_graph import brute_force_graph_unit

STRIDES = (4, 8, 16, 32, 64)
TERMS = {"pixel", "relation", "instance"}
PROFILES = pytest.mark.parametrize("profile", ["code", "paper"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def distiller(tmp_path):
    """Function (arch, opts, teacher's arch, its width) -> a Distiller with the head DRKD."""

    def make(arch: str = "faster", opts: tuple = (), teacher_arch: str = "", width: int = 24):
        teacher = detector_config(teacher_arch or arch, width=width)
        teacher = write_config(teacher, tmp_path / "teacher.yaml")
        return build(distiller_config(detector_config(arch), ["DRKD"], teacher, opts))

    return make


def make_spec(role: str, channels: int, strides=STRIDES) -> DetectorSpec:
    return DetectorSpec(role, "GeneralizedRCNN", dict.fromkeys(strides, channels), frozenset())


def make_head(student: int = 4, teacher: int = 6, **options) -> DRKD:
    """A head for pyramids of so many channels, with the weights of a two-stage student."""
    weights = {"pixel_weight": 1e-3, "relation_weight": 4e-3, "instance_weight": 2.4e-3}
    values = DRKDOptions(**{"nodes": (4, 4, 8), **weights, **options})
    return DRKD(
        options=values,
        student_spec=make_spec("student", student),
        teacher_spec=make_spec("teacher", teacher),
    )


def make_bundles(student: int = 4, teacher: int = 6, batch: int = 2, size=(64, 64), dtype=None):
    """Bundles with random pyramids; the student's maps collect gradients."""
    bundles = []
    for role, channels in (("student", student), ("teacher", teacher)):
        maps = {
            s: torch.randn(batch, channels, math.ceil(size[0] / s), math.ceil(size[1] / s)).to(
                dtype
            )
            for s in STRIDES
        }
        if role == "student":
            maps = {s: m.requires_grad_() for s, m in maps.items()}
        bundles.append(FeatureBundle(make_spec(role, channels), pyramid=maps))
    return bundles


def step(head: DRKD, objects: tuple[int, ...], **kwargs) -> tuple[dict, FeatureBundle]:
    """Forward and backward of the head alone on random pyramids."""
    inputs = make_batch(objects, size=kwargs.get("size", (64, 64)))
    bundles = make_bundles(batch=len(objects), **kwargs)
    terms = head(*bundles, Batch.from_inputs(inputs, torch.device("cpu")))
    head.zero_grad()
    sum(terms.values()).backward()
    return terms, bundles[0]


def assert_finite(terms: dict, head: nn.Module, student: FeatureBundle | None = None) -> None:
    """Terms, the gradients of all trainable parameters and of the student's maps are finite."""
    assert all(term.isfinite() for term in terms.values())
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    if student is not None:
        assert all(m.grad.isfinite().all() for m in student.pyramid.values())


# --- with whole detectors -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_whole_step(distiller, arch):
    """Each meta-architecture, with a wider teacher: three positive terms that reach the backbone,
    and a gradient for each parameter of the head."""
    model = distiller(arch)
    losses = run_step(model, make_batch())
    terms = {k: v for k, v in losses.items() if k.startswith("loss_kd_drkd_")}
    assert {name.removeprefix("loss_kd_drkd_") for name in terms} == TERMS
    assert all(term > 0 for term in terms.values())
    sum(terms.values()).backward()
    assert_finite(terms, model.distill_heads)
    assert model.student.backbone.bottom_up.stem.conv1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_weights_by_kind_of_student(distiller):
    """The released code's weights: by default those of the student's kind; a key overrides one."""
    expected = {"pixel": 1e-3, "relation": 4e-3, "instance": 2.4e-3}
    assert distiller("faster").distill_heads["DRKD"].weights == expected
    head = distiller("retinanet", ("DISTILL.DRKD.INSTANCE_WEIGHT", 0.5)).distill_heads["DRKD"]
    assert head.weights == {"pixel": 4e-3, "relation": 5e-3, "instance": 0.5}


def test_sizes_of_the_released_code(distiller):
    """By default 64 nodes on the two finest levels and 256 on the others; instances of 3 x 3 cells
    from the two finest levels, pooled without the half-pixel shift."""
    head = distiller("faster").distill_heads["DRKD"]
    nodes = [graph.projection.out_features for graph in head.student_graphs.values()]
    assert nodes == [64, 64, 256, 256, 256]
    assert head.instance_strides == (4, 8)
    options = head.options
    assert (options.pool_resolution, options.sampling_ratio, options.aligned) == (3, 0, False)


@pytest.mark.parametrize("term", sorted(TERMS))
def test_terms_alone(distiller, term):
    """A term of weight 0 is gone, with its parameters; the other stays finite."""
    keys = [("DISTILL.DRKD." + f"{t}_WEIGHT".upper(), 0.0) for t in TERMS - {term}]
    model = distiller(opts=tuple(part for key in keys for part in key))
    losses = run_step(model, make_batch())
    assert {k for k in losses if k.startswith("loss_kd")} == {f"loss_kd_drkd_{term}"}
    losses[f"loss_kd_drkd_{term}"].backward()
    assert_finite(losses, model.distill_heads)


@PROFILES
def test_retinanet_student_of_a_faster_rcnn(distiller, profile):
    """Levels meet by stride: the common ones are 8 to 64, and the finest two of those pool."""
    model = distiller("retinanet", ("DISTILL.DRKD.PROFILE", profile), teacher_arch="faster")
    head = model.distill_heads["DRKD"]
    assert head.strides == (8, 16, 32, 64) and head.instance_strides == (8, 16)
    losses = run_step(model, make_batch())
    sum(losses.values()).backward()
    assert_finite(losses, head)


def test_checkpoint_and_report(distiller, caplog):
    """The head's parameters are saved under distill_heads. only, and are counted in the report."""
    with caplog.at_level(logging.INFO):
        model = distiller(opts=("DISTILL.DRKD.BOTTLENECK", 8))
    head = model.distill_heads["DRKD"]
    extra = {k for k in model.state_dict() if k not in model.student.state_dict()}
    assert extra == {f"distill_heads.DRKD.{name}" for name in head.state_dict()}
    assert f"{sum(p.numel() for p in head.parameters()):,}" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PROFILE", "papers"),
        ("RELATION_FILTER", "bilinear"),
        ("NODES", []),
        ("NODES", [64, 0]),
        ("INSTANCE_LEVELS", 0),
        ("MAX_INSTANCES", 0),
        ("PIXEL_WEIGHT", -1.0),
        ("STRIDES", [4, 5]),
    ],
)
def test_bad_values_are_named(distiller, key, value):
    """A wrong value is an error before the first batch, and its line names the mistake."""
    with pytest.raises(ConfigError, match=key if key != "STRIDES" else "5"):
        distiller(opts=(f"DISTILL.DRKD.{key}", value))


def test_all_weights_zero_is_refused(distiller):
    """A head without a term is a mistake."""
    weights = ("PIXEL_WEIGHT", "RELATION_WEIGHT", "INSTANCE_WEIGHT")
    opts = tuple(part for w in weights for part in (f"DISTILL.DRKD.{w}", 0.0))
    with pytest.raises(ConfigError, match="RELATION_WEIGHT, INSTANCE_WEIGHT are all 0"):
        distiller(opts=opts)


# --- the head alone -------------------------------------------------------------------------------


def terms_by_loops(head: DRKD, student: dict, teacher: dict, boxes: list, profile: str) -> dict:
    """The three terms without weights, one level and one image at a time: graph units on maps, as
    the formulas stand, and RoIAlign image by image."""
    code, terms = profile == "code", dict.fromkeys(TERMS, 0.0)
    for s in STRIDES:
        gap = head.pixel_adapters(
            s, brute_force_graph_unit(head.student_graphs[str(s)], student[s])
        )
        gap = gap - brute_force_graph_unit(head.teacher_graphs[str(s)], teacher[s])
        terms["pixel"] += gap.norm() if code else gap.square().mean()
    for s in STRIDES[:2]:
        for image, own in enumerate(boxes):
            n = len(own)
            if n == 0:
                continue
            mine, theirs = (
                roi_align(x[s][image : image + 1], [own.to(x[s])], 3, 1 / s, -1, aligned=False)
                for x in (student, teacher)
            )
            gap, rows = head.instance_adapters(s, mine) - theirs, Ragged([n])
            total = sum(map(len, boxes))
            terms["instance"] += gap.norm() if code else gap.square().sum() / total
            evaluate = refine_instances if code else relation_matrices
            units = head.student_relations[str(s)], head.teacher_relations[str(s)]
            instances = [x.flatten(1) for x in (mine, theirs)]
            related, target = evaluate(units, instances, rows)
            if code:
                gap = head.relation_adapters(s, related.view_as(mine)) - target.view_as(theirs)
                terms["relation"] += gap.norm()
            else:
                images = sum(len(other) > 0 for other in boxes)
                terms["relation"] += (related - target).square().mean() / images
    return terms


@PROFILES
def test_terms_are_the_formulas(profile):
    """Weights, batch factors, levels, pooling and sides: the terms of a batch of three images, one
    of them without objects, equal plain loops over levels and images."""
    head = make_head(profile=profile).double()
    student, teacher = make_bundles(batch=3, dtype=torch.float64)
    batch = Batch.from_inputs(make_batch((3, 0, 2), size=(64, 64)), torch.device("cpu"))
    terms = head(student, teacher, batch)
    expected = terms_by_loops(head, student.pyramid, teacher.pyramid, batch.gt_boxes, profile)
    pixel, instance = (math.sqrt(2 / 3), 2 / 3) if profile == "code" else (1, 1)
    factors = {"pixel": 1e-3 * pixel, "relation": 4e-3 * instance, "instance": 2.4e-3 * instance}
    for name, factor in factors.items():
        torch.testing.assert_close(terms[name], factor * expected[name], rtol=1e-9, atol=0)


@PROFILES
@pytest.mark.parametrize("objects", [(0,), (0, 0), (0, 3), (1,), (1, 0), (2, 300)])
def test_numbers_of_objects(objects, profile):
    """None in an image or in the batch, one, 300: finite, and each parameter gets a gradient."""
    head = make_head(profile=profile)
    terms, student = step(head, objects)
    assert set(terms) == TERMS
    assert_finite(terms, head, student)
    if not any(objects):
        assert terms["relation"] == terms["instance"] == 0 and terms["pixel"] > 0


@pytest.mark.parametrize("relation_filter", ["learned", "uniform", "random", "none"])
@pytest.mark.parametrize("freeze", [False, True])
def test_units_of_the_teacher_side(freeze, relation_filter):
    """The teacher-side units are trained with the student, or kept as they are."""
    head = make_head(freeze_teacher_units=freeze, relation_filter=relation_filter)
    terms, student = step(head, (3, 2))
    assert_finite(terms, head, student)
    teacher_side = [*head.teacher_graphs.parameters(), *head.teacher_relations.parameters()]
    for parameter in teacher_side:
        assert parameter.requires_grad != freeze
        assert (parameter.grad is None) == freeze
    for module in (head.student_graphs, head.student_relations):
        assert all(p.grad is not None for p in module.parameters())
        assert any(p.grad.abs().max() > 0 for p in module.parameters())


def test_paper_profile_freezes_and_copies_the_teachers_relation():
    """Nothing ties the relation matrix to the features: its teacher side must not be trained away.
    With equal features the loss of the copied units is zero."""
    head = make_head(4, 4, profile="paper")
    assert not any(p.requires_grad for p in head.teacher_relations.parameters())
    pooled = torch.randn(3, 36)
    units = head.student_relations["4"], head.teacher_relations["4"]
    student, teacher = relation_matrices(units, [pooled, pooled], Ragged([3]))
    assert torch.equal(student, teacher)


def test_batch_size_rule():
    """Four equal pairs of images cost what one pair costs, in each term."""
    head = make_head(freeze_teacher_units=True)
    student, teacher = make_bundles(batch=2)
    inputs = make_batch((2, 3))
    one = head(student, teacher, Batch.from_inputs(inputs, torch.device("cpu")))
    student, teacher = (
        FeatureBundle(b.spec, pyramid={s: m.repeat(4, 1, 1, 1) for s, m in b.pyramid.items()})
        for b in (student, teacher)
    )
    four = head(student, teacher, Batch.from_inputs(inputs * 4, torch.device("cpu")))
    for name in TERMS:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=0)


def equal_sides(**kwargs) -> DRKD:
    """A head whose units are equal on both sides, with identity adapters."""
    head = make_head(4, 4, **kwargs).double()
    head.teacher_graphs.load_state_dict(head.student_graphs.state_dict())
    head.teacher_relations.load_state_dict(head.student_relations.state_dict())
    for adapters in (head.pixel_adapters, head.relation_adapters, head.instance_adapters):
        for adapter in adapters.values():
            nn.init.dirac_(adapter.weight)
            nn.init.zeros_(adapter.bias)
    return head


def test_equal_sides_have_no_loss():
    """With the whole head: equal features, units and identity adapters."""
    head = equal_sides()
    student, _ = make_bundles(4, 4, dtype=torch.float64)
    teacher = FeatureBundle(
        make_spec("teacher", 4), pyramid={s: m.detach() for s, m in student.pyramid.items()}
    )
    terms = head(student, teacher, Batch.from_inputs(make_batch(), torch.device("cpu")))
    assert all(abs(term.item()) < 1e-12 for term in terms.values())


@pytest.mark.parametrize("equal", [0, 1])
def test_objects_are_pooled_from_their_own_image(equal):
    """An image whose student equals its teacher has no relation and no instance loss, whatever the
    other image holds, and the other has its whole loss and gradient. (The released code pools the
    objects of all images from the first.)"""
    head, other = equal_sides(pixel_weight=0.0), 1 - equal
    student, teacher = make_bundles(4, 4, dtype=torch.float64)
    for stride, level in teacher.pyramid.items():
        level[equal] = student.pyramid[stride][equal].detach()
    inputs = make_batch((3, 2))
    terms = head(student, teacher, Batch.from_inputs(inputs, torch.device("cpu")))
    sum(terms.values()).backward()
    for stride in head.instance_strides:
        gradient = student.pyramid[stride].grad.flatten(1).abs().sum(1)
        assert gradient[equal] < 1e-12 < gradient[other]
    inputs[equal]["instances"] = inputs[equal]["instances"][:0]
    alone = head(student, teacher, Batch.from_inputs(inputs, torch.device("cpu")))
    assert set(terms) == {"relation", "instance"}
    for name, term in terms.items():
        torch.testing.assert_close(term, alone[name])


def test_half_precision_on_a_large_map():
    """bfloat16 on the maps of an 800 x 1344 image: finite, and close to float32."""
    head = make_head()
    size, objects = (800, 1344), (5,)
    torch.manual_seed(1)
    expected, _ = step(head, objects, size=size)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, student = step(head, objects, size=size, dtype=torch.bfloat16)
    assert_finite(terms, head, student)
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=0.02)


def test_choose_boxes():
    """Only images over the limit lose boxes; the choice is the seed's and disturbs no other."""
    boxes = [torch.rand(3, 4), torch.rand(9, 4)]
    state = torch.get_rng_state()
    first, second = (choose_boxes(boxes, 5, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], boxes[0])
    assert torch.equal(first[1], second[1]) and len(first[1].unique(dim=0)) == 5
    assert not torch.equal(first[1], choose_boxes(boxes, 5, seed=8)[1])


@PROFILES
def test_a_teacher_that_is_no_number_shows(distiller, profile):
    """A teacher that overflows gives losses that are no numbers: the trainer stops at those."""
    model = distiller("faster", ("DISTILL.DRKD.PROFILE", profile))
    model.teacher.model.backbone.fpn_output3.weight.data[0] = math.nan
    terms = {k: v for k, v in run_step(model, make_batch()).items() if "drkd_pixel" in k}
    assert terms and all(loss.isnan() for loss in terms.values())
