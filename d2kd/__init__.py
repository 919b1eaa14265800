"""d2kd: knowledge distillation for Detectron2 detectors.

Importing it registers heads, meta-architectures, backbones and datasets. ``__all__`` is the public
API, for the author of a head, of a trainer or of a script; docs/api.md describes it.
"""

import importlib
import logging
import warnings

__version__ = "0.2.0"

# What Detectron2 and fvcore do with functions that will go: a user of d2kd can do nothing about it.
for _message in ("pkg_resources is", "`torch.(jit.script|cuda.amp)", "torch.meshgrid: in an"):
    warnings.filterwarnings("ignore", message=_message)
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda r: "is_fx_tracing" not in str(r.msg))

try:
    from . import data, losses, models
    from .config import (
        HeadOptions,
        add_distillation_config,
        declared_keys,
        head_schedule,
        student_config,
        validate_distillation_config,
    )
    from .detectors.bundle import Batch, FeatureBundle, View, lazy
    from .detectors.foreign import GivesMaps, Pixels
    from .detectors.part import DetectorPart, StudentStep, TeacherStep
    from .detectors.spec import (
        DetectorSpec,
        Facts,
        describe_detector,
        fields_on_student_boxes,
        strides_of,
    )
    from .detectors.student_boxes import pool_for_own_head, pool_like_student
    from .detectors.teacher import Teacher, load_teacher
    from .errors import ConfigError
    from .heads import DistillHead, build_head
    from .heads.adapters import Adapters, build_adapters, pair_levels
    from .heads.needs import Need
    from .heads.pyramid import PyramidHead, PyramidOptions
    from .heads.sketch import Sketch
    from .keys import (
        COUNT,
        NOT_NEGATIVE,
        POSITIVE,
        Options,
        Rule,
        adds_config,
        config_keys,
        group,
        key,
        one_of,
        or_none,
    )
    from .meta_arch import Distiller
    from .numerics import connected_zero, full_precision
    from .registry import DETECTOR_PART_REGISTRY, DISTILL_HEAD_REGISTRY
    from .schedules import Schedule
except ModuleNotFoundError as error:
    # The command that installs Detectron2 is part of this package, and must run without it.
    if error.name != "detectron2":
        raise

# What is imported when it is first asked for: not everyone trains.
_LATER = {
    "DistillResult": ".commands.distill",
    "DistillTrainer": ".engine.trainer",
    "ExportedDetector": ".export.detector",
    "add_distillation_hooks": ".engine.own_trainer",
    "distill": ".commands.distill",
    "merged_config": ".engine.setup",
    "train": ".engine.train",
}

__all__ = [
    "COUNT",
    "DETECTOR_PART_REGISTRY",
    "DISTILL_HEAD_REGISTRY",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Adapters",
    "Batch",
    "ConfigError",
    "DetectorPart",
    "DetectorSpec",
    "DistillHead",
    "DistillResult",
    "DistillTrainer",
    "Distiller",
    "ExportedDetector",
    "Facts",
    "FeatureBundle",
    "GivesMaps",
    "HeadOptions",
    "Need",
    "Options",
    "Pixels",
    "PyramidHead",
    "PyramidOptions",
    "Rule",
    "Schedule",
    "Sketch",
    "StudentStep",
    "Teacher",
    "TeacherStep",
    "View",
    "add_distillation_config",
    "add_distillation_hooks",
    "adds_config",
    "build_adapters",
    "build_head",
    "config_keys",
    "connected_zero",
    "data",
    "declared_keys",
    "describe_detector",
    "distill",
    "fields_on_student_boxes",
    "full_precision",
    "group",
    "head_schedule",
    "key",
    "lazy",
    "load_teacher",
    "losses",
    "merged_config",
    "models",
    "one_of",
    "or_none",
    "pair_levels",
    "pool_for_own_head",
    "pool_like_student",
    "strides_of",
    "student_config",
    "train",
    "validate_distillation_config",
]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    if name in __all__:
        raise ImportError("d2kd needs Detectron2, which is missing: run `d2kd install-detectron2`")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
