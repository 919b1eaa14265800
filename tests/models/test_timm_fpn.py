"""Light students: timm models under an FPN, as detectors, students and teachers."""

from __future__ import annotations

import builtins
import logging
import sys

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from d2kd import ConfigError, add_distillation_config
from d2kd.config import student_config
from d2kd.config_files import load_config
from d2kd.engine import train as train_net
from d2kd.engine.checkpoint import save_student
from d2kd.engine.trainer import without_start
from d2kd.models import TimmBackbone

from ..detectors import build, detector_config, distiller_config, make_batch, run_step, write_config
from ..test_docs import ROOT, code_blocks

timm = pytest.importorskip("timm", reason="needs timm (the extra 'timm')")
STUDENTS_PAGE = ROOT / "docs" / "students.md"
LIGHT = "mobilenetv2_100"
MEAN, STD = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]


def light_config(arch: str = "faster", name: str = LIGHT):
    """A small detector on a timm model without pretrained weights."""
    cfg = detector_config(arch)
    kind = "retinanet_" if arch == "retinanet" else ""
    cfg.MODEL.BACKBONE.NAME = f"build_{kind}timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.NORM = "BN"
    return cfg


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
@pytest.mark.parametrize("name", [LIGHT, "efficientnet_b0", "convnext_atto", "mambaout_femto"])
def test_pyramid(arch, name):
    """The pyramid has Detectron2's levels, strides and sizes, and every parameter a gradient:
    for models with and without a map of stride 2, and one whose maps are channels-last."""
    backbone = build_backbone(light_config(arch, name))
    maps = backbone(torch.randn(2, 3, 64, 96))
    shapes = backbone.output_shape()
    first = 2 if arch == "faster" else 3
    assert list(maps) == [f"p{k}" for k in range(first, 7 if arch == "faster" else 8)]
    for level, feature in maps.items():
        stride = 2 ** int(level[1:])
        assert shapes[level].stride == stride and shapes[level].channels == 16
        assert feature.shape == (2, 16, -(-64 // stride), -(-96 // stride))
    sum(feature.sum() for feature in maps.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_maps_are_those_of_timm():
    """Levels carry timm's maps of their strides, whatever the model's other maps are."""
    backbone = TimmBackbone("cspdarknet53", ("res3", "res4", "res5"), pretrained=False).eval()
    whole = timm.create_model("cspdarknet53", features_only=True, out_indices=(3, 4, 5)).eval()
    whole.load_state_dict(backbone.body.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for (level, found), expected in zip(backbone(images).items(), whole(images), strict=True):
            assert backbone.output_shape()[level].channels == expected.shape[1]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "ends"),
    [(LIGHT, {1: "blocks.0", 2: "blocks.1"}), ("resnet18", {1: "bn1", 2: "layer1"})],
)
def test_frozen_stages(name, ends):
    """FREEZE_AT k freezes what lies before the map of stride 2^k, norms included, and nothing else:
    no gradient, and statistics that training does not move."""
    for freeze_at, end in ends.items():
        backbone = TimmBackbone(name, pretrained=False, freeze_at=freeze_at).train()
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        sum(m.sum() for m in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
        names = [key for key, _ in backbone.body.named_modules()]
        last = max(i for i, key in enumerate(names) if key == end or key.startswith(f"{end}."))
        for i, module_name in enumerate(names):
            module = backbone.body.get_submodule(module_name)
            assert not (i <= last and isinstance(module, nn.BatchNorm2d)), module_name
            for parameter in module.parameters(recurse=False):
                assert (parameter.grad is None) == (i <= last), module_name
        for key, value in backbone.state_dict().items():
            owner = key.removeprefix("body.").rpartition(".")[0]
            if key.endswith("running_mean"):
                assert torch.equal(value, before[key]) == (names.index(owner) <= last), key


def test_norms():
    """NORM converts all batch norms and keeps their statistics and activations."""
    torch.manual_seed(0)
    plain = TimmBackbone(LIGHT, pretrained=False).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(images)
    for norm in ("FrozenBN", "SyncBN"):
        backbone = TimmBackbone(LIGHT, pretrained=False, norm=norm)
        backbone.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():
            found = backbone.train(norm == "FrozenBN")(images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        for level, feature in expected.items():
            torch.testing.assert_close(found[level], feature, rtol=1e-3, atol=1e-4)
    grouped = TimmBackbone(LIGHT, pretrained=False, norm="GN")
    kinds = {type(module).__name__ for module in grouped.modules()}
    assert "GroupNormAct" in kinds and not any("BatchNorm" in kind for kind in kinds)
    assert sum(isinstance(m, nn.ReLU6) for m in grouped.modules()) == sum(
        isinstance(m, nn.ReLU6) for m in plain.modules()
    )


def test_frozen_norms_keep_the_precision():
    """Under autocast the maps between frozen norms are of the lower precision, as in ResNets."""
    backbone = TimmBackbone(LIGHT, pretrained=False, norm="FrozenBN")
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    types = []
    for module in norms:
        module.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 64, 64))
    assert norms and set(types) == {torch.bfloat16}


def test_norms_without_activation():
    """A model whose norms do not contain their activation is converted too."""
    backbone = TimmBackbone("resnet18", pretrained=False, norm="GN", freeze_at=0)
    assert any(isinstance(module, nn.GroupNorm) for module in backbone.modules())
    assert not any(isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)) for m in backbone.modules())


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_distillation(arch, teacher_files):
    """A MobileNetV2 learns from a ResNet: the student's losses are untouched, gradients reach all
    of its layers that are not frozen, and none of those that are."""
    cfg = light_config(arch)
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    heads = ["DSIG", "SSIM"]
    student, model = build(cfg), build(distiller_config(cfg, heads, teacher_files[arch]))
    model.student.load_state_dict(student.state_dict())
    batch = make_batch()
    plain, losses = run_step(student, batch), run_step(model, batch)
    for name, loss in plain.items():
        assert torch.equal(losses[name], loss), name
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(name.startswith("loss_kd_dsig") for name in losses)
    sum(losses.values()).backward()
    body = model.student.backbone.bottom_up.body
    frozen = [p for p in body.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    learning = [p for p in body.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert any(p.grad.abs().sum() > 0 for p in learning)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_checkpoint_is_a_plain_detector(norm, teacher_files, tmp_path):
    """student_final.pth of a light student loads into plain Detectron2 without a missing key."""
    cfg = light_config()
    cfg.MODEL.TIMM.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    model = build(distiller_config(cfg, ["SSIM"], teacher_files["faster"]))
    save_student(model, str(tmp_path / "student_final.pth"))
    plain = build_model(student_config(cfg))
    checkpointer = DetectionCheckpointer(plain)
    seen = []
    checkpointer._log_incompatible_keys = seen.append
    checkpointer.load(str(tmp_path / "student_final.pth"))
    assert not seen[0].missing_keys and not seen[0].unexpected_keys
    for name, value in model.student.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def test_light_teacher(tmp_path):
    """A light detector can teach, and its config asks for no pretrained weights then."""
    cfg = light_config()
    cfg.MODEL.TIMM.PRETRAINED = True
    teacher = write_config(cfg, tmp_path / "teacher.yaml")
    model = build(distiller_config(light_config(), ["FeatureMimic"], teacher))
    assert "loss_kd_feature_mimic" in run_step(model, make_batch())


# --- weights -------------------------------------------------------------------------------------


@pytest.fixture
def fetches(monkeypatch) -> list[str]:
    """Names of the models whose pretrained weights were asked for; none is fetched."""
    asked, create = [], timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        asked.extend([name] if pretrained else [])
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    return asked


def test_weights_are_fetched_only_where_they_are_used(fetches):
    """timm's weights are asked for without MODEL.WEIGHTS, once; not with it, and not where a
    checkpoint gives all weights."""
    cfg = light_config()
    cfg.MODEL.TIMM.PRETRAINED = True
    build_backbone(cfg)
    assert fetches == [LIGHT]
    build_backbone(without_start(cfg))
    cfg.MODEL.WEIGHTS = "student.pth"
    build_backbone(cfg)
    assert fetches == [LIGHT]
    assert cfg.MODEL.TIMM.PRETRAINED


def test_other_pixels_are_reported(fetches, caplog):
    """Pretrained weights with BGR images, or another mean, give a warning; with theirs, none."""
    cfg = light_config()
    cfg.MODEL.TIMM.PRETRAINED = True
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        build_backbone(cfg)
        assert "INPUT.FORMAT RGB" in caplog.text and "123.675" in caplog.text
        caplog.clear()
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "RGB", MEAN, STD
        build_backbone(cfg)
        assert not caplog.text


def test_weights_that_cannot_be_fetched(monkeypatch):
    """One line that names the model and the ways out."""
    create = timm.create_model

    def create_model(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host\nand more")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    cfg = light_config()
    cfg.MODEL.TIMM.PRETRAINED = True
    with pytest.raises(ConfigError, match=f"{LIGHT}.*no route.*HF_HOME.*WEIGHTS") as caught:
        build_backbone(cfg)
    assert "\n" not in str(caught.value)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.TIMM.NAME", ""], "NAME is empty.*mobilenetv2_100"),
        (["MODEL.TIMM.NAME", "mobilenet_v2_100"], "no model.*close: .*mobilenetv2_100"),
        (["MODEL.TIMM.NAME", "mobilenetv2_100.nonsense"], "nonsense"),
        (["MODEL.TIMM.NAME", "vit_tiny_patch16_224"], r"has no res2.*has: res4 \(stride 16\)"),
        (["MODEL.TIMM.NAME", "swin_tiny_patch4_window7_224"], "swin_tiny.*128 x 160"),
        (["MODEL.TIMM.NAME", "inception_v3"], "map of stride 4 is .* not"),
        (["MODEL.TIMM.NORM", "LN"], "valid: BN, SyncBN, FrozenBN, GN"),
        (["MODEL.FPN.IN_FEATURES", ["s8", "res5"]], r"no s8; it has: res1 \(stride 2\), res2"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res5"]], "follow one another"),
        (["MODEL.FPN.IN_FEATURES", ["res3", "res4"]], "must end with res5"),
        (["MODEL.FPN.IN_FEATURES", []], "must end with res5"),
        (["MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"], "no mobilenetv2_100"),
        (
            ["MODEL.TIMM.NAME", "convnext_atto", "MODEL.BACKBONE.FREEZE_AT", 1],
            "FREEZE_AT is 1.*convnext_atto",
        ),
    ],
    ids=str,
)
def test_mistakes_are_refused(opts, message):
    """A backbone that cannot be built says so in one line that names what is valid."""
    cfg = light_config()
    cfg.merge_from_list(opts)
    with pytest.raises(ConfigError, match=message) as caught:
        build_backbone(cfg, ShapeSpec(channels=3))
    assert "\n" not in str(caught.value)


def test_without_timm(monkeypatch):
    """Without timm the error is one line with the command that installs it."""
    find = builtins.__import__

    def no_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return find(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(builtins, "__import__", no_timm)
    with pytest.raises(ConfigError, match="pip install timm"):
        TimmBackbone(LIGHT)


def test_training_and_resuming(teacher_files, tmp_path, digits_root, fetches):
    """train_net.py trains, resumes and evaluates a light student from the command line, and asks
    for timm's weights once."""
    cfg = light_config()
    cfg.MODEL.TIMM.PRETRAINED = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 10
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digits_tiny_train",), ()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.SOLVER.MAX_ITER = 2
    config = write_config(
        distiller_config(cfg, ["FeatureMimic"], teacher_files["faster"]), tmp_path / "student.yaml"
    )
    train_net.main(["--config-file", config, "DISTILL.TEACHER.CHECK", "False"])
    train_net.main(["--config-file", config, "--resume", "SOLVER.MAX_ITER", "3"])
    weights = str(tmp_path / "out" / "student_final.pth")
    test = ["MODEL.WEIGHTS", weights, "DATASETS.TEST", "('digits_tiny_val',)"]
    train_net.main(["--config-file", config, "--eval-only", *test])
    assert fetches == [LIGHT]


# --- docs/students.md ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_documented_configs(index, tmp_path):
    """The configs of the page, over a detector's, build the backbone that the page promises."""
    snippet = tmp_path / "student.yaml"
    snippet.write_text(code_blocks(STUDENTS_PAGE, "yaml")[index])
    cfg = detector_config("retinanet" if index else "faster")
    load_config(cfg, str(snippet))
    cfg.MODEL.TIMM.PRETRAINED = False
    backbone = build_backbone(cfg)
    assert isinstance(backbone.bottom_up, TimmBackbone)
    assert list(backbone.output_shape())[0] == ("p3" if index else "p2")


def test_documented_use(tmp_path, monkeypatch):
    """The page's program loads a student's checkpoint, all of it, into Detectron2's predictor."""
    program = code_blocks(STUDENTS_PAGE, "python")[0]
    checkpoint = str(tmp_path / "student_final.pth")
    assert program.count("student_final.pth") == 1
    monkeypatch.chdir(ROOT)
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, "configs/coco/faster_rcnn_mobilenetv2.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = "cpu", False
    student = build_model(cfg)
    save_student(student, checkpoint)
    names = {}
    exec(program.replace("student_final.pth", checkpoint), names)
    found = names["predictor"].model.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(found[name], value), name
