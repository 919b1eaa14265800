"""What the values of Detectron2's own keys may be, where Detectron2 itself would fail late, hang or
go on with nonsense.

Detectron2 checks types and little else; these are the needs of its trainer, loader and models.
"""

from __future__ import annotations

import math
import re
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.utils.registry import Registry

from .config_files import close_to
from .errors import ConfigError
from .keys import COUNT, NOT_NEGATIVE, POSITIVE, Rule, node_at, one_of

SHARE = Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1")
MOMENTUM = Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1")
SIZES = Rule(
    lambda value: bool(value) and all(isinstance(v, int) and v > 0 for v in value),
    "it must be a list of sizes in pixels, each a positive whole number",
)
SIZE_OR_OFF = Rule(lambda value: value >= 0, "it must be a size in pixels, or 0 for none")
ITERATIONS = Rule(
    lambda value: all(isinstance(v, int) and v >= 0 for v in value),
    "they must be iterations, 0 or positive",
)
NAMES = Rule(
    lambda value: all(isinstance(v, str) and v for v in value), "it must be a list of names"
)
THREE = Rule(
    lambda value: len(value) == 3 and all(math.isfinite(v) for v in value),
    "it must be three numbers",
)
THREE_POSITIVE = Rule(
    lambda value: len(value) == 3 and all(0 < v < math.inf for v in value),
    "it must be three positive numbers",
)
NESTED_POSITIVE = Rule(
    lambda value: bool(value) and all(row and all(v > 0 for v in row) for row in value),
    "it must be a list of lists of positive numbers",
)
SEED = Rule(lambda value: -1 <= value < 2**31, "it must be from 0 to 2147483647, or -1 for none")
DEVICE = Rule(
    lambda value: re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", value) is not None,
    "valid: cpu, cuda, cuda:0, cuda:1, ...",
)

# Keys of every run.
RULES = {
    "MODEL.DEVICE": DEVICE,
    "MODEL.PIXEL_MEAN": THREE,
    "MODEL.PIXEL_STD": THREE_POSITIVE,
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.DEPTH": one_of((18, 34, 50, 101, 152)),
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.RETINANET.NUM_CLASSES": COUNT,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": SHARE,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.RETINANET.SCORE_THRESH_TEST": SHARE,
    "MODEL.RETINANET.NMS_THRESH_TEST": SHARE,
    "MODEL.ANCHOR_GENERATOR.SIZES": NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": NESTED_POSITIVE,
    "INPUT.FORMAT": one_of(("BGR", "RGB")),
    "INPUT.MASK_FORMAT": one_of(("polygon", "bitmask")),
    "INPUT.MIN_SIZE_TEST": SIZE_OR_OFF,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "DATASETS.TRAIN": NAMES,
    "DATASETS.TEST": NAMES,
    "DATALOADER.NUM_WORKERS": NOT_NEGATIVE,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "SEED": SEED,
}
# Keys that only training reads.
TRAIN_RULES = {
    "INPUT.MIN_SIZE_TRAIN": SIZES,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.RANDOM_FLIP": one_of(("horizontal", "vertical", "none")),
    "INPUT.CROP.TYPE": one_of(("relative", "relative_range", "absolute", "absolute_range")),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
    ),
    "DATALOADER.REPEAT_THRESHOLD": NOT_NEGATIVE,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": NOT_NEGATIVE,
    "SOLVER.MOMENTUM": MOMENTUM,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": NOT_NEGATIVE,
    "SOLVER.GAMMA": NOT_NEGATIVE,
    "SOLVER.STEPS": ITERATIONS,
    "SOLVER.WARMUP_FACTOR": NOT_NEGATIVE,
    "SOLVER.WARMUP_ITERS": NOT_NEGATIVE,
    "SOLVER.WARMUP_METHOD": one_of(("linear", "constant")),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
    ),
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": NOT_NEGATIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(("value", "norm", "full_model")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "TEST.EVAL_PERIOD": NOT_NEGATIVE,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
}
# Names that a registry must know, where the meta-architecture reads the key.
REGISTRIES: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, ("GeneralizedRCNN", "RetinaNet", "FCOS")),
    "MODEL.PROPOSAL_GENERATOR.NAME": (PROPOSAL_GENERATOR_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_HEADS.NAME": (ROI_HEADS_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_BOX_HEAD.NAME": (ROI_BOX_HEAD_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_MASK_HEAD.NAME": (ROI_MASK_HEAD_REGISTRY, ("GeneralizedRCNN",)),
}


def check_detectron2_keys(cfg: CfgNode, train: bool = True) -> None:
    """Check the values of Detectron2's keys.

    Args:
        train: also the keys that only training reads.

    Raises:
        ConfigError: names the first key whose value is not valid, and what is.
    """
    _refuse_empty(cfg)
    for name, rule in {**RULES, **(TRAIN_RULES if train else {})}.items():
        value = node_at(cfg, name)
        try:
            good = rule.holds(value)
        except (TypeError, ValueError):  # of values that cannot be compared
            good = False
        if not good:
            raise ConfigError(f"{name} is {value!r}; {rule.words}")
    _check_registries(cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; give names of datasets, or use --eval-only")


def _refuse_empty(cfg: CfgNode) -> None:
    """yacs takes None for every key; Detectron2's only key that may be None is one of its
    defaults."""
    for name in ("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST"):
        for key, value in _leaves(cfg[name], name):
            if value is None and key not in _MAY_BE_NONE:
                raise ConfigError(f"{key} is None; give a value")
    for key in ("OUTPUT_DIR", "SEED"):
        if cfg[key] is None:
            raise ConfigError(f"{key} is None; give a value")


_MAY_BE_NONE = {"SOLVER.WEIGHT_DECAY_BIAS"}


def _leaves(node: CfgNode, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        name = f"{prefix}.{key}"
        found += _leaves(value, name) if isinstance(value, CfgNode) else [(name, value)]
    return found


def _check_registries(cfg: CfgNode) -> None:
    arch = cfg.MODEL.META_ARCHITECTURE
    if arch == "Distiller":
        arch = cfg.DISTILL.STUDENT_META_ARCH
    for name, (registry, archs) in REGISTRIES.items():
        value = node_at(cfg, name)
        optional = name.endswith("BOX_HEAD.NAME") and value == ""
        if name.endswith("MASK_HEAD.NAME") and not cfg.MODEL.MASK_ON:
            continue
        if arch in archs and not optional and value not in registry:
            known = sorted(entry for entry, _ in registry)
            raise ConfigError(f"{name} is {value!r}; {close_to(value, known)}")
    if arch not in META_ARCH_REGISTRY:
        known = sorted(entry for entry, _ in META_ARCH_REGISTRY)
        raise ConfigError(f"MODEL.META_ARCHITECTURE is {arch!r}; {close_to(arch, known)}")
