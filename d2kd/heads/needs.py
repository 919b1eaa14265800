"""What a head's terms ask of a pair of detectors, and the one place where a pair is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..detectors.spec import DetectorSpec
from ..errors import ConfigError


class Shared(NamedTuple):
    """Words for an attribute of :class:`DetectorSpec` that both detectors must share.

    Attributes:
        wanted: what a term needs.
        value: from the attribute's value to its name in a message.
        advice: what works for pairs that differ; "" where only the term must go.
    """

    wanted: str
    value: Callable[[Any], str] = str
    advice: str = ""


_ANY_PAIR = "heads on the pyramid (SSIM, FeatureMimic, DRKD) take any pair"

# What a Need may name as ``same``.
SHARED = {
    "kind": Shared("two detectors of one kind", advice=_ANY_PAIR),
    "num_classes": Shared(
        "the same number of classes",
        advice="DISTILL.TEACHER.CLASS_MAP pairs classes that both have",
    ),
    "box_coding": Shared("boxes in the same code"),
    "anchors_per_location": Shared("the same number of anchors per location", advice=_ANY_PAIR),
    "head_strides": Shared("outputs at the same strides"),
    "anchors": Shared("the same anchors (MODEL.ANCHOR_GENERATOR)"),
    "sigmoid_classes": Shared(
        "box heads trained with the same loss (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE)",
        lambda sigmoids: "sigmoids" if sigmoids else "softmax",
    ),
}


@dataclass(frozen=True)
class Need:
    """What one term of a head asks of the pair.

    Attributes:
        term: name of the term; "" for the head as a whole.
        both, student, teacher: fields that it reads of both bundles, or of one.
        same: attributes of :class:`DetectorSpec` that must agree, keys of :data:`SHARED`.
        softmax: roles ("student", "teacher") whose box head must be trained with softmax.
        without: the KEY VALUE that switches it off, for the message.
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
        ConfigError: names the head, the term, what is missing and the key that switches it off.
    """
    for need in needs:
        problem = (
            _missing(need, student, teacher)
            or _different(need, student, teacher)
            or _sigmoids(need, student, teacher)
        )
        if problem:
            term = f"{head}'s term '{need.term}'" if need.term else f"the head {head}"
            remedy = f"; {need.without} switches it off" if need.without else ""
            raise ConfigError(f"{term} {problem}{remedy}")


def _missing(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    for spec, own in ((student, need.student), (teacher, need.teacher)):
        missing = sorted({*need.both, *own} - spec.fields)
        if missing:
            part = missing[0].split(".")[0]
            # A switch of the student's config; a teacher is what it is.
            hint = " without MODEL.MASK_ON" if part == "mask" and spec is student else ""
            return (
                f"reads {', '.join(missing)} of the {spec.role}, a {spec.meta_arch}{hint}, which "
                f"serves {', '.join(_served(spec, part))}"
            )
    return ""


def _served(spec: DetectorSpec, part: str) -> list[str]:
    """The fields that a detector has of a part, or the parts that it has instead."""
    of_part = sorted(field for field in spec.fields if field.split(".")[0] == part)
    return of_part or sorted({field.split(".")[0] for field in spec.fields}) or ["nothing"]


def _different(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    for name in need.same:
        if name == "num_classes" and teacher.class_map is not None:
            continue
        shared, mine, theirs = SHARED[name], getattr(student, name), getattr(teacher, name)
        if name == "anchors":
            gap = _other_anchors(student, teacher)
        else:
            values = f"student: {shared.value(mine)}, teacher: {shared.value(theirs)}"
            gap = values if mine != theirs else ""
        if name == "num_classes" and not gap:
            gap = _other_names(student, teacher)
        if gap:
            return f"needs {shared.wanted} ({gap})" + (f"; {shared.advice}" * bool(shared.advice))
    return ""


def _other_names(student: DetectorSpec, teacher: DetectorSpec) -> str:
    """The first class of another name, where the names of both are known."""
    pairs = zip(student.class_names or (), teacher.class_names or (), strict=False)
    for number, (mine, theirs) in enumerate(pairs):
        if mine != theirs:
            return f"class {number} of the student is '{mine}', of the teacher '{theirs}'"
    return ""


def _other_anchors(student: DetectorSpec, teacher: DetectorSpec) -> str:
    """Where the anchors of two dense detectors differ, as far as their numbers are known."""
    levels = student.head_strides, teacher.head_strides
    if all(levels) and not set.intersection(*map(set, levels)):
        return f"student: at strides {list(levels[0])}, teacher: at {list(levels[1])}"
    mine, theirs = student.anchors or {}, teacher.anchors or {}
    differ = (stride for stride in mine if mine[stride] != theirs.get(stride, mine[stride]))
    return next((f"different at stride {stride}" for stride in differ), "")


def _sigmoids(need: Need, student: DetectorSpec, teacher: DetectorSpec) -> str:
    """A box head that is trained with sigmoids has a background logit that is not trained."""
    for spec in (student, teacher):
        if spec.role in need.softmax and spec.sigmoid_classes:
            return (
                f"reads class logits as softmax, but the {spec.role}'s box head is trained with "
                "sigmoids (USE_SIGMOID_CE)"
            )
    return ""
