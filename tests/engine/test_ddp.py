"""Two gloo processes on the CPU, one of them without any object in its images."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from ..detectors import build, detector_config, distiller_config, make_batch
from ..toy_head import ToyMimic  # noqa: F401  (registers)

BUILT_IN = (
    *("SSIM", "FeatureMimic", "Logits", "DSIG", "DRKD", "GlobalKnowledge", "MAR"),
    *("PKD", "CWD"),
)
ALSO = {"mask": ("MaskMimic",), "retinanet": ("CrossKD",)}


def train_rank(rank: int, arch: str, teacher_file: str, port: int, results: str) -> None:
    """Two steps with every built-in head, balanced; saves this rank's final weights and balance."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # The toy head starts at iteration 1: in iteration 0 its parameters have nothing to do.
    opts = ("DISTILL.TOY_MIMIC.SCHEDULE.START_ITER", 1, "DISTILL.BALANCE.ENABLED", True)
    heads = [*BUILT_IN, *ALSO[arch], "ToyMimic"]
    cfg = distiller_config(detector_config(arch), heads, teacher_file, opts)
    model = DistributedDataParallel(build(cfg), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    with EventStorage() as storage:
        for step in range(2):
            losses = model(make_batch((2, 1) if rank else (0, 0), seed=10 * rank + step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.step()
    parameters = {name: p.detach() for name, p in model.module.named_parameters()}
    parameters["balance"] = model.module.balance.state_dict()
    torch.save(parameters, f"{results}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_ranks_stay_equal(arch, teacher_files, tmp_path, free_port):
    """All heads at once, find_unused_parameters off: no hang, and equal weights on both ranks."""
    mp.start_processes(
        train_rank,
        args=(arch, teacher_files[arch], free_port, str(tmp_path)),
        nprocs=2,
        start_method="spawn",
    )
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    balance = first.pop("balance")
    assert balance == second.pop("balance") and len(balance["means"]) == len(BUILT_IN) + 2
    assert all(count for _, count in balance["means"].values())
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, second[name]), name
