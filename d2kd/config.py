"""Every configuration key of d2kd, with what it does, and the checks that a config must pass."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

PRECISIONS = {
    "": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DECAYS = ("constant", "linear", "cosine", "step")


class ConfigError(ValueError):
    """A mistake in the configuration, said in one line that names what is valid."""


# --- what values may be -------------------------------------------------------------------------


class Rule(NamedTuple):
    """What a config value must be: a test, and the words for it in a message."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Rule(lambda value: value > 0, "it must be positive")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "it must be 0 or positive")
COUNT = Rule(lambda value: value >= 1, "it must be at least 1")


def one_of(choices: Collection) -> Rule:
    """The value is one of ``choices``."""
    return Rule(lambda value: value in choices, f"valid: {list(choices)}")


def check_values(prefix: str, node: CfgNode, rules: Mapping[str, Rule]) -> None:
    """Refuse values that a head is not defined for.

    Args:
        prefix: name of ``node``, e.g. "DISTILL.SSIM".
        rules: key, with dots where it is nested -> what its value must be. NaN, and another type
            where the key's default does not fix it, break every rule on numbers.

    Raises:
        ConfigError: names the first key that breaks its rule, and what is valid.
    """
    for key, rule in rules.items():
        value = operator.attrgetter(key)(node)
        try:
            good = rule.holds(value)
        except TypeError:  # of values that cannot be compared
            good = False
        if not good:
            raise ConfigError(f"{prefix}.{key} is {value!r}; {rule.words}")


def add_distillation_config(cfg: CfgNode) -> None:
    """Add d2kd's keys to Detectron2's ``cfg``; call it before merging any file."""
    from .heads import DISTILL_HEAD_REGISTRY, node_name

    _add_training(cfg)
    _add_data(cfg)
    _add_fcos(cfg)
    _add_timm(cfg)

    cfg.DISTILL = CfgNode()
    # The meta-architecture that is trained and saved: GeneralizedRCNN, RetinaNet, FCOS, ... The
    # student is the config itself: backbone, heads, input and solver keys are its own.
    cfg.DISTILL.STUDENT_META_ARCH = "GeneralizedRCNN"
    # Names of registered heads, e.g. ["DSIG", "SSIM"]. () trains the plain student.
    cfg.DISTILL.HEADS = []
    # Parts that the student copies from the teacher before training, after MODEL.WEIGHTS are
    # loaded and not on --resume: any of "fpn", "rpn", "box_head", "mask_head", "head" (of dense
    # detectors), or paths of modules such as "backbone.bottom_up". [] copies nothing.
    cfg.DISTILL.INHERIT = []
    _add_teacher(cfg.DISTILL)
    _add_ssim(cfg.DISTILL)
    _add_feature_mimic(cfg.DISTILL)
    _add_logits(cfg.DISTILL)
    _add_mask_mimic(cfg.DISTILL)
    _add_dsig(cfg.DISTILL)
    _add_drkd(cfg.DISTILL)
    _add_global_knowledge(cfg.DISTILL)
    _add_mar(cfg.DISTILL)
    for name, head in DISTILL_HEAD_REGISTRY:  # heads that users registered before this call
        node = node_name(name)
        if node not in cfg.DISTILL:
            cfg.DISTILL[node] = _head_node()
            head.add_config(cfg.DISTILL[node])


def _add_training(cfg: CfgNode) -> None:
    # "SGD" as in Detectron2, or "AdamW" (BASE_LR and WEIGHT_DECAY then mean AdamW's), which learns
    # faster from scratch.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Precision of SOLVER.AMP.ENABLED: "fp16" (needs a GPU; losses are scaled) or "bf16".
    cfg.SOLVER.AMP.PRECISION = "fp16"


def _add_data(cfg: CfgNode) -> None:
    """Keys of datasets."""
    # Your own datasets in COCO format, a list [name, annotation file, image directory] each. The
    # names can then be used in DATASETS.TRAIN and DATASETS.TEST. Relative paths start at the
    # working directory.
    cfg.DATASETS.COCO_FORMAT = []


def _add_fcos(cfg: CfgNode) -> None:
    """Keys of Detectron2's FCOS (``d2kd/fcos.py``), named as RetinaNet's.

    Values are those of its config fcos_R_50_FPN_1x.py, of RetinaNet where that says nothing.
    """
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Levels that the head reads, fine to coarse.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each tower, and their norm ("" for none).
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # Probability of foreground that the class bias starts with.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # A location is positive within this many strides of an object's centre.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Inference: the score is the root of class probability times centerness.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def _add_timm(cfg: CfgNode) -> None:
    """Keys of the backbones build_timm_fpn_backbone and build_retinanet_timm_fpn_backbone. Frozen
    stages (MODEL.BACKBONE.FREEZE_AT) and levels (MODEL.FPN.IN_FEATURES) have Detectron2's keys."""
    cfg.MODEL.TIMM = CfgNode()
    # A model of timm: "mobilenetv2_100", "efficientnet_b0", or with a tag that names its weights.
    cfg.MODEL.TIMM.NAME = ""
    # Start from timm's own weights. They are fetched, or taken from timm's cache, only where
    # MODEL.WEIGHTS is empty and there is no checkpoint to resume from.
    cfg.MODEL.TIMM.PRETRAINED = True
    # What the model's batch norms become: "BN", "SyncBN", "FrozenBN" or "GN", which starts anew.
    cfg.MODEL.TIMM.NORM = "FrozenBN"


def _add_teacher(distill: CfgNode) -> None:
    distill.TEACHER = CfgNode()
    # A YAML file, or a model-zoo name such as "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml".
    distill.TEACHER.CONFIG_FILE = ""
    # Its checkpoint. "": the zoo's for a zoo name, else MODEL.WEIGHTS of CONFIG_FILE. "random":
    # none, for tests only.
    distill.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs merged into the teacher's config, e.g. ["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]].
    distill.TEACHER.OPTS = []
    # "": the student's (autocast when SOLVER.AMP is on). "fp32", "bf16", "fp16": the teacher's own.
    distill.TEACHER.PRECISION = ""
    # Evaluate the teacher on DATASETS.TEST before training, so that a broken one is seen at once.
    distill.TEACHER.CHECK = True


def _head_node(weight: float = 1.0) -> CfgNode:
    """The keys that every head has."""
    node = CfgNode()
    # Factor of all of the head's terms.
    node.WEIGHT = weight
    node.SCHEDULE = CfgNode()
    # First iteration of the head, and the first without it again (-1: until the end). Outside, the
    # head is not computed.
    node.SCHEDULE.START_ITER = 0
    node.SCHEDULE.STOP_ITER = -1
    # The factor grows linearly from 0 over this many iterations after START_ITER.
    node.SCHEDULE.WARMUP_ITERS = 0
    # After the warm-up: "constant"; "linear" or "cosine" to 0 at STOP_ITER; "step": times GAMMA at
    # each of STEPS (iterations; []: SOLVER.STEPS).
    node.SCHEDULE.DECAY = "constant"
    node.SCHEDULE.STEPS = []
    node.SCHEDULE.GAMMA = 0.1
    return node


def _add_pyramid_keys(node: CfgNode) -> None:
    """Keys of heads that compare whole pyramids."""
    # Strides of the pyramid levels to distil; []: all that both detectors have.
    node.STRIDES = []
    # 1x1 convolution on the student's levels (phi): "auto" (where channels differ, and everywhere
    # if the detectors differ in meta-architecture or number of box stages), "always" or "never".
    node.ADAPTER = "auto"
    # Its first weights: "default" (PyTorch's), "identity" (starts as no adapter, where channels
    # agree) or "small" (near zero).
    node.ADAPTER_INIT = "default"


def _add_ssim(distill: CfgNode) -> None:
    """Structural Knowledge Distillation for Object Detection (NeurIPS 2022)."""
    # lambda. The paper found 2 and 4 best; which for which detector is not known to us. Our COCO
    # configs take 2 for two-stage pairs; {1, 2, 4, 8} is the grid to try.
    distill.SSIM = _head_node(weight=4.0)
    _add_pyramid_keys(distill.SSIM)
    # psi: what shares one minimum and maximum when a map is rescaled to [0, 1]: "image" (one image
    # of a level), "tensor" (the batch) or "channel" (one channel of an image). Not in the paper.
    distill.SSIM.RESCALE = "image"
    # Treat the student's minimum and maximum as constants in the backward pass.
    distill.SSIM.DETACH_RANGE = False
    # alpha, beta, gamma of luminance, contrast and structure, each 0 or 1. Others than 1, 1, 1 are
    # for ablations: they take about ten times the memory.
    distill.SSIM.EXPONENTS = [1, 1, 1]
    # Side (odd) and standard deviation of the Gaussian patch, in positions of the level (paper).
    distill.SSIM.WINDOW_SIZE = 11
    distill.SSIM.SIGMA = 1.5
    # Stabilisers C1 = K1^2 and C2 = K2^2 (paper). Contrast below K2 counts little.
    distill.SSIM.K1 = 0.01
    distill.SSIM.K2 = 0.03
    # Every so many iterations, log the median local standard deviation of the teacher's rescaled
    # levels as ssim/teacher_std_<stride>: below 0.02, K2 masks the structure, and RESCALE
    # "channel", a larger WEIGHT or a smaller K2 may help. 0: never.
    distill.SSIM.STATS_PERIOD = 500


def _add_feature_mimic(distill: CfgNode) -> None:
    """Plain feature distillation: L1 or L2 between the pyramids."""
    distill.FEATURE_MIMIC = _head_node()
    _add_pyramid_keys(distill.FEATURE_MIMIC)
    # "l1" or "l2": |s - t| or (s - t)^2, mean over a level, sum over levels.
    distill.FEATURE_MIMIC.DISTANCE = "l2"
    # "none": features as they are (FitNets). "image", "tensor" or "channel": both maps rescaled to
    # [0, 1] first, the frame in which the SSIM paper compares L1 and L2; raise WEIGHT accordingly.
    distill.FEATURE_MIMIC.RESCALE = "none"


def _add_logits(distill: CfgNode) -> None:
    """Distillation of the class, box and mask outputs.

    Terms on RoIs and masks are divided as Detectron2 divides its own losses of these outputs, dense
    ones by the foreground anchors of the step.
    """
    distill.LOGITS = _head_node()
    # Class outputs: KL divergence of softmax outputs on the student's RoIs (Hinton et al., 2015),
    # or a binary divergence for each sigmoid output of a dense detector; 0 switches a term off.
    distill.LOGITS.CLASS_WEIGHT = 1.0
    # Box deltas of foreground RoIs or anchors: smooth L1, plain L1 for BOX_BETA 0.
    distill.LOGITS.BOX_WEIGHT = 1.0
    distill.LOGITS.BOX_BETA = 0.0
    # Mask logits of the labelled class on foreground RoIs; ignored by students without masks.
    distill.LOGITS.MASK_WEIGHT = 1.0
    # T, by which class and mask logits are divided; terms are multiplied by T^2. 1: the
    # probabilities as the detectors predict them.
    distill.LOGITS.TEMPERATURE = 1.0
    # Exponent of |p - q|, the weight of a dense class logit, from the quality focal loss (Li et
    # al., 2020; with exponent 1 as a distillation loss in Yang et al., ICCV 2023). 0: plain
    # divergence, in which easy background anchors dominate.
    distill.LOGITS.DENSE_FOCUS = 1.0


def _add_mask_mimic(distill: CfgNode) -> None:
    """Distillation of the mask branch, on the student's foreground RoIs, beside any method."""
    distill.MASK_MIMIC = _head_node()
    # Mask logits of the labelled class: the term that LOGITS.MASK_WEIGHT and DSIG.MASK_WEIGHT
    # weigh too; 0 switches a term off.
    distill.MASK_MIMIC.LOGITS_WEIGHT = 1.0
    # T, by which mask logits are divided; the term is multiplied by T^2.
    distill.MASK_MIMIC.TEMPERATURE = 1.0
    # Mean squared error of the features that are pooled for the mask head (14x14 cells), through a
    # 1x1 convolution where channels differ.
    distill.MASK_MIMIC.FEATURES_WEIGHT = 1.0


def _add_dsig(distill: CfgNode) -> None:
    """Deep Structured Instance Graph for Distilling Object Detectors (ICCV 2021).

    Defaults are the authors' for a light two-stage student (R18 from R50, 2 images a GPU).
    """
    distill.DSIG = _head_node()
    # Node and edge terms of the images of a GPU: "mean", so that their strength does not depend on
    # the batch, or "sum", the authors' code. At 2 images a GPU the default "mean" with the three
    # default weights below equals their "sum" with half of them (0.5, 0.5, 2.0).
    distill.DSIG.IMAGE_REDUCTION = "mean"
    # Mean squared error of foreground nodes (lambda_1 in the paper); 0 switches a term off.
    distill.DSIG.FOREGROUND_WEIGHT = 1.0
    # Mean squared error of background nodes (lambda_2), times ALPHA * foreground / background
    # count of the image. Dense students have no background nodes.
    distill.DSIG.BACKGROUND_WEIGHT = 1.0
    distill.DSIG.BACKGROUND_ALPHA = 7.5
    # Half the mean squared difference of the cosine similarities of all pairs of nodes (lambda_3).
    # Authors: 4.0 for light two-stage students, 2.0 for R50 and up and for RetinaNet.
    distill.DSIG.EDGE_WEIGHT = 4.0
    # Background samples mining: a background RoI has edges where the teacher's cross-entropy with
    # "background" reaches the threshold. False: edges between foreground nodes only.
    distill.DSIG.MINE_BACKGROUND = True
    distill.DSIG.MINING_THRESHOLD = 0.6
    # KL divergence of class probabilities, averaged over all logits: softmax with this temperature,
    # over the K sigmoid logits for dense students too. Authors: 3.0, or 1.0 for RetinaNet, or off.
    distill.DSIG.CLASS_WEIGHT = 3.0
    distill.DSIG.CLASS_TEMPERATURE = 1.0
    # L1 distance of the box deltas of foreground predictions.
    distill.DSIG.BOX_WEIGHT = 1.0
    # Mean squared error of the pyramid levels that both detectors have. Authors: off from R50 up.
    distill.DSIG.PYRAMID_WEIGHT = 0.5
    # Mask logits of the labelled class on foreground RoIs (not in the paper).
    distill.DSIG.MASK_WEIGHT = 0.0
    # Foreground nodes from the mask branch's pooled features too, with FOREGROUND_WEIGHT (an
    # experiment of the authors that their configs never used).
    distill.DSIG.MASK_NODES = False
    # The stage of a cascade whose RoIs are the nodes.
    distill.DSIG.STAGE = 0
    # Nodes of a dense student: its best (location, class) pairs a level, through class-wise NMS,
    # the best of all levels, pooled to POOL_RESOLUTION squared cells.
    distill.DSIG.PREDICTIONS_PER_LEVEL = 1000
    distill.DSIG.PREDICTIONS_NMS = 0.5
    distill.DSIG.PREDICTIONS_PER_IMAGE = 100
    distill.DSIG.POOL_RESOLUTION = 7


def _add_drkd(distill: CfgNode) -> None:
    """Dual Relation Knowledge Distillation for Object Detection (IJCAI 2023)."""
    distill.DRKD = _head_node()
    # "code": what the authors released, un-squared norms of gaps between refined features. "paper":
    # the formulas of the paper, mean squares and relation matrices.
    distill.DRKD.PROFILE = "code"
    # Weights of the pixel-wise relation, the instance-wise relation and the instance features
    # (lambda_1, lambda_2, lambda_3); 0 turns a term off. None: of the released code, by the kind of
    # student: 0.001, 0.004, 0.0024 (two-stage) or 0.004, 0.005, 0.006 (dense); for the profile
    # "paper" 4, 10, 0.00026 or 8, 10, 0.00066, converted and not tuned.
    distill.DRKD.PIXEL_WEIGHT = None
    distill.DRKD.RELATION_WEIGHT = None
    distill.DRKD.INSTANCE_WEIGHT = None
    # The weights are for 2 images a GPU. Norms grow with the batch: scale the first by sqrt(2 / B)
    # and the others by 2 / B (profile "code").
    distill.DRKD.BATCH_SIZE_RULE = True
    # Strides of the levels of the pixel-wise relation; []: all that both detectors have.
    distill.DRKD.STRIDES = []
    # Nodes of the graph units, fine to coarse (M in the paper); the last holds for further levels.
    distill.DRKD.NODES = [64, 64, 256, 256, 256]
    # Divide node features by the number of pixels. The released code does not.
    distill.DRKD.NORMALIZE = False
    # First weights of the 1x1 convolutions on the student's side: "default" (released code),
    # "identity" (starts as no adapter where channels agree) or "small".
    distill.DRKD.ADAPTER_INIT = "default"
    # Start the graph units as the identity, with the scale of their batch norm at 0.
    distill.DRKD.ZERO_INIT_BN = False
    # The finest levels from which instances are pooled; every object from each of them.
    distill.DRKD.INSTANCE_LEVELS = 2
    # Side of the pooled instance, and RoIAlign's flags: samples a bin (0: as many as cells) and the
    # half-pixel shift. Without the shift a tiny box is enlarged to one cell.
    distill.DRKD.POOL_RESOLUTION = 3
    distill.DRKD.SAMPLING_RATIO = 0
    distill.DRKD.ALIGNED = False
    # Weights on relations: "learned"; "uniform" (1 / objects of the image, which "learned" starts
    # as); "random" (new at each step, the released code); "none".
    distill.DRKD.RELATION_FILTER = "learned"
    # Width inside the relation units; 0: half of their input, which at 256 channels and 3 x 3 cells
    # means 44 million parameters with the learned filter.
    distill.DRKD.BOTTLENECK = 0
    # Keep the teacher's graph and relation units at their random start; the released code trains
    # them with the student.
    distill.DRKD.FREEZE_TEACHER_UNITS = False
    # Of an image with more objects, a random choice of this many takes part.
    distill.DRKD.MAX_INSTANCES = 200


def _add_global_knowledge(distill: CfgNode) -> None:
    """Distilling Object Detectors with Global Knowledge (ECCV 2022)."""
    distill.GLOBAL_KNOWLEDGE = _head_node()
    node = distill.GLOBAL_KNOWLEDGE
    # Prototypes need a student that sees something: 0 for a trained one (MODEL.WEIGHTS of a
    # detector, as in the paper), a warm-up of plain training for one from scratch or ImageNet.
    node.SCHEDULE.START_ITER = 0
    # Strides of the pyramid levels to distil; []: all that both detectors have.
    node.STRIDES = []
    # Boxes of the global and local losses: "positives" (the student's sampled RoIs, or the anchors
    # that it matched) or "gt"; and how many an image at most.
    node.BOXES = "positives"
    node.MAX_BOXES = 128
    # Weight each box by r, how far both detectors agree on its typicality; False: r = 1.
    node.RELIABILITY = True
    # Local losses act on the level of a box's size: the finest up to twice this side in pixels,
    # each further octave on the next.
    node.LEVEL_SIZE = 56.0
    # "linear": global and local losses decay by 1 - iteration / MAX_ITER, "none": they do not.
    node.ATTENUATION = "linear"

    node.GLOBAL = CfgNode()
    # Weight of the global knowledge loss; 0: none. Released config 5, class default 20.
    node.GLOBAL.WEIGHT = 5.0
    # How a box responds to prototypes: "cosine" (released code), or "projection" on those of its
    # class (the paper's wording; experimental) with the ridge mu that keeps it solvable.
    node.GLOBAL.RESPONSES = "cosine"
    node.GLOBAL.RIDGE = 0.05
    # Compare a box on the level of its size only, instead of on all levels.
    node.GLOBAL.ASSIGNED_LEVEL_ONLY = False

    node.LOCAL = CfgNode()
    # k_fg and k_bg, weights of the squared error inside and outside of boxes; 0: none.
    node.LOCAL.FOREGROUND_WEIGHT = 1.0
    node.LOCAL.BACKGROUND_WEIGHT = 4.0
    # Convolution on the student's levels: "always", "auto" (only where channels differ), "never";
    # its kernel, 3 (released code) or 1 (cheaper); its first weights, "default" (released code),
    # "identity" or "small".
    node.LOCAL.ADAPTER = "always"
    node.LOCAL.ADAPTER_KERNEL = 3
    node.LOCAL.ADAPTER_INIT = "default"

    node.SOFT_LABELS = CfgNode()
    # Weight of the soft labels on positives (0: none) and tau, their temperature.
    node.SOFT_LABELS.WEIGHT = 1.0
    node.SOFT_LABELS.TEMPERATURE = 2.0

    node.PROTOTYPES = CfgNode()
    # M, prototypes a class and level.
    node.PROTOTYPES.COUNT = 10
    # Iterations between refreshes; -1: an epoch (released code), 0: made once.
    node.PROTOTYPES.REFRESH_PERIOD = -1
    # A file of tools/prototypes.py to start with, instead of making them at START_ITER.
    node.PROTOTYPES.FILE = ""
    # Training objects wider and higher than this many pixels of the original image are candidates,
    # of a random choice of this many images a class.
    node.PROTOTYPES.MIN_BOX_SIZE = 30.0
    node.PROTOTYPES.MAX_IMAGES = 800
    # alpha, coupling of the teacher's and the student's coefficients in the matching pursuit.
    node.PROTOTYPES.ALPHA = 10.0
    # Density filter: width of the kernel, and the quantile of densities that must be exceeded.
    node.PROTOTYPES.BANDWIDTH = 0.1
    node.PROTOTYPES.QUANTILE = 0.4
    # Images that a process runs at once to read their features.
    node.PROTOTYPES.BATCH_SIZE = 4


def _add_mar(distill: CfgNode) -> None:
    """Distilling object detectors with mask-guided feature and relation-based knowledge (IJCSE
    2024). A reconstruction: only the abstract is public, see docs/methods/mar.md."""
    distill.MAR = _head_node()
    # FGFI, whose masks this method generalises, skips the first 400 iterations.
    distill.MAR.SCHEDULE.WARMUP_ITERS = 500
    # Strides of the pyramid levels to distil; []: all that both detectors have.
    distill.MAR.STRIDES = []
    # Convolution on the student's levels: "always", "auto" (only where channels differ), "never".
    distill.MAR.ADAPTER = "always"
    # Its kernel, 1 or 3 (FGFI and DeFeat: 3), and its first weights: "identity" (where channels
    # agree, else PyTorch's default), "default" or "small" (FGFI and DeFeat).
    distill.MAR.ADAPTER_KERNEL = 1
    distill.MAR.ADAPTER_INIT = "identity"

    distill.MAR.MASK = CfgNode()
    # w_m, weight of the mask-guided term; 0 turns it off.
    distill.MAR.MASK.WEIGHT = 3.0
    # What a position is worth: "count", "binary", "iou", "gauss", "zones" or "roi_level", see
    # d2kd/anchor_masks.py.
    distill.MAR.MASK.KIND = "count"
    # psi: an anchor is near an object if its IoU exceeds this share of the level's best IoU.
    distill.MAR.MASK.IOU_RATIO = 0.5
    # kappa: an object takes part in the levels whose best IoU is at least this share of its best.
    distill.MAR.MASK.PARTICIPATION = 0.1
    # Whose anchors: "detector" (the student's own); "pseudo" (three of side 8 strides on each
    # cell); "auto": pseudo for anchor-free students and those with a single anchor a location,
    # which is how Detectron2 represents the points of FCOS.
    distill.MAR.MASK.ANCHORS = "auto"
    # Keep the values at the number of anchors a location, however many objects overlap.
    distill.MAR.MASK.CAP = False
    # eta, weight of the features outside the mask against those inside.
    distill.MAR.MASK.BACKGROUND = 0.0

    distill.MAR.RELATION = CfgNode()
    # Where pixels are related: "class_tower" (dense students); "roi_pixels" (the cells of each
    # positive RoI), "rpn_dense" (the RPN's hidden map), "roi_vectors" (the box head's outputs of an
    # image's RoIs) for two-stage ones. "auto": class_tower or roi_pixels.
    distill.MAR.RELATION.SITE = "auto"
    # w_r, weight of the relation term; 0 turns it off. None: 10 for maps (class_tower, rpn_dense)
    # and 1 for RoIs (roi_pixels, roi_vectors).
    distill.MAR.RELATION.WEIGHT = None
    # Weights of the pixels of a map: "balanced" (half of the mass near objects) or "uniform".
    distill.MAR.RELATION.PIXEL_WEIGHTS = "balanced"

    # After this many iterations a log line says which share of the detection loss each term has,
    # and which weight would bring it into the range that the method asks for. It is advice: nothing
    # is rescaled. 0: no advice.
    distill.MAR.ADVICE_ITER = 1000


# --- reading ------------------------------------------------------------------------------------


def resolve_config_file(name: str, key: str = "--config-file") -> str:
    """Path of a config: a file, or a name in Detectron2's model zoo.

    Raises:
        ConfigError: neither is there; names close matches.
    """
    if not name:
        raise ConfigError(f"{key} is empty: give a YAML file or a model-zoo name")
    if PathManager.isfile(name):
        return name
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        close = difflib.get_close_matches(name, _zoo_names() + _files_beside(name), n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(f"{key}: '{name}' is neither a file nor a model-zoo name{hint}") from None


def _zoo_names() -> list[str]:
    root = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
    return [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith(".yaml") and folder != root
    ]


def _files_beside(path: str) -> list[str]:
    folder = os.path.dirname(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    return [os.path.join(folder, name) for name in names if name.endswith(".yaml")]


def similar_files(path: str) -> str:
    """Files beside ``path`` with a name like it, as a list for a message."""
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.4)
    return ", ".join(os.path.join(folder, name) for name in close)


def load_config(cfg: CfgNode, name: str, key: str = "--config-file") -> None:
    """Merge a YAML file or model-zoo entry into ``cfg``.

    Files that ship with Detectron2 may contain Python expressions; a user's file is read safely.

    Raises:
        ConfigError: the file is missing or broken, or has a key that does not exist.
    """
    path = resolve_config_file(name, key)
    shipped = os.path.dirname(os.path.abspath(model_zoo.__file__))
    trusted = os.path.abspath(path).startswith(shipped + os.sep)
    try:
        cfg.merge_from_file(path, allow_unsafe=trusted)
    except KeyError as error:
        raise ConfigError(f"{path}: {unknown_key(cfg, error)}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def unknown_key(cfg: CfgNode, error: Exception) -> str:
    """One line for yacs' complaint about a key that does not exist, with the closest that do."""
    key = str(error.args[0]).rsplit(":", 1)[-1].strip()
    close = difflib.get_close_matches(key, _all_keys(cfg), n=3, cutoff=0.6)
    return f"no config key '{key}'" + (f"; close: {', '.join(close)}" if close else "")


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys


# --- checking -----------------------------------------------------------------------------------


def validate_meta_arch(key: str, name: str) -> None:
    """Check that ``name``, the value of ``key``, is a registered meta-architecture.

    Raises:
        ConfigError: it is not; names those that are.
    """
    known = sorted(registered for registered, _ in META_ARCH_REGISTRY)
    if name not in known:
        raise ConfigError(f"{key} is '{name}'; valid: {', '.join(known)}")


def validate_solver(cfg: CfgNode) -> None:
    """Check the values of d2kd's own keys under ``SOLVER``, of any training.

    Raises:
        ConfigError: names the key and what is valid.
    """
    rules = {"OPTIMIZER": one_of(("SGD", "AdamW")), "AMP.PRECISION": one_of(("fp16", "bf16"))}
    check_values("SOLVER", cfg.SOLVER, rules)
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("SOLVER.AMP.PRECISION fp16 needs a GPU; bf16 works on the CPU too")


def validate_distillation_config(cfg: CfgNode) -> None:
    """Check what can be checked of ``cfg.DISTILL`` without building a model.

    Raises:
        ConfigError: in one line that names the key and what is valid.
    """
    from .heads import DISTILL_HEAD_REGISTRY, node_name

    if "DISTILL" not in cfg:
        raise ConfigError("the config has no DISTILL: call d2kd.add_distillation_config(cfg) first")
    known = sorted(name for name, _ in DISTILL_HEAD_REGISTRY)
    heads = list(cfg.DISTILL.HEADS)
    for name in heads:
        if name not in known:
            raise ConfigError(f"DISTILL.HEADS: unknown head '{name}'; valid: {', '.join(known)}")
        if heads.count(name) > 1:
            raise ConfigError(f"DISTILL.HEADS names '{name}' twice")
        if node_name(name) not in cfg.DISTILL:
            raise ConfigError(
                f"there is no node DISTILL.{node_name(name)}: the head {name} must be registered "
                "(imported) before add_distillation_config(cfg) is called"
            )
        if not {"WEIGHT", "SCHEDULE"} <= cfg.DISTILL[node_name(name)].keys():
            raise ConfigError(
                f"DISTILL.{node_name(name)} has no WEIGHT or no SCHEDULE: leave the node to "
                "add_distillation_config(cfg), and add the head's own keys in its add_config"
            )
        _validate_schedule(cfg, f"DISTILL.{node_name(name)}", cfg.DISTILL[node_name(name)])
    needs_teacher = bool(heads or cfg.DISTILL.INHERIT)
    if needs_teacher and not cfg.DISTILL.TEACHER.CONFIG_FILE:
        raise ConfigError(
            "DISTILL.TEACHER.CONFIG_FILE is empty: give the teacher's YAML file or model-zoo name"
        )
    if needs_teacher:
        resolve_config_file(cfg.DISTILL.TEACHER.CONFIG_FILE, "DISTILL.TEACHER.CONFIG_FILE")
    check_values("DISTILL.TEACHER", cfg.DISTILL.TEACHER, {"PRECISION": one_of(PRECISIONS)})
    if cfg.DISTILL.TEACHER.PRECISION == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError("DISTILL.TEACHER.PRECISION fp16 needs a GPU; bf16 works on the CPU too")
    validate_meta_arch("DISTILL.STUDENT_META_ARCH", cfg.DISTILL.STUDENT_META_ARCH)
    if cfg.DISTILL.STUDENT_META_ARCH == "Distiller":
        raise ConfigError("DISTILL.STUDENT_META_ARCH names the student, e.g. GeneralizedRCNN")


SCHEDULE_RULES = {
    "WEIGHT": NOT_NEGATIVE,
    "SCHEDULE.START_ITER": NOT_NEGATIVE,
    "SCHEDULE.STOP_ITER": Rule(lambda value: value >= -1, "it must be an iteration, or -1"),
    "SCHEDULE.WARMUP_ITERS": NOT_NEGATIVE,
    "SCHEDULE.DECAY": one_of(DECAYS),
    "SCHEDULE.STEPS": Rule(
        lambda value: all(step >= 0 for step in value), "they must be iterations, 0 or positive"
    ),
    "SCHEDULE.GAMMA": NOT_NEGATIVE,
}


def _validate_schedule(cfg: CfgNode, key: str, node: CfgNode) -> None:
    schedule, max_iter = node.SCHEDULE, cfg.SOLVER.MAX_ITER
    stop = max_iter if schedule.STOP_ITER < 0 else schedule.STOP_ITER
    check_values(key, node, SCHEDULE_RULES)
    if schedule.START_ITER >= stop:
        raise ConfigError(
            f"{key}.SCHEDULE never runs: START_ITER {schedule.START_ITER} is not before "
            f"{'STOP_ITER' if schedule.STOP_ITER >= 0 else 'SOLVER.MAX_ITER'} {stop}"
        )


def student_config(cfg: CfgNode) -> CfgNode:
    """``cfg`` for the plain student, which ``--eval-only`` builds and a checkpoint fits."""
    student = cfg.clone()
    student.defrost()
    if student.MODEL.META_ARCHITECTURE == "Distiller":
        student.MODEL.META_ARCHITECTURE = student.DISTILL.STUDENT_META_ARCH
    student.freeze()
    return student
