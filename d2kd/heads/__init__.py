"""Distillation heads, one file a method. Importing the package registers them."""

from .base import DISTILL_HEAD_REGISTRY, DistillHead, build_head, node_name, require_fields
from .dsig import DSIG
from .mar import MAR

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "DSIG",
    "MAR",
    "DistillHead",
    "build_head",
    "node_name",
    "require_fields",
]
