#!/usr/bin/env python
"""Draw the multi-value masks of MAR (reconstruction) on training images, one column a level.

    python tools/show_masks.py --config-file configs/digits/faster_rcnn_R18_mar.yaml
    python tools/show_masks.py --config-file ... --image 7 --kinds count iou zones --output m.png

The masks come from the head itself, on one untrained forward of the student; no teacher is built.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from matplotlib.patches import Rectangle
from torch import Tensor

from d2kd import Batch, ConfigError
from d2kd.config import student_config
from d2kd.detectors.spec import describe_detector
from d2kd.detectors.taps import Taps
from d2kd.engine.setup import read_config
from d2kd.geometry.anchor_masks import MASK_KINDS
from d2kd.heads.mar import MAR


def read_image(cfg: CfgNode, index: int) -> dict:
    """The training image ``index`` of ``cfg``, as the student gets it."""
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    return DatasetMapper(cfg, is_train=True)(records[index])


def masks_by_kind(cfg: CfgNode, item: dict, kinds: list[str]) -> dict[str, dict[int, Tensor]]:
    """Kind -> stride -> (H, W), of one image."""
    torch.manual_seed(0)
    student = build_model(student_config(cfg)).train()
    spec = describe_detector(student, "student")
    head, taps = MAR(cfg, spec, spec), Taps(student, spec)
    with taps, torch.no_grad(), EventStorage():
        student([item])
    batch = Batch.from_inputs([item], student.device)
    bundle = taps.bundle(batch)
    masks = {}
    for kind in kinds:
        levels = head.build_masks(bundle, batch.gt_boxes, kind)
        masks[kind] = {stride: mask[0].cpu() for stride, mask in levels.items()}
    return masks


def draw(item: dict, masks: dict[str, dict[int, Tensor]], input_format: str) -> plt.Figure:
    """The image with its boxes, then a row a kind and a column a level."""
    image = item["image"].permute(1, 2, 0).numpy()
    image = image[..., ::-1] if input_format == "BGR" else image
    boxes = item["instances"].gt_boxes.tensor.tolist()
    strides = list(next(iter(masks.values())))
    size = (2.2 * (len(strides) + 1), 2.5 * len(masks))
    figure, axes = plt.subplots(len(masks), len(strides) + 1, figsize=size, squeeze=False)
    for row, (kind, levels) in zip(axes, masks.items(), strict=True):
        _show(row[0], image, boxes, f"{kind} on {image.shape[1]} x {image.shape[0]}")
        for axis, (stride, mask) in zip(row[1:], levels.items(), strict=True):
            _show(axis, image, boxes, f"stride {stride}: largest {mask.max():.3g}", grey=True)
            _overlay(axis, mask, stride)
    figure.tight_layout(pad=0.5)
    return figure


def _show(axis, image: np.ndarray, boxes: list, title: str, grey: bool = False) -> None:
    if grey:  # a faint image, so that the mask's colours carry the meaning
        image = np.repeat(image.mean(axis=2, keepdims=True) * 0.5 + 127, 3, axis=2).astype(np.uint8)
    axis.imshow(image)
    for x1, y1, x2, y2 in boxes:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=0.7, ec="#0050ff"))
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def _overlay(axis, mask: Tensor, stride: int) -> None:
    """Lay ``mask`` over the image, a square a cell, transparent where it is zero."""
    height, width = mask.shape
    limits = axis.axis()
    values = np.ma.masked_equal(mask.numpy(), 0)
    extent = (-0.5, width * stride - 0.5, height * stride - 0.5, -0.5)
    top = max(float(mask.max()), 1e-6)
    axis.imshow(values, extent=extent, cmap="YlOrRd", vmin=0, vmax=top, alpha=0.75)
    axis.axis(limits)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--image", type=int, default=0, help="index in DATASETS.TRAIN")
    parser.add_argument("--kinds", nargs="+", choices=MASK_KINDS, help="default: the config's")
    parser.add_argument("--output", type=Path, default=Path("output/masks.png"))
    parser.add_argument("--dpi", type=int, default=100)
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE overrides")
    args = parser.parse_args(argv)
    args.eval_only = True  # the teacher's files need not exist
    try:
        defaults = vars(default_argument_parser().parse_args([]))
        # Nothing is trained or loaded here: the config's weights need not be there.
        opts = [*args.opts, "MODEL.WEIGHTS", ""]
        cfg = read_config(argparse.Namespace(**{**defaults, **vars(args), "opts": opts}))
        item = read_image(cfg, args.image)
    except (ConfigError, IndexError) as error:
        sys.exit(f"show_masks: {error}")
    masks = masks_by_kind(cfg, item, args.kinds or [cfg.DISTILL.MAR.MASK.KIND])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(item, masks, cfg.INPUT.FORMAT).savefig(args.output, dpi=args.dpi)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
