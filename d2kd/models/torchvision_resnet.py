"""torchvision's ResNets in Detectron2's format: the ImageNet weights of ResNet-18 and 34, of which
Detectron2 publishes none, and of deeper ones, ResNeXt and Wide ResNet.

The networks are the same; names differ, and torchvision expects RGB images in [0, 1].
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor

from ..checkpoint_files import read_tensors
from ..errors import ConfigError

# Residual blocks of the four stages, and whether they are bottlenecks -> depth.
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
# ImageNet's mean and standard deviation as torchvision has them, times 255.
PIXEL_MEAN = [123.675, 116.280, 103.530]
PIXEL_STD = [58.395, 57.120, 57.375]


def read_torchvision(path: str) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save``: bare, or under "model" or "state_dict".

    Raises:
        ConfigError: the file cannot be read or holds no tensors by name.
    """
    try:
        found = read_tensors(path)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror or error}") from error
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise ConfigError(f"'{path}' holds no weights by name, but a {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def convert_torchvision_resnet(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights of a torchvision ResNet by the names of Detectron2's, without the classifier.

    Raises:
        ConfigError: they are no ResNet's; names a key that does not fit.
    """
    shapes = _shapes(describe_resnet(weights))
    converted = {}
    for name, value in weights.items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            key = _detectron2_name(name)
            if value.shape != shapes[key]:
                raise ConfigError(
                    f"no torchvision ResNet: {name} is {list(value.shape)}, not {list(shapes[key])}"
                )
            converted[key] = value.detach().float().numpy()
    return converted


def _shapes(resnet: Mapping[str, int | bool]) -> dict[str, torch.Size]:
    """Name -> shape of the weights and statistics of Detectron2's ResNet of these keys."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in resnet.items():
        cfg.MODEL.RESNETS[key] = value
    with torch.device("meta"):
        backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return {name: value.shape for name, value in backbone.state_dict().items()}


def _detectron2_name(name: str) -> str:
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def describe_resnet(weights: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Keys of ``MODEL.RESNETS`` and their values for the network that has these weights.

    Raises:
        ConfigError: no ResNet has them; names a key that does not fit.
    """
    blocks = [0, 0, 0, 0]
    for name in weights:
        match = re.match(r"layer([1-4])\.(\d+)\.", name)
        if match:
            stage = int(match[1]) - 1
            blocks[stage] = max(blocks[stage], int(match[2]) + 1)
    bottleneck = "layer1.0.conv3.weight" in weights
    depth = DEPTHS.get((tuple(blocks), bottleneck))
    if depth is None:
        raise ConfigError(
            f"no torchvision ResNet: {blocks} {'bottleneck' if bottleneck else 'basic'} blocks in "
            f"layer1 to layer4; the first keys are {', '.join(list(weights)[:3])}"
        )
    expected = _expected_names(blocks, bottleneck)
    for what, names in (("lacks", expected - set(weights)), ("has", set(weights) - expected)):
        names = {n for n in names if not n.endswith("num_batches_tracked") and n[:3] != "fc."}
        if names:
            raise ConfigError(f"no torchvision ResNet-{depth}: it {what} {sorted(names)[0]}")
    if not bottleneck:
        return {"DEPTH": depth, "RES2_OUT_CHANNELS": 64}
    width, per_group = weights["layer1.0.conv2.weight"].shape[:2]  # ResNeXt has groups
    return {
        "DEPTH": depth,
        "STRIDE_IN_1X1": False,
        "NUM_GROUPS": width // per_group,
        "WIDTH_PER_GROUP": per_group,
    }


def _expected_names(blocks: list[int], bottleneck: bool) -> set[str]:
    """Names of weights and statistics, without counters and classifier."""
    pairs = [("conv1", "bn1")]
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}."
            pairs += [(f"{prefix}conv{k}", f"{prefix}bn{k}") for k in range(1, 3 + int(bottleneck))]
            if block == 0 and (bottleneck or stage > 1):
                pairs.append((f"{prefix}downsample.0", f"{prefix}downsample.1"))
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {f"{conv}.weight" for conv, _ in pairs} | {
        f"{norm}.{name}" for _, norm in pairs for name in statistics
    }


def write_detectron2(weights: Mapping[str, np.ndarray], path: str) -> None:
    """Write ``weights`` as Detectron2's own converter does; its loader finds their modules."""
    content = {"model": dict(weights), "__author__": "torchvision", "matching_heuristics": True}
    with open(path, "wb") as file:
        pickle.dump(content, file)


def config_lines(weights: Mapping[str, Tensor], path: str) -> str:
    """YAML of the config that the converted file ``path`` needs."""
    resnets = "".join(f"    {key}: {value}\n" for key, value in describe_resnet(weights).items())
    return (
        f'MODEL:\n  WEIGHTS: "{path}"\n  PIXEL_MEAN: {PIXEL_MEAN}\n  PIXEL_STD: {PIXEL_STD}\n'
        f'  RESNETS:\n{resnets}INPUT:\n  FORMAT: "RGB"\n'
    )
