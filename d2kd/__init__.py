"""d2kd: knowledge distillation for Detectron2 detectors. Importing it registers everything."""

from . import data, models
from .config import add_distillation_config, validate_distillation_config
from .detectors.bundle import Batch, FeatureBundle
from .detectors.spec import DetectorSpec
from .detectors.teacher import Teacher
from .errors import ConfigError
from .heads import DistillHead
from .heads.adapters import build_adapters, pair_levels
from .meta_arch import Distiller
from .registry import DISTILL_HEAD_REGISTRY

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
    "build_adapters",
    "data",
    "models",
    "pair_levels",
    "validate_distillation_config",
]
