"""Detectors and images whose every number comes from NumPy."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn

from ..detectors import DENSE, detector_config

NUM_CLASSES = 3
IMAGE_SIZE = (96, 128)


def golden_config(arch: str, *, width: int = 16, stem: int = 8) -> CfgNode:
    """A ResNet-50 of few channels, in which nothing is drawn at random.

    Frozen norms keep activations in range, so that rounding is not amplified. Every proposal is
    sampled, so that Detectron2's choice of samples, by PyTorch's random numbers, has no effect.

    Args:
        arch: as in :func:`tests.detectors.detector_config`.
        width: channels of the pyramid. stem: channels of the stem and inside the first blocks.
    """
    cfg = detector_config(arch, width=width, depth=50, num_classes=NUM_CLASSES)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = stem
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = stem
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 2 * stem
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.FPN.NORM = ""
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.INPUT.MIN_SIZE_TRAIN = (IMAGE_SIZE[0],)
    cfg.INPUT.MIN_SIZE_TEST = IMAGE_SIZE[0]
    if arch not in DENSE:
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 24
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1 << 14
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 128
        cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.5
    return cfg


def generator(*words: str) -> np.random.Generator:
    """Random numbers that ``words`` alone decide."""
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(words).encode())))


@torch.no_grad()
def fill(model: nn.Module, role: str, skip: str | None = None) -> None:
    """Give each parameter, and the statistics of each norm, values that its name decides.

    Args:
        role: a word that makes two models of equal names differ.
        skip: parameters whose name begins with it keep the values that they have.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if skip and name.startswith(skip):
            continue
        if isinstance(value, nn.Parameter) or ".norm." in name:
            value.copy_(torch.as_tensor(_values(name, tuple(value.shape), role)))


def _values(name: str, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Weights that keep the size of what passes through them, about 1."""
    normal = generator(role, name).standard_normal(shape)
    if len(shape) > 1:
        is_box = "bbox_pred" in name or "anchor_deltas" in name  # boxes stay near their anchors
        return (0.2 if is_box else 1.0) * normal * np.sqrt(1.5 / np.prod(shape[1:]))
    if name.endswith("running_var"):
        return 1 + 0.2 * np.tanh(normal)
    if name.endswith("weight"):  # of a norm; the last of a residual block is the smallest
        return (0.4 if ".conv3." in name else 1.0) * (1 + 0.2 * np.tanh(normal))
    return 0.1 * normal


def golden_batch(objects: tuple[int, ...] = (4, 1)) -> list[dict]:
    """``batched_inputs`` with ``objects[i]`` objects of all sizes, with masks, in image i."""
    batch, (height, width) = [], IMAGE_SIZE
    for number, count in enumerate(objects):
        random = generator("batch", str(number))
        side = np.geomspace(12, 80, count) if count > 1 else np.array([40.0])
        extent = side[:, None] * random.uniform(0.8, 1.2, (count, 2))
        corner = random.uniform(0, 1, (count, 2)) * (np.array([width, height]) - extent).clip(0)
        boxes = np.concatenate([corner, corner + extent], axis=1).clip(0, [*IMAGE_SIZE[::-1]] * 2)
        instances = Instances(IMAGE_SIZE)
        instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
        instances.gt_classes = torch.arange(count) % NUM_CLASSES
        instances.gt_masks = BitMasks(_ellipses(boxes))
        image = _image(random, boxes)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def _image(random: np.random.Generator, boxes: np.ndarray) -> Tensor:
    """Noise with a brighter or darker patch for each object, (3, H, W) uint8."""
    pixels = random.uniform(80, 150, (3, *IMAGE_SIZE))
    for box in boxes.astype(int):
        pixels[:, box[1] : box[3], box[0] : box[2]] += random.uniform(-80, 105, (3, 1, 1))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def _ellipses(boxes: np.ndarray) -> Tensor:
    """(N, H, W) bool: the ellipse inside each box."""
    y, x = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]] + 0.5
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes.T)
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2
    return torch.from_numpy(inside <= 1)
