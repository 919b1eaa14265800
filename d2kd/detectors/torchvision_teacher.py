"""Teachers of torchvision: the pyramid of its detectors, and their outputs on RoIs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from .foreign import Pixels, map_name

KEY = "DISTILL.TEACHER.CONFIG_FILE"
_SIDE = 256


class TorchvisionTeacher(nn.Module):
    """A detector of torchvision, a :class:`~d2kd.detectors.foreign.GivesMaps` with RoI heads where
    the detector has some: Faster, Mask and Keypoint R-CNN. It reads the student's images at the
    student's size.

    Args:
        name: e.g. "fasterrcnn_resnet50_fpn_v2".
        pretrained: load torchvision's weights of it.
        options: arguments of its builder, e.g. ``num_classes``, with the background.

    Attributes:
        detector: torchvision's own.
        class_names: of the classes that it predicts, with torchvision's weights; else None.

    Raises:
        ConfigError: there is no such detector, it has no pyramid, or its weights cannot be fetched.
    """

    def __init__(self, name: str, *, pretrained: bool = True, **options: Any):
        super().__init__()
        from torchvision import models

        known = models.list_models(models.detection)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            raise ConfigError(f"{KEY}: torchvision has no detector '{name}'; close: {close}")
        own = models.get_model_weights(name).DEFAULT if pretrained else None
        options = {"weights_backbone": None, **options}
        try:
            self.detector: Any = models.get_model(name, weights=own, **options).eval()
        except Exception as error:
            raise ConfigError(
                f"{KEY}: torchvision's {name} cannot be built: {first_line(error)}"
            ) from error
        _check_options(name, options, self.detector)
        self.class_names = tuple(own.meta["categories"][1:]) if own else None
        self.names = _names_by_stride(self.detector.backbone, name)
        self.channels = {stride: width for stride, (_, width) in self.names.items()}
        transform = self.detector.transform
        mean, std = (
            tuple(255 * value for value in values)
            for values in (transform.image_mean, transform.image_std)
        )
        self.pixels = Pixels(mean, std, "RGB", max(32, transform.size_divisible))
        if hasattr(getattr(self.detector, "roi_heads", None), "box_roi_pool"):
            self.roi_heads = _RoIHeads(self.detector.roi_heads, self.names)

    def maps(self, images: Tensor) -> Mapping[int, Tensor]:
        """(B, 3, H, W) -> stride s -> (B, C, H / s, W / s)."""
        maps = self.detector.backbone(images)
        return {stride: maps[name] for stride, (name, _) in self.names.items()}


def _check_options(name: str, options: Mapping[str, Any], detector: Any) -> None:
    """Refuse arguments that torchvision would ignore."""
    from torchvision.models import get_model_builder

    makers = [get_model_builder(name), *type(detector).__mro__[:2]]
    known = {argument for make in makers for argument in inspect.signature(make).parameters}
    for argument in options:
        if argument not in known:
            close = difflib.get_close_matches(argument, known, n=3, cutoff=0.3)
            raise ConfigError(
                f"DISTILL.TEACHER.OPTS: torchvision's {name} takes no '{argument}'; close: "
                f"{', '.join(close)}"
            )


@torch.no_grad()
def _names_by_stride(backbone: nn.Module, name: str) -> dict[int, tuple[str, int]]:
    """Stride -> (torchvision's name, channels) of the maps, fine to coarse."""
    try:
        maps = backbone(torch.zeros(1, 3, _SIDE, _SIDE))
    except RuntimeError as error:  # SSD300's are made for 300 pixels
        raise ConfigError(
            f"{KEY}: torchvision's {name} has no pyramid: {first_line(error)}"
        ) from error
    found = {
        round(_SIDE / level.shape[-1]): (str(key), level.shape[1]) for key, level in maps.items()
    }
    if len(found) < len(maps) or any(stride & (stride - 1) for stride in found):
        raise ConfigError(
            f"{KEY}: torchvision's {name} has no pyramid: its maps have "
            f"{[level.shape[-1] for level in maps.values()]} cells for {_SIDE} pixels"
        )
    return found


class _RoIHeads(nn.Module):
    """torchvision's RoI heads under the names of Detectron2's; classes in its order, background
    last."""

    def __init__(self, own: Any, names: Mapping[int, tuple[str, int]]):
        super().__init__()
        strides = {name: stride for stride, (name, _) in names.items()}
        self.box_in_features, self.box_pooler = _pooler(own.box_roi_pool, strides)
        self.box_head = own.box_head
        self.box_predictor = _BoxPredictor(own.box_predictor, own.box_coder.weights)
        self.num_classes = own.box_predictor.cls_score.out_features - 1
        if own.mask_roi_pool is not None:
            self.mask_in_features, self.mask_pooler = _pooler(own.mask_roi_pool, strides)
            self.mask_head = _MaskHead(own.mask_head, own.mask_predictor)


def _pooler(own: Any, strides: Mapping[str, int]) -> tuple[list[str], ROIPooler]:
    """Names of the maps that torchvision's pooler reads, and Detectron2's that pools equally."""
    levels = [strides[name] for name in own.featmap_names if name in strides]
    pooler = ROIPooler(
        output_size=tuple(own.output_size),
        scales=[1 / stride for stride in levels],
        sampling_ratio=own.sampling_ratio,
        pooler_type="ROIAlign",  # torchvision's is not aligned
        canonical_box_size=own.canonical_scale,
        canonical_level=own.canonical_level,
    )
    return [map_name(stride) for stride in levels], pooler


class _BoxPredictor(nn.Module):
    def __init__(self, own: Any, weights: tuple[float, ...]):
        super().__init__()
        self.own = own
        self.cls_score = own.cls_score
        self.box2box_transform = Box2BoxTransform(weights=weights)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) -> (R, K + 1) logits and (R, 4 K) deltas."""
        logits, deltas = self.own(hidden)
        return logits.roll(-1, dims=1), deltas[:, 4:]


class _MaskHead(nn.Module):
    def __init__(self, head: nn.Module, own: Any):
        super().__init__()
        self.head, self.own = head, own
        # What is asked of Detectron2's mask predictor.
        self.predictor = SimpleNamespace(out_channels=own.mask_fcn_logits.out_channels - 1)

    def layers(self, features: Tensor) -> Tensor:
        """(F, C, P, P) -> (F, K, 2 P, 2 P)."""
        logits: Tensor = self.own(self.head(features))
        return logits[:, 1:]
