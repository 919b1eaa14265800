"""How config keys are declared: default, rule and comment in one line of a typed class.

    @dataclass(frozen=True)
    class MyOptions(HeadOptions):
        temperature: float = key(1.0, POSITIVE, "T, by which logits are divided.")

declares the key ``TEMPERATURE`` of a node. :meth:`Options.add_to` writes the defaults into a
Detectron2 config, :meth:`Options.read` gives the values back, checked and typed. The reference page
of all keys is made from the same declarations.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from detectron2.config import CfgNode

from .errors import ConfigError
from .registry import CONFIG_FUNCTIONS, CONFIG_KEYS

Self = TypeVar("Self", bound="Options")
Adder = TypeVar("Adder", bound=Callable[[CfgNode], Any])


class Rule(NamedTuple):
    """What a config value must be: a test, and the words for it in a message."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Rule(lambda value: 0 < value < math.inf, "it must be positive")
NOT_NEGATIVE = Rule(lambda value: 0 <= value < math.inf, "it must be 0 or positive")
COUNT = Rule(lambda value: value >= 1, "it must be at least 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1")
ITERATION_OR_NEVER = Rule(lambda value: value >= -1, "it must be an iteration, or -1")
ITERATIONS = Rule(
    lambda value: all(isinstance(v, int) and v >= 0 for v in value),
    "they must be iterations, 0 or positive",
)


def one_of(choices: Collection[Any]) -> Rule:
    """The value is one of ``choices``."""
    return Rule(lambda value: value in choices, f"valid: {list(choices)}")


def or_none(rule: Rule) -> Rule:
    """``None``, or a value that ``rule`` allows."""
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.words}, or None")


def check_rule(value: Any, rule: Rule, where: str) -> None:
    """Refuse a value that breaks its rule; ``where`` is its key, for the message."""
    try:
        good = rule.holds(value)
    except (TypeError, ValueError):  # of values that cannot be compared
        good = False
    if not good:
        raise ConfigError(f"{where} is {value!r}; {rule.words}")


@dataclass(frozen=True)
class _Key:
    rule: Rule | None
    comment: str


def key(default: Any, rule: Rule | None = None, comment: str = "") -> Any:
    """A field of an :class:`Options` class that is a config key.

    Args:
        default: its default; tuples are lists in the config.
        rule: what its value must be beyond the type; NaN breaks every rule on numbers.
        comment: what it does, with the paper's symbol where there is one.
    """
    return dataclasses.field(default=default, metadata={"key": _Key(rule, comment)})


def group(options: Options, comment: str = "") -> Any:
    """A field that is a node of its own, with ``options`` as its defaults."""
    return dataclasses.field(default=options, metadata={"key": _Key(None, comment)})


class KeyInfo(NamedTuple):
    """A declared key, for reference pages and checks."""

    path: str
    default: Any
    rule: Rule | None
    comment: str


@dataclass(frozen=True)
class Options:
    """Base of classes that declare the keys of one config node, a field a key.

    A field ``box_beta`` is the key ``BOX_BETA``; a trailing underscore is dropped (``global_`` is
    ``GLOBAL``). A field that holds another ``Options`` is a nested node.
    """

    @classmethod
    def add_to(cls, node: CfgNode, defaults: Options | None = None) -> None:
        """Write the defaults into ``node``; keys that are there already get this class's."""
        defaults = cls() if defaults is None else defaults
        for field in dataclasses.fields(cls):
            name, value = _key_name(field), getattr(defaults, field.name)
            if isinstance(value, Options):
                node.setdefault(name, CfgNode())
                value.add_to(node[name], value)
            else:
                node[name] = _to_config(value)

    @classmethod
    def read(cls: type[Self], node: CfgNode, path: str) -> Self:
        """The values of ``node``, checked.

        Args:
            path: name of the node in messages, e.g. "DISTILL.SSIM".

        Raises:
            ConfigError: names the first key whose value is not valid, and what is.
        """
        values = {}
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name = _key_name(field)
            where = f"{path}.{name}"
            if name not in node:
                raise ConfigError(
                    f"the config has no {where}: leave {path} to d2kd.add_distillation_config(cfg)"
                )
            if isinstance(field.default, Options):
                if not isinstance(node[name], CfgNode):
                    raise ConfigError(f"{where} is {node[name]!r}; it must be a section of keys")
                values[field.name] = type(field.default).read(node[name], where)
            else:
                info: _Key = field.metadata["key"]
                _check(node[name], hints[field.name], info.rule, where)
                values[field.name] = _from_config(node[name])
        return cls(**values)

    @classmethod
    def declared(cls, path: str, defaults: Options | None = None) -> Iterator[KeyInfo]:
        """Each key below ``path``, in the order of declaration."""
        defaults = cls() if defaults is None else defaults
        for field in dataclasses.fields(cls):
            value, info = getattr(defaults, field.name), field.metadata["key"]
            where = f"{path}.{_key_name(field)}"
            if isinstance(value, Options):
                yield from type(value).declared(where, value)
            else:
                yield KeyInfo(where, value, info.rule, info.comment)


def config_keys(path: str) -> Callable[[type[Self]], type[Self]]:
    """Class decorator: the keys of this :class:`Options` class belong into every config.

    Args:
        path: of their node, e.g. "MODEL.FCOS"; nodes that Detectron2 has keep their other keys.
    """

    def register(options: type[Self]) -> type[Self]:
        CONFIG_KEYS[path] = options
        return options

    return register


def adds_config(function: Adder) -> Adder:
    """Let ``function(cfg)`` add keys to every config, the student's and the teacher's.

    For keys that have no :class:`Options`, such as those of a Detectron2 project:
    ``d2kd.adds_config(add_pointrend_config)``, before :func:`d2kd.add_distillation_config`. A
    decorator, too.
    """
    if function not in CONFIG_FUNCTIONS:
        CONFIG_FUNCTIONS.append(function)
    return function


def node_at(cfg: CfgNode, path: str, create: bool = False) -> CfgNode:
    """The node or value of ``cfg`` at a dotted path; ``create`` adds nodes that are missing."""
    for name in path.split("."):
        if create and name not in cfg:
            cfg[name] = CfgNode()
        cfg = cfg[name]
    return cfg


def all_keys(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of each key below ``node``, of nodes too."""
    for name, value in node.items():
        yield prefix + name, value
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{name}.")


def flat_values(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of each key below ``node`` that is no node."""
    return {key: value for key, value in all_keys(node, prefix) if not isinstance(value, CfgNode)}


def _key_name(field: dataclasses.Field[Any]) -> str:
    return field.name.rstrip("_").upper()


def _to_config(value: Any) -> Any:
    return [_to_config(item) for item in value] if isinstance(value, tuple) else value


def _from_config(value: Any) -> Any:
    return tuple(_from_config(item) for item in value) if isinstance(value, list | tuple) else value


def _check(value: Any, hint: Any, rule: Rule | None, where: str) -> None:
    """Refuse a value of another type, or one that breaks its rule."""
    if not _is_a(value, hint):
        words = f"; {rule.words}" if rule else f"; it must be {_type_words(hint)}"
        raise ConfigError(f"{where} is {value!r}{words}")
    if rule is not None:
        check_rule(value, rule, where)


_PLAIN = {float: "a number", int: "a whole number", str: "a string", bool: "True or False"}


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        item, *_ = typing.get_args(hint)
        return all(_is_a(one, item) for one in value)
    if origin is not None:  # float | None
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if hint is Any or hint is type(None):
        return hint is Any or value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _type_words(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        item, *_ = typing.get_args(hint)
        return f"a list, each of it {_PLAIN.get(item, 'a value')}"
    options = typing.get_args(hint) or (hint,)
    words = (_PLAIN.get(one, "None" if one is type(None) else str(one)) for one in options)
    return " or ".join(words)
