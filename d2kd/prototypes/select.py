"""Choosing the prototypes of one class on one pyramid level: density filter and coupled pursuit.

Prototype generation of "Distilling Object Detectors with Global Knowledge" (Tang et al., ECCV
2022). The prototypes are those training objects from which all objects of the class can be
rebuilt in the teacher's and in the student's feature space at once, with nearly equal
coefficients.

N: objects of the class, K: candidates among them, C_t, C_s: channels of the two spaces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import full_precision, unit_vectors

# Share of the initial energy below which a gain, or a difference of gains, is rounding.
_NEGLIGIBLE = 1e-6
# Rows of the similarity matrix that exist at the same time.
_ROWS_AT_ONCE = 256


def density(unit_rows: Tensor, bandwidth: float = 0.1) -> Tensor:
    """``rho_i = sum_j exp(-((1 - cos_ij) / bandwidth)^2)`` (N,), j = i included, of rows (N, C) of
    length one."""
    rho = unit_rows.new_zeros(len(unit_rows))
    for start in range(0, len(unit_rows), _ROWS_AT_ONCE):
        # The matrix is symmetric: only its part right of the diagonal block is computed, and
        # serves as rows and as columns.
        stop = start + _ROWS_AT_ONCE
        kernel = unit_rows[start:stop] @ unit_rows[start:].T
        kernel.sub_(1).div_(bandwidth).square_().neg_().exp_()
        rho[start:stop] += kernel.sum(dim=1)
        rho[stop:] += kernel[:, _ROWS_AT_ONCE:].sum(dim=0)
    return rho


def dense_candidates(
    teacher: Tensor, student: Tensor, bandwidth: float = 0.1, quantile: float = 0.4
) -> Tensor:
    """Objects that lie in dense regions of both spaces; drops outliers.

    The threshold of a space is the entry at position ``floor(quantile N)`` of its sorted
    densities. Densities must exceed it; where that leaves no candidate (ties, tiny classes)
    reaching it is enough, and where even that leaves none everything is a candidate.

    Returns:
        (K,) ascending indices among the rows (N, C) of length one; K >= 1 for N >= 1.
    """
    densities = torch.stack([density(teacher, bandwidth), density(student, bandwidth)])
    position = min(int(quantile * len(teacher)), len(teacher) - 1)
    threshold = densities.sort(dim=1).values[:, position, None]
    strict = (densities > threshold).all(dim=0)
    reached = (densities >= threshold).all(dim=0)
    everything = torch.ones_like(reached)
    for kept in (strict, reached, everything):
        if kept.any():
            break
    return kept.nonzero().flatten()


def coupled_coefficients(
    teacher_products: Tensor, student_products: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Minimisers w^t, w^s of ``||R^t - w^t t||^2 + ||R^s - w^s s||^2 + alpha (w^t - w^s)^2``, from
    the products ``p = <R, atom>`` with unit atoms t, s; any shape. Infinite alpha makes them equal.
    """
    mean = (teacher_products + student_products) / 2
    half_gap = (teacher_products - student_products) / (2 * (1 + 2 * alpha))
    return mean + half_gap, mean - half_gap


def matching_pursuit(
    teacher: Tensor, student: Tensor, candidates: Tensor, count: int, alpha: float = 10.0
) -> list[int]:
    """Coupled matching pursuit: greedily the candidates that best rebuild all objects.

    Choosing candidate k lowers the cost by ``sum_n a^2 / 2 + d^2 / (2 (1 + 2 alpha))`` with the
    sums a and differences d of the products ``p^x_n = <R^x_n, x_k>`` of the two spaces. That is a
    weighted sum of ``<p^t, p^t>``, ``<p^s, p^s>`` and ``<p^t, p^s>``; these three numbers a
    candidate are all that is kept, and an update after each choice takes matrix-vector products
    only. So a step costs O((N + K) C) and nothing of size K x N exists.

    Args:
        teacher, student: (N, C_t), (N, C_s), rows of length one.
        candidates: (K,) ascending indices of the rows that may be chosen.

    Returns:
        chosen rows in order of choice, none twice, at most ``count``; fewer when nothing is left
        to explain. Among equal gains the lowest index wins.
    """
    t, s = teacher[candidates], student[candidates]
    rest_t, rest_s = teacher.clone(), student.clone()
    tt = _row_dot(t @ (rest_t.T @ rest_t), t)
    ss = _row_dot(s @ (rest_s.T @ rest_s), s)
    ts = _row_dot(t @ (rest_t.T @ rest_s), s)
    damping = 1 / (1 + 2 * alpha)
    rounding = _NEGLIGIBLE * 2 * len(teacher)
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        gain = (1 + damping) / 2 * (tt + ss) + (1 - damping) * ts
        gain[chosen] = -torch.inf
        best = gain.max()
        if best <= rounding:
            break
        pick = int((gain >= best - rounding).nonzero()[0])
        chosen.append(pick)
        w_t, w_s = coupled_coefficients(rest_t @ t[pick], rest_s @ s[pick], alpha)
        # Taking w x_pick away from the residuals takes <x_k, x_pick> w away from p_k.
        cos_t, cos_s = t @ t[pick], s @ s[pick]
        tt -= 2 * cos_t * (t @ (rest_t.T @ w_t)) - cos_t.square() * (w_t @ w_t)
        ss -= 2 * cos_s * (s @ (rest_s.T @ w_s)) - cos_s.square() * (w_s @ w_s)
        ts -= cos_t * (s @ (rest_s.T @ w_t)) + cos_s * (t @ (rest_t.T @ w_s))
        ts += cos_t * cos_s * (w_t @ w_s)
        rest_t.addr_(w_t, t[pick], alpha=-1)
        rest_s.addr_(w_s, s[pick], alpha=-1)
    return candidates[chosen].tolist()


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """(K, C), (K, C) -> (K,)."""
    return torch.einsum("kc,kc->k", a, b)


@full_precision
@torch.no_grad()
def select_prototypes(
    teacher: Tensor,
    student: Tensor,
    count: int,
    alpha: float = 10.0,
    bandwidth: float = 0.1,
    quantile: float = 0.4,
) -> list[int]:
    """Choose the prototypes of one class on one level.

    Args:
        teacher, student: (N, C_t), (N, C_s) features of the same N objects, any length. An
            object whose feature is zero or not finite in either space is left out.
        count: M, largest number of prototypes.

    Returns:
        at most M distinct row numbers in order of choice, empty without usable objects.
    """
    units = [unit_vectors(rows) for rows in (teacher, student)]
    usable = torch.stack([_is_unit(rows) for rows in units]).all(dim=0).nonzero().flatten()
    if len(usable) == 0:
        return []
    units = [rows[usable] for rows in units]
    candidates = dense_candidates(*units, bandwidth=bandwidth, quantile=quantile)
    chosen = matching_pursuit(*units, candidates, count, alpha)
    return usable[chosen].tolist()


def _is_unit(rows: Tensor) -> Tensor:
    """(N,) bool; false for rows that were zero or not finite before they were scaled."""
    return rows.square().sum(dim=1) > 0.5
