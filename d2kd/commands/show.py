"""Draw training images as the student gets them, and what heads distil of them.

    d2kd show --config-file digits/retinanet_R18_ssim.yaml --images 0 1 2
    d2kd show --config-file digits/retinanet_R18_mar.yaml --kinds count iou zones --output m.png
    d2kd show --config-file digits/retinanet_R18_ssim.yaml --heads MODEL.WEIGHTS model_final.pth

Each image has the boxes of its objects. With MAR among DISTILL.HEADS, or with --kinds, there is a
row per image and kind of mask and a column per pyramid level: the masks come from the head itself,
on one untrained forward of the student. No teacher is built and no weights are read.

With --heads, of all heads of the config or of those that are named, there are, a column per level:
how far the pyramids are apart; where each head's loss pulls at the student's pyramid (the length of
its gradient); and masks, graphs and resemblance to prototypes, of heads that have some. That takes
the teacher with its weights, and the student with MODEL.WEIGHTS.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
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

from ..arguments import CommandParser, file_to_write, natural, positive
from ..config import student_config
from ..data.custom import check_datasets
from ..detectors.building import building
from ..detectors.bundle import Batch
from ..detectors.spec import describe_detector
from ..detectors.taps import Taps
from ..engine.setup import add_import_argument, read_config
from ..errors import ConfigError
from ..geometry.anchor_masks import MASK_KINDS
from ..heads.mar import MAR
from .sketches import build_distiller, draw_rows, sketch_image

COLUMNS = 4  # images side by side where there are no masks


def read_images(cfg: CfgNode, indices: Sequence[int]) -> list[dict]:
    """Images of ``DATASETS.TRAIN`` as the student gets them.

    Raises:
        ConfigError: a dataset is not there, or there are fewer images.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name a dataset to show images of")
    check_datasets(cfg)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    if max(indices) >= len(records):
        raise ConfigError(
            f"--images {max(indices)}: DATASETS.TRAIN has images 0 to {len(records) - 1}"
        )
    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(records[index]) for index in indices]


def masks_by_kind(
    cfg: CfgNode, items: list[dict], kinds: list[str]
) -> list[dict[str, dict[int, Tensor]]]:
    """Of each image kind -> stride -> (H, W)."""
    torch.manual_seed(0)
    with building("the student"):
        student = build_model(student_config(cfg)).train()
    spec = describe_detector(student, "student")
    head, taps = MAR(cfg, spec, spec), Taps(student, spec)
    masks = []
    for item in items:
        with taps, torch.no_grad(), EventStorage():
            student([item])
        batch = Batch.from_inputs([item], student.device)
        bundle, found = taps.bundle(batch), {}
        for kind in kinds:
            levels = head.build_masks(bundle, batch.gt_boxes, kind)
            found[kind] = {stride: mask[0].cpu() for stride, mask in levels.items()}
        masks.append(found)
    return masks


def draw_images(items: list[dict], input_format: str) -> plt.Figure:
    """The images with their boxes, ``COLUMNS`` to a row."""
    columns = min(len(items), COLUMNS)
    rows = -(-len(items) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(items) :]:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        image = _rgb(item, input_format)
        _show(axis, image, _boxes(item), f"{image.shape[1]} x {image.shape[0]}")
    figure.tight_layout(pad=0.5)
    return figure


def draw_masks(
    items: list[dict], masks: list[dict[str, dict[int, Tensor]]], input_format: str
) -> plt.Figure:
    """A row per image and kind: the image with its boxes, then a column per level."""
    rows = [
        (item, kind, levels)
        for item, found in zip(items, masks, strict=True)
        for kind, levels in found.items()
    ]
    columns = 1 + max(len(levels) for _, _, levels in rows)
    size = (2.2 * columns, 2.5 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for row, (item, kind, levels) in zip(axes, rows, strict=True):
        image, boxes = _rgb(item, input_format), _boxes(item)
        _show(row[0], image, boxes, f"{kind} on {image.shape[1]} x {image.shape[0]}")
        for axis, (stride, mask) in zip(row[1:], levels.items(), strict=True):
            _show(axis, image, boxes, f"stride {stride}: largest {mask.max():.3g}", grey=True)
            _overlay(axis, mask, stride)
    figure.tight_layout(pad=0.5)
    return figure


def _rgb(item: dict, input_format: str) -> np.ndarray:
    image = item["image"].permute(1, 2, 0).numpy()
    return image[..., ::-1] if input_format == "BGR" else image


def _boxes(item: dict) -> list[list[float]]:
    return item["instances"].gt_boxes.tensor.tolist()


def _show(axis, image: np.ndarray, boxes: list, title: str, grey: bool = False) -> None:
    if grey:  # a faint image, so that the mask's colours carry the meaning
        image = np.repeat(image.mean(axis=2, keepdims=True) * 0.5 + 127, 3, axis=2).astype(np.uint8)
    axis.imshow(image)
    for x1, y1, x2, y2 in boxes:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=0.7, ec="#0050ff"))
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def _overlay(axis, mask: Tensor, stride: int) -> None:
    """Lay ``mask`` over the image, a square per cell, transparent where it is zero."""
    height, width = mask.shape
    limits = axis.axis()
    values = np.ma.masked_equal(mask.numpy(), 0)
    extent = (-0.5, width * stride - 0.5, height * stride - 0.5, -0.5)
    top = max(float(mask.max()), 1e-6)
    axis.imshow(values, extent=extent, cmap="YlOrRd", vmin=0, vmax=top, alpha=0.75)
    axis.axis(limits)


def show_heads(cfg: CfgNode, items: list[dict], heads: Sequence[str], args) -> None:
    """Draw and print what the heads distil, a file per image."""
    heads = list(heads) or list(cfg.DISTILL.HEADS)
    distiller = build_distiller(cfg, heads)
    for index, item in zip(args.images, items, strict=True):
        rows = sketch_image(distiller, item, heads)
        for row in rows:
            print(f"image {index}: {row.title}: {', '.join(row.cells)}".rstrip(": "))
        image, boxes = _rgb(item, cfg.INPUT.FORMAT), _boxes(item)
        draw_image = functools.partial(_show, image=image, boxes=boxes, grey=True)
        figure = draw_rows(rows, draw_image, _overlay)
        path = args.output
        if len(items) > 1:
            path = path.with_stem(f"{path.stem}_{index}")
        save(figure, path, args.dpi)


def save(figure: plt.Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"wrote {path}")


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--images",
        "--image",
        type=natural,
        nargs="+",
        default=[0],
        help="indices in DATASETS.TRAIN",
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=MASK_KINDS, help="kinds of masks; default: the config's"
    )
    parser.add_argument(
        "--heads", nargs="*", metavar="HEAD", help="draw what these heads distil; default: all"
    )
    endings = (".png", ".jpg", ".pdf", ".svg")
    parser.add_argument("--output", type=file_to_write(*endings), default="output/show.png")
    parser.add_argument("--dpi", type=positive, default=100)
    add_import_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the arguments say.

    Raises:
        ConfigError: in one line, before anything is written.
    """
    args = build_parser().parse_command(argv)
    # Without --heads neither the teacher's files nor weights need be there.
    args.eval_only = args.heads is None
    args.opts = [*args.opts, *(["MODEL.WEIGHTS", ""] if args.heads is None else [])]
    defaults = vars(default_argument_parser().parse_args([]))
    cfg = read_config(argparse.Namespace(**{**defaults, **vars(args)}))
    items = read_images(cfg, args.images)
    if args.heads is not None:
        show_heads(cfg, items, args.heads, args)
        return
    kinds = args.kinds or ([cfg.DISTILL.MAR.MASK.KIND] if "MAR" in cfg.DISTILL.HEADS else [])
    if kinds:
        figure = draw_masks(items, masks_by_kind(cfg, items, kinds), cfg.INPUT.FORMAT)
    else:
        figure = draw_images(items, cfg.INPUT.FORMAT)
    save(figure, args.output, args.dpi)
