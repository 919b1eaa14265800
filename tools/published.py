#!/usr/bin/env python
"""The pairs that the papers publish, as a table: what the configs say of themselves.

    python tools/published.py  # prints the table of docs/published.md

A config of published pairs starts with lines of this form, whose facts stand nowhere else:

    # Published: METHOD (VENUE), WHERE: ROW
    # With: KEY VALUE ...
    # Box AP: STUDENT ALONE -> DISTILLED
    # Differs: what else is not as in the authors' training

"Published" comes once for each row that the config trains, "With" where a row needs overrides, with
further lines for Mask AP or APs, and "-" for a number that is not known. "Differs" holds for all
rows; further lines of it are indented by two spaces. Student, teacher and schedule are read from
the config, and its solver is compared with the authors' (``AUTHORS``).
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from tabulate import tabulate

from d2kd.detectors.source import teacher_config
from d2kd.detectors.weights import RANDOM_WEIGHTS
from d2kd.engine.setup import merged_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PUBLISHED = re.compile(r"# Published: (?P<method>[^:]+), (?P<where>[^,:]+): (?P<row>.+)")
OVERRIDES = re.compile(r"# With: (.+)")
SCORE = re.compile(r"# ((?:Box|Mask) AP\w?): (\S+) -> (\S+)")
DIFFERS = re.compile(r"# Differs: (.+)")
CONTINUED = re.compile(r"#   (.+)")

# The authors' training by method, as their released configs have it: DSIG's in Detectron2, those of
# DRKD and Global Knowledge in MMDetection 2. SSIM and MAR released none: here they have
# MMDetection's defaults, whose AP their baselines have. A learning rate holds for box heads; that
# of one-stage detectors is half of it in all of them. Steps are shares of the training.
_MMDETECTION = {
    "images": 16,
    "learning rate": 0.02,
    "steps": (0.67, 0.92),
    "warm-up": 500,
    "gradient clipping": None,
    "weight decay": 0.0001,
    "weight decay of norms": 0.0001,
    "short side": (800,),
    "long side": 1333,
    "frozen stages": 2,
}
AUTHORS = {
    "DSIG (ICCV 2021)": {
        **_MMDETECTION,
        "images": 8,
        "learning rate": 0.01,
        "steps": (0.67, 0.89),
        "warm-up": 1000,
        "weight decay of norms": 0.0,
        "short side": (640, 672, 704, 736, 768, 800),
    },
    "DRKD (IJCAI 2023)": _MMDETECTION,
    "Global Knowledge (ECCV 2022)": _MMDETECTION,
    "SSIM (NeurIPS 2022)": _MMDETECTION,
    "MAR (IJCSE 2024)": _MMDETECTION,
}


@dataclass(frozen=True)
class Published:
    """One row of a paper's results and the config that is to reach it.

    Attributes:
        config: its path from the repository's root.
        method, where, row: of the row's first line.
        overrides: KEY VALUE pairs that make the row of the config.
        scores: metric -> (baseline, distilled), as printed; "-" where not known.
        differs: what else is not as in the authors' training, "" where nothing is.
    """

    config: str
    method: str
    where: str
    row: str
    overrides: tuple[str, ...]
    scores: dict[str, tuple[str, str]]
    differs: str

    @property
    def name(self) -> str:
        """The config and its overrides, to tell rows apart."""
        return " ".join([self.config, *self.overrides])


def read_header(path: Path) -> list[Published]:
    """The published rows that the file names, in its order; none for other configs.

    Raises:
        ValueError: it names one, but not in the form above.
    """
    lines = path.read_text().splitlines()
    if not lines or not lines[0].startswith("# Published"):
        return []
    complaint = ValueError(f"{path}: see tools/published.py for the form of its first lines")
    rows, differs = [], []
    for line in lines:
        if line.startswith("# Published"):
            found = PUBLISHED.fullmatch(line)
            if not found:
                raise complaint
            rows.append({**found.groupdict(), "overrides": (), "scores": {}})
        elif found := OVERRIDES.fullmatch(line):
            rows[-1]["overrides"] = tuple(shlex.split(found[1]))
        elif found := SCORE.fullmatch(line):
            rows[-1]["scores"][found[1]] = found[2], found[3]
        elif found := (CONTINUED if differs else DIFFERS).fullmatch(line):
            differs.append(found[1])
        else:
            break
    if not all(row["scores"] for row in rows):
        raise complaint
    config = str(path.relative_to(ROOT))
    return [Published(config, differs=" ".join(differs), **row) for row in rows]


def published(folder: Path = CONFIGS) -> list[Published]:
    """All published pairs, by method and file."""
    rows = [row for path in sorted(folder.rglob("*.yaml")) for row in read_header(path)]
    return sorted(rows, key=lambda row: row.method)


# --- what a config is about ---------------------------------------------------------------------


def read(row: Published) -> CfgNode:
    return merged_config(str(ROOT / row.config), list(row.overrides))


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


# --- and in what it is not the authors' ---------------------------------------------------------


def training_of(cfg: CfgNode) -> dict:
    """The settings of a config's training that ``AUTHORS`` names."""
    solver = cfg.SOLVER
    clip = solver.CLIP_GRADIENTS
    return {
        "images": solver.IMS_PER_BATCH,
        "learning rate": solver.BASE_LR,
        "steps": tuple(round(step / solver.MAX_ITER, 2) for step in solver.STEPS),
        "warm-up": solver.WARMUP_ITERS,
        "gradient clipping": clip.CLIP_VALUE if clip.ENABLED else None,
        "weight decay": solver.WEIGHT_DECAY,
        "weight decay of norms": solver.WEIGHT_DECAY_NORM,
        "short side": tuple(cfg.INPUT.MIN_SIZE_TRAIN),
        "long side": cfg.INPUT.MAX_SIZE_TRAIN,
        "frozen stages": cfg.MODEL.BACKBONE.FREEZE_AT,
    }


def authors_training(method: str, cfg: CfgNode) -> dict:
    """The authors' settings for a student like that of ``cfg``.

    DSIG's authors freeze the first two stages of a ResNet and nothing of other networks.
    """
    theirs = dict(AUTHORS[method])
    if cfg.DISTILL.STUDENT_META_ARCH != "GeneralizedRCNN":
        theirs["learning rate"] /= 2
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        theirs["frozen stages"] = 0
    return theirs


def differences(method: str, cfg: CfgNode) -> dict[str, str]:
    """Settings in which ``cfg`` trains otherwise than the authors: "warm-up" -> "1000 (500)"."""
    ours, theirs = training_of(cfg), authors_training(method, cfg)
    return {
        name: f"{value} ({theirs[name]})" for name, value in ours.items() if value != theirs[name]
    }


def markdown(folder: Path = CONFIGS) -> str:
    """The table of docs/published.md and its notes, with links that start in docs/."""
    lines, notes = [], []
    for row in published(folder):
        cfg = read(row)
        pair = f"{describe_detector(cfg)} <- {describe_detector(read_teacher(cfg.clone()))}"
        config = f"[{Path(row.config).stem}](../{row.config})"
        if row.overrides:
            config += f" `{shlex.join(row.overrides)}`"
        differs = [" ".join(item) for item in differences(row.method, cfg).items()]
        if row.differs:
            if row.differs not in notes:
                notes.append(row.differs)
            differs.append(f"note {notes.index(row.differs) + 1}")
        line = [row.method, pair, describe_schedule(cfg), f"{row.where}: {row.row}"]
        for metric, scores in row.scores.items():
            lines.append([*line, metric, *scores, config, ", ".join(differs) or "nothing known"])
    headers = ["method", "student <- teacher", "schedule", "published as", "metric"]
    headers += ["baseline", "distilled", "config", "differs from the authors in"]
    table = tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)
    listed = [_wrap(f"{n}. {note[0].upper()}{note[1:]}") for n, note in enumerate(notes, start=1)]
    return "\n".join([table, "", *listed])


def _wrap(item: str) -> str:
    """An item of a numbered list, in lines of a page."""
    return textwrap.fill(
        item, 100, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    print(markdown())
