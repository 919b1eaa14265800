"""``DISTILL.INHERIT``: a student that starts with parts of its teacher.

A part is copied module by module: a module whose own weights have the names and shapes of the
teacher's is copied whole, any other not at all, so that no layer is half the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError

# Names for the parts that detectors of Detectron2 are made of, and what their modules begin with.
PARTS = {
    "fpn": ("backbone.fpn_", "backbone.top_block."),
    "rpn": ("proposal_generator.",),
    "box_head": ("roi_heads.box_head.", "roi_heads.box_predictor."),
    "mask_head": ("roi_heads.mask_head.",),
    "head": ("head.",),
}
_LINES = 8


@dataclass(frozen=True)
class Inheritance:
    """What a student takes over from its teacher.

    Attributes:
        copied: part -> names of the modules to copy.
        refused: part -> module -> why it cannot be copied.
    """

    copied: dict[str, list[str]]
    refused: dict[str, dict[str, str]]

    @torch.no_grad()
    def copy(self, student: nn.Module, teacher: nn.Module) -> None:
        """Overwrite the student's modules with the teacher's, in place."""
        mine, theirs = _weights_by_module(student), _weights_by_module(teacher)
        for modules in self.copied.values():
            for module in modules:
                for name, weight in mine[module].items():
                    weight.copy_(theirs[module][name])

    def __str__(self) -> str:
        lines = []
        for part, modules in self.copied.items():
            refused = self.refused[part]
            count = f"{len(modules)} of {len(modules) + len(refused)} modules copied"
            lines.append(f"{part}: {count}: {_shortened(modules, ', ')}")
            if refused:
                reasons = [f"  not {module}: {reason}" for module, reason in refused.items()]
                lines.append(_shortened(reasons, "\n", indent="  "))
        return "\n".join(lines)


def _shortened(items: list[str], separator: str, indent: str = "") -> str:
    shown = items[:_LINES]
    if len(items) > _LINES:
        shown = [*shown, f"{indent}and {len(items) - _LINES} more"]
    return separator.join(shown)


def plan_inheritance(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> Inheritance:
    """Compare names and shapes of the parts; nothing is copied yet.

    Args:
        parts: names of ``PARTS``, or paths of modules of the student such as "roi_heads.box_head".

    Raises:
        ConfigError: the student has no such part (names those it has), or nothing of a part fits.
    """
    mine, theirs = _weights_by_module(student), _weights_by_module(teacher)
    copied, refused = {}, {}
    for part in parts:
        reasons = {
            module: _difference(weights, theirs.get(module))
            for module, weights in mine.items()
            if _belongs(module, part)
        }
        if not reasons:
            have = [name for name in PARTS if any(_belongs(module, name) for module in mine)]
            raise ConfigError(
                f"DISTILL.INHERIT: the student has no part '{part}'; valid: {', '.join(have)}, or "
                "the path of a module, such as backbone.bottom_up"
            )
        copied[part] = [module for module, reason in reasons.items() if not reason]
        refused[part] = {module: reason for module, reason in reasons.items() if reason}
        if not copied[part]:
            module, reason = next(iter(refused[part].items()))
            raise ConfigError(
                f"DISTILL.INHERIT: nothing of '{part}' can be copied from the teacher, e.g. "
                f"{module}: {reason}"
            )
    return Inheritance(copied, refused)


def _weights_by_module(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Module path -> its own parameters and saved buffers by name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, weight in model.state_dict().items():
        path, _, name = key.rpartition(".")
        modules.setdefault(path, {})[name] = weight
    return modules


def _belongs(module: str, part: str) -> bool:
    return f"{module}.".startswith(PARTS.get(part, (f"{part}.",)))


def _difference(mine: dict[str, Tensor], theirs: dict[str, Tensor] | None) -> str:
    """Why weights of a module cannot be copied; "" where they can."""
    if theirs is None:
        return "the teacher has no such module"
    if mine.keys() != theirs.keys():
        return f"it has {', '.join(mine)}, the teacher's {', '.join(theirs)}"
    for name, weight in mine.items():
        if weight.shape != theirs[name].shape:
            shapes = tuple(weight.shape), tuple(theirs[name].shape)
            return f"{name} is {shapes[0]}, the teacher's {shapes[1]}"
    return ""
