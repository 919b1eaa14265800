"""LazyConfig files: loaded, changed by a.b=c, and refused in one line."""

from __future__ import annotations

import builtins

import pytest
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from torch import nn

from d2kd import ConfigError
from d2kd.lazy_config import build_lazy, load_lazy, override_lazy


def layer_config() -> DictConfig:
    layer = L(nn.Conv2d)(in_channels=3, out_channels="${..width}", kernel_size=1)
    return DictConfig({"layer": layer, "width": 4, "sizes": [1, 2]}, flags={"allow_objects": True})


def test_overrides():
    """a.b=c changes what is there, and gives arguments that the thing to build takes."""
    cfg = layer_config()
    override_lazy(cfg, ["width=5", "layer.kernel_size=3", "layer.bias=False", "sizes.1=7"], "--x")
    layer = build_lazy(cfg, "layer", "file.py")
    assert layer.weight.shape == (5, 3, 3, 3) and layer.bias is None
    assert cfg.sizes == [1, 7]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layr.bias=False", "no key 'layr.bias'; close: layer"),
        ("layer.kernel_sise=3", "no key 'layer.kernel_sise'; close: kernel_size"),
        ("widht=3", "no key 'widht'; close: width"),
        ("width.a=3", "'width.a': what is before '.a' has no keys"),
        ("width=[1", "'width=.1'"),
        ("width", "'width' changes no LazyConfig; give strings a.b=c"),
        ("layer._target_=os.system", "a _target_ runs code"),
        ("layer={_target_: os.system, command: ls}", "a _target_ runs code"),
        (3, "3 changes no LazyConfig"),
    ],
)
def test_wrong_overrides(override, message):
    """A typing error is one line with close names, not a new key that nobody reads."""
    cfg = layer_config()
    with pytest.raises(ConfigError, match=f"^OPTS: .*{message}") as error:
        override_lazy(cfg, [override], "OPTS")
    assert "\n" not in str(error.value)
    assert cfg == layer_config()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.py": "model = dict(\n"}, r"a\.py:1: .*closed"),
        ({"a.py": "\nmodel = dict(x=y)\n"}, r"a\.py:2: NameError: name 'y'"),
        ({"a.py": "from .b import model\n"}, r"a\.py:1: ImportError: Cannot import name b"),
        ({"a.py": "from .b import c\n", "b.py": "c = 1 / 0\n"}, r"b\.py:1: ZeroDivisionError"),
    ],
)
def test_broken_files(files, message, tmp_path):
    """The line that fails is named, and Python's import is as before."""
    before = builtins.__import__
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_lazy(str(tmp_path / "a.py"))
    assert builtins.__import__ is before


def test_a_command_line_may_say_what_is_called():
    """As in Detectron2; a YAML file may not."""
    cfg = layer_config()
    override_lazy(cfg, ["layer._target_=torch.nn.ConvTranspose2d"], "argv", trusted=True)
    assert isinstance(build_lazy(cfg, "layer", "file.py"), nn.ConvTranspose2d)


def test_what_cannot_be_built():
    """A missing object names those that are there; a wrong argument is one line."""
    cfg = layer_config()
    with pytest.raises(ConfigError, match="file.py has no 'model' among .*: layer, width, sizes"):
        build_lazy(cfg, "model", "file.py")
    cfg.layer.kernel_sise = 3
    with pytest.raises(
        ConfigError, match="file.py: its 'layer' cannot be built: TypeError: .*sise"
    ):
        build_lazy(cfg, "layer", "file.py")
