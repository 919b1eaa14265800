"""What a training costs: counted over all pieces of a resumed run, parameters told apart."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from d2kd.engine.cost import STRETCH, TrainingCost, typical_seconds

from ..detectors import detector_config, distiller_config

CPU = torch.device("cpu")


def test_a_resumed_run_counts_all_its_pieces():
    """Steps of before and after the stop make one median and one sum."""
    first = TrainingCost()
    for seconds in (0.5, 0.1):
        first.add_step(seconds, CPU)
    first.hook_seconds = 2.0
    first.peak_mib = 1e6
    second = TrainingCost()
    second.load_state_dict(first.state_dict())
    second.add_step(0.3, CPU)
    found = second.summary(build_model(detector_config("retinanet")))
    assert found["iterations"] == 3 and found["peak_memory_mib"] == 1e6
    assert found["step_seconds"] == pytest.approx(0.3)
    assert found["train_seconds"] == pytest.approx(2.9)


def test_typical_seconds():
    """Slow moments do not count; a head that rests for most of a training does."""
    slow = [0.2] * STRETCH
    slow[3] = 9.0
    assert typical_seconds([0.4] * STRETCH + 3 * slow) == pytest.approx(STRETCH * (0.4 + 3 * 0.2))
    assert typical_seconds([]) == 0


def test_parameters(teacher_files):
    """The student's parameters, and those that are trained beside it; the teacher has none here."""
    cfg = distiller_config(detector_config(), ["FeatureMimic"], teacher_files["faster"])
    student = sum(p.numel() for p in build_model(detector_config()).parameters())
    found = TrainingCost().summary(build_model(cfg))
    assert found["student_parameters"] == student
    # 1x1 convolutions from 16 to 24 channels, with bias, on five levels.
    assert found["distillation_parameters"] == 5 * (16 * 24 + 24)
    assert found["step_seconds"] is None and found["memory_of"] == "process"
