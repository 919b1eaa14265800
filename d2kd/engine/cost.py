"""What a training costs: time, memory and parameters, over all the pieces of a resumed run."""

from __future__ import annotations

import resource
import statistics
import sys

import torch
from torch import nn

from ..meta_arch import moments_of

MIB = 2**20
STRETCH = 20  # steps: many for a median, few for a training


class TrainingCost:
    """The clock and the memory meter of a training; part of its checkpoints."""

    def __init__(self) -> None:
        self.steps: list[float] = []  # seconds of each step
        self.hook_seconds = 0.0
        self.peak_mib = 0.0

    def add_step(self, seconds: float, device: torch.device) -> None:
        self.steps.append(seconds)
        self.peak_mib = max(self.peak_mib, peak_memory(device))

    def add_wait(self, seconds: float, steps: int) -> None:
        """Share out what the last ``steps`` steps left a GPU to do, and was waited for later."""
        for step in range(max(len(self.steps) - steps, 0), len(self.steps)):
            self.steps[step] += seconds / steps

    def state_dict(self) -> dict:
        steps = torch.tensor(self.steps, dtype=torch.float32)
        return {"steps": steps, "hook_seconds": self.hook_seconds, "peak_mib": self.peak_mib}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"].tolist()
        self.hook_seconds, self.peak_mib = state["hook_seconds"], state["peak_mib"]

    def summary(self, model: nn.Module) -> dict:
        """The costs, for results.json.

        Returns:
            ``iterations``; ``step_seconds``, the median step (None if there was none);
            ``typical_seconds`` of all steps, by the median of each short stretch: heads may rest
            for a part of a training;
            ``hook_seconds``, what heads did between steps, such as making prototypes;
            ``train_seconds``, all of it, without evaluations; ``peak_memory_mib`` and
            ``memory_of``, what it is the peak of; ``student_parameters`` and
            ``distillation_parameters``, those that are trained in addition to the student.
        """
        on_gpu = model.device.type == "cuda"
        moments = moments_of(model)
        return {
            "iterations": len(self.steps),
            "step_seconds": statistics.median(self.steps) if self.steps else None,
            "typical_seconds": typical_seconds(self.steps),
            "hook_seconds": self.hook_seconds,
            "train_seconds": sum(self.steps) + self.hook_seconds,
            "peak_memory_mib": round(self.peak_mib, 1),
            "memory_of": "CUDA tensors" if on_gpu else "process",
            "student_parameters": sum(p.numel() for p in moments.student.parameters()),
            "distillation_parameters": sum(p.numel() for p in moments.trained_beside),
        }


def typical_seconds(steps: list[float]) -> float:
    """Time of all steps, without the few that a busy machine made slow."""
    stretches = [steps[i : i + STRETCH] for i in range(0, len(steps), STRETCH)]
    return sum(len(stretch) * statistics.median(stretch) for stretch in stretches)


def peak_memory(device: torch.device) -> float:
    """Most memory so far in MiB: of tensors on a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / MIB if sys.platform == "darwin" else resident / 1024
