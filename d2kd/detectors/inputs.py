"""What both detectors read: images and ground truth, copied to the device once, and normalised.

A copy of ordinary memory waits for all that the device has still to do, and one for each tensor of
each model adds up. Here each tensor is copied from pinned memory, which waits for nothing, before
the student runs; what lies on the device already is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch import DenseDetector, GeneralizedRCNN
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, RotatedBoxes
from torch import Tensor, nn

# What Detectron2's models copy to their device.
_MOVED = ("image", "instances", "proposals", "sem_seg")
# Structures that are one tensor; polygons stay on the CPU.
_WRAPPED = (Boxes, RotatedBoxes, BitMasks, Keypoints)


def to_device(inputs: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Detectron2's ``batched_inputs`` with images and annotations on ``device``.

    Returns:
        new dicts; values that lie there already, and those that no model copies, are the same.
    """
    return [
        {key: _moved(value, device) if key in _MOVED else value for key, value in item.items()}
        for item in inputs
    ]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, _WRAPPED):
        tensor = _moved(value.tensor, device)
        return value if tensor is value.tensor else type(value)(tensor)
    if isinstance(value, Instances):
        fields = {name: _moved(field, device) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    return value.to(device) if hasattr(value, "to") else value


def normalisation(model: nn.Module) -> tuple[list[float], list[float]] | None:
    """(mean, std) by channel of the (image - mean) / std that ``model`` reads; None where it may do
    something of its own."""
    own = [kind.preprocess_image for kind in (GeneralizedRCNN, DenseDetector)]
    if getattr(type(model), "preprocess_image", None) not in own:
        return None
    detector: Any = model
    mean, std = detector.pixel_mean.flatten(), detector.pixel_std.flatten()
    return None if mean.is_meta else (mean.tolist(), std.tolist())


def feeds_backbone(model: nn.Module) -> bool:
    """Whether the backbone's input is what ``preprocess_image`` returns, and nothing else."""
    return type(model).forward in (GeneralizedRCNN.forward, DenseDetector.forward)


def pad_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Add zeros below and to the right of (B, C, H, W); as it is where that is its size."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def batch_size(
    images: Sequence[Tensor] | Tensor, backbone: nn.Module, least: tuple[int, int]
) -> tuple[int, int]:
    """(H, W) of a batch of ``images`` (C, h_i, w_i) for a detector with this backbone: multiples of
    what it asks for, and at least ``least``."""
    network: Any = backbone
    constraints = getattr(network, "padding_constraints", {})
    square = constraints.get("square_size", 0)
    divisor = max(constraints.get("size_divisibility", network.size_divisibility), 1)
    sides = []
    for axis in (0, 1):
        side = max(least[axis], square or max(image.shape[axis - 2] for image in images))
        sides.append(-(-side // divisor) * divisor)
    return sides[0], sides[1]


def normalise(
    images: Sequence[Tensor], mean: Tensor, std: Tensor, size: tuple[int, int], flip: bool
) -> Tensor:
    """Normalise raw images into one padded batch.

    Args:
        images: (C, h_i, w_i) in the loader's order of channels, on the device.
        mean, std: (C, 1, 1) in the model's order of channels.
        size: (H, W) to pad to, with zeros.
        flip: the model's order is the reverse of the loader's.

    Returns:
        (B, C, H, W) in the model's order of channels.
    """
    if flip:
        mean, std = mean.flip(0), std.flip(0)
    batch = mean.new_zeros(len(images), len(mean), *size)
    for image, slot in zip(images, batch, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]].copy_((image - mean) / std)
    return batch.flip(1) if flip else batch
