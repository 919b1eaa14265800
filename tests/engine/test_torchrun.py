"""Two processes of ``torchrun``, and two that Detectron2's launcher starts, train the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .children import CONFIG, OUTPUT, TOY_HEAD, write_job

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train(job: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Train in processes without a GPU; the student's final weights."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, str(ROOT / "train_net.py"), *TOY_HEAD, *arguments]
    opts = ["DISTILL.TEACHER.CHECK", "False", "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", "2"]
    done = subprocess.run(
        [*command, "--config-file", CONFIG, *opts],
        cwd=job,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return torch.load(job / OUTPUT / "student_final.pth", map_location="cpu")["model"]


def test_torchrun_equals_the_launcher(tmp_path):
    """Bit for bit: both give the ranks the same images, seeds and gradients."""
    (tmp_path / "launcher").mkdir()
    job = write_job(tmp_path / "launcher")
    shutil.copytree(job, tmp_path / "torchrun")
    launched = train(job, "--num-gpus", "2")
    joined = train(tmp_path / "torchrun", launcher=TORCHRUN)
    assert launched.keys() == joined.keys()
    assert all(torch.equal(joined[name], value) for name, value in launched.items())
