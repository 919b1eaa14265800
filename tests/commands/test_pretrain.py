"""d2kd pretrain: the grown backbone computes what the small one does."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone

from d2kd import ConfigError
from d2kd.commands import pretrain

from ..detectors import detector_config


def backbone_of(cfg, weights: dict | None = None):
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    if weights is not None:
        prefix = "backbone.bottom_up."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
    return model


def test_growing_keeps_the_function():
    """A ResNet-34 grown from a ResNet-18 has its outputs; from a ResNet-50 there is no growing."""
    small, large = detector_config(depth=18), detector_config(depth=34)
    model = backbone_of(small)
    weights = {f"backbone.bottom_up.{k}": v for k, v in model.state_dict().items()}
    grown = backbone_of(large, pretrain.grow(weights, large))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), grown(images)
    for name, feature in expected.items():
        torch.testing.assert_close(found[name], feature)
    with pytest.raises(ConfigError, match="ResNet-50 cannot take"):
        pretrain.grow(weights, detector_config(depth=50))


def test_pretraining_writes_both_files(tmp_path, digits_root, monkeypatch):
    """Five steps on digits_tiny write weights by the detector's names, for both depths."""
    configs = {}
    for depth in (18, 34):
        cfg = detector_config(depth=depth, num_classes=10)
        cfg.DATASETS.TRAIN = ("digits_tiny_train",)
        configs[depth] = tmp_path / f"R{depth}.yaml"
        configs[depth].write_text(cfg.dump())
    files = [tmp_path / "small.pth", tmp_path / "large.pth"]
    arguments = ["--config-file", str(configs[18]), "--output", str(files[0]), "--steps", "5"]
    arguments += ["--batch", "2", "--crop", "16", "--grow", str(configs[34]), str(files[1])]
    pretrain.main(arguments)  # five steps: a fifth of them is one
    with pytest.raises(ConfigError, match="--batch: at least 2 crops"):
        pretrain.main([*arguments, "--batch", "1"])
    small, large = (torch.load(file)["model"] for file in files)
    assert all(name.startswith("backbone.bottom_up.") for name in large)
    assert set(small) < set(large)


def test_light_backbones_are_pretrained_too(digits_root):
    """One step on a model of timm gives the weights of the detector's backbone, by their names."""
    pytest.importorskip("timm", reason="needs timm (the extra 'timm')")
    cfg = detector_config("retinanet")
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = "mobilenetv2_100", False
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    weights = pretrain.pretrain(cfg, steps=1, batch=8, crop=32, seed=0)
    detector = build_model(cfg).state_dict()
    assert set(weights) == {name for name in detector if name.startswith("backbone.bottom_up.")}
