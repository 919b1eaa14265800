"""What a distillation head is: it reads both detectors' bundles and returns named loss terms."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from detectron2.engine import HookBase
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..bundle import Batch, DetectorSpec, FeatureBundle
from ..config import ConfigError

DISTILL_HEAD_REGISTRY = Registry("DISTILL_HEAD")
DISTILL_HEAD_REGISTRY.__doc__ = """
Heads that ``DISTILL.HEADS`` can name. A head called ``MyHead`` is configured by the node
``DISTILL.MY_HEAD`` and is called as ``MyHead(cfg, student_spec, teacher_spec)``.
"""


class DistillHead(nn.Module, ABC):
    """Base class of distillation heads.

    A head decides what to read, which parameters it needs and which losses it returns. Weight,
    schedule, naming, freezing the teacher, precision and checkpoints are not its concern.

    ``reads`` names the fields it reads of both bundles (see :class:`~d2kd.bundle.DetectorSpec`),
    ``student_reads`` and ``teacher_reads`` what it reads of one only; a pair that cannot serve them
    is refused when the model is built. A class or an instance may set them.
    """

    reads: Iterable[str] = ("pyramid",)
    student_reads: Iterable[str] = ()
    teacher_reads: Iterable[str] = ()

    @abstractmethod
    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        """Compute the head's loss terms, scalars by name; a single term may have the name "".

        Each carries the head's own inner weights, but not ``WEIGHT`` or the schedule.
        """

    @classmethod
    def add_config(cls, node) -> None:
        """Add the head's own keys, with defaults, to its ``DISTILL`` node (heads of users)."""

    def build_hooks(self, cfg) -> list[HookBase]:
        """Hooks that the trainer runs for this head."""
        return []


def node_name(head_name: str) -> str:
    """The config node of a head: ``FeatureMimic`` -> ``FEATURE_MIMIC``, ``SSIM`` -> ``SSIM``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", head_name).upper()


def require_fields(head: str, spec: DetectorSpec, fields: Iterable[str]) -> None:
    """Refuse a detector that cannot serve ``fields`` to ``head``.

    Raises:
        ConfigError: names the head, the fields, the detector and what it can serve.
    """
    missing = sorted(set(fields) - spec.fields)
    if missing:
        raise ConfigError(
            f"the head {head} reads {missing} of the {spec.role}, a {spec.meta_arch}, which can "
            f"serve only {sorted(spec.fields)}"
        )


def build_head(name: str, cfg, student: DetectorSpec, teacher: DetectorSpec) -> DistillHead:
    """Build the registered head ``name`` for this pair, or say why the pair cannot serve it."""
    head_class = DISTILL_HEAD_REGISTRY.get(name)
    try:
        head = head_class(cfg, student, teacher)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if name in message else f"{name}: {message}") from error
    require_fields(name, student, {*head.reads, *head.student_reads})
    require_fields(name, teacher, {*head.reads, *head.teacher_reads})
    return head
