"""Check the datasets of a config: annotation files, images, and a sheet of samples.

    d2kd check --config-file my_config.yaml
    d2kd check --config-file my_config.yaml --sheet samples.png DATASETS.TEST "('parts_val',)"

Says all that training would say of the annotation files, opens all images (truncated files, sizes,
16 bits, EXIF orientation), finds images that stand in training and test sets, tells how many
objects are too small for the model, and draws samples with their annotations.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

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
from ..data.sheet import draw_sheet
from ..engine.setup import add_import_argument, import_user_module, merged_config
from ..errors import ConfigError

_SHEET = "dataset_check.jpg"


@dataclass
class DatasetCheck:
    """What a full check of the datasets of a config found.

    Attributes:
        reports: one for each dataset.
        rows: (name, records, class names) of those that can be drawn.
    """

    reports: list[DatasetReport] = field(default_factory=list)
    rows: list[tuple[str, list[dict], list[str]]] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether training or evaluation would refuse a dataset."""
        return any(report.fatal for report in self.reports)


def build_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config to check")
    parser.add_argument(
        "--sheet",
        type=lambda text: text and str(file_to_write(".jpg", ".jpeg", ".png")(text)),
        default=_SHEET,
        metavar="FILE",
        help="where the samples go; '' draws none (default: %(default)s)",
    )
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument(
        "--threads", type=natural, default=0, help="that open images (default: one a processor)"
    )
    add_import_argument(parser)
    return parser


def check_config(cfg: CfgNode, images: bool = True, threads: int = 0) -> DatasetCheck:
    """Checks all datasets of ``cfg``.

    Args:
        images: also open the images.
        threads: that open them; 0: one a processor.

    Raises:
        ConfigError: a dataset is not known, or its files are not there.
    """
    register_coco_format_datasets(cfg)
    check_detectron2_keys(cfg, train=True)
    uses = dataset_uses(cfg, train=True)
    for name in uses:
        check_present(name)
    if images:
        uses = {name: replace(use, headers=0) for name, use in uses.items()}
    found = DatasetCheck(examine(cfg, uses))
    if images:
        _open_images(uses, found.reports, threads)
    for report in found.reports:
        if not report.fatal:
            found.rows.append(_row(report.name))
    for name, records, _ in found.rows:
        if uses[name].train:
            report = next(report for report in found.reports if report.name == name)
            sides = sides_in_training(records, cfg)
            report.findings += check_sizes(sides, strides_of(cfg), anchor_shapes(cfg))
    return found


def _row(name: str) -> tuple[str, list[dict], list[str]]:
    records = DatasetCatalog.get(name)
    return name, records, list(MetadataCatalog.get(name).get("thing_classes", ()))


def _open_images(uses: dict[str, Use], reports: Iterable[DatasetReport], threads: int) -> None:
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
        with tqdm(total=len(table.images), desc=report.name, disable=None, leave=False) as bar:
            looks = check_images.look_at_all(
                table, str(metadata.image_root), threads, lambda count, bar=bar: bar.update(1)
            )
        looked[report.name] = (report.name, table, looks)
        report.findings += check_images.judge(table, looks)
    for report in reports:
        if report.name in looked and uses[report.name].test:
            report.findings += _compare_with_trained(report.name, uses, looked)


def _compare_with_trained(name: str, uses: dict[str, Use], looked: dict) -> Iterator:
    for other, use in uses.items():
        if use.train and other != name and other in looked:
            yield from check_images.compare(looked[other], looked[name])


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the datasets of a config, prints all that was found and draws a sheet.

    Raises:
        ConfigError: in one line: a mistake in the arguments, or, after the report, datasets that
            training would refuse.
    """
    args = build_parser().parse_command(argv)
    for name in args.imports:
        import_user_module(name)
    cfg = merged_config(args.config_file, args.opts)
    found = check_config(cfg, not args.no_images, args.threads)
    for line in report_lines(found.reports, limit=None):
        print(line)
    for report in found.reports:
        if not report.findings:
            print(f"{report.heading()}: nothing to say")
    if args.sheet and found.rows:
        os.makedirs(os.path.dirname(args.sheet) or ".", exist_ok=True)
        draw_sheet(found.rows).save(args.sheet)
        print(f"wrote {args.sheet}: look whether boxes and masks fit")
    if found.refused:
        raise ConfigError(error_line(found.reports))
