"""What the values of Detectron2's own keys may be, where Detectron2 itself would fail late, hang or
go on with nonsense.

Detectron2 checks types and little else; these are the needs of its trainer, loader and models.
"""

from __future__ import annotations

import math
import re

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils.registry import Registry

from .config_files import check_registered
from .errors import ConfigError
from .keys import (
    BELOW_ONE,
    COUNT,
    ITERATIONS,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    all_keys,
    check_rule,
    node_at,
    one_of,
)

SHARE = Rule(lambda value: 0 <= value <= 1, "it must be from 0 to 1")
SIZES = Rule(
    lambda value: bool(value) and all(isinstance(v, int) and v > 0 for v in value),
    "it must be a list of sizes in pixels, each a positive whole number",
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
NORM = one_of(
    ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
)
BOX_LOSS = one_of(("smooth_l1", "giou", "diou", "ciou"))
CROP = Rule(
    lambda value: len(value) == 2 and all(v > 0 for v in value),
    "it must be two positive numbers, height and width",
)
EXPECTED = Rule(
    lambda value: all(
        len(row) == 4 and [type(v) for v in row[:2]] == [str, str] and row[2] + row[3] < math.inf
        for row in value
    ),
    "it must be a list of [task, metric, value, tolerance]",
)
DEVICE = Rule(
    # "meta" builds a model without its memory.
    lambda value: re.fullmatch(r"cpu|meta|mps|(cuda|xpu)(:\d+)?", value) is not None,
    "valid: cpu, cuda, cuda:0, cuda:1, ...",
)

_OF_MODELS = ("MODEL.", "INPUT.FORMAT")
_NEVER_NONE = (
    *("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST"),
    *("OUTPUT_DIR", "SEED"),
)
# Samplers of training that d2kd's loader knows.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

# Keys of every run.
RULES = {
    "MODEL.DEVICE": DEVICE,
    "MODEL.PIXEL_MEAN": THREE,
    "MODEL.PIXEL_STD": THREE_POSITIVE,
    "MODEL.LOAD_PROPOSALS": Rule(
        lambda value: not value,
        "d2kd does not load pre-computed proposals, as their files are pickles, which can run "
        "code; valid: False, with MODEL.PROPOSAL_GENERATOR.NAME RPN",
    ),
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.FPN.FUSE_TYPE": one_of(("sum", "avg")),
    "MODEL.FPN.NORM": NORM,
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.ROI_BOX_HEAD.NORM": NORM,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of(("ROIAlignV2", "ROIAlign", "ROIPool")),
    "MODEL.ROI_MASK_HEAD.NORM": NORM,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": COUNT,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": one_of(("", "ROIAlignV2", "ROIAlign", "ROIPool")),
    "MODEL.BACKBONE.FREEZE_AT": NOT_NEGATIVE,
    "MODEL.RESNETS.DEPTH": one_of((18, 34, 50, 101, 152)),
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.RETINANET.NUM_CLASSES": COUNT,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSS,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.RETINANET.SCORE_THRESH_TEST": SHARE,
    "MODEL.RETINANET.NMS_THRESH_TEST": SHARE,
    "MODEL.ANCHOR_GENERATOR.SIZES": NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": NESTED_POSITIVE,
    "INPUT.FORMAT": one_of(("BGR", "RGB")),
    "INPUT.MASK_FORMAT": one_of(("polygon", "bitmask")),
    "INPUT.MIN_SIZE_TEST": NOT_NEGATIVE,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "DATASETS.TRAIN": NAMES,
    "DATASETS.TEST": NAMES,
    "DATALOADER.NUM_WORKERS": NOT_NEGATIVE,
    "TEST.AUG.ENABLED": Rule(
        lambda value: not value, "d2kd evaluates without test-time augmentation; valid: False"
    ),
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.EXPECTED_RESULTS": EXPECTED,
    "SEED": SEED,
}
# Keys that only training reads.
TRAIN_RULES = {
    "INPUT.MIN_SIZE_TRAIN": SIZES,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.RANDOM_FLIP": one_of(("horizontal", "vertical", "none")),
    "INPUT.CROP.SIZE": CROP,
    "INPUT.CROP.TYPE": one_of(("relative", "relative_range", "absolute", "absolute_range")),
    "DATALOADER.SAMPLER_TRAIN": one_of(SAMPLERS),
    "DATALOADER.REPEAT_THRESHOLD": NOT_NEGATIVE,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": NOT_NEGATIVE,
    "SOLVER.MOMENTUM": BELOW_ONE,
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
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Rule(lambda value: value > 0, "it must be positive, or inf"),
    "SOLVER.NUM_DECAYS": COUNT,
    "TEST.EVAL_PERIOD": NOT_NEGATIVE,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
    "VIS_PERIOD": NOT_NEGATIVE,
}
# Keys that name a part of a model -> its registry, and the meta-architectures for which the name is
# checked here.
PARTS: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "MODEL.META_ARCHITECTURE": (META_ARCH_REGISTRY, ()),
    "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, ("GeneralizedRCNN", "RetinaNet", "FCOS")),
    "MODEL.ANCHOR_GENERATOR.NAME": (ANCHOR_GENERATOR_REGISTRY, ("GeneralizedRCNN", "RetinaNet")),
    "MODEL.PROPOSAL_GENERATOR.NAME": (PROPOSAL_GENERATOR_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.RPN.HEAD_NAME": (RPN_HEAD_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_HEADS.NAME": (ROI_HEADS_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_BOX_HEAD.NAME": (ROI_BOX_HEAD_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_MASK_HEAD.NAME": (ROI_MASK_HEAD_REGISTRY, ("GeneralizedRCNN",)),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": (ROI_KEYPOINT_HEAD_REGISTRY, ()),
    "MODEL.SEM_SEG_HEAD.NAME": (SEM_SEG_HEADS_REGISTRY, ()),
}


def check_detectron2_keys(cfg: CfgNode, train: bool = True) -> None:
    """Check the values of Detectron2's keys, with ``train`` also those that only training reads.

    Raises:
        ConfigError: names the first key whose value is not valid, and what is.
    """
    _refuse_empty(cfg)
    _check_rules(cfg, {**RULES, **(TRAIN_RULES if train else {})})
    _check_registries(cfg)
    if train:
        _check_combinations(cfg)
        if not cfg.DATASETS.TRAIN:
            raise ConfigError("DATASETS.TRAIN is empty; give names of datasets, or use --eval-only")


def check_model_keys(cfg: CfgNode) -> None:
    """As :func:`check_detectron2_keys`, of the keys by which a teacher's model is built."""
    _check_rules(cfg, {name: r for name, r in RULES.items() if name.startswith(_OF_MODELS)})
    _check_registries(cfg)


def _check_rules(cfg: CfgNode, rules: dict[str, Rule]) -> None:
    for name, rule in rules.items():
        try:
            value = node_at(cfg, name)
        except KeyError:  # of another version of Detectron2
            continue
        check_rule(value, rule, name)


def _check_combinations(cfg: CfgNode) -> None:
    """Keys of training whose values Detectron2 wants to fit each other."""
    solver, images = cfg.SOLVER, cfg.INPUT
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        raise ConfigError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}; it must divide "
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, or be 0"
        )
    if images.MIN_SIZE_TRAIN_SAMPLING == "range" and len(images.MIN_SIZE_TRAIN) != 2:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN is {images.MIN_SIZE_TRAIN}; it must be two sizes for "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING range"
        )
    if images.CROP.TYPE.startswith("relative") and max(images.CROP.SIZE) > 1:
        raise ConfigError(
            f"INPUT.CROP.SIZE is {images.CROP.SIZE}; it must be shares of the image, up to 1, for "
            f"INPUT.CROP.TYPE {images.CROP.TYPE}"
        )


def _refuse_empty(cfg: CfgNode) -> None:
    """yacs takes None for every key; Detectron2's only key that may be None is one of its
    defaults."""
    for key, value in all_keys(cfg):
        if value is None and key.startswith(_NEVER_NONE) and key != "SOLVER.WEIGHT_DECAY_BIAS":
            raise ConfigError(f"{key} is None; give a value")


def _check_registries(cfg: CfgNode) -> None:
    key, arch = "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE
    if arch == "Distiller":
        key, arch = "DISTILL.STUDENT_META_ARCH", cfg.DISTILL.STUDENT_META_ARCH
    for name, (registry, archs) in PARTS.items():
        value = node_at(cfg, name)
        optional = name.endswith("BOX_HEAD.NAME") and value == ""
        if name.endswith("MASK_HEAD.NAME") and not cfg.MODEL.MASK_ON:
            continue
        if arch in archs and not optional:
            check_registered(name, value, registry)
    check_registered(key, arch, META_ARCH_REGISTRY)
