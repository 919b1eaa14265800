"""Distillation heads, one file a method. Importing the package registers them."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_head, node_name, require_fields
from .dsig import DSIG
from .feature_mimic import FeatureMimic
from .logits import Logits
from .mar import MAR
from .ssim import SSIM

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "DSIG",
    "MAR",
    "SSIM",
    "DistillHead",
    "FeatureMimic",
    "Logits",
    "build_head",
    "node_name",
    "require_fields",
]
