"""Detectron2's FCOS from a YAML file.

Detectron2 has the meta-architecture FCOS, but builds it from Python configs (LazyConfig) only: it
is neither registered nor does it read a CfgNode. What is added here is the reading of
``MODEL.FCOS``, whose keys are declared here, training in mixed precision, and a builder of the
backbone of Detectron2's FCOS config.
"""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.meta_arch import fcos

from ..errors import ConfigError
from ..keys import Options, config_keys, key
from .timm_fpn import build_fpn


@config_keys("MODEL.FCOS")
@dataclass(frozen=True)
class FCOSOptions(Options):
    """Keys of ``MODEL.FCOS``."""

    num_classes: int = key(80, comment="Foreground classes.")
    in_features: tuple[str, ...] = key(
        ("p3", "p4", "p5", "p6", "p7"),
        comment="Levels that the head reads, fine to coarse.",
    )
    num_convs: int = key(4, comment="Convolutions in each tower.")
    norm: str = key("GN", comment='Norm of the towers; "" for none.')
    prior_prob: float = key(
        0.01,
        comment="Probability of foreground that the class bias starts with.",
    )
    center_sampling_radius: float = key(
        1.5,
        comment="A position is positive within this many strides of an object's centre.",
    )
    focal_loss_alpha: float = key(0.25, comment="alpha of the focal loss: weight of positives.")
    focal_loss_gamma: float = key(2.0, comment="gamma of the focal loss.")
    score_thresh_test: float = key(
        0.2,
        comment="Inference: the score is the root of class probability times centerness.",
    )
    topk_candidates_test: int = key(1000, comment="Best positions per level that go into NMS.")
    nms_thresh_test: float = key(0.6, comment="IoU of class-wise NMS.")


class FCOS(fcos.FCOS):
    """Detectron2's FCOS, which can be built from a config: ``FCOS(cfg)``.

    An anchor-free dense detector (Tian et al., ICCV 2019, with the improvements of
    arXiv 2006.09214). Its arguments are those of :class:`detectron2.modeling.FCOS`.
    """

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        unknown = [name for name in node.IN_FEATURES if name not in shapes]
        if unknown:
            raise ConfigError(
                f"MODEL.FCOS.IN_FEATURES: the backbone has no {unknown}; valid: {list(shapes)}"
            )
        inputs = [shapes[name] for name in node.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=inputs,
            num_classes=node.NUM_CLASSES,
            conv_dims=[inputs[0].channels] * node.NUM_CONVS,
            norm=node.NORM,
            prior_prob=node.PRIOR_PROB,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """Detectron2's, with box outputs in float32 as RetinaNet's are: in half precision its
        decoding would round boxes to several pixels, and its GIoU loss fails."""
        deltas, centerness = (
            [level.float() for level in levels] for levels in (pred_anchor_deltas, pred_centerness)
        )
        return super().losses(anchors, pred_logits, gt_labels, deltas, gt_boxes, centerness)


# A later Detectron2, or another project, may have an FCOS of its own in the registry.
if "FCOS" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(FCOS)


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet with a pyramid p3 to p7 whose p6 and p7 come from p5, where RetinaNet takes res5."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape), top_block)
