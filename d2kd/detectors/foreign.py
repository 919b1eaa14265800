"""Teachers that are no Detectron2 model: any module that gives maps.

Such a module says which maps it gives and which pixels it expects; :class:`MapsDetector` makes of
it what the rest of the package knows as a detector: one with a pyramid, and with no outputs unless
the module brings RoI heads under Detectron2's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, GeneralizedRCNN
from torch import Tensor, nn

from ..errors import ConfigError, first_line


class Pixels(NamedTuple):
    """What images a network expects.

    Attributes:
        mean, std: by channel, of values from 0 to 255: it reads (image - mean) / std.
        order: of the channels, "RGB" or "BGR".
        divisor: of which height and width are multiples.
    """

    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    order: str = "RGB"
    divisor: int = 32


@runtime_checkable
class GivesMaps(Protocol):
    """What a module needs to teach: an ``nn.Module`` with these three.

    Attributes:
        channels: stride -> channels of the maps, fine to coarse.
        pixels: what :meth:`maps` expects of images.
    """

    channels: Mapping[int, int]
    pixels: Pixels

    def maps(self, images: Tensor) -> Mapping[int, Tensor]:
        """Normalised images (B, 3, H, W) -> stride s -> (B, channels[s], H / s, W / s)."""


class MapsDetector(nn.Module):
    """A module that gives maps, as a detector.

    Args:
        module: a :class:`GivesMaps`. It may have ``roi_heads``, a module with ``box_pooler``,
            ``box_in_features`` ("stride4", ...), ``box_head`` and ``box_predictor`` as in
            Detectron2's, which then predict on the student's RoIs.
        name: of the model, for messages; default: its class.

    Raises:
        ConfigError: the maps are not what ``channels`` says.
    """

    preprocess_image = GeneralizedRCNN.preprocess_image
    _move_to_current_device = GeneralizedRCNN._move_to_current_device

    def __init__(self, module: nn.Module, name: str = ""):
        super().__init__()
        own: Any = module
        self.meta_arch = name or type(module).__name__
        self.input_format = own.pixels.order
        self.backbone = _MapsBackbone(module)
        self.backbone.check(self.meta_arch)
        for key, values in (("pixel_mean", own.pixels.mean), ("pixel_std", own.pixels.std)):
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), False)
        if hasattr(module, "roi_heads"):
            self.roi_heads = own.roi_heads

    @property
    def device(self) -> torch.device:
        buffer: Any = self.pixel_mean
        device: torch.device = buffer.device
        return device


def map_name(stride: int) -> str:
    """The name of a map of this stride in a :class:`MapsDetector`."""
    return f"stride{stride}"


class _MapsBackbone(Backbone):
    def __init__(self, module: Any):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.module.maps(images)
        return {map_name(stride): maps[stride] for stride in self.module.channels}

    @property
    def size_divisibility(self) -> int:
        divisor: int = self.module.pixels.divisor
        return divisor

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            map_name(stride): ShapeSpec(channels=channels, stride=stride)
            for stride, channels in self.module.channels.items()
        }

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Compare the maps of an image with what the module says of them."""
        channels = dict(self.module.channels)
        side = max(self.size_divisibility, 64)
        size = 2 * side, 3 * side
        where = next(self.parameters(), torch.zeros(0)).device
        try:
            maps = self.eval()(torch.zeros(1, 3, *size, device=where))
        except Exception as error:
            raise ConfigError(
                f"the teacher, a {name}, gives no maps for an image of {size[0]} x {size[1]} "
                f"pixels: {type(error).__name__}: {first_line(error)}"
            ) from error
        for stride, width in channels.items():
            expected = (1, width, *(-(-length // stride) for length in size))
            found = tuple(maps[map_name(stride)].shape)
            if found != expected:
                raise ConfigError(
                    f"the teacher, a {name}: its map of stride {stride} is {found} for an image of "
                    f"{size[0]} x {size[1]} pixels; its channels promise {expected}"
                )


def as_detector(model: nn.Module) -> nn.Module:
    """``model``, inside a :class:`MapsDetector` if it is a :class:`GivesMaps`."""
    return MapsDetector(model) if isinstance(model, GivesMaps) else model


def own_module(model: nn.Module) -> nn.Module:
    """What the files of a detector's weights are of: the model, or the library's inside it."""
    if not isinstance(model, MapsDetector):
        return model
    module: Any = model.backbone.module
    inner: nn.Module = getattr(module, "detector", module)
    return inner
