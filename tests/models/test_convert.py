"""torchvision's ResNets compute in Detectron2 what they compute in torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone

from d2kd import ConfigError
from d2kd.checkpoint_files import read_state_dict
from d2kd.commands import convert as tool
from d2kd.config import add_distillation_config
from d2kd.config_files import load_config
from d2kd.engine.setup import check_weights
from d2kd.models.torchvision_resnet import convert_torchvision_resnet

from ..detectors import detector_config

ROOT = Path(__file__).parents[2]


def random_resnet(name: str) -> torch.nn.Module:
    """torchvision's network with random weights and statistics."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    return model


def torchvision_maps(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of its four layers, by Detectron2's names."""
    x, maps = model.maxpool(model.relu(model.bn1(model.conv1(images)))), {}
    for k in range(1, 5):
        x = maps[f"res{k + 1}"] = getattr(model, f"layer{k}")(x)
    return maps


def convert(model: torch.nn.Module, folder: Path, capsys) -> tuple[str, str]:
    """The converted file, and the YAML that the tool printed."""
    torch.save(model.state_dict(), folder / "in.pth")
    output = str(folder / "pretrained" / "out.pkl")
    tool.main([str(folder / "in.pth"), output])
    return output, capsys.readouterr().out.split("\n\n", 1)[1]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", "FrozenBN"),
        ("resnet18", "BN"),
        ("resnet34", "FrozenBN"),
        ("resnet50", "FrozenBN"),
        ("resnext50_32x4d", "FrozenBN"),
    ],
)
def test_same_maps(name, norm, tmp_path, capsys):
    """The converted file gives torchvision's maps in Detectron2's network, built from the config
    that the tool prints, with every weight of file and network used."""
    model = random_resnet(name)
    path, printed = convert(model, tmp_path, capsys)
    config = tmp_path / "config.yaml"
    config.write_text(printed)
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    checkpointer, seen = DetectionCheckpointer(backbone), []
    checkpointer._log_incompatible_keys = seen.append
    assert cfg.MODEL.WEIGHTS == path
    checkpointer.load(path)
    missing, unexpected, misfits = seen[0]
    assert not unexpected and not misfits
    assert all(key.endswith("num_batches_tracked") for key in missing)  # counters, no weights
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = torchvision_maps(model, images), backbone(images)
    for level, feature in expected.items():
        torch.testing.assert_close(found[level], feature, rtol=1e-4, atol=1e-4)


def test_finds_its_place_in_a_detector(tmp_path, capsys):
    """In a whole detector the file's weights reach the backbone, all of them."""
    model = random_resnet("resnet18")
    path, _ = convert(model, tmp_path, capsys)
    detector = build_model(detector_config("retinanet"))
    DetectionCheckpointer(detector).load(path)
    found = detector.backbone.bottom_up.state_dict()
    for name, value in convert_torchvision_resnet(model.state_dict()).items():
        assert torch.equal(found[name], torch.from_numpy(value)), name


@pytest.mark.parametrize("name", ["faster_rcnn_R18", "mask_rcnn_R18_R50_dsig", "retinanet_R18"])
def test_configs_agree_with_the_tool(name, tmp_path, capsys):
    """The R18 configs on COCO say what the tool prints for resnet18."""
    _, printed = convert(random_resnet("resnet18"), tmp_path, capsys)
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(ROOT / "configs" / "coco" / f"{name}.yaml"))
    assert cfg.MODEL.WEIGHTS == "datasets/pretrained/R-18.pkl"
    with pytest.raises(ConfigError, match="d2kd convert makes it"):
        check_weights(str(tmp_path / "R-18.pkl"), "MODEL.WEIGHTS")
    cfg.MODEL.WEIGHTS = ""
    before = cfg.dump()
    wanted = yaml.safe_load(printed)
    wanted["MODEL"]["WEIGHTS"] = ""
    cfg.merge_from_other_cfg(type(cfg)(wanted))
    assert cfg.dump() == before


def test_wrapped_files(tmp_path):
    """Weights under "model" or "state_dict", and with DDP's prefix, are found."""
    weights = random_resnet("resnet18").state_dict()
    for key, prefix in (("model", ""), ("state_dict", "module.")):
        torch.save({key: {prefix + k: v for k, v in weights.items()}, "epoch": 3}, tmp_path / key)
        assert set(read_state_dict(str(tmp_path / key))) == set(weights)


def test_other_networks_are_refused(tmp_path, capsys):
    """What is no ResNet ends in one line and leaves no file."""
    whole = random_resnet("resnet18").state_dict()
    files = {
        "no torchvision ResNet: .*features": torchvision.models.squeezenet1_1().state_dict(),
        "it lacks layer3.1.bn2.weight": {k: v for k, v in whole.items() if "3.1.bn2.w" not in k},
        "it has layer1.0.se.weight": {**whole, "layer1.0.se.weight": torch.zeros(1)},
        r"layer2.0.bn1.bias is \[5\], not \[128\]": {**whole, "layer2.0.bn1.bias": torch.zeros(5)},
        "holds no weights": [1, 2],
    }
    for message, content in files.items():
        torch.save(content, tmp_path / "in.pth")
        with pytest.raises(ConfigError, match=message):
            tool.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pkl")])
    (tmp_path / "in.pth").write_text("nothing")
    with pytest.raises(ConfigError, match="is not read: it is damaged, or no file of torch.save"):
        tool.main([str(tmp_path / "in.pth"), str(tmp_path / "out.pkl")])
    assert not list(tmp_path.glob("out*"))
