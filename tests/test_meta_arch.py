"""The Distiller: what it leaves alone, what it adds, what it saves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from d2kd import ConfigError, Distiller, Teacher, add_distillation_config
from d2kd.detectors.spec import describe_detector
from d2kd.engine.checkpoint import AtomicCheckpointer
from d2kd.heads import build_head
from d2kd.meta_arch import moments_of
from d2kd.schedules import Schedule

from .detectors import ARCHS, build, detector_config, distiller_config, make_batch, run_step


def train_three_steps(model: torch.nn.Module) -> list[dict[str, float]]:
    """Three SGD steps on three batches; returns the losses of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    torch.manual_seed(7)
    with EventStorage() as storage:
        for step in range(3):
            losses = model(make_batch((2, 1 + step), seed=step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
            history.append({name: loss.item() for name, loss in losses.items()})
    return history


@pytest.mark.parametrize("arch", ARCHS)
def test_no_heads_is_plain_detectron2(arch, teacher_files):
    """With HEADS () losses and weights after 3 steps equal plain Detectron2's, bit for bit."""
    # TorchScript recompiles the focal loss in its first calls, and rounds differently then.
    train_three_steps(build(detector_config(arch)))
    plain = build(detector_config(arch))
    distiller = build(distiller_config(detector_config(arch), [], teacher_files[arch]))
    assert isinstance(distiller, Distiller) and distiller.teacher is None
    assert train_three_steps(plain) == train_three_steps(distiller)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, distiller.state_dict()[name]), name


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_leave_the_student_alone(arch, teacher_files):
    """With a head, the student's initial weights and own losses are plain Detectron2's."""
    plain = build(detector_config(arch))
    distiller = build(distiller_config(detector_config(arch), ["ToyMimic"], teacher_files[arch]))
    expected, found = run_step(plain, make_batch()), run_step(distiller, make_batch())
    assert {name: found[name].item() for name in expected} == {
        name: loss.item() for name, loss in expected.items()
    }
    assert set(found) - set(expected) == {"loss_kd_toy_mimic"}


def test_evaluation_is_the_student(teacher_files):
    """In eval mode the Distiller returns what its student returns."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    distiller = build(cfg).eval()
    batch = make_batch()
    with torch.no_grad():
        found, expected = distiller(batch), distiller.student(batch)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


@pytest.mark.parametrize("arch", ARCHS)
def test_checkpoint_is_a_plain_student(arch, teacher_files):
    """The state dict loads into the plain student with no missing key, and back."""
    distiller = build(distiller_config(detector_config(arch), ["ToyMimic"], teacher_files[arch]), 1)
    plain = build(detector_config(arch), 2)
    state = distiller.state_dict()
    result = plain.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert all(key.startswith("distill_heads.") for key in result.unexpected_keys)
    assert not any("teacher" in key or key.startswith("student.") for key in state)

    other = build(distiller_config(detector_config(arch), ["ToyMimic"], teacher_files[arch]), 3)
    result = other.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_loading_reports_keys_as_the_file_names_them(teacher_files):
    """A plain student's file lacks the heads, which is no news; a missing weight is."""
    distiller = build(distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"]))
    plain = build(detector_config()).state_dict()
    assert distiller.load_state_dict(plain, strict=False).missing_keys == []
    name = "backbone.fpn_output2.weight"
    del plain[name]
    assert distiller.load_state_dict(plain, strict=False).missing_keys == [name]


def test_deepcopy_of_the_student_is_independent(teacher_files):
    """An EMA that deep-copies the student gets a plain detector with weights of its own."""
    distiller = build(distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"]))
    ema = copy.deepcopy(distiller.student)
    assert set(ema.state_dict()) == set(build(detector_config()).state_dict())
    before = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    for parameter in ema.parameters():
        parameter.data.fill_(1.0)
    for name, value in distiller.student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_copies_and_pickles_record_for_themselves(teacher_files):
    """A deep copy of the whole Distiller trains like it, and the tapped student can be pickled."""
    distiller = build(distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"]))
    expected, found = (run_step(m, make_batch()) for m in (distiller, copy.deepcopy(distiller)))
    assert found["loss_kd_toy_mimic"].item() == expected["loss_kd_toy_mimic"].item()
    pickle.dumps(distiller.student)


def test_weights_of_other_shapes_are_left_out(teacher_files, tmp_path):
    """A detector of other classes starts a Distiller: what does not fit is named, the rest loads;
    so is a head of another shape."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    five = distiller_config(detector_config(num_classes=5), ["ToyMimic"], teacher_files["faster"])
    state = build(five, 1).state_dict()
    adapter = next(
        key for key in state if key.startswith("distill_heads.") and key.endswith("bias")
    )
    state[adapter] = state[adapter][:3]
    torch.save({"model": state}, tmp_path / "other.pth")
    distiller = build(cfg, 2)
    unloaded = AtomicCheckpointer(distiller)._load_model(torch.load(tmp_path / "other.pth"))
    assert {key for key, *_ in unloaded.incorrect_shapes} == {
        adapter,
        *(key for key in state if "cls_score" in key or ("predictor" in key and "bbox" in key)),
    }
    assert unloaded.unexpected_keys == []
    for key, value in distiller.state_dict().items():
        if key not in {key for key, *_ in unloaded.incorrect_shapes}:
            assert torch.equal(value, state[key]), key


def test_a_head_registered_too_late_is_named(teacher_files):
    """A head that the config knows nothing of is an error that says what to do."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    del cfg.DISTILL["TOY_MIMIC"]
    with pytest.raises(ConfigError, match="no node DISTILL.TOY_MIMIC.*registered"):
        build(cfg)


def test_an_inactive_head_is_not_computed(teacher_files):
    """Outside its schedule a head and the teacher rest; the head's parameters stay in the graph."""
    opts = ("DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 5, "DISTILL.TOY_MIMIC.SCHEDULE.STOP_ITER", 7)
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"], opts)
    distiller = build(cfg)
    calls = []
    distiller.teacher.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    seen = {i: set(run_step(distiller, make_batch(), iteration=i)) for i in (4, 5, 6, 7)}
    active = [i for i, names in seen.items() if "loss_kd_toy_mimic" in names]
    assert active == [5, 6] and len(calls) == 2


def test_a_resting_head_has_no_gradient(teacher_files):
    """Not even the zeros that DDP gives it, by which weight decay would move it."""
    opts = ("DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 5)
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"], opts)
    distiller = build(cfg)
    for iteration, has in ((4, False), (5, True)):
        run_step(distiller, make_batch(), iteration=iteration)
        for parameter in distiller.distill_heads.parameters():
            parameter.grad = torch.zeros_like(parameter)
        distiller.after_backward()
        grads = [p.grad is not None for p in distiller.distill_heads.parameters()]
        assert grads and all(g == has for g in grads)


def test_two_heads_give_the_sum_of_their_losses(teacher_files):
    """A head's loss does not depend on the heads beside it; WEIGHT multiplies it."""

    def losses_of(heads: list[str], *opts) -> dict[str, float]:
        cfg = distiller_config(detector_config(), heads, teacher_files["faster"], opts)
        step = run_step(build(cfg), make_batch())
        return {name: loss.item() for name, loss in step.items() if name.startswith("loss_kd")}

    toy, ssim = losses_of(["ToyMimic"]), losses_of(["SSIM"])
    # The first head's adapters start with the same random numbers as if it were alone.
    for first, heads in ((toy, ["ToyMimic", "SSIM"]), (ssim, ["SSIM", "ToyMimic"])):
        both = losses_of(heads)
        assert both.keys() == toy.keys() | ssim.keys()
        assert {name: both[name] for name in first} == pytest.approx(first, rel=1e-6)
    doubled = losses_of(["ToyMimic"], "DISTILL.TOY_MIMIC.WEIGHT", 2.0)
    assert doubled == pytest.approx({name: 2 * loss for name, loss in toy.items()}, rel=1e-6)


def test_usable_without_a_config():
    """A Distiller built from modules alone: any Detectron2 model, here from plain configs."""
    torch.manual_seed(0)
    student, teacher = build_model(detector_config()), Teacher(build_model(detector_config()))
    cfg = get_cfg()
    add_distillation_config(cfg)
    spec = describe_detector(student, "student")
    head = build_head("ToyMimic", cfg, spec, teacher.describe(spec))
    distiller = Distiller(
        student=student,
        teacher=teacher,
        heads={"ToyMimic": head},
        schedules={"ToyMimic": Schedule(weight=1.0, start=0, stop=10)},
    ).train()
    losses = run_step(distiller, make_batch())
    sum(losses.values()).backward()
    assert losses["loss_kd_toy_mimic"] > 0


def test_incomplete_distillers_are_refused():
    """Heads without teacher or schedule, and configs without d2kd's keys, say what is missing."""
    student = build(detector_config())
    heads = {"ToyMimic": torch.nn.Identity()}
    with pytest.raises(ConfigError, match=r"heads \['ToyMimic'\] need a teacher"):
        Distiller(student=student, heads=heads)
    with pytest.raises(ConfigError, match=r"no schedule for the heads \['ToyMimic'\]"):
        Distiller(student=student, teacher=Teacher(build(detector_config())), heads=heads)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "Distiller", "cpu"
    with pytest.raises(ConfigError, match="call d2kd.add_distillation_config"):
        build(cfg)


def test_a_node_without_schedule_is_named(teacher_files):
    """A node that a user made by hand, without the keys of every head, is named."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    del cfg.DISTILL.TOY_MIMIC["SCHEDULE"]
    with pytest.raises(ConfigError, match="the config has no DISTILL.TOY_MIMIC.SCHEDULE"):
        build(cfg)


def test_optimizer_has_student_and_heads_only(teacher_files):
    """No parameter of the teacher reaches the optimiser; the heads' do."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    distiller = build(cfg)
    optimised = {id(p) for g in build_optimizer(cfg, distiller).param_groups for p in g["params"]}
    assert optimised == {id(p) for p in distiller.parameters() if p.requires_grad}
    assert not optimised & {id(p) for p in distiller.teacher.model.parameters()}
    assert {id(p) for p in distiller.distill_heads.parameters()} <= optimised


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DISTILL.HEADS", ["SIM"]), "unknown head 'SIM'; valid: .*DSIG"),
        (("DISTILL.HEADS", ["ToyMimic", "ToyMimic"]), "names 'ToyMimic' twice"),
        (("DISTILL.TEACHER.CONFIG_FILE", ""), "DISTILL.TEACHER.CONFIG_FILE is empty"),
        (("DISTILL.TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_101_FPN.yaml"), "_3x"),
        (("DISTILL.TEACHER.PRECISION", "int8"), "PRECISION is 'int8'; valid"),
        (("DISTILL.TEACHER.PRECISION", "fp16"), "TEACHER.PRECISION fp16 needs a GPU; bf16"),
        (("DISTILL.TOY_MIMIC.SCHEDULE.DECAY", "slow"), "DECAY is 'slow'; valid"),
        (("DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 10), "never runs"),
        (("DISTILL.TOY_MIMIC.WEIGHT", -1.0), "WEIGHT is -1.0; it must be 0 or positive"),
        (("DISTILL.STUDENT_META_ARCH", "Distiller"), "names the student"),
    ],
)
def test_bad_configs_are_refused_in_one_line(opts, message, teacher_files):
    """A mistake is one line that names what is valid."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"], opts)
    with pytest.raises(ConfigError, match=message) as error:
        build(cfg)
    assert "\n" not in str(error.value)


def test_a_trainer_meets_every_model_in_the_same_moments(teacher_files):
    """A plain detector has them all and does nothing; a Distiller shows its student and heads; the
    wrapper of a distributed training hides neither."""
    plain = build(detector_config())
    moments = moments_of(plain)
    assert moments.student is plain and moments.teacher is None
    assert moments.trained_beside == [] and not moments.distill_heads and not moments.factors
    assert moments.build_hooks(detector_config()) == []
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    moments.start_from_weights(), moments.before_training(), moments.after_backward()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())

    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    distiller = build(cfg)
    assert moments_of(distiller) is distiller
    heads = [id(p) for p in distiller.distill_heads.parameters()]
    assert [id(p) for p in distiller.trained_beside] == heads and heads
    keys = [f"distill_heads.{key}" for key in distiller.distill_heads.state_dict()]
    assert {*keys, *distiller.student.state_dict()} == distiller.state_dict().keys()
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    torch.nn.Module.__init__(wrapped)
    wrapped.module = distiller
    assert moments_of(wrapped) is distiller
