"""Small detectors, batches and configs that the tests share."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY, add_distillation_config
from d2kd.registry import node_name

ARCHS = ("faster", "cascade", "mask", "retinanet", "fcos")
DENSE = ("retinanet", "fcos")
# Heads for pairs of dense detectors alone.
DENSE_HEADS = ("CrossKD",)


def detector_config(
    arch: str = "faster", *, width: int = 16, depth: int = 18, num_classes: int = 3
) -> CfgNode:
    """Config of a detector small enough for many tests a second.

    Args:
        arch: one of ``ARCHS`` or "cascade_mask".
        width: channels of the pyramid. depth: of the ResNet.
    """
    cfg = get_cfg()
    add_distillation_config(cfg)
    # Heads that other tests registered: a process that reads the dumped config may not know them.
    for name, head in DISTILL_HEAD_REGISTRY:
        if not head.__module__.startswith(("d2kd.", "tests.toy_head")):
            del cfg.DISTILL[node_name(name)]
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = width
    cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.MODEL.FCOS.NUM_CLASSES = num_classes
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    if arch in DENSE:
        cfg.MODEL.META_ARCHITECTURE = {"retinanet": "RetinaNet", "fcos": "FCOS"}[arch]
        cfg.MODEL.BACKBONE.NAME = f"build_{arch}_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
            [x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (16, 32, 64, 128, 256)
        ]
        cfg.MODEL.RETINANET.NUM_CONVS = cfg.MODEL.FCOS.NUM_CONVS = 2
        cfg.MODEL.FCOS.NORM = ""
        return cfg
    is_cascade = arch.startswith("cascade")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 200
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads" if is_cascade else "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = is_cascade
    if "mask" in arch:
        cfg.MODEL.MASK_ON = True
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
        cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
        cfg.INPUT.MASK_FORMAT = "bitmask"
    return cfg


def distiller_config(
    student: CfgNode, heads: list[str], teacher_file: str, opts: tuple = ()
) -> CfgNode:
    """``student`` in distillation from the (randomly initialised) config ``teacher_file``."""
    cfg = student.clone()
    cfg.DISTILL.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.DISTILL.HEADS = list(heads)
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(teacher_file)
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    cfg.merge_from_list(list(opts))
    return cfg


def write_config(cfg: CfgNode, path) -> str:
    """Write ``cfg`` as a YAML file; returns its name."""
    path.write_text(cfg.dump())
    return str(path)


def make_batch(
    objects: tuple[int, ...] = (2, 3),
    *,
    size: tuple[int, int] = (64, 64),
    num_classes: int = 3,
    seed: int = 0,
) -> list[dict]:
    """``batched_inputs`` with ``objects[i]`` random objects, with masks, in image i."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    batch = []
    for count in objects:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        extent = (0.15 + 0.25 * torch.rand(count, 2, generator=generator)) * min(size)
        boxes = torch.cat([corner, corner + extent], dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for mask, box in zip(masks, boxes.long(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (count,), generator=generator)
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def build(cfg: CfgNode, seed: int = 0) -> torch.nn.Module:
    """The model of ``cfg`` in training mode, from ``seed``."""
    torch.manual_seed(seed)
    return build_model(cfg).train()


def run_step(model: torch.nn.Module, batch: list[dict], iteration: int = 0, seed: int = 0) -> dict:
    """One training forward; the sampling of proposals is drawn from ``seed``."""
    torch.manual_seed(seed)
    with EventStorage(iteration):
        return model(batch)
