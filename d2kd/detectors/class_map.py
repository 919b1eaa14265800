"""The teacher's outputs in the student's classes, where the two sets differ.

Terms that compare classes then act on those that both know: of a class that only the student has,
the teacher repeats what the student says (a constant), which leaves no loss and no gradient; a
class that only the teacher has is background to the student.

Shapes: R RoIs, K_s and K_t classes of student and teacher, M side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..numerics import on_device

KEY = "DISTILL.TEACHER.CLASS_MAP"
UNKNOWN = -1


@dataclass(frozen=True)
class ClassMap:
    """Which class of the teacher each class of the student is.

    Attributes:
        numbers: of the teacher's classes, by the student's; -1 for one that it does not have.
        width: K_t.
    """

    numbers: tuple[int, ...]
    width: int

    @property
    def shared(self) -> tuple[int, ...]:
        """Numbers of the student's classes that the teacher knows."""
        return tuple(i for i, number in enumerate(self.numbers) if number != UNKNOWN)

    def fill(self, theirs: Tensor, mine: Tensor, dim: int = 1) -> Tensor:
        """(..., K_t, ...) of the teacher and (..., K_s, ...) of the student along ``dim`` -> the
        teacher's, in the student's classes, with the student's own of those it does not know."""
        index = on_device([max(number, 0) for number in self.numbers], theirs.device)
        return torch.where(self._known(theirs, dim), theirs.index_select(dim, index), mine.detach())

    def _known(self, like: Tensor, dim: int) -> Tensor:
        known = on_device([number != UNKNOWN for number in self.numbers], like.device)
        return known.view(-1, *[1] * (like.dim() - dim - 1))

    def roi_logits(self, theirs: Tensor, mine: Tensor, sigmoid: bool) -> Tensor:
        """(R, K_t + 1) and (R, K_s + 1), background last -> (R, K_s + 1) of the teacher.

        Of a softmax, the classes that the teacher does not know keep the student's probability,
        and it shares out the rest.

        Args:
            sigmoid: the teacher's box head is trained with a sigmoid per class.
        """
        theirs, mine = theirs.float(), mine.detach().float()
        if sigmoid:
            return torch.cat([self.fill(theirs[:, :-1], mine[:, :-1]), theirs[:, -1:]], dim=1)
        others = [k for k in range(self.width + 1) if k not in self.numbers]  # and background
        compared = [*self.shared, len(self.numbers)]
        background = _mass(theirs, others)
        shift = _mass(mine, compared) - theirs.logsumexp(dim=1, keepdim=True)
        classes = self.fill(theirs[:, :-1] + shift, mine[:, :-1])
        return torch.cat([classes, background + shift], dim=1)

    def roi_deltas(
        self, theirs: Tensor, mine: Tensor, weights: Sequence[float], own: Sequence[float]
    ) -> Tensor:
        """(R, 4 K_t or 4) and (R, 4 K_s or 4) -> (R, 4 K_s) of the teacher, in the student's units.

        Args:
            weights, own: what the student's, and the teacher's, deltas are multiplied by.
        """
        factors = on_device([new / old for new, old in zip(weights, own, strict=True)], mine.device)
        theirs, mine = theirs.unflatten(1, (-1, 4)) * factors, mine.unflatten(1, (-1, 4))
        return self.fill(theirs.expand(-1, self.width, -1), mine).flatten(1)

    def masks(self, theirs: Tensor, mine: Tensor) -> Tensor:
        """(F, K_t or 1, M', M') and (F, K_s or 1, M, M) -> (F, K_s, M, M) of the teacher."""
        if theirs.shape[-2:] != mine.shape[-2:]:
            size = mine.shape[-2], mine.shape[-1]
            theirs = F.interpolate(theirs, size, mode="bilinear", align_corners=False)
        return self.fill(theirs.expand(-1, self.width, -1, -1), mine)


def _mass(logits: Tensor, columns: list[int]) -> Tensor:
    """(R, 1) log of the sum of exp over ``columns`` of (R, K + 1)."""
    index = on_device(columns, logits.device)
    return logits.index_select(1, index).logsumexp(dim=1, keepdim=True)


def match_classes(
    student: Sequence[str] | int | None, teacher: Sequence[str] | int | None, pairs: Sequence[Any]
) -> ClassMap | None:
    """The classes that student and teacher share: of equal names, and those of ``pairs``.

    Args:
        student, teacher: names of the classes in order, or their number; None: it predicts none.
        pairs: ``DISTILL.TEACHER.CLASS_MAP``: (student's class, teacher's), each a name or a number
            from 0; the teacher's may be "": none of its classes.

    Returns:
        None where there is nothing to map: the classes are the same, as far as is known, or share
        no name.

    Raises:
        ConfigError: a pair names a class that is not there, or a class has two partners.
    """
    if student is None or teacher is None:
        if pairs:
            role = "student" if student is None else "teacher"
            raise ConfigError(f"{KEY}: the {role} predicts no classes")
        return None
    mine, theirs = _numbers(student), _numbers(teacher)
    count, width = (x if isinstance(x, int) else len(x) for x in (student, teacher))
    numbers = [UNKNOWN] * count
    for name in mine.keys() & theirs.keys():
        numbers[mine[name]] = theirs[name]
    paired: dict[int, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(f"{KEY}: {pair!r} is not a pair [student's class, teacher's class]")
        own = _number(pair[0], mine, count, "student")
        if own in paired:
            raise ConfigError(
                f"{KEY}: the student's class {pair[0]!r} is paired with {paired[own]!r} and "
                f"{pair[1]!r}, but one class can teach it: keep one of these pairs"
            )
        paired[own] = pair[1]
        numbers[own] = UNKNOWN if pair[1] == "" else _number(pair[1], theirs, width, "teacher")
    _check_partners(numbers, student, teacher)
    if set(numbers) == {UNKNOWN} or (numbers == list(range(count)) and count == width):
        return None
    return ClassMap(tuple(numbers), width)


def _numbers(classes: Sequence[str] | int) -> dict[str, int]:
    """Name -> number of the classes that have a name of their own."""
    if isinstance(classes, int):
        return {}
    return {name: i for i, name in enumerate(classes) if list(classes).count(name) == 1}


def _check_partners(
    numbers: list[int], student: Sequence[str] | int, teacher: Sequence[str] | int
) -> None:
    """Refuse a teacher's class that is two of the student's: its probability would count twice."""
    for number in set(numbers) - {UNKNOWN}:
        owners = [own for own, found in enumerate(numbers) if found == number]
        if len(owners) > 1:
            mine = " and ".join(_call(student, own) for own in owners)
            raise ConfigError(
                f"{KEY}: the teacher's class {_call(teacher, number)} is paired with {mine} of the "
                'student, but can teach one of them: pair all but one with ""'
            )


def _call(classes: Sequence[str] | int, number: int) -> str:
    """A class in a message."""
    return repr(number if isinstance(classes, int) else classes[number])


def _number(given: Any, known: dict[str, int], count: int, role: str) -> int:
    """The number of a class that a pair names."""
    number = known.get(given, given) if isinstance(given, str) else given
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
        return number
    valid = f"its classes are {', '.join(known)}" if known else "its classes have no known names"
    raise ConfigError(
        f"{KEY}: the {role} has no class {given!r}; {valid}; numbers go from 0 to {count - 1}"
    )
