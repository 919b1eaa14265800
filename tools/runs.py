"""Running trainings as processes: progress on one line, logs in files, finished ones kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def progress_of(line: str) -> str | None:
    """What a line of a training's or pre-training's log says of its progress."""
    if line.startswith("pre-training"):
        return (
            line.split(":", 1)[0].removeprefix("pre-training ") + line.rsplit(",", 1)[-1].rstrip()
        )
    match = re.search(r"eta: (.+?)\s+iter: (\d+)\s+total_loss: (\S+)", line)
    return f"iteration {match[2]}, loss {match[3]}, {match[1]} to go" if match else None


def run_stage(name: str, command: list[str], done: Path, logs: Path, threads: int) -> None:
    """Run ``python command``, showing its progress, unless the file ``done`` is there already.

    Args:
        logs: folder for the full output.
        threads: CPU threads of the process.

    Raises:
        SystemExit: it failed; names the log.
    """
    if done.exists():
        print(f"{name}: done before", flush=True)
        return
    start = time.perf_counter()
    print(f"{name} ...", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name.replace(' ', '_')}.log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            file.write(line)
            progress = progress_of(line)
            if progress:
                print(f"  {name}: {progress}", flush=True)
    if process.wait() != 0 or not done.exists():
        sys.exit(f"{name} failed; its output is in {log}")
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
