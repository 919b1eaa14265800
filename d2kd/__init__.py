"""d2kd: knowledge distillation for Detectron2 detectors. Importing it registers everything."""

from . import backbones, data, fcos
from .adapters import build_adapters, pair_levels
from .bundle import Batch, DetectorSpec, FeatureBundle
from .config import ConfigError, add_distillation_config, validate_distillation_config
from .heads import DISTILL_HEAD_REGISTRY, DistillHead
from .meta_arch import Distiller
from .teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "DISTILL_HEAD_REGISTRY",
    "Batch",
    "ConfigError",
    "DetectorSpec",
    "DistillHead",
    "Distiller",
    "FeatureBundle",
    "Teacher",
    "add_distillation_config",
    "backbones",
    "build_adapters",
    "data",
    "fcos",
    "pair_levels",
    "validate_distillation_config",
]
