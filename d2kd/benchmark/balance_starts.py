"""Where DISTILL.BALANCE brings a head from weights that are 100 times too small and too large.

    python -m d2kd.benchmark.balance_starts [--config-file CONFIG] [--heads SSIM DSIG] \\
        --json docs/results/balance_starts.json

Each head is trained twice on the config's pair and data, with its WEIGHT times 0.01 and times 100;
the share of the gradient that it has in the end is what the two should agree in. A training that
is finished is kept. KEY VALUE pairs override keys of all trainings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..arguments import CommandParser, file_to_write, positive
from ..config import validate_distillation_config
from ..engine.setup import merged_config
from ..engine.train import train
from ..files import write_json
from ..registry import node_name

STARTS = (0.01, 100.0)
LAST = 3  # measurements whose geometric mean is the share in the end


def shares(metrics: Path, head: str) -> list[float]:
    """The head's share at each measurement that a run's metrics.json holds, in order."""
    name, found = f"balance/{node_name(head).lower()}/share", {}
    for line in metrics.read_text().splitlines():
        entry = json.loads(line)
        if name in entry:
            found[entry["iteration"]] = entry[name]
    return [found[iteration] for iteration in sorted(found)]


def final_share(config_file: str, head: str, start: float, opts: Sequence[str]) -> float:
    """Train ``head`` from ``start`` times its weight; its share in the end."""
    cfg = merged_config(config_file, list(opts))
    cfg.defrost()
    cfg.DISTILL.HEADS, cfg.DISTILL.BALANCE.ENABLED = [head], True
    cfg.DISTILL[node_name(head)].WEIGHT *= start
    cfg.DISTILL.TEACHER.CHECK, cfg.DATASETS.TEST = False, ()
    folder = f"{Path(config_file).stem}_{cfg.SOLVER.MAX_ITER}"
    cfg.OUTPUT_DIR = f"output/balance_starts/{folder}/{head}_{start:g}"
    if not (Path(cfg.OUTPUT_DIR) / "student_final.pth").exists():
        train(cfg, resume=True)
    last = shares(Path(cfg.OUTPUT_DIR) / "metrics.json", head)[-LAST:]
    return math.exp(sum(map(math.log, last)) / len(last))


def markdown(measured: dict[str, Any]) -> str:
    """The table of a file that this command has written."""
    rows = []
    for row in measured["rows"]:
        low, high = row["shares"]
        factor = max(low / high, high / low)
        rows.append([row["head"], f"{low:.3f}", f"{high:.3f}", f"{factor:.2f}"])
    headers = ["head", "share from 0.01 times WEIGHT", "from 100 times", "factor between them"]
    table = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return (
        f"{table}\n\n{measured['iterations']} iterations of {measured['config']}; "
        f"the target is {measured['target']:g}."
    )


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", default="digits/retinanet_R18_choose.yaml", help="a Distiller's config")
    add("--heads", nargs="+", help="default: the config's")
    add("--iterations", type=positive, help="default: the config's")
    add("--json", type=file_to_write(), help="write the rows to this file as well")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print a row after the other, then the table."""
    args = build_parser().parse_command(argv)
    opts = list(args.opts)
    if args.iterations:
        opts += ["SOLVER.MAX_ITER", str(args.iterations)]
    cfg = merged_config(args.config_file, opts)
    cfg.defrost()
    cfg.DISTILL.HEADS = args.heads or cfg.DISTILL.HEADS
    validate_distillation_config(cfg)
    rows = []
    for head in cfg.DISTILL.HEADS:
        ends = [final_share(args.config_file, head, start, opts) for start in STARTS]
        rows.append({"head": head, "shares": ends})
        print(head, *ends, flush=True)
    measured = {
        "config": args.config_file,
        "iterations": cfg.SOLVER.MAX_ITER,
        "target": cfg.DISTILL.BALANCE.SHARE,
        "rows": rows,
    }
    print(markdown(measured))
    if args.json:
        write_json(measured, args.json)


if __name__ == "__main__":
    main()
