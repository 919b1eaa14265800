"""Teachers of timm: the maps of a CNN, or the one map of a ViT."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.timm_models import create_body, describe_levels, import_timm
from .foreign import Pixels

KEY = "DISTILL.TEACHER.CONFIG_FILE"
WEIGHTS_KEY = "DISTILL.TEACHER.WEIGHTS"


class TimmTeacher(nn.Module):
    """The maps of a model of timm, a :class:`~d2kd.detectors.foreign.GivesMaps`.

    Of several maps of one stride, as of a ViT, it gives the deepest. Where a patch is no power of
    two (14 pixels of DINOv2) images are shrunk so that a patch covers the next one of the student's
    pixels (16).

    Args:
        name: of the model, with or without the tag of its weights.
        pretrained: load weights.
        weights: where they are: "" for timm's own; else as ``MODEL.TIMM.WEIGHTS``.
        options: arguments of ``timm.create_model``.

    Attributes:
        body: timm's feature extractor, ``timm.create_model(name, features_only=True, ...)``.

    Raises:
        ConfigError: timm, the model or its weights are not there.
    """

    def __init__(self, name: str, *, pretrained: bool = True, weights: str = "", **options: Any):
        super().__init__()
        levels = describe_levels(name, KEY, options)
        if _takes_sizes(name):  # else it reads images of one size only
            options.setdefault("dynamic_img_size", True)
        maps = {info["reduction"]: info for info in levels.values()}
        indices = tuple(info["index"] for info in maps.values())
        self.body = create_body(
            name,
            indices,
            in_channels=3,
            pretrained=pretrained,
            weights=weights,
            key=WEIGHTS_KEY,
            options=options,
        )
        strides = {stride: 2 ** math.ceil(math.log2(stride)) for stride in maps}
        self.scale = min(stride / students for stride, students in strides.items())
        self.channels = {strides[s]: info["num_chs"] for s, info in maps.items()}
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        expected: Any = self.body.pretrained_cfg
        mean, std = (tuple(255 * value for value in expected[key]) for key in ("mean", "std"))
        self.pixels = Pixels(mean, std, "RGB", max(32, *self.channels))

    def maps(self, images: Tensor) -> Mapping[int, Tensor]:
        """(B, 3, H, W) -> stride s -> (B, C, H / s, W / s)."""
        if self.scale != 1:
            size = [round(side * self.scale) for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        maps = self.body(images)
        if self.channels_last:
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        return dict(zip(self.channels, maps, strict=True))


def _takes_sizes(name: str) -> bool:
    """Whether timm's model ``name`` has a switch for images of any size."""
    with torch.device("meta"):
        network = import_timm().create_model(name, pretrained=False)
    return "dynamic_img_size" in inspect.signature(type(network).__init__).parameters
