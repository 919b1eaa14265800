"""Train a baseline and each method on one footing, and compare AP and cost.

    d2kd compare --suite suites/digits_retinanet_strong_teacher.yaml --jobs 2
    d2kd compare --configs digits/retinanet_R18.yaml digits/retinanet_R18_ssim.yaml \\
        --seeds 1 2 3 SOLVER.MAX_ITER 1000
    d2kd compare --report-only output/compare

A suite, a file or one that d2kd ships, names arms and a baseline (d2kd/compare/suite.py says what
it holds); of --configs the first is the baseline. Runs of one seed see the same images in the same
order, with the same augmentation and the same initial weights of the student. A run that was
stopped goes on where its last checkpoint is, a finished one is kept, one of other settings is
refused: one JSON line each in OUTPUT/results.jsonl, whose tables, plots and pictures are in
OUTPUT/report.html and report.md. KEY VALUE pairs override keys of all runs.

--ray trains on the machines of a Ray cluster. They need the same files under the same paths (the
working directory, OUTPUT, data, weights), as on a network file system, and the same environment.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..arguments import CommandParser, folder_to_write, natural, positive
from ..config_files import resolve_config_file
from ..engine.setup import add_import_argument, import_user_module
from ..errors import ConfigError
from .comparison import Comparison
from .processes import stopping_by_sigterm
from .ray_processes import AUTO, RayProcesses
from .report import write_report
from .suite import Suite, read_suite, suite_of_configs
from .tables import read_lines


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help="a suite's file, or the name of a shipped one")
    what.add_argument("--configs", nargs="+", help="the baseline first")
    what.add_argument("--report-only", type=Path, metavar="OUTPUT", help="only write its reports")
    add = parser.add_argument
    seeds = "train only these; default: the suite's, else 1 2 3"
    add("--seeds", type=natural, nargs="+", help=seeds)
    add("--arms", nargs="+", help="train only these arms of the suite")
    add("--output", type=folder_to_write, help="default: output/compare[/<suite>]")
    add("--jobs", type=positive, help="runs at a time; default: 1, or what the cluster holds")
    add("--threads", type=positive, default=1, help="CPU threads of a run")
    add("--keep-checkpoints", action="store_true", help="also those before the end of a run")
    cluster = "train on the Ray cluster at HOST:PORT; default: RAY_ADDRESS, or this machine's"
    add("--ray", nargs="?", const=AUTO, metavar="ADDRESS", help=cluster)
    add_import_argument(parser)
    return parser


def suite_of(args: Namespace) -> Suite:
    """The suite that the command line asks for."""
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    if args.suite is not None:
        path = Path(resolve_config_file(args.suite, "--suite"))
        suite = read_suite(path, args.seeds, opts)
    else:
        suite = suite_of_configs(args.configs, args.seeds or [1, 2, 3], opts)
    for label in args.arms or []:
        if label not in suite.arms:
            known = ", ".join(f"'{known}'" for known in suite.arms)
            raise ConfigError(f"--arms: no arm '{label}'; valid: {known}")
    return suite


def main(argv: Sequence[str] | None = None) -> None:
    """Train what a suite lacks and write its report, or write a report only.

    Raises:
        ConfigError: in one line, before anything is trained, or, after the report of all others,
            of trainings that failed.
        KeyboardInterrupt: says how to go on.
    """
    args = build_parser().parse_command(argv)
    for name in args.imports:
        import_user_module(name)
    if args.report_only is not None:
        output = args.report_only.resolve()
        if not read_lines(output / "results.jsonl"):
            raise ConfigError(f"no finished run in {output}")
        print(write_report(output))
        return
    output = args.output or Path("output/compare") / (Path(args.suite).stem if args.suite else "")
    output = output.resolve()
    suite = suite_of(args)
    cluster = RayProcesses(args.ray, args.threads) if args.ray else None
    with stopping_by_sigterm(f"stopped; the same command goes on, finished runs are in {output}"):
        comparison = Comparison(
            suite,
            output,
            jobs=args.jobs or (cluster.room if cluster else 1),
            threads=args.threads,
            keep_checkpoints=args.keep_checkpoints,
            imports=args.imports,
            processes=cluster,
        )
        failed = comparison.run(args.arms, args.seeds)
    print(f"\n{write_report(output)}\n\nwrote {output}/results.jsonl, report.md and report.html")
    if failed:
        each = "; ".join(why if run in why else f"{run}: {why}" for run, why in failed.items())
        raise ConfigError(f"{len(failed)} runs failed; the same command tries again: {each}")
