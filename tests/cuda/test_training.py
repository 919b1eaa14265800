"""Training on a GPU: DistributedDataParallel, fp16 with its scaler, and steps without a wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from d2kd.benchmark.counts import count_waits
from d2kd.engine.trainer import DistillTrainer

from ..detectors import (
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)
from ..engine.test_ddp import BUILT_IN
from . import MAY_WAIT, NEEDS_GPU

pytestmark = NEEDS_GPU

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_ddp_with_one_process(arch, teacher_files, tmp_path):
    """NCCL, all heads, find_unused_parameters off: the gradients of no DDP."""
    cfg = distiller_config(detector_config(arch), list(BUILT_IN), teacher_files[arch])
    cfg.MODEL.DEVICE = "cuda"
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        plain, model = build(cfg), build(cfg)
        wrapped = DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)
        for _ in range(2):
            for trained in (plain, wrapped):
                trained.zero_grad()
                sum(run_step(trained, make_batch((2, 0))).values()).backward()
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            if a.grad is not None:
                size = a.grad.abs().max().item()
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-2, atol=1e-3 * size, msg=name)
    finally:
        dist.destroy_process_group()


def digits_job(folder: Path, precision: str) -> CfgNode:
    """Four iterations on digits_tiny."""
    teacher = detector_config(width=24, num_classes=10)
    student = detector_config(num_classes=10)
    student.MODEL.DEVICE = "cuda"
    student.DATASETS.TRAIN, student.DATASETS.TEST = ("digits_tiny_train",), ()
    student.SOLVER.MAX_ITER, student.SOLVER.CHECKPOINT_PERIOD = 4, 2
    student.SOLVER.BASE_LR, student.SEED = 1e-3, 3
    if precision:
        student.SOLVER.AMP.ENABLED, student.SOLVER.AMP.PRECISION = True, precision
    student.OUTPUT_DIR = str(folder / "out")
    file = write_config(teacher, folder / "teacher.yaml")
    return distiller_config(student, ["FeatureMimic", "Logits"], file)


def train(config_file: str, *arguments: str) -> None:
    """train_net.py as a user runs it."""
    command = [sys.executable, "train_net.py", "--import", "tests.toy_head"]
    command += ["--config-file", config_file, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def scaler_of(checkpoint: Path) -> dict:
    state = torch.load(checkpoint, map_location="cpu")
    return state["trainer"]["_trainer"]["scaler"]


def test_resume_in_fp16(digits_root, tmp_path):
    """The loss's scale goes on from the checkpoint; so do the steps since it last grew."""
    file = write_config(digits_job(tmp_path, "fp16"), tmp_path / "student.yaml")
    train(file)
    out, other = tmp_path / "out", tmp_path / "other"
    half, full = (scaler_of(out / name) for name in ("model_0000001.pth", "model_final.pth"))
    assert half["scale"] > 0 and half != full
    other.mkdir()
    shutil.copy(out / "model_0000001.pth", other)
    (other / "last_checkpoint").write_text("model_0000001.pth")
    train(file, "--resume", "OUTPUT_DIR", str(other))
    assert scaler_of(other / "model_final.pth") == full


def test_a_step_of_the_trainer_does_not_wait(digits_root, tmp_path):
    """Reading the losses, the update and the batch's copies included, outside of the student."""
    DatasetCatalog.get("digits_tiny_train")  # made when it is first read
    trainer = DistillTrainer(digits_job(tmp_path, ""))
    with EventStorage(0):
        trainer.iter = 0
        trainer.run_step()
        trainer.iter = 1
        assert not count_waits(trainer.run_step, trainer.model.student, MAY_WAIT).waits
