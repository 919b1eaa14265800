"""The factor of a head over the iterations."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2kd.config import head_schedule
from d2kd.schedules import Schedule
from tools import plot_schedules

from .detectors import detector_config

ROOT = Path(__file__).parents[1]


def test_constant_window():
    """The weight inside [start, stop), 0 outside."""
    schedule = Schedule(weight=2.0, start=3, stop=6)
    assert [schedule(i) for i in range(8)] == [0, 0, 0, 2, 2, 2, 0, 0]


def test_warmup_is_linear_and_never_zero():
    """Over the warm-up the factor grows linearly; its first step is not 0 already."""
    schedule = Schedule(weight=1.0, start=2, stop=20, warmup=4)
    assert [schedule(i) for i in range(1, 8)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_ends_at_zero(decay, half):
    """From 1 after the warm-up to 0 at ``stop``, half-way at the middle."""
    schedule = Schedule(weight=1.0, start=0, stop=110, warmup=10, decay=decay)
    assert schedule(10) == 1.0
    assert schedule(60) == pytest.approx(half)
    assert 0 < schedule(109) < 0.02 and schedule(110) == 0


def test_steps():
    """Times gamma at each of the steps."""
    schedule = Schedule(weight=1.0, start=0, stop=10, decay="step", steps=(4, 8), gamma=0.5)
    assert [schedule(i) for i in (3, 4, 7, 8)] == [1, 0.5, 0.5, 0.25]


def test_read_from_config():
    """STOP_ITER -1 is the end of training; no STEPS are the solver's."""
    cfg = detector_config()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 50, (20, 30)
    node = cfg.DISTILL.FEATURE_MIMIC
    node.WEIGHT, node.SCHEDULE.DECAY, node.SCHEDULE.GAMMA = 3.0, "step", 0.1
    schedule = head_schedule(cfg, "FeatureMimic")
    assert schedule(25) == pytest.approx(0.3) and schedule(49) == pytest.approx(0.03)
    assert schedule(50) == 0


def test_the_picture_in_the_docs(tmp_path):
    """The tool draws a small picture; docs/training.md shows one, and the lines of its curves."""
    plot_schedules.main(["--output", str(tmp_path / "new" / "schedules.png")])
    for picture in (tmp_path / "new" / "schedules.png", ROOT / "docs/images/schedules.png"):
        assert 5_000 < picture.stat().st_size < 60_000
    page = (ROOT / "docs/training.md").read_text()
    for curve in plot_schedules.CURVES:
        assert plot_schedules.config_line(curve) in page
