"""Balance from weights that are far off, in trainings of a few iterations."""

from __future__ import annotations

import json

import pytest

from d2kd import ConfigError
from d2kd.benchmark import balance_starts

from ..engine.children import CONFIG, write_job


def test_both_starts_meet(tmp_path, monkeypatch, capsys):
    """The table has the shares that the trainings logged; finished trainings are kept. Weights were
    10,000 times apart, and six steps on few images are all that the balance has."""
    monkeypatch.chdir(write_job(tmp_path))
    argv = ["--config-file", CONFIG, "--heads", "SSIM", "--json", "rows.json"]
    opts = ["DISTILL.BALANCE.PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "100"]
    balance_starts.main([*argv, *opts])
    text = capsys.readouterr().out
    measured = json.loads((tmp_path / "rows.json").read_text())
    low, high = measured["rows"][0]["shares"]
    assert 1 / 4 < low / high < 4
    assert f"| SSIM   | {low:.3f} " in text and "6 iterations of config.yaml" in text
    monkeypatch.setattr(balance_starts, "train", None)
    balance_starts.main([*argv, *opts])
    assert json.loads((tmp_path / "rows.json").read_text()) == measured


def test_unknown_head(tmp_path, monkeypatch):
    """One line that names the valid ones."""
    monkeypatch.chdir(write_job(tmp_path))
    with pytest.raises(ConfigError, match="'Simm'.*SSIM"):
        balance_starts.main(["--config-file", CONFIG, "--heads", "Simm"])
