"""What gradients that are written out save over autograd's: time, kept memory, operators.

    python -m d2kd.benchmark.gradients [--device cuda] --json docs/results/gradients.json

For each custom ``autograd.Function`` of the losses on outputs and graphs: the function and the
plain formula that it replaces, at the sizes of a step on two images of 320 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from ..arguments import CommandParser, file_to_write, positive
from ..files import write_json
from ..losses.dsig import cosine_graph
from ..losses.logits import dense_class_loss
from ..losses.mimic import mimic_loss
from ..numerics import inverse_lengths, softened_kl
from .counts import count_operators
from .machine import machine, machine_text
from .steps import timed

Loss = Callable[[Tensor], Tensor]

# Two images of 320 px on RetinaNet: anchors per position, classes, positions.
DENSE = (2, 9, 80, 2134)
# Two images of 320 px at stride 4.
LEVEL = (2, 256, 80, 80)
# Two images of 256 nodes with 256 channels of 7 x 7 cells.
NODES = (2, 256, 12544)


def plain_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """:func:`softened_kl` as PyTorch's functions give it, over dimension 2."""
    log_q, log_p = F.log_softmax(student, 2), F.log_softmax(teacher, 2)
    return (F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(2) * weights).sum()


def plain_focused(student: Tensor, teacher: Tensor) -> Tensor:
    """The focused divergence of :func:`dense_class_loss`, of one foreground anchor."""
    p, q = teacher.sigmoid(), student.sigmoid()
    divergence = F.binary_cross_entropy_with_logits(student, p, reduction="none")
    return ((q - p).abs() * divergence).sum()


def plain_cosines(nodes: Tensor) -> Tensor:
    """:func:`cosine_graph`, differentiated by autograd."""
    gram = nodes @ nodes.mT
    inverse = inverse_lengths(gram.diagonal(dim1=-2, dim2=-1))
    others = ~torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    return gram * inverse[:, :, None] * inverse[:, None, :] * others


def cases(device: str) -> Iterator[tuple[str, Tensor, Loss, Loss]]:
    """(name, student's tensor, the function, what it replaces)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student, teacher = randn(*DENSE), randn(*DENSE)
    valid = torch.ones(DENSE[0], DENSE[1], DENSE[3], device=device)
    one = torch.ones((), device=device)
    yield (
        "softened KL of 80 logits per anchor (DSIG)",
        student,
        lambda x: softened_kl(x, teacher, 1.0, valid, 2),
        lambda x: plain_kl(x, teacher, valid),
    )
    yield (
        "focused divergence of these logits (Logits)",
        student,
        lambda x: dense_class_loss(x, teacher, valid.bool(), one),
        lambda x: plain_focused(x, teacher),
    )
    nodes, edges = randn(*NODES), randn(NODES[0], NODES[1], NODES[1])
    yield (
        "cosines of 256 nodes per image (DSIG)",
        nodes,
        lambda x: F.mse_loss(cosine_graph(x), edges),
        lambda x: F.mse_loss(plain_cosines(x), edges),
    )
    level, target = randn(*LEVEL).bfloat16(), randn(*LEVEL).bfloat16()
    yield (
        "L2 of a pyramid level in bf16 (FeatureMimic, DSIG)",
        level,
        lambda x: mimic_loss(x, target),
        lambda x: F.mse_loss(x.float(), target.float()),
    )


def kept_memory(loss: Loss, x: Tensor) -> float:
    """MiB that are kept for the backward pass in addition to the student's own tensor."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(x)
    storages.pop(x.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values()) / 2**20


def measure(loss: Loss, x: Tensor, repeats: int) -> tuple[float, float, int]:
    """Milliseconds (the least) forward and backward, MiB kept between them, operators."""

    def step() -> None:
        x.grad = None
        loss(x).backward()

    step()
    seconds = min(timed(step, x.device.type) for _ in range(repeats))
    operators = count_operators(step, torch.nn.Identity()).operators
    return seconds * 1e3, kept_memory(loss, x), operators


def markdown(measured: dict[str, Any]) -> str:
    """The table of a file that this command has written."""
    rows = [list(row.values()) for row in measured["rows"]]
    header = ["", "gradient", "ms", "MiB kept", "operators"]
    table = tabulate(rows, header, tablefmt="pipe", floatfmt=".1f")
    return f"{table}\n\n{machine_text(measured['machine'])}, best of {measured['repeats']}."


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--json", type=file_to_write(), help="write the rows to this file as well")
    args = parser.parse_args(argv)
    rows = []
    for name, x, written, plain in cases(args.device):
        x.requires_grad_()
        torch.testing.assert_close(written(x), plain(x), rtol=1e-4, atol=1e-6)
        for kind, loss in (("written out", written), ("autograd", plain)):
            ms, mib, operators = measure(loss, x, args.repeats)
            numbers = {"ms": ms, "MiB": mib, "operators": operators}
            rows.append({"of": name, "gradient": kind, **numbers})
    measured = {"machine": machine(args.device), "repeats": args.repeats, "rows": rows}
    print(markdown(measured))
    if args.json:
        write_json(measured, args.json)


if __name__ == "__main__":
    main()
