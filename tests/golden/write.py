"""Writes the golden files.

They were written by version 0.1, and are what later versions are compared with. Rewrite a loss only
where it was changed on purpose, in the commit that changes it, with the reason in its message.

    python -m tests.golden.write                       add the cases that are not there yet
    python -m tests.golden.write --replace 'MAR/*'     and compute those of this pattern once more
    python -m tests.golden.write --training            begin the training of run_0_1 once more

A case is named "student from teacher/head/variant"; a pattern matches its end or all of it.
``--training`` loses the checkpoint of version 0.1, so it is for version 0.1 alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import tempfile
from pathlib import Path

import torch

import d2kd

from ..detectors import write_config
from .cases import all_cases, measure
from .training import (
    CHECKPOINT,
    CONTINUATION,
    OUTPUT,
    RUN,
    outcome,
    train,
    training_config,
    write_inputs,
)

LOSSES = Path(__file__).parent / "losses.json"


def write_losses(replace: str | None) -> None:
    """Add missing cases to ``losses.json``, compute those of the pattern ``replace`` once more,
    and drop those that are no case any longer."""
    golden = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    result, written = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for case in all_cases():
            again = replace and fnmatch.fnmatch(case.name, f"*{replace}")
            if case.name in golden and not again:
                result[case.name] = golden[case.name]
            else:
                result[case.name] = measure(case, Path(folder))
                written += 1
    LOSSES.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{LOSSES.name}: {written} of {len(result)} cases computed")


def write_training() -> None:
    """Train, keep what was there half-way in ``run_0_1``, and what the rest did."""
    if d2kd.__version__ != "0.1.0":
        raise SystemExit("error: --training is for version 0.1, whose checkpoint must be kept")
    with tempfile.TemporaryDirectory() as name:
        folder, output = Path(name), Path(name) / OUTPUT
        write_inputs(folder)
        train(folder, Path(write_config(training_config(), folder / "config.yaml")))
        shutil.rmtree(RUN, ignore_errors=True)
        RUN.mkdir()
        for file in ("config.yaml", CHECKPOINT):
            shutil.copy(output / file, RUN)
        (RUN / "last_checkpoint").write_text(CHECKPOINT)
        whole = outcome(output)
        shutil.rmtree(output)
        shutil.copytree(RUN, output)
        train(folder, RUN / "config.yaml", "--resume")
        resumed = outcome(output)
        assert all(whole[key] == resumed[key] for key in ("change", "momentum"))
        CONTINUATION.write_text(json.dumps(resumed, indent=1) + "\n")
    print(f"{RUN.name}: written")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replace", metavar="PATTERN", help="cases to compute once more")
    parser.add_argument("--training", action="store_true", help="write run_0_1 instead of losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.training:
        write_training()
    else:
        write_losses(args.replace)


if __name__ == "__main__":
    main()
