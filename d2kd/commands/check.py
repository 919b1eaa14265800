"""Check the datasets of a config: annotation files, images, and a sheet of samples.

    d2kd check --config-file my_config.yaml
    d2kd check --config-file my_config.yaml --sheet samples.png DATASETS.TEST "('parts_val',)"

Says all that training would say of the annotation files, opens all images (truncated files, sizes,
16 bits, EXIF orientation), finds images that stand in training and test sets, tells how many
objects are too small for the model, and draws samples with their annotations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..arguments import CommandParser, file_to_write, natural
from ..config_rules import check_detectron2_keys
from ..data import check_images
from ..data.catalog import check_present, is_readable
from ..data.check import Use
from ..data.coco import Table, read_json
from ..data.custom import dataset_uses, register_coco_format_datasets
from ..data.examine import examine
from ..data.object_sizes import anchor_shapes, check_sizes, sides_in_training, strides_of
from ..data.report import DatasetReport, error_line, report_lines
from ..data.sheet import SheetRow, draw_sheet
from ..engine.setup import add_import_argument, import_user_module, merged_config
from ..errors import ConfigError


def build_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config to check")
    parser.add_argument(
        "--sheet",
        type=lambda text: text and str(file_to_write(".jpg", ".jpeg", ".png")(text)),
        default="dataset_check.jpg",
        metavar="FILE",
        help="where the samples go; '' draws none (default: %(default)s)",
    )
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument(
        "--threads", type=natural, default=0, help="that open images (default: one a processor)"
    )
    add_import_argument(parser)
    return parser


def check_config(
    cfg: CfgNode, images: bool = True, threads: int = 0
) -> tuple[list[DatasetReport], list[SheetRow]]:
    """Checks all datasets of ``cfg``, and their ``images`` in so many threads (0: one a processor).

    Returns:
        A report for each dataset, and what can be drawn of those that are not refused.

    Raises:
        ConfigError: a dataset is not known, or its files are not there; there is none.
    """
    register_coco_format_datasets(cfg)
    if not (cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty: name a dataset to check")
    check_detectron2_keys(cfg, train=bool(cfg.DATASETS.TRAIN))
    uses = dataset_uses(cfg, train=True)
    for name in uses:
        check_present(name)
    if images:
        uses = {name: replace(use, headers=0) for name, use in uses.items()}
    reports, rows = examine(cfg, uses), []
    if images:
        _open_images(uses, reports, threads)
    for report in reports:
        if report.fatal:
            continue
        records = DatasetCatalog.get(report.name)
        classes = MetadataCatalog.get(report.name).get("thing_classes", ())
        rows.append((report.name, records, list(classes)))
        if uses[report.name].train:
            sides = sides_in_training(records, cfg)
            report.findings += check_sizes(sides, strides_of(cfg), anchor_shapes(cfg))
    return reports, rows


def _open_images(uses: dict[str, Use], reports: list[DatasetReport], threads: int) -> None:
    """Adds to each report what its images show."""
    looked: dict[str, tuple[str, Table, dict[int, check_images.Look]]] = {}
    for report in reports:
        metadata = MetadataCatalog.get(report.name)
        if not is_readable(report.name):
            continue
        try:
            table = Table(read_json(str(metadata.json_file)))
        except ConfigError:  # said already
            continue
        looks = check_images.look_at_all(table, str(metadata.image_root), threads, report.name)
        looked[report.name] = (report.name, table, looks)
        report.findings += check_images.judge(table, looks)
    for report in reports:
        for other, use in uses.items():
            is_pair = uses[report.name].test and use.train and other != report.name
            if is_pair and {other, report.name} <= looked.keys():
                report.findings += check_images.compare(looked[other], looked[report.name])


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the datasets of a config, prints all that was found and draws a sheet; ends in an
    error where training would refuse one."""
    args = build_parser().parse_command(argv)
    for name in args.imports:
        import_user_module(name)
    cfg = merged_config(args.config_file, args.opts)
    reports, rows = check_config(cfg, not args.no_images, args.threads)
    for line in report_lines(reports, limit=None):
        print(line)
    for report in reports:
        if not report.findings:
            print(f"{report.heading()}: nothing to say")
    if args.sheet and rows:
        os.makedirs(os.path.dirname(args.sheet) or ".", exist_ok=True)
        draw_sheet(rows).save(args.sheet)
        print(f"wrote {args.sheet}: look whether boxes and masks fit")
    if any(report.fatal for report in reports):
        raise ConfigError(error_line(reports))
