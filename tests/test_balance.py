"""Balancing heads by their gradients: what is measured, what is chosen, what stays as it was."""

from __future__ import annotations

import logging
import math
import shutil

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2kd import balance as balance_module
from d2kd.balance import Balance, BalanceOptions, Outweighed, gradient_lengths
from d2kd.config import head_balance, validate_distillation_config
from d2kd.errors import ConfigError
from d2kd.registry import node_name

from .detectors import build, detector_config, distiller_config, make_batch
from .engine.children import OUTPUT, train, write_job

HEADS = (
    *("SSIM", "FeatureMimic", "Logits", "DSIG", "DRKD", "GlobalKnowledge", "MAR"),
    *("PKD", "CWD"),
)
ALSO = {"mask": ("MaskMimic",), "retinanet": ("CrossKD",)}
ON = ("DISTILL.BALANCE.ENABLED", True)


def make(shares: dict[str, float], weight: float = 1.0, **options) -> Balance:
    return Balance(BalanceOptions(True, **options), shares, dict.fromkeys(shares, weight))


def measured(balance: Balance, iteration: int, norms: dict[str, float], **scheduled) -> dict:
    """Measure a detector whose gradient at the one map is 1 and heads of these; the log's scalars.

    Args:
        scheduled: head -> its factor, 1 by default.
    """
    x = torch.zeros(4, requires_grad=True)
    losses = {"loss_cls": x[0] * 0.6, "loss_box_reg": x[1] * 0.8}
    heads = {name: {"": x[2] * norm} for name, norm in norms.items()}
    factors = {name: scheduled.get(name, 1.0) for name in norms}
    with EventStorage(iteration) as storage:
        balance.measure(iteration, factors, losses, heads, {8: x}, nn.Linear(1, 1))
        return {name: history.latest() for name, history in storage.histories().items()}


# --- what is measured ---------------------------------------------------------------------------


def test_lengths_by_hand():
    """Norms by place; the terms of a head, and their sum, in which they may cancel out."""
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    a, b = x * 1, y * 1
    terms = {"up": 3 * a[0] + 4 * a[1] + b[0], "down": -3 * a[0], "none": torch.zeros(())}
    found = gradient_lengths(2 * b.sum(), {"H": terms}, {4: [a], 8: [b]}, scale=8.0)
    assert found.strides == (4, 8)
    assert found.detection == pytest.approx([0, 2 * math.sqrt(3)])
    assert found.terms["H"] == {"up": pytest.approx([5, 1]), "down": [3, 0], "none": [0, 0]}
    assert found.heads["H"] == pytest.approx([4, 1])
    whole = math.sqrt(12) + 10 * math.sqrt(17)
    assert found.shares({"H": 10.0})["H"] == pytest.approx(10 * math.sqrt(17) / whole)
    assert found.details("H", {"H": 10.0}) == {
        "stride4": 1.0,
        "stride8": pytest.approx(10 / (10 + math.sqrt(12))),
        "up": pytest.approx(10 * math.sqrt(26) / whole),
        "down": pytest.approx(30 / whole),
        "none": 0.0,
        "cosine_detector": pytest.approx(2 / math.sqrt(12 * 17)),
    }
    assert x.grad is None
    assert gradient_lengths(a[0] * math.inf, {}, {4: [a]}) is None


def test_angles_by_hand():
    """At all places together; a head without a gradient has no angle."""
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    a, b = x * 1, y * 1
    heads = {
        "DSIG": {"": 3 * a[0] + 4 * b[0]},
        "GlobalKnowledge": {"one": -a[0], "two": -2 * b[1]},
        "Idle": {"": torch.zeros(())},
    }
    found = gradient_lengths(2 * a.sum(), heads, {4: [a], 8: [b]}, scale=8.0)
    detector, conflict = 6 / (5 * math.sqrt(8)), -3 / (5 * math.sqrt(5))
    assert found.cosines["DSIG"] == pytest.approx(
        {"detector": detector, "GlobalKnowledge": conflict}
    )
    assert found.cosines["GlobalKnowledge"]["DSIG"] == pytest.approx(conflict)
    assert found.cosines["Idle"] == {}
    details = found.details("DSIG", dict.fromkeys(heads, 1.0))
    assert details["cosine_detector"] == pytest.approx(detector)
    assert details["cosine_global_knowledge"] == pytest.approx(conflict)


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_measuring_changes_nothing(arch, teacher_files):
    """With weights that stay, all losses and gradients are those without; every head is seen."""
    heads = [*HEADS, *ALSO[arch]]
    results = []
    # The first pass of a process may differ in the last bit from all that follow.
    for opts in ((), (), (*ON, "DISTILL.BALANCE.FREEZE_ITER", 0)):
        model = build(distiller_config(detector_config(arch), heads, teacher_files[arch], opts))
        torch.manual_seed(0)
        with EventStorage(5) as storage:
            losses = model(make_batch())
            sum(losses.values()).backward()
        results.append((losses, [p.grad for p in model.parameters()]))
    (_, (losses, gradients), (found, others)) = results
    assert losses.keys() == found.keys()
    for name, loss in losses.items():
        assert torch.equal(loss, found[name]), name
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    shares = {n: h.latest() for n, h in storage.histories().items() if n.endswith("/share")}
    assert len(shares) == len(heads) + 1 and all(0 < share < 1 for share in shares.values())
    named = [n for n in storage.histories() if n.startswith("balance/drkd/")]
    strides = [f"stride{s}" for s in model.taps.spec.strides]
    others = ["detector", *(node_name(head).lower() for head in heads if head != "DRKD")]
    cosines = [f"cosine_{other}" for other in others]
    ends = {"weight", "share", "pixel", "relation", "instance", *strides, *cosines}
    assert {name.rpartition("/")[2] for name in named} == ends


def test_a_head_below_the_pyramid_is_measured_at_the_trunk():
    """One that reads the backbone's weights alone gets its share of the gradient there."""
    trunk = nn.Linear(2, 1, bias=False)
    pyramid = trunk(torch.tensor([[3.0, 4.0]]))
    balance = make({"A": 0.2, "B": 0.2})
    heads = {"A": {"": pyramid.sum() * 2}, "B": {"": trunk.weight[0, 0] * 7}}
    factors = {"A": 1.0, "B": 1.0}
    with EventStorage(0) as storage:
        balance.measure(0, factors, {"loss": pyramid.sum()}, heads, {4: pyramid}, trunk)
    factors = balance.factors(0, factors)
    assert factors["A"] * 2 == pytest.approx(0.2 / 0.6)
    assert factors["B"] * 7 == pytest.approx(0.2 / 0.6 * 5)
    assert storage.histories()["balance/b/share"].latest() == pytest.approx(0.25)  # of itself and 1
    assert storage.histories()["balance/a/share"].latest() == pytest.approx(0.25)


def test_nothing_to_measure():
    """A frozen pyramid, no head that has a gradient, a loss that is no number: weights stay."""
    balance = make({"A": 0.2})
    loss = torch.zeros((), requires_grad=True)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    for bad in (loss * 1, loss * math.nan):
        with EventStorage(0):
            balance.measure(0, {"A": 1.0}, {"loss": loss * 1}, {"A": {"": bad}}, {}, frozen)
        assert balance.factors(0, {"A": 3.0}) == {"A": 3.0}
    measured(balance, 1, {"A": math.nan})
    assert balance.factors(0, {"A": 3.0}) == {"A": 3.0}


def test_float16_is_scaled():
    """Gradients that float16 does not have are measured; at an overflow the scale falls, and the
    measurement is left out."""
    x = torch.zeros(4, requires_grad=True)
    low = x.half() * 1  # whose gradient is float16
    losses = {"loss": low.float()[0] * 1e-7}
    balance = make({"A": 0.2})
    for norm, scale in ((2e-7, 2.0**16), (100.0, 2.0**12)):
        with EventStorage(0), torch.autocast("cpu", torch.float16):
            heads = {"A": {"": low.float()[1] * norm}}
            balance.measure(0, {"A": 1.0}, losses, heads, {8: low}, nn.Linear(1, 1))
        assert balance.state_dict()["scale"] == scale
        assert balance.factors(0, {"A": 1.0})["A"] == pytest.approx(0.2 / 0.8 / 2, rel=1e-2)


# --- what is chosen -----------------------------------------------------------------------------


def test_weights_make_the_shares_at_once():
    """Whatever heads began with; one at rest leaves its share to nobody but the detector."""
    for weight in (0.01, 1.0, 100.0):
        balance = make({"A": 0.3, "B": 0.1, "C": 0.5}, weight)
        scheduled = {"A": weight, "B": weight}
        found = measured(balance, 0, {"A": 20.0, "B": 0.05}, **scheduled)
        assert found["balance/a/share"] == pytest.approx(0.3)
        assert found["balance/b/share"] == pytest.approx(0.1)
        assert found["balance/share"] == pytest.approx(0.4)
        factors = balance.factors(0, {**scheduled, "C": 0.0})
        assert factors == {
            "A": pytest.approx(0.3 / 0.6 / 20),
            "B": pytest.approx(0.1 / 0.6 / 0.05),
            "C": 0.0,
        }
        half = balance.factors(0, {"A": weight / 2, "B": weight})  # in its warm-up
        assert half["A"] == pytest.approx(factors["A"] / 2) and half["B"] == factors["B"]


def test_measurements_are_averaged():
    """The mean of logarithms at first, then mostly of the last; one far off counts as ten times."""
    balance = make({"A": 0.5}, smoothing=0.75)
    expected = []
    for i, norm in enumerate((1.0, 4.0, 2.0, 2.0, 32.0, 1e6, 0.0)):
        measured(balance, i, {"A": norm})
        expected.append(1 / balance.factors(0, {"A": 1.0})["A"])
    logs = [math.log2(value) for value in expected]
    assert logs[:5] == pytest.approx([0, 1, 1, 1, 1 + 0.25 * math.log2(10)])
    assert logs[5:] == pytest.approx([1 + 0.5 * math.log2(10)] * 2)


def test_bound_and_freezing(caplog):
    """The weight stays near WEIGHT, which is said; from FREEZE_ITER on it stays as it is."""
    balance = make({"A": 0.5}, 2.0, bound=10.0)
    measured(balance, 0, {"A": 1e-3}, A=2.0)
    assert balance.factors(0, {"A": 2.0})["A"] == pytest.approx(20)
    balance.factors(0, {"A": 2.0})
    assert caplog.text.count("DISTILL.A: a WEIGHT of 1e+03 would make the head's share") == 1
    balance = make({"A": 0.5, "B": 0.1}, freeze_iter=2)
    measured(balance, 0, {"A": 4.0})
    found = measured(balance, 2, {"A": 1.0, "B": 2.0})
    again = make({"A": 0.5, "B": 0.1}, freeze_iter=2)
    again.load_state_dict(balance.state_dict())
    for one in (balance, again):  # where B stops, too
        assert one.factors(3, {"A": 1.0, "B": 0.0})["A"] == found["balance/a/weight"]
    assert found["balance/a/weight"] == pytest.approx(0.5 / 0.4 / 4)
    assert found["balance/b/share"] == pytest.approx(0.25 / (1 + 0.5 / 0.4 / 4 + 0.25))


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_every_head_comes_to_its_share(arch, teacher_files):
    """From weights 100 times too small and too large, in a training on changing images: the same
    within a factor of 1.5, and the target within what so few images vary, for each head."""
    heads = [*HEADS, *ALSO[arch]]
    ends: dict[str, list[float]] = {name: [] for name in heads}
    for start in (0.01, 100.0):
        cfg = distiller_config(detector_config(arch), heads, teacher_files[arch], ON)
        cfg.merge_from_list(["DISTILL.BALANCE.PERIOD", 2, "DISTILL.BALANCE.BOUND", 1e9])
        for name in heads:
            cfg.DISTILL[node_name(name)].WEIGHT *= start
            cfg.DISTILL[node_name(name)].SCHEDULE.WARMUP_ITERS = 0
        model = build(cfg)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with EventStorage(1) as storage:  # not 0: a first weight is chosen without a measurement
            for step in range(1, 11):
                torch.manual_seed(step)
                losses = model(make_batch(seed=step))
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                storage.step()
        for name in heads:
            history = storage.history(f"balance/{node_name(name).lower()}/share").values()
            ends[name].append(math.exp(sum(math.log(share) for share, _ in history[-3:]) / 3))
    for name, (low, high) in ends.items():
        assert 1 / 1.5 < low / high < 1.5, (name, low, high)
        assert 1 / 3 < low / (0.2 / len(heads)) < 3, (name, low)


# --- what is said -------------------------------------------------------------------------------


def test_warning_of_too_much(caplog, monkeypatch):
    """When distillation makes most of the gradient for long; then not in every iteration."""
    monkeypatch.setattr(balance_module, "LONG", 6)
    caplog.set_level(logging.INFO, "d2kd")
    balance = make({"A": 0.2}, freeze_iter=0)
    for iteration in range(0, 22, 2):
        norm = 0.5 if iteration == 4 else 3.0
        assert measured(balance, iteration, {"A": norm})["balance/a/weight"] == 1
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(lines) == (0 if iteration < 12 else 1 if iteration < 18 else 2)
    assert lines[0].startswith("Distillation has made more than half of the gradient")
    assert caplog.text.count("Balance at iteration") == 1
    never = Outweighed()
    assert not any(never.lasts(bool(i % 5), i) for i in range(50))


def test_values_that_are_refused(teacher_files):
    """In one line, with the key."""
    for opts, words in (
        (("DISTILL.SSIM.SHARE", 0.9), "DISTILL.SSIM.SHARE, DISTILL.DSIG.SHARE: .* 1 in all"),
        (("DISTILL.BALANCE.SHARE", 1.0), "BALANCE.SHARE is 1.0; it must be between 0 and 1"),
        (("DISTILL.BALANCE.PERIOD", 0), "PERIOD is 0; it must be at least 1"),
        (("DISTILL.BALANCE.FREEZE_ITER", -2), "FREEZE_ITER is -2; it must be an iteration, or -1"),
    ):
        cfg = distiller_config(detector_config(), ["SSIM", "DSIG"], teacher_files["faster"], opts)
        cfg.merge_from_list(list(ON))
        with pytest.raises(ConfigError, match=words):
            validate_distillation_config(cfg)
    cfg = distiller_config(detector_config(), ["SSIM", "DSIG"], teacher_files["faster"])
    assert head_balance(cfg) is None
    cfg.merge_from_list([*ON, "DISTILL.SSIM.SHARE", 0.4])
    assert head_balance(cfg).shares == {"SSIM": 0.4, "DSIG": 0.1}


# --- over a training ----------------------------------------------------------------------------


def test_a_resumed_training_is_the_same(tmp_path):
    """To the last bit, the mean over measurements included; what comes out is a plain student."""
    write_job(tmp_path, *ON, "DISTILL.BALANCE.PERIOD", 3, "DISTILL.TEACHER.CHECK", False)
    assert train(tmp_path).code == 0
    whole = torch.load(tmp_path / OUTPUT / "model_final.pth", weights_only=True)
    state = whole["trainer"]["_trainer"]["model"]["balance"]
    assert {name: count for name, (_, count) in state["means"].items()} == {
        "SSIM": 5,  # iterations 0, 1, 2, 3, 4
        "FeatureMimic": 5,
    }
    shutil.rmtree(tmp_path / OUTPUT / "inference", ignore_errors=True)
    (tmp_path / OUTPUT / "last_checkpoint").write_text("model_0000003.pth")
    assert train(tmp_path, "--resume").code == 0
    resumed = torch.load(tmp_path / OUTPUT / "model_final.pth", weights_only=True)
    assert resumed["trainer"]["_trainer"]["model"]["balance"] == state
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    student = torch.load(tmp_path / OUTPUT / "student_final.pth", weights_only=True)["model"]
    assert not any("balance" in name or name.startswith("distill_heads") for name in student)
