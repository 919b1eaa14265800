"""Distillation heads, one file per method. Importing the package registers them."""

from ..registry import DISTILL_HEAD_REGISTRY, node_name
from .base import DistillHead, build_head
from .crosskd import CrossKD
from .cwd import CWD
from .drkd import DRKD
from .dsig import DSIG
from .feature_mimic import FeatureMimic
from .global_knowledge import GlobalKnowledge
from .logits import Logits
from .mar import MAR
from .mask_mimic import MaskMimic
from .pkd import PKD
from .ssim import SSIM

__all__ = [
    "CWD",
    "DISTILL_HEAD_REGISTRY",
    "DRKD",
    "DSIG",
    "MAR",
    "PKD",
    "SSIM",
    "CrossKD",
    "DistillHead",
    "FeatureMimic",
    "GlobalKnowledge",
    "Logits",
    "MaskMimic",
    "build_head",
    "node_name",
]
