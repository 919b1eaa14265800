"""Which method, at which weight, for my student, teacher and data? Tried out within a time budget.

    d2kd choose --config-file my_distiller.yaml --minutes 60 --jobs 2
    d2kd choose --config-file my_student.yaml --teacher my_teacher.yaml \\
        --teacher-weights teacher/student_final.pth --heads SSIM DSIG Logits --minutes 60

From the same start, with the same data order, it trains the baseline and each head that the pair
can serve, at a few weights, for a short time; the better half goes on and is trained for longer,
with another seed, until one is left. That one is trained with fresh seeds, as are the baseline and
the baseline for the same wall time. The verdict is BEATS or NO GAIN, with the interval of the
paired seeds; OUTPUT gets choose.md, the report of `d2kd compare`, and winner.yaml to train with.
A choice that was stopped goes on with the same command. KEY VALUE pairs override keys of all runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..arguments import CommandParser, folder_to_write, positive, positive_number
from ..engine.setup import add_import_argument, import_user_module
from .candidates import BALANCED, Pair, named_heads
from .choice import Choice, Limits
from .processes import stopping_by_sigterm
from .tables import TASKS


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, help="the student, or a Distiller's config")
    add("--teacher", help="default: DISTILL.TEACHER.CONFIG_FILE of the config")
    add("--teacher-weights", help="default: DISTILL.TEACHER.WEIGHTS")
    add("--minutes", type=positive_number, default=30.0, help="of wall time, in all")
    add("--heads", nargs="+", help="default: all that the pair can serve; SSIM+DSIG are together")
    weights = f"factors of the config's own weights, or '{BALANCED}' (default: 1 3 {BALANCED})"
    add("--weights", nargs="+", default=["1", "3", BALANCED], help=weights)
    add("--seeds", type=_several, default=3, help="of the confirmation; at least 2")
    add("--task", choices=list(TASKS), default="bbox", help="whose AP decides")
    add("--output", type=folder_to_write, help="default: output/choose/<config>")
    add("--jobs", type=positive, default=1, help="runs at a time")
    add("--threads", type=positive, default=1, help="CPU threads of a run")
    add("--any-teacher", action="store_true", help="also one that is not ahead of the baseline")
    add_import_argument(parser)
    return parser


def _several(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}': an interval needs at least 2")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Choose, and print the verdict.

    Raises:
        ConfigError: in one line, before anything is trained; or the baseline failed.
        KeyboardInterrupt: says how to go on.
    """
    args = build_parser().parse_command(argv)
    for name in args.imports:
        import_user_module(name)
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    if args.teacher is not None:
        opts["DISTILL.TEACHER.CONFIG_FILE"] = args.teacher
    if args.teacher_weights is not None:
        opts["DISTILL.TEACHER.WEIGHTS"] = args.teacher_weights
    heads = named_heads(args.heads)
    pair = Pair.of(args.config_file, opts, args.task)
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
    output = args.output or Path("output/choose") / Path(args.config_file).stem
    with stopping_by_sigterm(f"stopped; the same command goes on, finished runs are in {output}"):
        verdict = Choice(pair, heads, args.weights, output.resolve(), limits).run()
    print(f"\n{(output / 'choose.md').read_text()}\nwrote {output}/choose.md", flush=True)
    print(verdict.text)
