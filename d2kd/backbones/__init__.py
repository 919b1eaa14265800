"""Backbones that Detectron2 does not have; importing registers them."""

from .timm_fpn import TimmBackbone, build_retinanet_timm_fpn_backbone, build_timm_fpn_backbone

__all__ = ["TimmBackbone", "build_retinanet_timm_fpn_backbone", "build_timm_fpn_backbone"]
