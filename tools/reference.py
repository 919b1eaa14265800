"""The reference pages docs/api.md and docs/config.md, from docstrings and declarations of keys."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tabulate import tabulate

import d2kd
from d2kd.config import HeadOptions, declared_keys
from d2kd.keys import KeyInfo, Options, Rule

GENERATED = "<!-- Written by tools/update_docs.py: change docstrings and declarations instead. -->"
# The sections of docs/api.md; each name of d2kd.__all__ is in one of them.
SECTIONS = {
    "Writing a head": (
        *("DistillHead", "DISTILL_HEAD_REGISTRY", "Need", "build_head", "Batch", "FeatureBundle"),
        *("DetectorSpec", "describe_detector", "Adapters", "build_adapters", "pair_levels"),
        *("PyramidHead", "PyramidOptions", "full_precision", "connected_zero", "Sketch"),
    ),
    "Writing a detector part": (
        *("DetectorPart", "DETECTOR_PART_REGISTRY", "View", "StudentStep", "TeacherStep", "Facts"),
        *("lazy", "strides_of", "fields_on_student_boxes"),
        *("pool_like_student", "pool_for_own_head"),
    ),
    "Declaring keys": (
        *("Options", "HeadOptions", "key", "group", "config_keys", "declared_keys", "Rule"),
        *("adds_config", "POSITIVE", "NOT_NEGATIVE", "COUNT", "one_of", "or_none"),
    ),
    "Configs and schedules": (
        *("merged_config", "add_distillation_config", "validate_distillation_config"),
        *("student_config", "head_schedule", "Schedule", "ConfigError"),
    ),
    "Training, and using the student": (
        *("distill", "DistillResult", "train", "DistillTrainer", "add_distillation_hooks"),
        *("Distiller", "Teacher", "load_teacher", "GivesMaps", "Pixels", "ExportedDetector"),
    ),
    "Modules": ("losses", "models", "data"),
}


# --- docs/api.md --------------------------------------------------------------------------------


def api_page() -> str:
    """The public API, section by section."""
    parts = [
        f"# The public API\n\n{GENERATED}\n\nThe names of `d2kd.__all__`; `import d2kd` registers "
        "heads, meta-architectures, backbones and datasets."
    ]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        parts += [entry(name, getattr(d2kd, name)) for name in names]
    return "\n\n".join(parts) + "\n"


def entry(name: str, value: Any) -> str:
    """A name with its signature and what its docstring says."""
    if isinstance(value, ModuleType):
        return f"### d2kd.{name}\n\n{module_list(value)}"
    if isinstance(value, Rule):
        return f"### {name}\n\nA `Rule`: {value.words}."
    parts = [f"### {name}"]
    if inspect.isfunction(value) or "__init__" in vars(value) or value is Rule:
        parts.append(f"```python\n{name}{signature(value)}\n```")
    parts.append(prose(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        parts += methods(value)
    return "\n\n".join(filter(None, parts))


def methods(cls: type) -> list[str]:
    """The public methods that a class defines, a line each."""
    lines = []
    for name, member in vars(cls).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        plain = plain.fget if isinstance(plain, property) else plain
        if name.startswith("_") or not inspect.isfunction(plain) or not plain.__doc__:
            continue
        call = "" if isinstance(member, property) else signature(plain, bound=True)
        lines.append(f"* `{name}{call}`: {summary(plain)}")
    return ["Methods:\n\n" + "\n".join(lines)] if lines else []


def module_list(package: ModuleType) -> str:
    """The modules of a package; of losses also the functions, which a head may call."""
    lines = []
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        lines.append(f"* `{module.__name__}`: {summary(module)}")
        for name, value in vars(module).items() if package is d2kd.losses else ():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not name.startswith("_"):
                lines.append(f"  * `{name}`: {summary(value)}")
    return "\n".join(lines)


def signature(value: Any, bound: bool = False) -> str:
    """The call of a function or class, with annotations as they are written."""
    found = inspect.signature(value)
    parameters = list(found.parameters.values())[1 if bound else 0 :]
    found = found.replace(parameters=[with_short_default(p) for p in parameters])
    text = unquoted(str(found))
    if len(text) < 88 or bound:
        return text
    shown = [unquoted(str(p)) for p in found.parameters.values()]
    return "(\n    " + ",\n    ".join(shown) + ",\n" + text[text.rindex(")") :]


def unquoted(text: str) -> str:
    """Annotations without the quotes of postponed evaluation."""
    text = re.sub(r"ForwardRef\(('[^']*')\)", r"\1", text)
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def with_short_default(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter, a default of which is a class or an object of many fields by its name."""
    default = parameter.default
    if isinstance(default, Options):
        return parameter.replace(default=Name(f"{type(default).__name__}()"))
    if inspect.isclass(default) and default is not inspect.Parameter.empty:
        return parameter.replace(default=Name(default.__name__))
    return parameter


class Name:
    """Prints as the text that it is given."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def summary(value: Any) -> str:
    """The first sentence of a docstring, in one line."""
    first = markup((inspect.getdoc(value) or "").split("\n\n")[0])
    return re.split(r"(?<=[.])\s", " ".join(first.split()))[0]


def markup(text: str) -> str:
    """Markdown of the little reStructuredText that docstrings hold."""
    text = re.sub(r":(?:func|class|mod|meth|attr|data):`~?\.?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def prose(docstring: str) -> str:
    """A docstring as Markdown: Args and the like become lists."""
    blocks = re.split(r"^(Args|Attributes|Returns|Yields|Raises):\n", docstring, flags=re.M)
    parts = [markup(blocks[0]).strip()]
    for title, text in zip(blocks[1::2], blocks[2::2], strict=True):
        inside, *after = re.split(r"\n(?=\S)", text)
        parts.append(f"{title}:\n\n{items(textwrap.dedent(inside).strip(), title)}")
        parts += [markup("\n".join(after)).strip()]
    return "\n\n".join(filter(None, parts))


def items(text: str, title: str) -> str:
    """The entries ``name: words`` of a section, with their continuation lines, as a list."""
    text = re.sub(r"\n +", " ", text)
    if title in ("Returns", "Yields"):
        return markup(text)
    return "\n".join(
        re.sub(r"^([\w*, /]+):", r"* `\1`:", markup(line)) for line in text.splitlines() if line
    )


# --- docs/config.md -----------------------------------------------------------------------------


def config_page() -> str:
    """Every key that d2kd adds to Detectron2's, a table per node."""
    parts = [
        f"# The config keys\n\n{GENERATED}\n\nWhat d2kd adds to Detectron2's keys, with defaults. "
        "Each head has a node under `DISTILL`, and in it `WEIGHT` and a `SCHEDULE`; a head's table "
        "shows of the schedule what differs from this one."
    ]
    every = "DISTILL.<HEAD>"
    parts.append(f"## Every head\n\n{table(HeadOptions.declared(every), every)}")
    for node, keys in by_node().items():
        parts.append(f"## {node}\n\n{table(keys, node)}")
    return "\n\n".join(parts) + "\n"


def by_node() -> dict[str, list[KeyInfo]]:
    """The keys of each node that has a page's section of its own: heads, and groups like SOLVER."""
    common = {(i.path.split(".", 2)[2], i.default) for i in HeadOptions.declared("DISTILL.HEAD")}
    nodes: dict[str, list[KeyInfo]] = {}
    for info in declared_keys():
        parent, _, last = info.path.rpartition(".")
        if info.path.startswith("DISTILL.") and info.path.count(".") > 1:
            _, head, last = info.path.split(".", 2)
            parent = f"DISTILL.{head}"
        if not (last.startswith("SCHEDULE.") and (last, info.default) in common):
            nodes.setdefault(parent, []).append(info)
    return nodes


def table(keys: list[KeyInfo] | Iterator[KeyInfo], node: str) -> str:
    """Key, default, what is valid, and what it does."""
    rows = [
        [
            f"`{info.path.removeprefix(f'{node}.')}`",
            f"`{written(info.default)}`",
            cell(_valid(info.rule)),
            cell(info.comment),
        ]
        for info in keys
    ]
    return tabulate(rows, ["key", "default", "valid", ""], tablefmt="pipe", disable_numparse=True)


def _valid(rule: Rule | None) -> str:
    return re.sub("^((it|they) must|valid:) (be )?", "", rule.words) if rule else ""


def cell(text: str) -> str:
    """``text`` inside a table."""
    return markup(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def written(value: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
