"""Where detections and annotations agree, on boxes by hand."""

from __future__ import annotations

import numpy as np
import pytest

from d2kd.data.agreement import Agreement, Boxes, wrong_classes

SQUARE = [0, 0, 10, 10]


def moved(dx: float, dy: float = 0.0, scale: float = 1.0) -> list[float]:
    return [dx, dy, dx + 10 * scale, dy + 10 * scale]


def test_an_image_by_hand():
    """One object of each kind: right, of another class, displaced, not found; one extra."""
    agreement = Agreement(2)
    for _ in range(9):  # what boxes usually differ by
        agreement.add(Boxes.of([SQUARE], [0]), Boxes.of([moved(0.1)], [0], [0.9]))
    truth = Boxes.of([SQUARE, moved(50), moved(100), moved(150)], [0, 0, 1, 1])
    places = [moved(0.1), moved(51), moved(107), moved(200), moved(150)]
    found = Boxes.of(places, [0, 1, 1, 0, 1], [0.9, 0.8, 0.7, 0.6, 0.4])
    agreement.add(truth, found)
    assert agreement.paired == 11 and agreement.displaced == 1 and agreement.limit == 0.2
    assert agreement.confusion.tolist() == [[10, 1, 0], [0, 1, 1]]
    (one,) = agreement.disagreements()
    assert (one.image, one.other_class, one.displaced) == (9, [(1, 1)], [(2, 2)])
    assert (one.extra, one.missed) == ([3], [])  # a detection of low confidence is one
    assert one.words() == "1 of another class, 1 displaced, 1 not annotated"
    assert one.weight == pytest.approx((0.8 + 0.7 + 0.6) / 5**0.5)


def test_boxes_that_always_differ_are_not_displaced():
    """A teacher that places boxes roughly is no sign of bad annotations."""
    agreement = Agreement(1)
    for dx in (1, 2, 2, 3, 4):
        agreement.add(Boxes.of([SQUARE], [0]), Boxes.of([moved(dx)], [0], [0.9]))
    assert agreement.limit == pytest.approx(0.5) and agreement.displaced == 0


def test_calibration():
    """The gap by bin, and its sign; a second detection of one object is wrong."""
    agreement = Agreement(1)
    found = Boxes.of([SQUARE, SQUARE, moved(100)], [0, 0, 0], [0.95, 0.85, 0.25])
    agreement.add(Boxes.of([SQUARE], [0]), found)
    error, bias = agreement.calibration()
    assert error == pytest.approx((0.05 + 0.85 + 0.25) / 3)
    assert bias == pytest.approx((-0.05 + 0.85 + 0.25) / 3)


def test_nothing_to_compare():
    """No object, no detection, neither."""
    agreement = Agreement(2)
    nothing = Boxes.of([], [], [])
    agreement.add(nothing, nothing)
    assert agreement.calibration() == (0.0, 0.0) and agreement.disagreements() == []
    agreement.add(Boxes.of([SQUARE], [1]), nothing)
    agreement.add(nothing, Boxes.of([SQUARE], [1], [0.9]))
    assert [one.words() for one in agreement.disagreements()] == ["1 not annotated", "1 not found"]
    assert agreement.confusion.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_wrong_classes():
    """Swapped ones, one taken for another, and few objects, of which nothing is said."""
    confusion = np.zeros((5, 6), int)
    confusion[0, 1], confusion[1, 0] = 8, 9  # swapped
    confusion[0, 0] = 2
    confusion[2, 3], confusion[2, 2], confusion[2, -1] = 6, 4, 50
    confusion[3, 3] = 10
    confusion[4, 0] = 4
    assert [(w.name, w.taken_for, w.share, w.swapped) for w in wrong_classes(confusion)] == [
        (0, 1, 0.8, True),
        (1, 0, 1.0, True),
        (2, 3, 0.6, False),
    ]
