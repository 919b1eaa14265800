"""The one place where a pair is refused: what a message says, and that it is one line."""

from __future__ import annotations

import pytest

from d2kd.detectors.spec import DetectorSpec
from d2kd.errors import MAX_LINE, ConfigError
from d2kd.heads.needs import SHARED, Need, check_needs
from d2kd.registry import DISTILL_HEAD_REGISTRY

FIELDS = frozenset({"pyramid", "roi", "roi.logits", "roi.features", "rpn.anchors"})


def spec(role: str, **known) -> DetectorSpec:
    return DetectorSpec(role, "GeneralizedRCNN", {4: 8, 8: 8}, **{"fields": FIELDS} | known)


def refusal(need: Need, student: dict | None = None, teacher: dict | None = None) -> str:
    """What a pair of these specs is told."""
    with pytest.raises(ConfigError) as error:
        check_needs(
            "Toy", [need], spec("student", **student or {}), spec("teacher", **teacher or {})
        )
    return str(error.value)


def test_a_pair_that_fits():
    """Nothing is said."""
    needs = [
        Need("", both=("pyramid",), same=tuple(SHARED)),
        Need("edge", student=("roi",), teacher=("roi.logits",), softmax=("student", "teacher")),
    ]
    check_needs("Toy", needs, spec("student"), spec("teacher"))


def test_missing_fields():
    """The message names the detector, and what it has of the part or instead of it."""
    need = Need("box", both=("roi.deltas",), without="DISTILL.TOY.BOX_WEIGHT 0")
    assert refusal(need) == (
        "Toy's term 'box' reads roi.deltas of the student, a GeneralizedRCNN, which serves roi, "
        "roi.features, roi.logits; DISTILL.TOY.BOX_WEIGHT 0 switches it off"
    )
    without_rois = {"fields": frozenset({"pyramid", "dense.logits"})}
    message = refusal(Need("", teacher=("roi.logits",)), teacher=without_rois)
    assert message == (
        "the head Toy reads roi.logits of the teacher, a GeneralizedRCNN, which serves dense, "
        "pyramid"
    )
    assert "without MODEL.MASK_ON" in refusal(Need("", student=("mask",)))
    assert "without MODEL.MASK_ON" not in refusal(Need("", teacher=("mask",)))


@pytest.mark.parametrize(
    ("name", "mine", "theirs", "message"),
    [
        ("num_classes", 3, 80, r"the same number of classes (student: 3, teacher: 80)"),
        ("box_coding", "A", "B", "boxes in the same code (student: A, teacher: B)"),
        ("anchors_per_location", 9, 1, "anchors per location (student: 9, teacher: 1)"),
        ("sigmoid_classes", True, False, "(student: sigmoids, teacher: softmax)"),
        ("head_strides", (8, 16), (16,), "(student: (8, 16), teacher: (16,))"),
        ("anchors", {8: (0, 1), 16: (0, 2)}, {16: (0, 3)}, "(different at stride 16)"),
    ],
)
def test_what_must_be_shared(name, mine, theirs, message):
    """Both values, in words."""
    need = Need("cls", same=(name,), without="DISTILL.TOY.CLASS_WEIGHT 0")
    found = refusal(need, {name: mine}, {name: theirs})
    assert found.startswith("Toy's term 'cls' needs ") and message in found
    assert found.endswith("; DISTILL.TOY.CLASS_WEIGHT 0 switches it off")
    check_needs("Toy", [need], spec("student", **{name: mine}), spec("teacher", **{name: mine}))


def test_heads_without_a_common_level():
    """Dense heads that read other levels have no anchor in common, whatever the numbers are."""
    need = Need("cls", same=("anchors",))
    message = refusal(need, {"head_strides": (8, 16)}, {"head_strides": (32,)})
    assert "(student: at strides [8, 16], teacher: at [32])" in message
    check_needs("Toy", [need], spec("student", head_strides=(8, 16)), spec("teacher"))


def test_detectors_of_two_kinds():
    """The advice names heads that are registered and take any pair."""
    message = refusal(Need("", same=("kind",)), {"num_stages": 1})
    assert "one kind (student: two-stage, teacher: maps only)" in message
    *_, advice = message.split("; ")
    named = advice[advice.index("(") + 1 : advice.index(")")].split(", ")
    assert all(name in DISTILL_HEAD_REGISTRY for name in named)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_box_heads_with_sigmoids(role):
    """Where the class logits of a detector are read as softmax, they must be trained so."""
    sigmoids = {"sigmoid_classes": True}
    need = Need("class", softmax=(role,))
    message = refusal(need, **{role: sigmoids})
    assert f"the {role}'s box head is trained with sigmoids" in message
    both = {name: spec(name, sigmoid_classes=name != role) for name in ("student", "teacher")}
    check_needs("Toy", [need], **both)  # the other one is not read so


def test_a_message_fits_a_line():
    """The longest names that there are leave room for the remedy."""
    fields = frozenset(
        f"roi.{name}" for name in ("features", "hidden", "logits", "boxes", "labels")
    )
    need = Need(
        "background", both=("roi.deltas",), without="DISTILL.GLOBAL_KNOWLEDGE.SOFT_LABELS.WEIGHT 0"
    )
    with pytest.raises(ConfigError) as error:
        check_needs("GlobalKnowledge", [need], spec("student", fields=fields), spec("teacher"))
    assert len(str(error.value)) <= MAX_LINE
