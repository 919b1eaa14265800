"""What balancing costs, at small sizes."""

from __future__ import annotations

import pytest

from d2kd.benchmark import balance


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_a_row(arch, capsys):
    """Seconds of a step, and what a measurement adds to it, spread over PERIOD."""
    argv = ["--archs", arch, "--heads", "FeatureMimic DISTILL.BALANCE.PERIOD 10"]
    balance.main([*argv, "--size", "64", "--batch", "1", "--repeats", "3", "--device", "cpu"])
    row = capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]
    assert row[0].strip() == arch and float(row[2]) > 0
    added, spread = float(row[3]), float(row[4].replace("%", ""))
    assert 0 < added < 5
    assert spread == pytest.approx(100 * added / 10, abs=0.1)
