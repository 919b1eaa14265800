#!/usr/bin/env python
"""Draw the schedules of docs/training.md: the factor of a head's loss over a training.

    python tools/plot_schedules.py [--output output/schedules.png]

Each curve is d2kd's own schedule, read from the config lines above it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from d2kd import add_distillation_config
from d2kd.config import head_schedule

ROOT = Path(__file__).resolve().parents[1]
# Values of DISTILL.<HEAD>.SCHEDULE in a training of MAX_ITER iterations.
MAX_ITER = 1000
CURVES = (
    {"DECAY": "constant"},
    {"START_ITER": 300, "STOP_ITER": 800},
    {"WARMUP_ITERS": 300},
    {"DECAY": "linear", "WARMUP_ITERS": 100},
    {"DECAY": "cosine", "START_ITER": 200, "WARMUP_ITERS": 100},
    {"DECAY": "step", "STEPS": [400, 700], "GAMMA": 0.5},
)


def config_line(curve: dict) -> str:
    """The curve as one line of YAML."""
    return f"SCHEDULE: {yaml.safe_dump(curve, default_flow_style=True, sort_keys=False).strip()}"


def values(curve: dict) -> list[float]:
    """Factors of all iterations."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.SOLVER.MAX_ITER = MAX_ITER
    node = cfg.DISTILL.FEATURE_MIMIC
    node.SCHEDULE.merge_from_other_cfg(CfgNode(curve))
    schedule = head_schedule(cfg, "FeatureMimic")
    return [schedule(iteration) for iteration in range(MAX_ITER)]


def draw() -> Figure:
    """One panel a curve."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, curve in zip(figure.subplots(2, 3, sharey=True).flat, CURVES, strict=True):
        lines = [f"{key}: {value}" for key, value in curve.items()]
        panel.set_title("\n".join(lines), family="monospace", fontsize=8, loc="left")
        panel.plot(values(curve), color="#1f77b4", linewidth=1.8)
        panel.set(xlim=(0, MAX_ITER), ylim=(-0.04, 1.08))
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
    figure.supxlabel("iteration", fontsize=8)
    figure.supylabel("factor, for WEIGHT 1", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/schedules.png")
    args = parser.parse_args(argv)
    buffer = io.BytesIO()
    draw().savefig(buffer, dpi=110)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # A few colours do, at a fraction of the size.
    Image.open(buffer).convert("RGB").quantize(32).save(args.output, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
