"""``d2kd export`` where there is a GPU: a file for it too, and its latency."""

from __future__ import annotations

import json

import pytest

from d2kd.export.command import main

from ..detectors import write_config
from ..export.test_export import decided, save, student
from . import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_a_file_for_the_gpu(arch, tmp_path, digits_root):
    """TorchScript is traced on each device, finds what the model finds, and is timed."""
    cfg = student(arch)
    cfg.MODEL.DEVICE = "cuda"
    weights = save(decided(cfg).cpu(), tmp_path / "weights.pth")
    words = ["--config-file", write_config(cfg, tmp_path / "config.yaml"), "--repeats", "2"]
    words += ["--formats", "torchscript", "--output", str(tmp_path), "MODEL.WEIGHTS", weights]
    main(words)
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["parity"].keys() == {"student.ts", "student_cuda.ts"}
    assert all(p["holds"] and p["detections"] > 80 for p in report["parity"].values())
    timed = [(row["model"], row["device"]) for row in report["latency"]]
    assert timed == [
        *(("student", "cpu"), ("student.ts", "cpu")),
        *(("student", "cuda"), ("student_cuda.ts", "cuda")),
    ]
