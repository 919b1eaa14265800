"""Backbones and meta-architectures that Detectron2 lacks; importing registers them."""

from .fcos import FCOS
from .timm_fpn import TimmBackbone, build_retinanet_timm_fpn_backbone, build_timm_fpn_backbone

__all__ = ["FCOS", "TimmBackbone", "build_retinanet_timm_fpn_backbone", "build_timm_fpn_backbone"]
