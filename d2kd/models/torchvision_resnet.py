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
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

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


def convert_torchvision_resnet(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights of a torchvision ResNet by the names of Detectron2's, without the classifier.

    Raises:
        ConfigError: they are no ResNet's; names a key that does not fit.
    """
    describe_resnet(weights)
    return {
        _detectron2_name(name): value.detach().float().numpy()
        for name, value in _without_classifier(weights).items()
    }


def _without_classifier(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and statistics, without counters and the classifier."""
    return {
        name: value
        for name, value in weights.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


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
    groups, per_group = 1, 64
    if bottleneck and "layer1.0.conv2.weight" in weights:  # ResNeXt has groups
        width, per_group = weights["layer1.0.conv2.weight"].shape[:2]
        groups = width // per_group
    with torch.device("meta"):
        block = Bottleneck if bottleneck else BasicBlock
        network = ResNet(block, blocks, groups=groups, width_per_group=per_group)
    expected, found = map(_without_classifier, (network.state_dict(), weights))
    for what, names in (("lacks", expected.keys() - found), ("has", found.keys() - expected)):
        if names:
            raise ConfigError(f"no torchvision ResNet-{depth}: it {what} {min(names)}")
    for name, value in found.items():
        if value.shape != expected[name].shape:
            shapes = f"{list(value.shape)}, not {list(expected[name].shape)}"
            raise ConfigError(f"no torchvision ResNet-{depth}: {name} is {shapes}")
    if not bottleneck:
        return {"DEPTH": depth, "RES2_OUT_CHANNELS": 64}
    return {
        "DEPTH": depth,
        "STRIDE_IN_1X1": False,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": per_group,
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
