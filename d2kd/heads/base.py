"""What a distillation head is: it reads both detectors' bundles and returns named loss terms."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from ..config import HeadOptions
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.spec import DetectorSpec
from ..errors import ConfigError
from ..registry import DISTILL_HEAD_REGISTRY, node_name
from .needs import Need, check_needs
from .sketch import Sketch

# Loss terms of a head, scalars by name.
Terms = dict[str, Tensor]


class DistillHead(nn.Module, ABC):
    """Base class of distillation heads.

    A head decides what to read, which parameters it needs and which losses it returns. Its
    constructor takes its ``options``, ``student_spec`` and ``teacher_spec`` by these names, or what
    a :meth:`from_config` of its own returns; ``@configurable`` stands above it. Weight, schedule,
    naming, freezing the teacher, precision and checkpoints are not its concern.

    ``Options`` declares the head's keys (see :mod:`d2kd.keys`). ``reads`` names the fields it reads
    of both bundles (see :class:`~d2kd.detectors.spec.DetectorSpec`), ``student_reads`` and
    ``teacher_reads`` what it reads of one only; a class or an instance may set them. A head whose
    terms have needs of their own returns them from :meth:`needs`. A pair that cannot serve a head
    is refused when the model is built.

    A head of several terms names the option of each term's weight in ``term_options``, e.g.
    ``{"box": "box_weight"}``; ``weights`` then has the terms that are in use, see
    :meth:`term_weights`.
    """

    Options: type[HeadOptions] = HeadOptions
    term_options: ClassVar[Mapping[str, str]] = {}
    weights: Mapping[str, float] = {}
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
    def from_config(
        cls, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec
    ) -> dict[str, Any]:
        """Arguments of the constructor: the head's options and both specs, or a head's own."""
        return {
            "options": cls.read_options(cfg),
            "student_spec": student_spec,
            "teacher_spec": teacher_spec,
        }

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        """Add the head's own keys, with defaults, to its ``DISTILL`` node: those of ``Options``."""
        cls.Options.add_to(node)

    @classmethod
    def read_options(cls, cfg: CfgNode) -> Any:
        """The head's ``Options`` with the values of ``cfg``, checked.

        Raises:
            ConfigError: names the first key whose value is not valid.
        """
        name = node_name(cls.__name__)
        return cls.Options.read(cfg.DISTILL[name], f"DISTILL.{name}")

    @classmethod
    def term_weights(cls, options: HeadOptions, absent: Collection[str] = ()) -> dict[str, float]:
        """Weight of each term in use: one whose option in ``term_options`` is not 0.

        Args:
            absent: terms that there are not in this pair, or with these options.

        Raises:
            ConfigError: no term is left.
        """
        wanted: dict[str, float] = {
            term: operator.attrgetter(path)(options) for term, path in cls.term_options.items()
        }
        weights = {term: weight for term, weight in wanted.items() if term not in absent}
        if not any(weights.values()):
            keys = ", ".join(dict.fromkeys(_key_path(cls.term_options[term]) for term in weights))
            missing = ", ".join(f"'{term}'" for term in wanted if wanted[term])
            raise ConfigError(
                f"DISTILL.{node_name(cls.__name__)}: nothing to distil, as {keys} "
                + ("are all 0" if len(weights) > 1 else "is 0")
                + f"; this pair has no term {missing}" * bool(missing)
            )
        return {term: weight for term, weight in weights.items() if weight}

    def weigh(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term times its weight in ``weights``."""
        weights = self.weights
        return {t: loss if weights[t] == 1 else weights[t] * loss for t, loss in terms.items()}

    @classmethod
    def needs(cls, options: Any, student: DetectorSpec, teacher: DetectorSpec) -> Sequence[Need]:
        """What each term that ``options`` (the head's ``Options``) switch on asks of the pair;
        default: the class's reads.

        Raises:
            ConfigError: the options leave nothing to distil, or do not fit the pair's kind.
        """
        return [Need("", both=cls.reads, student=cls.student_reads, teacher=cls.teacher_reads)]

    def sketch(self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch) -> Sketch:
        """What ``d2kd show --heads`` draws of a step of one image, in addition to where the head's
        loss pulls at the student's pyramid; default: nothing."""
        return Sketch()

    def build_hooks(self, cfg: CfgNode) -> list[HookBase]:
        """Hooks that the trainer runs for this head."""
        return []


def _key_path(option: str) -> str:
    """The config key of an option: "global_.weight" -> "GLOBAL.WEIGHT"."""
    return ".".join(name.rstrip("_").upper() for name in option.split("."))


def _complete(needs: Iterable[Need], head_class: type[DistillHead]) -> list[Need]:
    """``needs``, each with the key that switches its term off."""
    node = f"DISTILL.{node_name(head_class.__name__)}"
    remedies = {term: f"{node}.{_key_path(o)} 0" for term, o in head_class.term_options.items()}
    return [replace(n, without=n.without or remedies.get(n.term, "")) for n in needs]


def _declares_needs(head_class: type[DistillHead]) -> bool:
    """Whether a head has needs of its own, instead of what its class or instance reads."""
    return any("needs" in vars(base) for base in head_class.__mro__ if base is not DistillHead)


def build_head(
    name: str, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec
) -> DistillHead:
    """Build the registered head ``name`` for this pair, or say why the pair cannot serve it.

    Raises:
        ConfigError: a value is not valid, or the pair cannot serve a term; names the head.
    """
    head_class = DISTILL_HEAD_REGISTRY.get(name)
    try:
        options = head_class.read_options(cfg)
        needs = _complete(head_class.needs(options, student, teacher), head_class)
        check_needs(name, needs, student, teacher)
        head = head_class(cfg, student, teacher)
    except ConfigError as error:
        message = str(error)
        known = name in message or node_name(name) in message
        raise ConfigError(message if known else f"{name}: {message}") from error
    if _declares_needs(head_class):
        head.reads = {field for need in needs for field in need.both}
        head.student_reads = {field for need in needs for field in need.student}
        head.teacher_reads = {field for need in needs for field in need.teacher}
    else:  # an instance may have set its own
        own = Need("", head.reads, head.student_reads, head.teacher_reads)
        check_needs(name, [own], student, teacher)
    return head
