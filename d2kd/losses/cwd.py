"""CWD: each channel of a map as a distribution over positions, all levels of a pyramid together.

Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. With y_i the
features of one channel of one image and T the temperature,

    phi(y)_i = exp(y_i / T) / sum_j exp(y_j / T)
    loss of the channel = T^2 KL(phi(t) || phi(s))

Shape legend: B images, C channels, H_r x W_r the size of level r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import check_shapes, connected_zero, full_precision


class _MeanDivergence(torch.autograd.Function):
    """Sum over levels of the mean over rows of T^2 KL(softmax(t / T) || softmax(s / T)).

    Value and gradient in one go, with one kernel for all levels where that is possible: autograd
    would keep three maps per level and launch several times the kernels.
    """

    @staticmethod
    def forward(ctx: Any, temperature: float, *rows: Tensor) -> Tensor:
        """rows: s_1 ... s_L, t_1 ... t_L, each (B C_r, H_r W_r)."""
        if temperature != 1:
            rows = torch._foreach_div(rows, temperature)
        logs = [F.log_softmax(x, 1) for x in rows]
        log_q, log_p = logs[: len(rows) // 2], logs[len(rows) // 2 :]
        p = torch._foreach_exp(log_p)
        torch._foreach_sub_(log_p, log_q)
        torch._foreach_mul_(log_p, p)
        totals = torch._foreach_mul(
            [x.sum() for x in log_p], [temperature**2 / len(x) for x in log_p]
        )
        if any(ctx.needs_input_grad):
            torch._foreach_exp_(log_q)
            torch._foreach_sub_(log_q, p)
            torch._foreach_mul_(log_q, [temperature / len(x) for x in log_q])
            ctx.save_for_backward(*log_q)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch._foreach_mul(ctx.saved_tensors, grad)
        return None, *gradients, *[None] * len(gradients)


@full_precision
def pyramid_cwd_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """Sum over pyramid levels of the mean over images and channels of T^2 KL(phi(t) || phi(s)).

    Args:
        students: one (B, C_r, H_r, W_r) per level, after its adapter.
        teachers: as many, of the same shapes; constants.
        temperature: T.

    Returns:
        Scalar: 0 for maps that differ by an offset in each channel of each image; 0 for an empty
        batch.

    Raises:
        ValueError: shapes differ.
    """
    check_shapes(students, teachers)
    if not all(x.numel() for x in students):
        return connected_zero(*students)
    rows = [x.flatten(2).flatten(0, 1) for x in (*students, *(x.detach() for x in teachers))]
    loss: Tensor = _MeanDivergence.apply(temperature, *rows)
    return loss


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`pyramid_cwd_loss` of one level, (B, C, H, W) each."""
    return pyramid_cwd_loss([student], [teacher], temperature)
