"""What a head's terms ask of a pair of detectors, and the one place where a pair is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..detectors.spec import DetectorSpec
from ..errors import ConfigError

# Attributes of DetectorSpec that both detectors may have to share, in words.
SHARED = {
    "two_stage": "both two-stage or both one-stage",
    "num_classes": "the same number of classes",
    "box_coding": "boxes coded alike",
    "anchors_per_location": "the same number of anchors per location",
    "head_strides": "outputs at the same strides",
    "anchors": "the same anchors (MODEL.ANCHOR_GENERATOR)",
    "sigmoid_classes": "box heads both trained with softmax or both with sigmoids (USE_SIGMOID_CE)",
}


@dataclass(frozen=True)
class Need:
    """What one term of a head asks of the pair.

    Attributes:
        term: name of the term; "" for the head as a whole.
        both, student, teacher: fields that it reads of both bundles, or of one.
        same: attributes of :class:`DetectorSpec` that must agree, keys of :data:`SHARED`.
        softmax: roles ("student", "teacher") whose box head must be trained with softmax.
        without: the KEY VALUE that switches the term off, for the message.
    """

    term: str
    both: Iterable[str] = ()
    student: Iterable[str] = ()
    teacher: Iterable[str] = ()
    same: Sequence[str] = ()
    softmax: Sequence[str] = ()
    without: str = ""


def check_needs(
    head: str, needs: Iterable[Need], student: DetectorSpec, teacher: DetectorSpec
) -> None:
    """Refuse a pair that cannot serve a head.

    Raises:
        ConfigError: names the head, the term, what is missing and what works without it.
    """
    for need in needs:
        problem = (
            _missing(need, student, teacher)
            or _different(need, student, teacher)
            or _sigmoids(need, student, teacher)
        )
        if problem:
            term = f"{head}'s term '{need.term}'" if need.term else f"the head {head}"
            remedy = f"; without the term: {need.without}" if need.without else ""
            raise ConfigError(f"{term} {problem}{remedy}")


def _missing(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    for spec, own in ((student, need.student), (teacher, need.teacher)):
        missing = sorted({*need.both, *own} - spec.fields)
        if missing:
            return (
                f"reads {', '.join(missing)} of the {spec.role}, a {spec.meta_arch}, which can "
                f"serve only {', '.join(sorted(spec.fields))}"
            )
    return ""


def _different(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    for name in need.same:
        mine, theirs = getattr(student, name), getattr(teacher, name)
        if name == "anchors":
            stride = _other_anchors(mine or {}, theirs or {})
            if stride:
                return f"needs {SHARED[name]} in both detectors; they differ at stride {stride}"
        elif mine != theirs:
            return f"needs {SHARED[name]}; the student has {mine}, the teacher {theirs}"
        elif name == "num_classes" and _other_names(student, teacher):
            return f"needs the same classes in the same order; {_other_names(student, teacher)}"
    return ""


def _other_names(student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The first class of another name, where the names of both are known."""
    pairs = zip(student.class_names or (), teacher.class_names or (), strict=False)
    for number, (mine, theirs) in enumerate(pairs):
        if mine != theirs:
            return f"class {number} of the student is '{mine}', of the teacher '{theirs}'"
    return ""


def _other_anchors(
    mine: dict[int, tuple[Any, ...]], theirs: dict[int, tuple[Any, ...]]
) -> int | None:
    """The first common stride at which the anchors differ."""
    return next((s for s in mine if mine[s] != theirs.get(s, mine[s])), None)


def _sigmoids(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    """A box head that is trained with sigmoids has a background logit that is not trained."""
    for spec in (student, teacher):
        if spec.role in need.softmax and spec.sigmoid_classes:
            return (
                f"reads class logits as softmax, but the {spec.role}'s box head is trained with "
                "sigmoids (USE_SIGMOID_CE)"
            )
    return ""
