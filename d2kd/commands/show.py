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

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from ..arguments import CommandParser, file_to_write, natural, positive
from ..config import student_config
from ..data.custom import check_datasets
from ..data.loader import NamingMapper
from ..detectors.building import building
from ..detectors.bundle import Batch
from ..detectors.spec import describe_detector
from ..detectors.taps import Taps
from ..engine.setup import add_import_argument, read_config
from ..errors import ConfigError
from ..geometry.anchor_masks import MASK_KINDS
from ..heads.mar import MAR
from .sketches import Row, build_distiller, draw_image, draw_rows, sketch_image

COLUMNS = 4  # images side by side where there are no masks


def read_images(cfg: CfgNode, indices: Sequence[int]) -> list[dict]:
    """Images of ``DATASETS.TRAIN`` as the student gets them."""
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name a dataset to show images of")
    cfg.defrost()  # RLE masks set INPUT.MASK_FORMAT
    check_datasets(cfg)
    cfg.freeze()
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    if max(indices) >= len(records):
        raise ConfigError(
            f"--images {max(indices)}: DATASETS.TRAIN has images 0 to {len(records) - 1}"
        )
    mapper = NamingMapper(DatasetMapper(cfg, is_train=True))
    return [mapper(records[index]) for index in indices]


def mask_rows(cfg: CfgNode, items: list[dict], kinds: Sequence[str]) -> list[tuple[dict, Row]]:
    """A row per image and kind of mask, with a map per level."""
    torch.manual_seed(0)
    with building("the student"):
        student = build_model(student_config(cfg)).train()
    spec = describe_detector(student, "student")
    head, taps = MAR(cfg, spec, spec), Taps(student, spec)
    rows = []
    for item in items:
        with taps, torch.no_grad(), EventStorage():
            student([item])
        batch = Batch.from_inputs([item], student.device)
        bundle = taps.bundle(batch)
        height, width = item["image"].shape[1:]
        for kind in kinds:
            levels = head.build_masks(bundle, batch.gt_boxes, kind)
            cells = {f"stride {s}: largest {m.max():.3g}": (s, m[0]) for s, m in levels.items()}
            rows.append((item, Row(f"{kind} on {width} x {height}", cells)))
    return rows


def draw_images(items: list[dict], input_format: str) -> plt.Figure:
    """The images with their boxes, ``COLUMNS`` to a row."""
    columns = min(len(items), COLUMNS)
    rows = -(-len(items) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        height, width = item["image"].shape[1:]
        draw_image(axis, item, input_format, f"{width} x {height}")
    figure.tight_layout(pad=0.5)
    return figure


def show_heads(cfg: CfgNode, items: list[dict], heads: Sequence[str], args) -> None:
    """Draw and print what the heads distil, a file per image."""
    heads = list(heads) or list(cfg.DISTILL.HEADS)
    distiller = build_distiller(cfg, heads)
    for index, item in zip(args.images, items, strict=True):
        rows = sketch_image(distiller, item, heads)
        for row in rows:
            print(f"image {index}: {row.title}: {', '.join(row.cells)}".rstrip(": "))
        path = args.output
        if len(items) > 1:
            path = path.with_stem(f"{path.stem}_{index}")
        save(draw_rows([(item, row) for row in rows], cfg.INPUT.FORMAT), path, args.dpi)


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
    parser.set_defaults(resume=False, num_gpus=1, num_machines=1)  # a training's, for read_config
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the arguments say."""
    args = build_parser().parse_command(argv)
    # Without --heads neither the teacher's files nor weights need be there.
    args.eval_only = args.heads is None
    args.opts = [*args.opts, *(["MODEL.WEIGHTS", ""] if args.heads is None else [])]
    cfg = read_config(args)
    items = read_images(cfg, args.images)
    if args.heads is not None:
        show_heads(cfg, items, args.heads, args)
        return
    kinds = args.kinds or ([cfg.DISTILL.MAR.MASK.KIND] if "MAR" in cfg.DISTILL.HEADS else [])
    if kinds:
        figure = draw_rows(mask_rows(cfg, items, kinds), cfg.INPUT.FORMAT)
    else:
        figure = draw_images(items, cfg.INPUT.FORMAT)
    save(figure, args.output, args.dpi)
