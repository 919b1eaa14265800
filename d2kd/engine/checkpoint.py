"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

import os

import torch

from ..checkpoint_files import SafeCheckpointer
from ..files import write_atomically, write_text
from ..meta_arch import HEADS_PREFIX, Distiller, moments_of


class AtomicCheckpointer(SafeCheckpointer):
    """Detectron2's checkpointer; a kill while it saves leaves the last checkpoint as it was."""

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        write_atomically(path, lambda temporary: torch.save(data, temporary))
        self.logger.info("Saved %s", path)
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(last_filename_basename, os.path.join(self.save_dir, "last_checkpoint"))

    def _load_model(self, checkpoint):
        """Load a Distiller part by part: Detectron2 follows a name to its module where shapes
        differ, and matches names of foreign backbones by their ends, which the heads' must not see.
        """
        distiller = self.model
        if not isinstance(distiller, Distiller):
            return super()._load_model(checkpoint)
        state = checkpoint.pop("model")
        heads = {key: state.pop(key) for key in list(state) if key.startswith(HEADS_PREFIX)}
        try:
            self.model = distiller.student
            result = super()._load_model({**checkpoint, "model": state})
            if heads and len(distiller.distill_heads):
                self.model = distiller.distill_heads
                own = {key.removeprefix(HEADS_PREFIX): value for key, value in heads.items()}
                for found, more in zip(result, super()._load_model({"model": own}), strict=True):
                    found += [_with_prefix(HEADS_PREFIX, key) for key in more]
        finally:
            self.model = distiller
        return result


def _with_prefix(prefix: str, key):
    """``key``, or the key that a tuple (key, shape, shape) begins with, after ``prefix``."""
    return prefix + key if isinstance(key, str) else (prefix + key[0], *key[1:])


def save_student(model: torch.nn.Module, path: str) -> None:
    """Write the student's weights alone: what a plain Detectron2 model of the config loads."""
    student = moments_of(model).student
    write_atomically(path, lambda temporary: torch.save({"model": student.state_dict()}, temporary))
