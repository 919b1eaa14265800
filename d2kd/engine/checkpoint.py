"""Checkpoints: written whole or not at all, checked before anything of them is used."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint_files import SafeCheckpointer
from ..errors import ConfigError, first_line, one_line
from ..files import shown, write_tensors, write_text
from ..meta_arch import HEADS_PREFIX, moments_of

LAST_CHECKPOINT = "last_checkpoint"
STUDENT_FILE = "student_final.pth"

# Share of a file's weights that must find a place in the student; share of the convolutions of the
# backbone, by name, that may differ in shape. (A pyramid of another width may start elsewhere.)
_MIN_SHARE = 0.1
_MAX_OTHER_SHAPES = 0.25
_PYRAMID = ("backbone.fpn_", "backbone.top_block.")
_SHOWN = 2


class AtomicCheckpointer(SafeCheckpointer):
    """Detectron2's checkpointer; a kill while it saves leaves the last checkpoint as it was."""

    before_save: Callable[[], None] | None = None  # called before each save, to refuse it

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        if self.before_save is not None:
            self.before_save()
        data = {"model": self.model.state_dict(), **kwargs}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        write_tensors(data, path)
        self.logger.info("Saved %s", path)
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(last_filename_basename, os.path.join(self.save_dir, LAST_CHECKPOINT))

    def load_weights(self, path: str, complete: bool = False) -> None:
        """Load ``MODEL.WEIGHTS``, as Detectron2 does, and nothing else of the file.

        Args:
            complete: every weight of the model must be in the file, as for an evaluation.

        Raises:
            ConfigError: the file cannot be read or does not fit the model; names weights.
        """
        self._wanted = (path, complete)
        try:
            self.load(path, checkpointables=[])
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"MODEL.WEIGHTS '{shown(path)}' cannot be read: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        finally:
            self._wanted = None
            self._parsed_url_during_load = None  # Detectron2 leaves it behind after an error

    _wanted: tuple[str, bool] | None = None

    def restore(self, checkpoint: dict) -> None:
        """Load what :func:`read_checkpoint` read: the model and all that goes with it."""
        self._log_incompatible_keys(self._load_model(checkpoint))
        for key, item in self.checkpointables.items():
            item.load_state_dict(checkpoint[key])

    def _load_model(self, checkpoint: dict):
        """Load the student and the heads apart: Detectron2 follows a name to its module where
        shapes differ, and matches names of foreign backbones by their ends, which those of heads
        must not see.
        """
        state, moments = checkpoint.pop("model"), moments_of(self.model)
        of_heads = [k for k in state if k.startswith(HEADS_PREFIX) and moments.distill_heads]
        heads = {key.removeprefix(HEADS_PREFIX): state.pop(key) for key in of_heads}
        sizes = {key: math.prod(getattr(value, "shape", ())) for key, value in state.items()}
        names = None if checkpoint.get("matching_heuristics") else _names(state)
        result = _load(moments.student, {**checkpoint, "model": state})
        self._check_fit(moments.student, result, sizes, names)
        if heads and moments.distill_heads.state_dict():
            found = _load(moments.distill_heads, {"model": heads})
            result.missing_keys.extend(HEADS_PREFIX + key for key in found.missing_keys)
            result.unexpected_keys.extend(HEADS_PREFIX + key for key in found.unexpected_keys)
            shapes = ((HEADS_PREFIX + key, *both) for key, *both in found.incorrect_shapes)
            result.incorrect_shapes.extend(shapes)
        return result

    def _check_fit(
        self, student: nn.Module, result, sizes: dict[str, int], names: set[str] | None
    ) -> None:
        """Refuse weights of which nearly nothing found a place, or too little for ``complete``.

        ``sizes`` are of each weight in the file, and ``names`` what they are called there; None
        where they are matched in other ways. (What is not missed need not be in the file: a frozen
        norm makes up its statistics.)
        """
        if self._wanted is None:
            return
        path, complete = self._wanted
        model = student.state_dict()
        misfits = {key: math.prod(found) for key, found, _ in result.incorrect_shapes}
        absent = {*result.missing_keys, *misfits}
        absent |= set() if names is None else model.keys() - names
        fitting = sum(value.numel() for key, value in model.items() if key not in absent)
        in_vain = sum(sizes.get(key, 0) for key in result.unexpected_keys) + sum(misfits.values())
        common = [key for key in model if key in misfits or key not in absent]
        convolutions = [key for key in common if _is_of_backbone(key) and model[key].dim() > 1]
        others = [key for key in convolutions if key in misfits]
        is_other_backbone = len(others) > _MAX_OTHER_SHAPES * len(convolutions)
        if not fitting or fitting < _MIN_SHARE * (fitting + in_vain) or is_other_backbone:
            raise ConfigError(_unfit_words(path, result, sorted(absent)))
        needed = sorted(absent & {name for name, _ in student.named_parameters()})
        if complete and needed:
            raise ConfigError(
                f"MODEL.WEIGHTS '{shown(path)}' lacks {len(needed)} weights of the model, or has "
                f"them in other shapes ({_some(needed)}): give a checkpoint of this detector"
            )


def _load(module: nn.Module, checkpoint: dict):
    return SafeCheckpointer(module)._load_model(checkpoint)


def _names(state: dict) -> set[str]:
    """The keys of ``state`` as they are loaded: a prefix of DataParallel's is taken off."""
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix) for key in state}


def _is_of_backbone(key: str) -> bool:
    return key.startswith("backbone.") and not key.startswith(_PYRAMID)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _unfit_words(path: str, result, absent: list[str]) -> str:
    shapes = sorted(result.incorrect_shapes, key=lambda item: not _is_of_backbone(item[0]))
    for key, found, wanted in shapes[:1]:
        return (
            f"MODEL.WEIGHTS '{shown(path)}' does not fit the model: {key} is {tuple(found)} in it, "
            f"{tuple(wanted)} in the model"
        )
    has = _some(list(result.unexpected_keys)) or "no weights"
    hint = "" if "?" in path else "; add '?matching_heuristics=True' to match name endings"
    return (
        f"MODEL.WEIGHTS '{shown(path)}' does not fit the model: it has {has}; the model has "
        f"{_some(absent)}{hint}"
    )


def save_student(model: nn.Module, path: str) -> None:
    """Write only the student's weights: what a plain Detectron2 model of the config loads."""
    write_tensors({"model": moments_of(model).student.state_dict()}, path)


# --- finding and reading the checkpoint of a training --------------------------------------------


def find_checkpoint(folder: str, *, weights_only: bool = False) -> str:
    """The checkpoint that a training in ``folder`` goes on from; "" where there is none.

    Args:
        weights_only: a file of weights without the state of a training will do.

    Raises:
        ConfigError: the last one is damaged (names the newest that are whole), or no training's.
    """
    pointer = os.path.join(folder, LAST_CHECKPOINT)
    if not os.path.isfile(pointer):
        return ""
    with open(pointer, errors="replace") as file:
        name = file.read().strip()
    path = os.path.join(folder, name)
    # A file that was cut off lacks its end, PyTorch's table of contents. Bytes that changed in the
    # middle show when it is read.
    if not _is_whole(path):
        raise ConfigError(_damage_words(folder, name))
    if not weights_only and zipfile.is_zipfile(path) and _iteration_of(path) is None:
        raise ConfigError(
            f"'{shown(path)}' holds no state of a training to resume, only weights: start from "
            "them, by MODEL.WEIGHTS, in another OUTPUT_DIR"
        )
    return path


def _is_whole(path: str) -> bool:
    """Whether a file has its end; of PyTorch's old format, a pickle, only reading it tells."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _damage_words(folder: str, name: str) -> str:
    """One line for a last checkpoint ``name`` that cannot be resumed from."""
    if not name:
        what = f"'{shown(os.path.join(folder, LAST_CHECKPOINT))}' is empty"
    else:
        there = os.path.lexists(os.path.join(folder, name))
        state = "damaged" if there else "not there"
        what = f"the last checkpoint '{shown(os.path.join(folder, name))}' is {state}"
    iterations = {
        path.name: iteration
        for path in Path(folder).glob("model_*.pth")
        if path.name != name and (iteration := _iteration_of(path)) is not None
    }
    newest = sorted(iterations, key=lambda n: (iterations[n], n), reverse=True)[:3]
    if not newest:
        return f"{what}, and no other is whole: train from the start, into another OUTPUT_DIR"
    return one_line(
        f"{what}; the newest whole ones are {', '.join(newest)}: write a name into "
        f"'{LAST_CHECKPOINT}' there to go on from it"
    )


def _iteration_of(path: str | Path) -> int | None:
    """The last iteration of a checkpoint; None if it is damaged or not one of a training."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(content["trainer"]["iteration"])
    except Exception:
        return None


def read_checkpoint(path: str) -> dict:
    """The content of the checkpoint that :func:`find_checkpoint` found; a ConfigError if it is
    damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(_damage_words(*os.path.split(path))) from error


def prune(folder: str, keep: int, best: str = "") -> None:
    """Remove all checkpoints of the way but the ``keep`` that were written last and ``best``."""
    paths = [path for path in Path(folder).iterdir() if re.fullmatch(r"model_\d+\.pth", path.name)]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, path))
    for path in paths[: max(len(paths) - keep, 0)]:
        if path.name != best:
            path.unlink()
