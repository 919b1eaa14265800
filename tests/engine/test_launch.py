"""Processes of a job: where they meet, and how the end of one becomes the end of all, in a line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from detectron2.utils import comm

from d2kd.engine import launch as launcher
from d2kd.engine.faults import TrainingError
from d2kd.engine.launch import launch
from d2kd.engine.setup import build_parser
from d2kd.errors import ConfigError

LISTENING = "0A"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Two processes on a machine with one GPU too, which need not import everything once more."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launcher, "START_METHOD", "fork")


def arguments(*argv: str, **more) -> argparse.Namespace:
    """Arguments of train_net.py, and ``more`` for the function that is launched."""
    args = build_parser().parse_args(list(argv))
    vars(args).update(more)
    return args


def listening() -> list[str]:
    """Addresses, in hexadecimal, on which this process listens."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(link))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1].split(":")[0])
    return found


def note(args: argparse.Namespace) -> None:
    """What a process sees of its group."""
    ranks = comm.all_gather(comm.get_rank())
    seen = {
        "ranks": ranks,
        "local": comm.get_local_size(),
        "listening": listening(),
        "backend": dist.get_backend(),
    }
    Path(args.folder, f"{comm.get_rank()}.json").write_text(json.dumps(seen))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_meet_on_loopback(tmp_path):
    """Without --dist-url no process listens on another address than 127.0.0.1."""
    launch(note, arguments("--num-gpus", "2", folder=str(tmp_path)))
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["ranks"] == [0, 1] and seen["local"] == 2 and seen["backend"] == "gloo"
        assert set(seen["listening"]) == {"0100007F"}  # 127.0.0.1
    assert "00000000" not in listening()


def fail(args: argparse.Namespace) -> None:
    """Rank 1 ends as ``args.how`` says; rank 0 waits for it."""
    if comm.get_rank() == 1:
        if args.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if args.how == "defect":
            raise KeyError("a defect")
        raise {"mistake": ConfigError, "fault": TrainingError}[args.how](f"this was a {args.how}")
    comm.synchronize()


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("kill", "error: process 1 of 2 was killed by SIGKILL, often .*; --resume goes on"),
        ("mistake", "^error: this was a mistake$"),
        ("fault", "^error: this was a fault$"),
    ],
)
def test_one_process_ends(how, line, capfd):
    """The launcher ends all, and says why in one line."""
    with pytest.raises(SystemExit, match=line):
        launch(fail, arguments("--num-gpus", "2", how=how))
    assert "Traceback" not in capfd.readouterr().err


def test_a_machine_that_never_joins(free_port, capfd):
    """The first machine waits no longer than --dist-timeout for the second."""
    argv = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port}"]
    line = f"^error: not all 2 processes met at tcp://127.0.0.1:{free_port} within 2 seconds"
    with pytest.raises(SystemExit, match=line) as end:
        launch(note, arguments(*argv, "--dist-timeout", "2"))
    assert len(str(end.value)) <= 300 and "--dist-timeout" in str(end.value)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--num-machines", "2"], "--num-machines needs --dist-url: the address of machine 0"),
        (["--machine-rank", "1"], "--machine-rank 1 must be from 0 to 0, for --num-machines 1"),
        (["--num-gpus", "-1"], "--num-gpus -1 --num-machines 1: at least 0 and 1 are needed"),
        (["--num-gpus", "2", "--dist-timeout", "0"], "--dist-timeout 0.0: it must be positive"),
    ],
)
def test_arguments_that_make_no_job(argv, line):
    """They are refused before a process is started."""
    with pytest.raises(SystemExit, match=f"^error: {re.escape(line)}"):
        launch(note, arguments(*argv))


def test_under_torchrun(tmp_path, monkeypatch, free_port):
    """A process that torchrun started joins the group of its environment."""
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    launch(note, arguments(folder=str(tmp_path)))
    assert json.loads((tmp_path / "0.json").read_text())["ranks"] == [0]
    assert not dist.is_initialized()


def test_one_process_is_this_one():
    """No process is started for one GPU, and the result is returned."""
    assert launch(lambda args: os.getpid(), arguments()) == os.getpid()
