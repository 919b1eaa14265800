#!/usr/bin/env python
"""The pairs that the papers publish, as a table: what the configs say of themselves.

    python tools/published.py  # prints the table of docs/published.md

A config of a published pair starts with lines of this form, whose facts stand nowhere else:

    # Published: METHOD (VENUE), WHERE: ROW
    # Box AP: STUDENT ALONE -> DISTILLED

with further lines for Mask AP or APs, and "-" for a number that is not known. Student, teacher and
schedule are read from the config itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from runs import ROOT
from tabulate import tabulate

from d2kd.detectors.weights import RANDOM_WEIGHTS, teacher_config
from d2kd.engine.setup import merged_config

CONFIGS = ROOT / "configs"
PUBLISHED = re.compile(r"# Published: (?P<method>[^:]+), (?P<where>[^,:]+): (?P<row>.+)")
SCORE = re.compile(r"# ((?:Box|Mask) AP\w?): (\S+) -> (\S+)")


@dataclass(frozen=True)
class Published:
    """One row of a paper's results and the config that is to reach it.

    Attributes:
        config: its path from the repository's root.
        method, where, row: of the header's first line.
        scores: metric -> (student alone, distilled), as printed; "-" where not known.
    """

    config: str
    method: str
    where: str
    row: str
    scores: dict[str, tuple[str, str]]


def read_header(path: Path) -> Published | None:
    """The published row that the file names, or None.

    Raises:
        ValueError: it names one, but not in the form above.
    """
    first, *lines = path.read_text().splitlines()
    if not first.startswith("# Published"):
        return None
    head, scores = PUBLISHED.fullmatch(first), {}
    for line in lines:
        score = SCORE.fullmatch(line)
        if not score:
            break
        scores[score[1]] = score[2], score[3]
    if not head or not scores:
        raise ValueError(f"{path}: see tools/published.py for the form of its first lines")
    return Published(str(path.relative_to(ROOT)), **head.groupdict(), scores=scores)


def published(folder: Path = CONFIGS) -> list[Published]:
    """All published pairs, by method and file."""
    rows = [row for path in sorted(folder.rglob("*.yaml")) if (row := read_header(path))]
    return sorted(rows, key=lambda row: row.method)


# --- what a config is about ---------------------------------------------------------------------


def read(config: str) -> CfgNode:
    return merged_config(str(ROOT / config), [])


def read_teacher(cfg: CfgNode) -> CfgNode:
    """The config of a Distiller's teacher, whose weights need not be there."""
    teacher = cfg.DISTILL.TEACHER
    teacher.WEIGHTS = RANDOM_WEIGHTS
    if (ROOT / teacher.CONFIG_FILE).is_file():
        teacher.CONFIG_FILE = str(ROOT / teacher.CONFIG_FILE)
    return teacher_config(cfg)


def describe_detector(cfg: CfgNode) -> str:
    """E.g. "Cascade Mask R-CNN X101-32x8d"."""
    model = cfg.MODEL
    name = model.META_ARCHITECTURE
    if name == "Distiller":
        name = cfg.DISTILL.STUDENT_META_ARCH
    if name == "GeneralizedRCNN":
        cascade = "Cascade " if model.ROI_HEADS.NAME == "CascadeROIHeads" else ""
        kind = "Mask " if model.MASK_ON else "" if cascade else "Faster "
        name = f"{cascade}{kind}R-CNN"
    return f"{name} {describe_backbone(model)}"


def describe_backbone(model: CfgNode) -> str:
    """E.g. "R50"; timm's name for a model of timm."""
    if "timm" in model.BACKBONE.NAME:
        return model.TIMM.NAME
    resnet = model.RESNETS
    if resnet.NUM_GROUPS == 1:
        return f"R{resnet.DEPTH}"
    return f"X{resnet.DEPTH}-{resnet.NUM_GROUPS}x{resnet.WIDTH_PER_GROUP}d"


def describe_schedule(cfg: CfgNode) -> str:
    """E.g. "1x", which is 90,000 batches of 16 images, else the number of iterations."""
    times, rest = divmod(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH, 90000 * 16)
    return f"{cfg.SOLVER.MAX_ITER:,} iterations" if rest else f"{times}x"


def markdown(folder: Path = CONFIGS) -> str:
    """The table of docs/published.md, whose links start in docs/."""
    lines = []
    for row in published(folder):
        cfg = read(row.config)
        pair = f"{describe_detector(cfg)} <- {describe_detector(read_teacher(cfg))}"
        source = f"{row.where}: {row.row}"
        config = f"[{Path(row.config).stem}](../{row.config})"
        for metric, (alone, distilled) in row.scores.items():
            lines.append(
                [row.method, pair, describe_schedule(cfg), source, metric, alone, distilled, config]
            )
    headers = ["method", "student <- teacher", "schedule", "published as", "metric"]
    headers += ["student alone", "distilled", "config"]
    return tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    print(markdown())
