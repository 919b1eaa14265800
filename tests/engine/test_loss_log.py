"""Losses are read once a period, and are logged as if each had been read at once."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter

from d2kd.engine.faults import LossError
from d2kd.engine.loss_log import LossLog


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
    """Values, their iterations, their order and the medians of metrics.json do not change."""
    each, late = (run(8, period, tmp_path / f"{period}.json") for period in (1, 4))
    assert each == late and list(each) == list(late)
    assert each["loss_cls"] == [(1.0 + i, i) for i in range(8)]
    assert [i for _, i in each["loss_kd_ssim"]] == [2, 3, 4, 5, 6, 7]
    assert [value for value, _ in each["loss_kd_ssim"][3:]] == [0, 0, 0]
    lines = [
        [json.loads(x) for x in (tmp_path / f"{p}.json").read_text().splitlines()] for p in (1, 4)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert lines[0][1]["loss_cls"] == statistics.median(range(1, 9))


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


def test_losses_do_not_keep_the_graph():
    """What a step computed is freed though its losses are not read yet."""
    log, weight = LossLog(), torch.ones(3, requires_grad=True)
    log.add(0, {"loss_cls": (weight * 2).sum()}, 0.0)
    assert not log._steps[0].losses.requires_grad
