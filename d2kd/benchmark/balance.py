"""What DISTILL.BALANCE adds to a training: seconds of a measurement, spread over its PERIOD.

    python -m d2kd.benchmark.balance [--archs retinanet] [--heads SSIM DSIG,SSIM] [--device cuda]

Steps that measure the heads' gradients and steps that do not are timed in turn, on a student with
a ResNet-18 and a teacher with a ResNet-50, at the image size of ``d2kd benchmark``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from ..arguments import CommandParser, positive
from .command import default_heads, parse_variant
from .steps import BASES, PRECISIONS, TrainingStep, build_models, interleaved, random_batch

# Past every warm-up and not measured as one of the first iterations; the next is not measured.
_MEASURED = 45_000


def measure(arch: str, variant: str, args: argparse.Namespace) -> list[str]:
    """A row of the table: a step, what a measurement adds to it, and that over the period."""
    heads, opts = parse_variant(variant)
    setting = {
        **{"arch": arch, "student": 18, "teacher": 50, "heads": heads},
        **{"teacher_precision": "", "channels_last": False},
        "opts": [*opts, "DISTILL.BALANCE.ENABLED", "True"],
    }
    batch = random_batch(args.batch, args.size, 8, 80)
    torch.manual_seed(0)
    _, distiller, _ = build_models(setting, args.device, batch)
    assert distiller.balance is not None
    step = TrainingStep(distiller, batch, args.precision)

    def at(iteration: int) -> None:
        with EventStorage(iteration):
            step()

    parts = {"plain": lambda: at(_MEASURED + 1), "measured": lambda: at(_MEASURED)}
    for part in reversed(parts.values()):
        part()
    seconds = interleaved(parts, args.repeats, args.device)
    plain = statistics.median(seconds["plain"])
    added = statistics.median(
        b - a for a, b in zip(seconds["plain"], seconds["measured"], strict=True)
    )
    period = distiller.balance.options.period
    numbers = f"{plain:.3f}", f"{added / plain:.2f}", f"{100 * added / plain / period:.2f} %"
    return [arch, variant, *numbers]


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--archs", nargs="+", default=["faster", "retinanet"], choices=BASES)
    add("--heads", nargs="+", help="a row each: HEAD[,HEAD ...]; default: every head")
    add("--size", type=positive, default=320, help="side of the images in pixels")
    add("--batch", type=positive, default=2, help="images per step")
    add("--precision", default="", choices=PRECISIONS, help="autocast of the step")
    add("--repeats", type=positive, default=9)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a row after the other, then the table."""
    args = build_parser().parse_command(argv)
    rows = []
    for arch in args.archs:
        for variant in args.heads or default_heads(arch, profile=False):
            rows.append(measure(arch, variant, args))
            print(*rows[-1], flush=True)
    headers = ["detector", "heads", "step, s", "measurement, steps", "added to a training"]
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
