"""Gradients where backward() is called under autocast, as by a trainer of a user's."""

from __future__ import annotations

import pytest
import torch

from d2kd.losses.cwd import pyramid_cwd_loss
from d2kd.losses.dsig import edge_loss
from d2kd.losses.global_knowledge import decoupled_losses
from d2kd.losses.logits import dense_class_loss
from d2kd.losses.mar import map_relation_loss, mask_guided_loss
from d2kd.losses.mimic import pyramid_mimic_loss
from d2kd.losses.pkd import pyramid_pkd_loss
from d2kd.losses.ssim import pyramid_ssim_loss

MASK = torch.arange(128.0).remainder(3).view(2, 8, 8)
# Losses with a backward pass of their own, of maps (2, 16, 8, 8).
LOSSES = {
    "cwd": lambda s, t: pyramid_cwd_loss([s], [t]),
    "edges": lambda s, t: edge_loss(s.flatten(2), t.flatten(2), torch.ones(2, 16) > 0),
    "local": lambda s, t: sum(decoupled_losses([s], [t], [MASK])).sum(),
    "logits": lambda s, t: dense_class_loss(
        s.flatten(2)[:, None], t.flatten(2)[:, None], torch.ones(2, 1, 64) > 0, torch.tensor(3)
    ),
    "mask": lambda s, t: mask_guided_loss([s], [t], [MASK]),
    "mimic": lambda s, t: pyramid_mimic_loss([s], [t]),
    "pkd": lambda s, t: pyramid_pkd_loss([s], [t]),
    "relation": lambda s, t: map_relation_loss([s], [t], MASK.flatten(1) / 64),
    "ssim": lambda s, t: pyramid_ssim_loss([s], [t]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_keep_their_precision(loss):
    student, teacher = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for is_half in (False, True):
        maps = student.clone().requires_grad_()
        total = loss(maps, teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
            total.backward()
        gradients.append(maps.grad)
    assert torch.equal(*gradients)
