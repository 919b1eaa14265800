"""What a training leaves for use: a student that needs no teacher, and often no d2kd."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

from d2kd import Teacher, add_distillation_config
from d2kd.engine.deliverable import STUDENT_CONFIG, deployable_config, save_deliverable
from d2kd.models import fcos, timm_fpn  # noqa: F401  (registers)

from ..detectors import ARCHS, build, detector_config, distiller_config

PLAIN = [arch for arch in ARCHS if arch != "fcos"]


def deliver(cfg, folder):
    """Save the deliverable of an untrained model; returns the model."""
    cfg.OUTPUT_DIR = str(folder)
    model = build(cfg)
    save_deliverable(cfg, model)
    return model.eval()


def predict(cfg) -> torch.Tensor:
    """Boxes of a picture, the most certain first."""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return DefaultPredictor(cfg)(image)["instances"].pred_boxes.tensor


@pytest.mark.parametrize("arch", PLAIN)
def test_plain_detectron2_reads_it(arch, teacher_files, tmp_path, monkeypatch):
    """Without d2kd's keys; DefaultPredictor computes what the student does, without a teacher."""
    cfg = distiller_config(detector_config(arch), ["ToyMimic"], teacher_files[arch])
    model = deliver(cfg, tmp_path)
    monkeypatch.setattr(Teacher, "from_config", lambda *_: pytest.fail("a teacher was built"))
    found = get_cfg()
    found.merge_from_file(str(tmp_path / STUDENT_CONFIG))
    assert found.MODEL.WEIGHTS == str(tmp_path / "student_final.pth")
    assert found.MODEL.META_ARCHITECTURE == type(model.student).__name__
    plain = detector_config(arch)
    plain.MODEL.WEIGHTS = found.MODEL.WEIGHTS
    assert torch.equal(predict(found), predict(plain))
    text = yaml.safe_load((tmp_path / STUDENT_CONFIG).read_text())
    assert "DISTILL" not in text and "COCO_FORMAT" not in text["DATASETS"]
    state = torch.load(found.MODEL.WEIGHTS)["model"]
    assert all(torch.equal(value, model.student.state_dict()[key]) for key, value in state.items())


def test_no_part_of_d2kd_is_imported(teacher_files, tmp_path):
    """A process that knows Detectron2 only reads the config and loads the weights."""
    cfg = distiller_config(detector_config(), ["ToyMimic"], teacher_files["faster"])
    deliver(cfg, tmp_path)
    program = (
        "import sys; from detectron2.config import get_cfg; cfg = get_cfg()\n"
        f"cfg.merge_from_file({str(tmp_path / STUDENT_CONFIG)!r})\n"
        "from detectron2.engine import DefaultPredictor; DefaultPredictor(cfg)\n"
        "assert not [name for name in sys.modules if name.startswith('d2kd')]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_student_of_d2kds_parts(teacher_files, tmp_path):
    """It keeps the keys of those parts, names them, and has no teacher either."""
    cfg = distiller_config(detector_config("fcos"), ["ToyMimic"], teacher_files["fcos"])
    deliver(cfg, tmp_path)
    text = (tmp_path / STUDENT_CONFIG).read_text()
    header = text.splitlines()[0]
    assert "d2kd.add_distillation_config(cfg)" in header
    assert "FCOS, build_fcos_resnet_fpn_backbone" in header
    keys = yaml.safe_load(text)
    assert "DISTILL" not in keys and "OPTIMIZER" not in keys["SOLVER"]
    with pytest.raises(KeyError):
        get_cfg().merge_from_file(str(tmp_path / STUDENT_CONFIG))
    found = get_cfg()
    add_distillation_config(found)
    found.merge_from_file(str(tmp_path / STUDENT_CONFIG))
    assert predict(found).shape[1] == 4


def test_pretrained_weights_are_not_fetched(tmp_path):
    """A timm student's config asks for no weights but its own."""
    cfg = detector_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.PRETRAINED = True
    found, foreign = deployable_config(cfg, "student_final.pth")
    assert not found.MODEL.TIMM.PRETRAINED and list(foreign) == ["build_timm_fpn_backbone"]
