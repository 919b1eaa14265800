"""Prototypes as data: packed in a file, and padded in fixed-size buffers of a module.

Packed, the prototypes of all classes of a level stand below each other. Padded, each class has
room for M of them, so that the size of a checkpoint does not depend on how many were found and
losses need no loop over classes.

L: levels, K: classes, M: prototypes per class at most, M_all: prototypes of a level over all
classes, C_t, C_s: channels of teacher and student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..files import write_tensors
from ..numerics import stack_channels, unit_vectors


@dataclass(frozen=True)
class Instance:
    """A training object: where it is, so that a prototype can be looked at."""

    image_id: int | str
    file_name: str
    box: tuple[float, float, float, float]  # xyxy, pixels of the original image
    category: int  # contiguous class index


@dataclass
class LevelPrototypes:
    """The prototypes of one level, class after class."""

    teacher: Tensor  # (M_all, C_t), not normalised
    student: Tensor  # (M_all, C_s), not normalised
    offsets: Tensor  # (K + 1,) long; rows offsets[c] to offsets[c + 1] belong to class c
    instances: Tensor  # (M_all,) long, positions in Prototypes.instances

    def likeness(self) -> dict[str, tuple[float, float]]:
        """Mean cosine of two prototypes of one class, and of two classes, by detector.

        Where the two hardly differ, responses to prototypes hardly tell classes apart. NaN where
        there are no two such prototypes.
        """
        counts = self.offsets.diff()
        classes = torch.repeat_interleave(torch.arange(len(counts)), counts)
        same = classes[:, None] == classes
        others = ~torch.eye(len(classes), dtype=torch.bool)
        cosines = {}
        for name, features in (("student", self.student), ("teacher", self.teacher)):
            unit = unit_vectors(features.float())
            product = unit @ unit.T
            cosines[name] = (product[same & others].mean().item(), product[~same].mean().item())
        return cosines


@dataclass
class Prototypes:
    """The prototypes of all levels, and the training objects they are."""

    levels: dict[int, LevelPrototypes]  # by stride, fine to coarse
    instances: list[Instance]
    meta: dict = field(default_factory=dict)  # "datasets", "classes" (names), "iteration"

    @property
    def counts(self) -> Tensor:
        """(L, K) long: prototypes per level and class."""
        return torch.stack([level.offsets.diff() for level in self.levels.values()])

    def save(self, path: str) -> None:
        """Write to ``path``, whole or not at all."""
        content = dataclasses.asdict(self)
        content["instances"] = [tuple(item.values()) for item in content["instances"]]
        write_tensors(content, path)

    @classmethod
    def load(cls, path: str) -> Prototypes:
        """Read a file that :meth:`save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is another kind of file.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            levels = {s: LevelPrototypes(**level) for s, level in content["levels"].items()}
            instances = [Instance(*item) for item in content["instances"]]
            return cls(levels, instances, content["meta"])
        except OSError:
            raise
        except Exception as error:  # what unpickling foreign bytes may raise has no end
            raise ValueError(f"'{path}' is no file of prototypes") from error


class PrototypeBank(nn.Module):
    """Padded prototypes as buffers: (K, M, C) features per level and their presence (K, M).

    The buffers belong to the checkpoint of the module that owns the bank. ``iteration`` is the
    training step the prototypes were made for, -1 while there are none.

    Args:
        num_classes: K.
        num_prototypes: M.
        student_channels, teacher_channels: stride -> channels, of the same strides.
    """

    def __init__(
        self,
        num_classes: int,
        num_prototypes: int,
        student_channels: Mapping[int, int],
        teacher_channels: Mapping[int, int],
    ):
        super().__init__()
        self.strides = tuple(student_channels)
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.num_classes, self.num_prototypes = num_classes, num_prototypes
        room = (num_classes, num_prototypes)
        for stride in self.strides:
            self.register_buffer(f"student_{stride}", torch.zeros(*room, student_channels[stride]))
            self.register_buffer(f"teacher_{stride}", torch.zeros(*room, teacher_channels[stride]))
            self.register_buffer(f"present_{stride}", torch.zeros(room, dtype=torch.bool))
        self.register_buffer("iteration", torch.tensor(-1))

    @property
    def has_prototypes(self) -> bool:
        """Whether any class has one (a checkpoint of other sizes leaves a bank empty)."""
        return any(bool(self.level(stride)[2].any()) for stride in self.strides)

    def levels(self, strides: Sequence[int]) -> tuple[Tensor, Tensor]:
        """:meth:`level` of each of ``strides``, stacked: features of student and teacher
        (2, L, K, M, C) and presence (L, K, M). Features of fewer channels are padded with zeros,
        which no cosine sees."""
        student, teacher, present = zip(*(self.level(s) for s in strides), strict=True)
        features = stack_channels([*student, *teacher])
        return features.unflatten(0, (2, -1)), torch.stack(present)

    def level(self, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Student features (K, M, C_s), teacher features (K, M, C_t) and presence (K, M)."""
        names = ("student", "teacher", "present")
        return tuple(self.get_buffer(f"{name}_{stride}") for name in names)

    @torch.no_grad()
    def fill(self, prototypes: Prototypes, iteration: int) -> None:
        """Replace the whole content.

        Nothing is written unless everything fits.

        Args:
            prototypes: at most M a class, of the bank's strides, classes and channels.
            iteration: training step that they were made for.

        Raises:
            ValueError: the prototypes are of another model or setting.
        """
        if tuple(prototypes.levels) != self.strides:
            raise ValueError(
                f"prototypes of strides {tuple(prototypes.levels)} for a bank of {self.strides}"
            )
        padded = {stride: self._pad(level, stride) for stride, level in prototypes.levels.items()}
        for stride, tensors in padded.items():
            for buffer, tensor in zip(self.level(stride), tensors, strict=True):
                buffer.copy_(tensor)
        self.iteration.fill_(iteration)

    def _pad(self, level: LevelPrototypes, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """The level in the shapes of :meth:`level`, zeros where a class has fewer than M."""
        student, teacher, present = (torch.zeros_like(buffer) for buffer in self.level(stride))
        counts = level.offsets.diff()
        found = (
            len(counts),
            int(counts.amax()),
            level.student.shape[1],
            level.teacher.shape[1],
        )
        room = (*student.shape, teacher.shape[2])
        if found[0] != room[0] or found[1] > room[1] or found[2:] != room[2:]:
            raise ValueError(
                f"prototypes at stride {stride} have (classes, prototypes per class, student "
                f"channels, teacher channels) {found}, the bank has room for {room}"
            )
        classes = torch.arange(len(counts)).repeat_interleave(counts)
        slots = torch.arange(len(classes)) - level.offsets[classes]
        for buffer, rows in ((student, level.student), (teacher, level.teacher)):
            buffer[classes, slots] = rows.to(buffer)
        present[classes, slots] = True
        return student, teacher, present
