"""docs/quickstart.md and docs/deploy.md run as they are printed, at small size."""

from __future__ import annotations

import functools
import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog

import d2kd
from d2kd import ExportedDetector, cli
from d2kd.compare.comparison import Comparison
from d2kd.compare.suite import read_suite
from d2kd.engine.setup import merged_config

from .detectors import build, detector_config, write_config
from .test_docs import code_blocks

DOCS = Path(__file__).parents[1] / "docs"
# Keys that make a detector of the zoo small, and start it from nothing.
SMALL = ["MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
SMALL += ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 16]
SMALL += ["MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
SHORT = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0]
SHORT += ["MODEL.DEVICE", "cpu"]


def commands(page: str) -> list[list[str]]:
    """The words of the commands of a page."""
    blocks = code_blocks(DOCS / page, "bash")
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


@pytest.fixture
def workplace(tmp_path, digits_root, monkeypatch) -> Path:
    """A directory with what the page's reader has: data/, on which the page's names lead."""
    for part in ("train", "val"):
        DatasetCatalog.get(f"digits_tiny_{part}")  # makes it
        metadata = MetadataCatalog.get(f"digits_tiny_{part}")
        (tmp_path / "data").mkdir(exist_ok=True)
        content = json.loads(Path(metadata.json_file).read_text())
        for image in content["images"]:
            own = f"{part}_{image['file_name']}"
            shutil.copy(Path(metadata.image_root, image["file_name"]), tmp_path / own)
            image["file_name"] = own
        (tmp_path / "data/images").mkdir(exist_ok=True)
        for image in content["images"]:
            shutil.move(tmp_path / image["file_name"], tmp_path / "data/images")
        (tmp_path / f"data/{part}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coco_weights(path: Path) -> str:
    """Weights of a small RetinaNet of 80 classes."""
    cfg = merged_config("COCO-Detection/retinanet_R_101_FPN_3x.yaml", [*SMALL, *SHORT])
    torch.save({"model": build(cfg).state_dict()}, path)
    return str(path)


def test_the_quickstart(workplace, monkeypatch, capsys):
    """All blocks, in order: the zoo's pair on own data, a light student, Python, the comparison.

    The zoo's checkpoint stands for itself as weights of 80 classes, from which the teacher is
    trained; keys make the detectors and the trainings small.
    """
    pytest.importorskip("timm")
    first, light, compare = commands("quickstart.md")
    weights = coco_weights(workplace / "coco.pth")
    teacher = ["DISTILL.TEACHER.OPTS", str([*SMALL, *SHORT])]
    monkeypatch.setattr(model_zoo, "get_checkpoint_url", lambda name: weights)
    words = [*first[1:], "--iterations", "2", "--batch", "2", *map(str, SMALL + SHORT), *teacher]
    cli.main(words)
    out = workplace / "output/mine"
    assert "trained first: its weights are" in (out / "report.md").read_text()
    for line in Path(DOCS / "quickstart.md").read_text().splitlines():
        if line.startswith("| `"):
            for name in line.split("|")[1].split(","):
                assert (out / name.strip(" `")).is_file(), name
    (yaml,) = code_blocks(DOCS / "quickstart.md", "yaml")
    (workplace / "my_student.yaml").write_text(yaml)
    cli.main([*light[1:], "--iterations", "2", *map(str, SHORT)])
    assert "SSIM" in (workplace / "output/light/report.md").read_text()
    (python,) = code_blocks(DOCS / "quickstart.md", "python")
    opts = ["DISTILL.TEACHER.WEIGHTS", "output/mine/teacher/student_final.pth", *SHORT]
    small = functools.partial(d2kd.distill, iterations=2)
    monkeypatch.setattr(d2kd, "distill", lambda **kwargs: small(**{**kwargs, "opts": opts}))
    capsys.readouterr()
    exec(compile(python, "quickstart.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith("output/light_drkd/student/student_final.pth")
    suite = read_suite(Path(compare[compare.index("--suite") + 1]))
    comparison = Comparison(suite, workplace / "gain", jobs=1, threads=1)
    comparison.check(comparison.runs())


def test_the_programs_for_a_file(tmp_path, digits_root, monkeypatch, capsys):
    """The two programs of docs/deploy.md, with d2kd and with ONNX Runtime alone, find the same."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        pytest.skip("onnx or onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    cfg = detector_config("mask", num_classes=10)
    cfg.DATASETS.TEST = ("digits_tiny_val",)
    model = build(cfg).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 30
    torch.save({"model": model.state_dict()}, "weights.pth")
    write_config(cfg, tmp_path / "student.yaml")
    words = ["--config-file", "student.yaml", "--size", "64", "96", "--output", "."]
    words += ["--formats", "onnx", "--repeats", "1", "MODEL.WEIGHTS", "weights.pth"]
    cli.main(["export", *words])
    shutil.copy(DatasetCatalog.get("digits_tiny_val")[2]["file_name"], "photograph.jpg")
    with_d2kd, alone = code_blocks(DOCS / "deploy.md", "python")
    space: dict = {}
    exec(compile(with_d2kd, "deploy.md", "exec"), space)
    found = space["found"]
    assert isinstance(space["detector"], ExportedDetector) and len(found) > 5
    capsys.readouterr()
    exec(compile(alone, "deploy.md", "exec"), space)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == int((found.scores > 0.5).sum()) > 0
    assert np.abs(space["boxes"] - found.pred_boxes.tensor.numpy()).max() < 0.1
    number, score = found.pred_classes[0], found.scores[0]
    assert printed[0].startswith(f"{number} {round(float(score), 2)} [")
