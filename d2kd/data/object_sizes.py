"""Objects against the strides and anchors of a detector: those that it can hardly see."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from .model_classes import architecture
from .records import box_of
from .report import Finding

# Below it Detectron2's RPN takes an anchor for background (MODEL.RPN.IOU_THRESHOLDS, default).
_POSITIVE_IOU = 0.5


def sides_in_training(records: list[dict], cfg: CfgNode) -> np.ndarray:
    """(n, 2) width and height of all objects, resized as in training.

    Images are resized so that the shorter side is the median of ``INPUT.MIN_SIZE_TRAIN`` and the
    longer at most ``INPUT.MAX_SIZE_TRAIN``.
    """
    short, most = float(np.median(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN
    sides = [np.zeros((0, 2))]
    for record in records:
        objects = [o for o in record.get("annotations", ()) if not o.get("iscrowd")]
        boxes = [box[2:] for box in map(box_of, objects) if box is not None]
        size = sorted((record["width"], record["height"]))
        scale = min(short / size[0], most / size[1]) if short > 0 else 1.0
        if boxes:
            sides.append(np.array(boxes, float) * scale)
    return np.concatenate(sides)


def strides_of(cfg: CfgNode) -> dict[str, int]:
    """Name -> stride of the levels on which the detector of ``cfg`` looks for objects; {} where it
    is of a kind that is not known here."""
    nodes = {"GeneralizedRCNN": "RPN", "RetinaNet": "RETINANET", "FCOS": "FCOS"}
    if architecture(cfg) not in nodes:
        return {}
    with torch.device("meta"):  # shapes only
        shapes = build_backbone(cfg).output_shape()
    levels = cfg.MODEL[nodes[architecture(cfg)]].IN_FEATURES
    return {name: shapes[name].stride for name in levels}


def anchor_shapes(cfg: CfgNode) -> np.ndarray:
    """(A, 2) width and height of all anchors; (0, 2) for a detector without."""
    if architecture(cfg) == "FCOS" or cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator":
        return np.zeros((0, 2))
    node = cfg.MODEL.ANCHOR_GENERATOR
    sizes = np.unique(np.concatenate([np.atleast_1d(s) for s in node.SIZES]).astype(float))
    ratios = np.unique(np.concatenate([np.atleast_1d(r) for r in node.ASPECT_RATIOS]))
    width = sizes[:, None] / np.sqrt(ratios)
    return np.stack([width, width * ratios], axis=-1).reshape(-1, 2)


def best_iou(sides: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n,) largest IoU of each of (n, 2) objects with one of (A, 2) anchors at the same centre."""
    best = np.zeros(len(sides))
    area = sides.prod(axis=1)
    for anchor in anchors:  # a few; all pairs at once may not fit into memory
        common = np.minimum(sides, anchor).prod(axis=1)
        union = np.maximum(area + anchor.prod() - common, 1e-9)
        best = np.maximum(best, common / union)
    return best


def check_sizes(
    sides: np.ndarray, strides: dict[str, int], anchors: np.ndarray
) -> Iterator[Finding]:
    """What is said about the objects of a training set, from the three functions above."""
    if not len(sides):
        return
    root = np.sqrt(np.maximum(sides, 0).prod(axis=1))
    tenth, half, most = np.quantile(root, (0.1, 0.5, 0.9))
    yield Finding(
        f"objects in training: 10 %, 50 % and 90 % of their sizes (root of the area) are "
        f"{tenth:.0f}, {half:.0f} and {most:.0f} px"
    )
    larger = "larger images (INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN)"
    if strides:
        name, stride = min(strides.items(), key=lambda item: item[1])
        small = int((root < stride).sum())
        if small:
            yield Finding(
                f"{small:,} of {len(root):,} objects are smaller than a cell of the finest level, "
                f"{name} with stride {stride}",
                f"{larger}, or a finer level",
            )
    if len(anchors):
        far = int((best_iou(sides, anchors) < _POSITIVE_IOU).sum())
        if far:
            yield Finding(
                f"{far:,} of {len(root):,} objects have no anchor of IoU {_POSITIVE_IOU} at their "
                "centre",
                "fit MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS to your objects, or " + larger,
            )
