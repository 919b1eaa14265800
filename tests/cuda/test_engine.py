"""The engine on a GPU: no step waits for its losses, fp16 resumes with its scaler, NCCL works."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2kd.engine.loss_log import LossLog

from ..engine.children import CONFIG, OUTPUT, TOY_HEAD, write_job
from . import NEEDS_GPU

pytestmark = NEEDS_GPU
ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_waits():
    """An operator that waits for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


def test_noting_losses_does_not_wait(no_waits):
    """Not even where terms are in half precision."""
    log, loss = LossLog(), torch.ones((), device="cuda")
    for iteration in range(20):
        log.add(iteration, {"loss_cls": loss, "loss_kd_ssim": loss.half()}, 0.0)
    with pytest.raises(RuntimeError, match="synchronizing"):
        log.check()


def run(folder: Path, *argv: str, launcher: tuple[str, ...] = ()) -> None:
    """train_net.py in a process of its own: a fork cannot use the GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    opts = ["MODEL.DEVICE", "cuda", "DISTILL.TEACHER.CHECK", "False", "DATASETS.TEST", "()"]
    command = [sys.executable, *launcher, str(ROOT / "train_net.py"), *TOY_HEAD]
    command += ["--config-file", CONFIG, *argv, *opts]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_fp16_resumes_with_its_scaler(tmp_path):
    """The scale of the losses is that of the checkpoint, and losses stay finite."""
    job = write_job(tmp_path)
    fp16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "fp16"]
    run(job, *fp16)
    state = torch.load(job / OUTPUT / "model_0000001.pth", map_location="cpu")
    scale = state["trainer"]["_trainer"]["scaler"]["scale"]
    state["trainer"]["_trainer"]["scaler"]["scale"] = 128.0
    shutil.rmtree(job / OUTPUT)
    (job / OUTPUT).mkdir()
    torch.save(state, job / OUTPUT / "model_0000001.pth")
    (job / OUTPUT / "last_checkpoint").write_text("model_0000001.pth")
    run(job, "--resume", *fp16)
    final = torch.load(job / OUTPUT / "model_final.pth", map_location="cpu")
    assert scale > 128.0 >= final["trainer"]["_trainer"]["scaler"]["scale"] > 0
    assert all(math.isfinite(float(v.double().sum())) for v in final["model"].values())


def test_one_process_of_torchrun(tmp_path):
    """A group of one process by NCCL trains as one process without a group, to rounding."""
    (tmp_path / "alone").mkdir()
    job = write_job(tmp_path / "alone")
    shutil.copytree(job, tmp_path / "group")
    run(job)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    run(tmp_path / "group", launcher=torchrun)
    alone, group = (
        torch.load(folder / OUTPUT / "student_final.pth", map_location="cpu")["model"]
        for folder in (job, tmp_path / "group")
    )
    for name, value in alone.items():
        torch.testing.assert_close(group[name], value, rtol=1e-3, atol=1e-3, msg=name)
