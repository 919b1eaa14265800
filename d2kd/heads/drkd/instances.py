"""DRKD's instance-wise relation: relation units, which refine each instance by the others of its
image, and the relation filter inside them.

Units of both sides and of all levels are evaluated together: each of their linear layers on the
instances as they come, image after image, and what relates instances on a padded grid.

Shapes: U units, B images, R instances of the batch, n = the most instances that one image has,
D = C x k x k features of an instance, d the width inside a unit, e that of the learned filter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...numerics import Ragged, full_precision

RELATION_FILTERS = ("learned", "uniform", "random", "none")


class RelationFilter(nn.Module):
    """Relation filter F: a weight on the similarity of each pair of instances of an image.

    The released code draws a new random linear layer D -> n in each forward pass, which is never
    trained; in expectation its row softmax is 1/n. ``learned`` is a persistent form of it that does
    not depend on the order of the instances: F = softmax_rows((x U_q)(x U_k)^T / sqrt(e)), with U_k
    zero at first, so that F starts at exactly 1/n. ``uniform`` is 1/n, ``random`` is what the
    released code does, ``none`` is 1.

    Args:
        dim: D.
        kind: one of ``RELATION_FILTERS``.
        width: e, of the learned filter.
    """

    def __init__(self, dim: int, kind: str = "learned", width: int = 64) -> None:
        super().__init__()
        if kind not in RELATION_FILTERS:
            raise ValueError(f"relation filter must be one of {RELATION_FILTERS}, got {kind!r}")
        self.kind = kind
        if kind == "learned":
            self.query = nn.Linear(dim, width, bias=False)
            self.key = nn.Linear(dim, width, bias=False)
            nn.init.zeros_(self.key.weight)

    def layers(self) -> list[nn.Linear]:
        """U_q and U_k of the learned filter; the others have none."""
        return [self.query, self.key] if self.kind == "learned" else []


class InstanceRelation(nn.Module):
    """Relation matrix psi of the instances of each image.

    psi = softmax_rows((W_q x + b_q)(W_k x + b_k)^T * F(x)), without a 1/sqrt(d), as in the code.
    The module holds the parameters; :func:`relation_matrices` evaluates many at once.

    Args:
        dim: D, features of an instance.
        width: d, of queries and keys; the default 0 means D/2.
        relation_filter: kind of the filter F, see ``RelationFilter``.
    """

    def __init__(self, dim: int, width: int = 0, relation_filter: str = "learned") -> None:
        super().__init__()
        self.width = width or max(dim // 2, 1)
        self.query = nn.Linear(dim, self.width)
        self.key = nn.Linear(dim, self.width)
        self.filter = RelationFilter(dim, relation_filter)


class RelationUnit(nn.Module):
    """Instance-wise relation rho: each instance, refined by the instances of its image.

    rho(x) = x + W_o (psi(x) (W_v x + b_v)) + b_o.
    The module holds the parameters; :func:`refine_instances` evaluates many at once.

    Args:
        dim, width, relation_filter: as of :class:`InstanceRelation`.
    """

    def __init__(self, dim: int, width: int = 0, relation_filter: str = "learned") -> None:
        super().__init__()
        self.relation = InstanceRelation(dim, width, relation_filter)
        self.value = nn.Linear(dim, self.relation.width)
        self.output = nn.Linear(self.relation.width, dim)


@full_precision
def relation_matrices(
    relations: Sequence[InstanceRelation], instances: Sequence[Tensor], rows: Ragged
) -> list[Tensor]:
    """psi of each of U units, those of one width side by side, on instances (R, D) of its own.

    Returns:
        (B, n, n) for each unit: rows of instances sum to 1, rows and columns of padding are 0.
    """
    matrices: list[Tensor] = []
    for _, run in itertools.groupby(zip(relations, instances, strict=True), lambda p: p[0].width):
        equal, inputs = zip(*run, strict=True)
        grid = _all_rows(rows, len(equal))
        matrix, _ = _relate(equal, inputs, grid)
        if not grid.is_full:
            matrix = matrix * grid.valid.unsqueeze(2)
        matrices += matrix.unflatten(0, (len(equal), -1)).unbind()
    return matrices


@full_precision
def refine_instances(
    units: Sequence[RelationUnit], instances: Sequence[Tensor], rows: Ragged
) -> list[Tensor]:
    """rho (R, D) of each of U units, those of one width side by side, on instances (R, D) of its
    own."""
    refined: list[Tensor] = []
    pairs = zip(units, instances, strict=True)
    for _, run in itertools.groupby(pairs, lambda pair: pair[0].relation.width):
        equal, inputs = zip(*run, strict=True)
        grid = _all_rows(rows, len(equal))
        relations = [unit.relation for unit in equal]
        matrix, values = _relate(relations, inputs, grid, [unit.value for unit in equal])
        mixed = grid.unpad(matrix @ values).unflatten(0, (len(equal), sum(rows.counts)))
        refined += [
            x + unit.output(m) for unit, x, m in zip(equal, inputs, mixed.unbind(), strict=True)
        ]
    return refined


def _all_rows(rows: Ragged, units: int) -> Ragged:
    """The grid (U B, n) of U units' instances: those of one unit after those of another."""
    return Ragged(rows.counts * units, rows.device)


def _relate(
    relations: Sequence[InstanceRelation],
    instances: Sequence[Tensor],
    grid: Ragged,
    value_layers: Sequence[nn.Linear] = (),
) -> tuple[Tensor, Tensor]:
    """psi of units of one width, and what further layers make of the instances.

    Returns:
        (U B, n, n) with rows of padding undefined, though finite; (U B, n, d), or (U B, n, 0)
        without layers.
    """
    layers = [
        [relation.query, relation.key, *relation.filter.layers(), *value_layers[i : i + 1]]
        for i, relation in enumerate(relations)
    ]
    widths = [layer.out_features for layer in layers[0]]
    outputs = apply_layers(layers, instances)
    query, key, *others = grid.pad(outputs.flatten(0, 1)).split(widths, dim=2)
    similarity = query @ key.mT
    kind = relations[0].filter.kind
    if kind == "learned":
        logits = others[0] @ others[1].mT / math.sqrt(others[0].shape[2])
        similarity = similarity * _softmax(logits, grid)
    elif kind == "random":
        similarity = similarity * _softmax(
            _random_linear(grid.pad(torch.cat(list(instances)))), grid
        )
    elif kind == "uniform":
        similarity = similarity / grid.lengths.clamp(min=1)[:, None, None]
    values = others[-1] if value_layers else query[:, :, :0]
    return _softmax(similarity, grid), values


def apply_layers(layers: Sequence[Sequence[nn.Linear]], inputs: Sequence[Tensor]) -> Tensor:
    """Linear layers side by side, those of each unit on its own input.

    Args:
        layers: of U units, as many and as wide for each.
        inputs: (R, D) for each unit; D may differ.

    Returns:
        (U, R, sum of the layers' widths).
    """
    flat = [layer for own in layers for layer in own]
    biases = [layer.bias for layer in flat if layer.bias is not None]
    has_bias = [layer.bias is not None for layer in layers[0]]
    weights = [layer.weight for layer in flat]
    output: Tensor = _Layers.apply(has_bias, len(inputs), *inputs, *weights, *biases)
    return output


class _Layers(torch.autograd.Function):
    """What :func:`apply_layers` does, without the copies and sums that autograd adds: each product
    goes where it belongs, an input's gradient is accumulated by the products themselves, and those
    of all biases are one sum."""

    @staticmethod
    def forward(ctx: Any, has_bias: Sequence[bool], units: int, *tensors: Tensor) -> Tensor:
        inputs, weights, biases = _split(tensors, units, units * len(has_bias))
        widths = [len(weight) for weight in weights[: len(has_bias)]]
        ctx.save_for_backward(*inputs, *weights)
        ctx.has_bias, ctx.units, ctx.widths = has_bias, units, widths
        output = inputs[0].new_empty(units, len(inputs[0]), sum(widths))
        parts = [part for own in output for part in own.split(widths, 1)]
        rest = iter(biases)
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            x = inputs[k // len(has_bias)]
            if has_bias[k % len(has_bias)]:
                torch.addmm(next(rest), x, weight.mT, out=part)
            else:
                torch.mm(x, weight.mT, out=part)
        return output

    @staticmethod
    @once_differentiable
    @full_precision  # autocast may be on where backward() is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth, units = len(ctx.has_bias), ctx.units
        inputs, weights, _ = _split(ctx.saved_tensors, units, units * depth)
        of_input, of_weight, _ = _split(ctx.needs_input_grad[2:], units, units * depth)
        parts = [part for own in grad for part in own.split(ctx.widths, 1)]
        grad_inputs: list[Tensor | None] = [None] * units
        grad_weights: list[Tensor | None] = [None] * len(weights)
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            unit = k // depth
            if of_weight[k]:
                grad_weights[k] = part.mT @ inputs[unit]
            if of_input[unit]:
                so_far = grad_inputs[unit]
                product = part @ weight if so_far is None else so_far.addmm_(part, weight)
                grad_inputs[unit] = product
        sums = [part for own in grad.sum(1) for part in own.split(ctx.widths)]
        grad_biases = [total for k, total in enumerate(sums) if ctx.has_bias[k % depth]]
        return None, None, *grad_inputs, *grad_weights, *grad_biases


def _split(items: Sequence[Any], first: int, second: int) -> tuple[Any, Any, Any]:
    """The first items, those after them, and the rest."""
    return items[:first], items[first : first + second], items[first + second :]


def _softmax(logits: Tensor, grid: Ragged) -> Tensor:
    """Softmax over the instances of the same image: (U B, n, n) -> (U B, n, n).

    Columns of padding are 0; rows of padding are finite, so that an image without instances does
    not spoil the gradients of the others.
    """
    if not grid.is_full:
        padding = ~grid.valid.unsqueeze(1)
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    return logits.softmax(2)


def _random_linear(x: Tensor) -> Tensor:
    """A fresh ``nn.Linear(D, n)``, initialised as usual, for each image of each unit: (U B, n, D)
    -> (U B, n, n)."""
    groups, size, dim = x.shape
    bound = 1 / math.sqrt(dim)
    weight = x.new_empty(groups, dim, size).uniform_(-bound, bound)
    bias = x.new_empty(groups, 1, size).uniform_(-bound, bound)
    return torch.baddbmm(bias, x, weight)
