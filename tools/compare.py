#!/usr/bin/env python
"""Train configs from several seeds on one footing and compare their AP with a baseline's.

    python tools/compare.py --configs configs/digits/faster_rcnn_R18.yaml \\
        configs/digits/faster_rcnn_R18_ssim.yaml --seeds 1 2 3 --output output/compare

The first config is the baseline. Runs of one seed see the same images in the same order, with the
same augmentation and the same initial weights of the student. A run that was stopped goes on where
its last checkpoint is, a finished one is kept: one JSON line each in OUTPUT/results.jsonl. Where
there is more than one seed, the difference to the baseline is paired by seed, with a 95 % interval
of Student's t.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from runs import run_stage
from scipy import stats
from tabulate import tabulate

from d2kd.files import write_atomically

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def label_of(config: str) -> str:
    return Path(config).stem


def train(config: str, seed: int, args: argparse.Namespace) -> dict:
    """One run; returns its JSON line."""
    label = label_of(config)
    folder = args.output.resolve() / f"{label}_{seed}"
    command = ["train_net.py", "--resume", "--config-file", str(Path(config).resolve())]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", "0"]
    command += ["DISTILL.TEACHER.CHECK", "False", *args.opts]
    done = folder / "results.json"
    run_stage(f"{label} {seed}", command, done, args.output.resolve() / "logs", args.threads)
    return {"config": config, "seed": seed, "opts": args.opts, **json.loads(done.read_text())}


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def table(lines: list[dict], configs: list[str], task: str) -> str:
    """Means over the seeds, and paired differences to the first config, as Markdown."""
    runs = {(line["config"], line["seed"]): line for line in lines if task in line["results"]}
    seeds = {config: [s for c, s in runs if c == config] for config in configs}

    def values(config: str, metric: str, over: list[int]) -> np.ndarray:
        return np.array([runs[config, seed]["results"][task][metric] for seed in over])

    rows = []
    for config in configs:
        if not seeds[config]:
            continue
        cells = [f"{values(config, m, seeds[config]).mean():.1f}" for m in METRICS]
        both = [seed for seed in seeds[config] if seed in seeds[configs[0]]]
        gain = values(config, "AP", both) - values(configs[0], "AP", both)
        difference = "" if config == configs[0] else f"{gain.mean():+.1f}"
        if config != configs[0] and len(both) > 1:
            difference += f" ± {interval(gain):.1f}"
        # A run that was stopped after its last step, before its evaluation, has no time.
        seconds = [runs[config, seed]["step_seconds"] for seed in seeds[config]]
        seconds = [value for value in seconds if value is not None]
        step = f"{1000 * np.mean(seconds):.0f}" if seconds else "-"
        rows.append([label_of(config), len(seeds[config]), *cells, difference, step])
    headers = ["config", "seeds", *METRICS, "gain in AP", "ms a step"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def report(lines: list[dict], configs: list[str], opts: list[str]) -> str:
    """The Markdown report of all tasks."""
    parts = []
    for task, name in (("bbox", "Boxes"), ("segm", "Masks")):
        if any(task in line["results"] for line in lines):
            parts += [f"### {name}", "", table(lines, configs, task), ""]
    if opts:
        parts.append(f"Overrides: `{' '.join(opts)}`.")
    return "\n".join(parts).replace("nan", "-")


def save(lines: list[dict], configs: list[str], args: argparse.Namespace) -> str:
    """Write the JSON lines and the report; returns the report."""
    text = report(lines, configs, args.opts)
    contents = {
        "results.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "report.md": text + "\n",
    }
    for name, content in contents.items():
        path = str(args.output / name)
        write_atomically(
            path, lambda temporary, content=content: Path(temporary).write_text(content)
        )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", required=True, help="the baseline first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("output/compare"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE overrides of all runs")
    args = parser.parse_args(argv)
    missing = [config for config in args.configs if not Path(config).is_file()]
    if missing:
        sys.exit(f"error: no file {', '.join(missing)}")
    args.output.mkdir(parents=True, exist_ok=True)
    lines: list[dict] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [
            pool.submit(train, config, seed, args) for seed in args.seeds for config in args.configs
        ]
        for future in todo:
            lines.append(future.result())
            save(lines, args.configs, args)
    print("\n" + save(lines, args.configs, args))
    print(f"\nwrote {args.output}/results.jsonl and report.md")


if __name__ == "__main__":
    main()
