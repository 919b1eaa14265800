"""Whether the gradients of heads that train together are opposed.

    python -m d2kd.benchmark.angles output/compare/<suite>/DSIG_and_DRKD_* \\
        --json docs/results/angles.json

Reads what DISTILL.BALANCE has measured in trainings of the same heads (metrics.json in each
folder); DISTILL.BALANCE.FREEZE_ITER 0 measures and changes no weight.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ..arguments import CommandParser, file_to_write
from ..errors import ConfigError
from ..files import write_json

NAME = re.compile(r"balance/(\w+)/(share|cosine_\w+)")


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Head -> "share" or "cosine_..." -> mean over the measurements of a training.

    Raises:
        ConfigError: the folder holds no measurements.
    """
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    path = folder / "metrics.json"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a training that was killed
            continue
        for name, value in entry.items():
            if match := NAME.fullmatch(name):
                found[match[1]][match[2]][entry["iteration"]] = value
    if not found:
        raise ConfigError(f"{folder} holds no metrics.json with measurements of DISTILL.BALANCE")
    return {
        head: {name: float(np.mean(list(own.values()))) for name, own in of_head.items()}
        for head, of_head in found.items()
    }


def markdown(data: dict[str, Any]) -> str:
    """The table of a file that this command has written: means over the trainings, and the lowest
    and the highest."""
    runs = data["runs"]
    names = sorted({name for run in runs for head in run.values() for name in head}, reverse=True)
    rows = []
    for head in runs[0]:
        row = [head]
        for name in names:
            values = [run[head][name] for run in runs if name in run[head]]
            ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            row.append(f"{np.mean(values):.2f}{ends}" if values else "-")
        rows.append(row)
    headers = ["head", *(name.replace("cosine_", "cosine with ") for name in names)]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of trainings of the same heads")
    parser.add_argument("--json", type=file_to_write(), help="write what was read to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table.

    Raises:
        ConfigError: a folder without measurements, or of other heads than the first.
    """
    args = build_parser().parse_command(argv)
    data = {"runs": [measured(folder) for folder in args.folders]}
    for folder, run in zip(args.folders, data["runs"], strict=True):
        if run.keys() != data["runs"][0].keys():
            raise ConfigError(
                f"{folder} is a training of {', '.join(run)}, and {args.folders[0]} one of "
                f"{', '.join(data['runs'][0])}: name trainings of the same heads"
            )
    print(markdown(data))
    if args.json:
        write_json(data, args.json)


if __name__ == "__main__":
    main()
