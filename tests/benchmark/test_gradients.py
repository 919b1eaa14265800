"""The tool that says what written-out gradients save, at small sizes."""

from __future__ import annotations

import pytest
import torch

from d2kd.benchmark import gradients


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gradients, "DENSE", (2, 1, 5, 40))
    monkeypatch.setattr(gradients, "NODES", (2, 6, 300))
    monkeypatch.setattr(gradients, "LEVEL", (2, 3, 8, 8))


def test_both_gradients_are_equal():
    """What is compared is the same function."""
    for name, x, written, plain in gradients.cases("cpu"):
        x.requires_grad_()
        ours, theirs = (torch.autograd.grad(loss(x), x)[0] for loss in (written, plain))
        rtol = 1e-2 if x.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5, msg=name)


def test_less_is_kept():
    """At most half of what autograd keeps, which is why the gradients are written out."""
    for name, x, written, plain in gradients.cases("cpu"):
        x.requires_grad_()
        kept = [gradients.measure(loss, x, repeats=1)[1] for loss in (written, plain)]
        assert 0 < kept[0] <= 0.6 * kept[1], name
