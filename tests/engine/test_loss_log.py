"""Losses are read once a period, and are logged as if each had been read at once."""

from __future__ import annotations

import json
import logging
import re
import statistics
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2kd import balance
from d2kd.engine import launch as launcher
from d2kd.engine.faults import LossError
from d2kd.engine.loss_log import LossLog
from d2kd.engine.setup import build_parser


def losses_of(iteration: int) -> dict[str, torch.Tensor]:
    """A head begins at iteration 2 and ends at 5."""
    losses = {"loss_cls": torch.tensor(1.0 + iteration), "loss_box_reg": torch.tensor(0.5)}
    if 2 <= iteration < 5:
        losses["loss_kd_ssim"] = torch.tensor(0.1 * iteration, dtype=torch.bfloat16)
    return losses


def run(steps: int, period: int, file) -> dict[str, list]:
    """Histories of ``steps`` steps that are read every ``period``; metrics are written to file."""
    log = LossLog()
    with EventStorage(0) as storage:
        writer = JSONWriter(str(file))
        for iteration in range(steps):
            storage.iter = iteration
            log.add(iteration, losses_of(iteration), 0.01 * iteration)
            if (iteration + 1) % period == 0:
                log.flush()
            if (iteration + 1) % 4 == 0:
                writer.write()
        writer.close()
        return {name: history.values() for name, history in storage.histories().items()}


def test_numbers_are_those_of_reading_each_step(tmp_path):
    """Values, their iterations, their order and the means of metrics.json do not change."""
    each, late = (run(8, period, tmp_path / f"{period}.json") for period in (1, 4))
    assert each == late and list(each) == list(late)
    assert each["loss_cls"] == [(1.0 + i, i) for i in range(8)]
    assert [i for _, i in each["loss_kd_ssim"]] == list(range(8))
    resting = [value for value, i in each["loss_kd_ssim"] if not 2 <= i < 5]
    assert resting == [0] * 5
    lines = [
        [json.loads(x) for x in (tmp_path / f"{p}.json").read_text().splitlines()] for p in (1, 4)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert lines[0][1]["loss_cls"] == statistics.mean(range(1, 9))


def factors_of(iteration: int) -> dict[str, float]:
    return {"mask": 2.0 if iteration >= 3 else 0.0, "mask_mimic": 0.5 + iteration}


def uneven(iteration: int) -> dict[str, torch.Tensor]:
    """Losses whose medians do not add up; the head "mask" begins at iteration 3."""
    sizes = {"loss_cls": 3 ** (iteration % 3), "loss_kd_mask_mimic": 2 ** (iteration % 5)}
    if iteration >= 3:
        sizes |= {"loss_kd_mask_a": 5 ** (iteration % 2), "loss_kd_mask_b": 0.25}
    return {name: torch.tensor(float(value)) for name, value in sizes.items()}


def assert_adds_up(values: dict[str, float], tolerance: float) -> None:
    of_detector = [v for n, v in values.items() if n.startswith("loss_") and "_kd_" not in n]
    for total, terms in {
        "total_kd_loss/mask": [values["loss_kd_mask_a"], values["loss_kd_mask_b"]],
        "total_kd_loss/mask_mimic": [values["loss_kd_mask_mimic"]],
        "total_kd_loss": [values["total_kd_loss/mask"], values["total_kd_loss/mask_mimic"]],
        "total_detection_loss": of_detector,
        "total_loss": [values["total_detection_loss"], values["total_kd_loss"]],
    }.items():
        assert values[total] == pytest.approx(sum(terms), rel=tolerance), total


def test_sums_add_up_in_every_file(tmp_path, caplog):
    """metrics.json, TensorBoard and the console have factor and total of each head, and the terms
    add up to each total, also in the window in which a head begins."""
    printer = CommonMetricPrinter(100)
    printer.logger = logging.getLogger("of_the_test")
    caplog.set_level(logging.INFO)
    log, writers = LossLog(), [JSONWriter(str(tmp_path / "metrics.json")), printer]
    writers.append(TensorboardXWriter(str(tmp_path)))
    with EventStorage(0) as storage:
        for iteration in range(33):
            storage.iter = iteration
            log.add(iteration, uneven(iteration), 0.0, factors_of(iteration))
            if iteration in (6, 12, 32):
                log.flush()
                for writer in writers:
                    writer.write()
    for writer in writers:
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    printed = [dict(re.findall(r"(\S*loss\S*): (\S+)", r.getMessage())) for r in caplog.records]
    printed = [{n: float(v) for n, v in line.items()} for line in printed if line]
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    names = [name for name in board.Tags()["scalars"] if "loss" in name]
    events = [{n: board.Scalars(n)[i].value for n in names} for i in range(3)]
    assert len(lines) == len(printed) == len(events) == 3
    for source, tolerance in ((lines, 1e-9), (events, 1e-5), (printed, 1e-2)):
        for values, iteration in zip(source, (6, 12, 32), strict=True):
            assert_adds_up(values, tolerance)
            for head, factor in factors_of(iteration).items():
                assert values[f"kd_loss_factor/{head}"] == pytest.approx(factor)
    # Over the last twenty steps, in which the head of the second window did not always run.
    assert lines[1]["loss_kd_mask_b"] == pytest.approx(0.25 * 10 / 13)
    assert lines[2]["loss_cls"] == statistics.mean(3 ** (i % 3) for i in range(13, 33))


def test_a_step_reads_nothing(monkeypatch):
    """Noting losses makes the CPU wait for no value; reading copies once for all steps."""
    log, copies = LossLog(), []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("it waits"))
    for iteration in range(5):
        log.add(iteration, losses_of(iteration), 0.0)
    monkeypatch.undo()
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or copy(self))
    with EventStorage(4):
        log.flush()
        assert len(copies) == 1 and len(log) == 0
        assert log.flush() >= 0  # nothing is left


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_loss_that_is_not_finite(value):
    """Its step and name are said, whatever follows it; checking leaves the steps to be logged."""
    log = LossLog()
    for iteration in range(5):
        losses = losses_of(iteration)
        if iteration >= 2:
            losses["loss_kd_ssim"] = torch.tensor(value)
        if iteration >= 3:
            losses["loss_cls"] = torch.tensor(value)
        log.add(iteration, losses, 0.0)
    for read in (log.check, log.flush):
        with EventStorage(4), pytest.raises(LossError, match="^loss_kd_ssim is .* at iteration 2,"):
            read()


def test_warning_of_distillation_that_outweighs(caplog, monkeypatch):
    """Once it has for long, and not where the gradients are measured."""
    monkeypatch.setattr(balance, "LONG", 4)
    for is_measured in (False, True):
        caplog.clear()
        log = LossLog()
        with EventStorage(0) as storage:
            if is_measured:
                storage.put_scalar("balance/share", 0.2)
            for iteration in range(8):
                loss = 0.5 if iteration == 1 else 2.0
                losses = {"loss_cls": torch.tensor(1.0), "loss_kd_ssim": torch.tensor(loss)}
                log.add(iteration, losses, 0.0)
            log.flush()
        warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warned) == (not is_measured)
        assert is_measured or "for 4 iterations (now 2 and 1)" in warned[0]


def test_losses_do_not_keep_the_graph():
    """What a step computed is freed though its losses are not read yet."""
    log, weight = LossLog(), torch.ones(3, requires_grad=True)
    log.add(0, {"loss_cls": (weight * 2).sum()}, 0.0)
    assert not log._values[0].requires_grad


def two_ranks(args) -> None:
    """Rank r notes r + iteration; with ``args.nan`` the last loss of rank 1 is not finite."""
    log, rank = LossLog(), comm.get_rank()
    for iteration in range(3):
        value = torch.nan if args.nan and rank and iteration == 2 else float(rank + iteration)
        log.add(iteration, {"loss_cls": torch.tensor(value)}, 0.1 * (rank + 1))
    with EventStorage(2) as storage:
        try:
            log.flush()
            seen = {name: h.values() for name, h in storage.histories().items()}
        except LossError as error:
            seen = str(error).split(",")[0]
    Path(args.folder, f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("nan", [False, True])
def test_ranks_are_gathered_once_a_period(nan, tmp_path, monkeypatch):
    """The main process logs the mean of each step; what one rank finds, all ranks raise."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launcher, "START_METHOD", "fork")
    args = build_parser().parse_args(["--num-gpus", "2"])
    args.nan, args.folder = nan, str(tmp_path)
    launcher.launch(two_ranks, args)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    if nan:
        assert main == other == "loss_cls is nan at iteration 2"
    else:
        assert main["loss_cls"] == [[0.5, 0], [1.5, 1], [2.5, 2]] and other == {}
        assert [value for value, _ in main["data_time"]] == [0.2] * 3
