"""Successive halving: sizes and lengths of rungs, and what fits into a budget."""

from __future__ import annotations

import pytest

from d2kd.compare.halving import Pace, Stage, fitting_iterations, seconds_of, stages


def test_stages():
    """Half go on, down to two; later rungs are longer, and none is below a quarter."""
    assert stages(1, 3) == [Stage(3, 6)]
    assert stages(2, 3) == [Stage(1, 2), Stage(3, 6)]
    assert stages(11, 2) == [
        Stage(1, 11, 0.25),
        Stage(1, 6, 0.25),
        Stage(1, 3, 0.5),
        Stage(1, 2, 1.0),
        Stage(2, 4),
    ]


def test_seconds():
    """3 runs, 2 at a time, are two waves of 10 s beside steps of (1 + 2 x 1.5) / 3 of 0.5 s."""
    pace = Pace(step=0.5, overhead=10.0, ratio=1.5)
    assert Stage(1, 2, 0.5).seconds(300, pace, jobs=2) == pytest.approx(2 * (10 + 4 / 3 * 75))


@pytest.mark.parametrize("candidates", [1, 2, 5, 30])
@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_what_fits(candidates, jobs):
    """One iteration more would not fit; without time for the runs' starts nothing does."""
    to_do, pace = stages(candidates, 3), Pace(0.3, 20.0, 1.7)
    longest = fitting_iterations(to_do, 7200.0, pace, jobs)
    assert seconds_of(to_do, longest, pace, jobs) <= 7200
    assert seconds_of(to_do, longest + 1, pace, jobs) > 7200
    fixed = seconds_of(to_do, 0, pace, jobs)
    assert fitting_iterations(to_do, fixed - 1, pace, jobs) < 1
