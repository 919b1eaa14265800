#!/usr/bin/env python
"""Train a student alone and with each method on one footing, and compare AP and cost.

    python tools/compare.py --suite configs/suites/digits_retinanet.yaml --jobs 2
    python tools/compare.py --configs configs/digits/faster_rcnn_R18.yaml \\
        configs/digits/faster_rcnn_R18_ssim.yaml --seeds 1 2 3 --output output/compare
    python tools/compare.py --report-only output/compare

A suite (tools/suite.py says what it holds) names arms and a baseline; of --configs the first is the
baseline. Runs of one seed see the same images in the same order, with the same augmentation and the
same initial weights of the student. A run that was stopped goes on where its last checkpoint is, a
finished one is kept, one of other settings is refused: one JSON line each in OUTPUT/results.jsonl,
whose tables, plots and pictures are in OUTPUT/report.html and report.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from comparison import Comparison
from report import read_lines
from report_html import write_report
from runs import ROOT
from suite import Suite, read_suite, suite_of_configs

from d2kd.engine.setup import add_import_argument, import_user_module
from d2kd.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", type=Path, help="a file of configs/suites")
    what.add_argument("--configs", nargs="+", help="the baseline first")
    what.add_argument(
        "--report-only", type=Path, metavar="OUTPUT", help="write the reports of OUTPUT anew"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="train only these; default: the suite's, else 1 2 3"
    )
    parser.add_argument("--arms", nargs="+", help="train only these arms of the suite")
    parser.add_argument("--output", type=Path, help="default: output/compare[/<suite>]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="also those before the end of a run"
    )
    add_import_argument(parser)
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE overrides of all runs")
    return parser


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite that the command line asks for.

    Raises:
        ConfigError: in one line.
    """
    if len(args.opts) % 2:
        raise ConfigError("--opts: KEY VALUE pairs, please")
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    if args.suite is not None:
        suite = read_suite(args.suite, args.seeds, opts)
    else:
        configs = [str(Path(c).resolve()) if Path(c).is_file() else c for c in args.configs]
        configs = [c.removeprefix(f"{ROOT}{os.sep}") for c in configs]
        suite = suite_of_configs(configs, args.seeds or [1, 2, 3], opts)
    for label in args.arms or []:
        if label not in suite.arms:
            known = ", ".join(f"'{known}'" for known in suite.arms)
            raise ConfigError(f"--arms: no arm '{label}'; valid: {known}")
    return suite


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.report_only is not None:
        output = args.report_only.resolve()
        if not read_lines(output / "results.jsonl"):
            sys.exit(f"error: no finished run in {output}")
        os.chdir(ROOT)
        print(write_report(output))
        return
    output = args.output or Path("output/compare") / (args.suite.stem if args.suite else "")
    output = output.resolve()
    signal.signal(signal.SIGTERM, _stop)
    # The trainings run elsewhere.
    imports = [os.path.abspath(name) if name.endswith(".py") else name for name in args.imports]
    try:
        for name in imports:
            import_user_module(name)
        suite = suite_of(args)
        os.chdir(ROOT)
        comparison = Comparison(
            suite,
            output,
            jobs=args.jobs,
            threads=args.threads,
            keep_checkpoints=args.keep_checkpoints,
            imports=imports,
        )
        output.mkdir(parents=True, exist_ok=True)
        comparison.run(args.arms, args.seeds)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on, finished runs are in {output}")
    print(f"\n{write_report(output)}\n\nwrote {output}/results.jsonl, report.md and report.html")


def _stop(*_) -> None:
    """End as Ctrl-C does. (Raising SIGINT would not: in the background it is ignored.)"""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
