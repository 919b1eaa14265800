"""What a detector part is, and the two steps that its fields come from.

A part (the box head, the mask branch, ...) is one class in one file: how a model's part is
described, which of the student's submodules are tapped, and how both detectors' views are made.
Built-in parts and a user's register in the same place:

    @DETECTOR_PART_REGISTRY.register()
    class Keypoint(DetectorPart):
        name = "keypoint"
        ...

A head that names "keypoint.logits" in its ``reads`` then finds ``student.keypoint.logits``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from ..geometry.anchors import grid_anchors
from ..registry import DETECTOR_PART_REGISTRY
from .bundle import Batch, FeatureBundle, View
from .spec import DetectorSpec, Facts, strides_of

T = TypeVar("T")


class Call(NamedTuple):
    """One recorded call of a tapped submodule or method."""

    inputs: tuple[Any, ...]
    output: Any


@dataclass(frozen=True)
class StudentStep:
    """One recorded forward of the student.

    Attributes:
        model, spec: the student.
        batch: the ground truth.
        recorded: path of what is tapped -> its calls, in order.
    """

    model: Any
    spec: DetectorSpec
    batch: Batch
    recorded: Mapping[str, Sequence[Call]]

    def calls(self, path: str) -> Sequence[Call]:
        """The calls of what is tapped at ``path``, in order."""
        return self.recorded[path]

    def outputs(self, path: str) -> list[Any]:
        """What each of :meth:`calls` returned."""
        return [call.output for call in self.recorded[path]]


@dataclass(frozen=True)
class TeacherStep:
    """The teacher's side of a step: nothing is computed until a field is read.

    Attributes:
        model, spec: the teacher.
        student: the student's bundle of the step. student_model: the student.
        bundle: the teacher's own, for the parts to read from each other.
    """

    model: Any
    spec: DetectorSpec
    bundle: FeatureBundle
    student_model: Any
    student: FeatureBundle

    @property
    def pyramid(self) -> Mapping[int, Tensor]:
        return self.bundle.pyramid

    def size(self, stride: int) -> tuple[int, int]:
        """(H, W) of the teacher's map, where possible without computing it."""
        maps = self.student.pyramid if stride in self.student.pyramid else self.pyramid
        height, width = maps[stride].shape[-2:]
        return height, width

    def anchors(self, generator: Any, in_features: Iterable[str]) -> dict[int, Tensor]:
        """Stride -> (H W A, 4) of an anchor generator of the teacher's."""
        strides = strides_of(self.model, in_features)
        if type(generator).forward is not DefaultAnchorGenerator.forward:
            boxes = generator([self.pyramid[s] for s in strides])
            return by_stride(strides, [b.tensor for b in boxes])
        return {
            stride: grid_anchors(cell, self.size(stride), stride, generator.offset)
            for stride, cell in zip(strides, generator.cell_anchors, strict=True)
        }

    def maps(self, in_features: Iterable[str]) -> list[Tensor]:
        """The teacher's maps of these names, as one of its own heads reads them."""
        return [self.pyramid[s] for s in strides_of(self.model, in_features)]


class DetectorPart(ABC):
    """Knowledge of one part of a detector. It holds no state: one instance serves all models.

    Attributes:
        name: of the part; "keypoint" is served where a spec's ``fields`` has "keypoint" or
            "keypoint.<field>".
        attribute: of the bundle that holds the view; default: the name.
        optional: fields of the view that a detector may lack, although it has the part:
            "logits" can be read where the spec's ``fields`` has "keypoint.logits".
    """

    name: ClassVar[str]
    attribute: ClassVar[str] = ""
    optional: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        """What ``model`` can serve of this part, and its sizes; no fields where there is none.

        Args:
            student: for a teacher, the spec of its student.
        """

    @abstractmethod
    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        """Paths of the student's submodules, or methods, whose calls are to be recorded."""

    @abstractmethod
    def student_view(self, step: StudentStep) -> View | Sequence[View]:
        """The view of what the student computed; one for each stage if the part has stages."""

    @abstractmethod
    def teacher_view(self, step: TeacherStep) -> View | Sequence[View]:
        """The same of the teacher: with fields that are computed when they are read."""

    def is_served(self, spec: DetectorSpec) -> bool:
        """Whether a detector has this part."""
        return any(field.split(".")[0] == self.name for field in spec.fields)

    def join(self, bundle: FeatureBundle, views: View | Sequence[View]) -> None:
        """Make ``views`` the part's field of ``bundle``, without what the detector lacks."""
        served = bundle.spec.fields
        withheld = [name for name in self.optional if f"{self.name}.{name}" not in served]
        bundle.add(self.attribute or self.name, views, withheld)


def detector_parts() -> list[DetectorPart]:
    """An instance of each registered part, built-in ones first."""
    return [part() for _, part in DETECTOR_PART_REGISTRY]


def by_stride(strides: Iterable[int], values: Iterable[T]) -> dict[int, T]:
    """Pair strides with as many values."""
    return dict(zip(strides, values, strict=True))
