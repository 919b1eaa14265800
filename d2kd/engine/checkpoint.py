"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts

from ..meta_arch import Distiller


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class AtomicCheckpointer(DetectionCheckpointer):
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
        def write(temporary: str) -> None:
            with open(temporary, "w") as file:
                file.write(last_filename_basename)

        write_atomically(os.path.join(self.save_dir, "last_checkpoint"), write)

    def _load_model(self, checkpoint):
        if checkpoint.get("matching_heuristics") and isinstance(self.model, Distiller):
            # Names of foreign backbones are matched by their ends; the heads' are not among them.
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.student.state_dict(),
                checkpoint["model"],
                c2_conversion=checkpoint.get("__author__") == "Caffe2",
            )
            checkpoint = {**checkpoint, "matching_heuristics": False}
        return super()._load_model(checkpoint)


def save_student(model: torch.nn.Module, path: str) -> None:
    """Write the student's weights alone: what a plain Detectron2 model of the config loads."""
    student = model.student if isinstance(model, Distiller) else model
    write_atomically(path, lambda temporary: torch.save({"model": student.state_dict()}, temporary))
