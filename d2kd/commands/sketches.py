"""What the heads of a Distiller distil of an image, as pictures: ``d2kd show --heads``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..detectors.bundle import Batch, FeatureBundle
from ..engine.checkpoint import AtomicCheckpointer
from ..errors import ConfigError
from ..heads import DistillHead
from ..meta_arch import Distiller
from ..prototypes.store import Prototypes

MAX_EDGES = 200  # the strongest, of a graph


class Row(NamedTuple):
    """A row of pictures of one image: what it shows, and by title a map (stride, (H, W)) or a graph
    (boxes (n, 4), edges (n, n))."""

    title: str
    cells: dict[str, tuple[Any, Tensor]]


def build_distiller(cfg: CfgNode, heads: Sequence[str]) -> Distiller:
    """The Distiller of ``cfg`` with its weights, to look at one step of."""
    known = list(cfg.DISTILL.HEADS) if cfg.MODEL.META_ARCHITECTURE == "Distiller" else []
    if not known or set(heads) - set(known):
        raise ConfigError(f"--heads {' '.join(heads)}: the config's DISTILL.HEADS are {known}")
    torch.manual_seed(0)
    distiller: Distiller = build_model(cfg).train()
    if cfg.MODEL.WEIGHTS:
        AtomicCheckpointer(distiller).load_weights(cfg.MODEL.WEIGHTS)
    bank = getattr(distiller.distill_heads, "GlobalKnowledge", None)
    file = cfg.DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE
    if file and bank is not None and bank.bank is not None:
        bank.bank.fill(Prototypes.load(file), 0)
    distiller.before_training()
    for module in distiller.modules():
        if isinstance(module, _BatchNorm):  # one image gives no statistics
            module.eval()
    return distiller


def sketch_image(distiller: Distiller, item: dict, heads: Sequence[str]) -> list[Row]:
    """What the heads distil of one training image."""
    torch.manual_seed(0)
    batch = Batch.from_inputs([item], distiller.device, max_iter=distiller.max_iter)
    with distiller.taps, EventStorage():
        distiller.student([item])  # Detectron2 may draw it, which needs boxes on the CPU
    student = distiller.taps.bundle(batch)
    spec, taps = distiller.teacher_spec, distiller.taps
    teacher = distiller.teacher.bundle(batch.inputs, spec, student, taps)
    rows = [_gap_row(student, teacher)]
    for name in heads:
        head: Any = distiller.distill_heads[name]
        with EventStorage():
            rows += list(_head_rows(name, head, student, teacher, batch))
    taps.clear()
    return rows


def _gap_row(student: FeatureBundle, teacher: FeatureBundle) -> Row:
    """Where the squared activations of the maps, as shares of their sum, differ. Half the sum of
    the differences is from 0 to 1, whatever the channels are."""
    cells = {}
    for stride in (s for s in student.pyramid if s in teacher.pyramid):
        mine, theirs = (_shares(bundle.pyramid[stride]) for bundle in (student, teacher))
        gap = (mine - theirs).abs() / 2
        cells[f"stride {stride}: {float(gap.sum()):.0%} apart"] = (stride, gap)
    return Row("gap of the pyramids", cells)


def _shares(maps: Tensor) -> Tensor:
    energy = maps[0].detach().float().square().sum(0)
    return energy / energy.sum().clamp(min=1e-12)


def _head_rows(
    name: str, head: DistillHead, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
) -> Iterator[Row]:
    """Where the head's loss pulls at the student's pyramid, and its own sketch."""
    terms = head(student, teacher, batch)
    words = ", ".join(
        f"{term or 'loss'} {float(loss.detach()):.3g}" for term, loss in terms.items()
    )
    pull = pull_of(sum(terms.values()), student)
    total = max(sum(float(m.sum()) for m in pull.values()), 1e-12)
    cells = {f"stride {s}: {float(m.sum()) / total:.0%}": (s, m) for s, m in pull.items()}
    yield Row(f"{name} ({words}): where it pulls", cells)
    sketch = head.sketch(student, teacher, batch)
    for title, levels in sketch.maps.items():
        cells = {f"stride {s}: largest {float(m.max()):.3g}": (s, m) for s, m in levels.items()}
        yield Row(f"{name}: {title}", cells)
    if sketch.graphs:
        yield Row(
            f"{name}: graph", {f"{t} ({len(g[0])} nodes)": g for t, g in sketch.graphs.items()}
        )
    if sketch.note:
        yield Row(f"{name}: {sketch.note}", {})


def pull_of(loss: Any, student: FeatureBundle) -> dict[int, Tensor]:
    """Length of the loss's gradient in each cell of the student's pyramid: stride -> (H, W)."""
    maps = dict(student.pyramid)
    grads: Sequence[Tensor | None] = [None] * len(maps)
    if getattr(loss, "requires_grad", False):
        grads = torch.autograd.grad(loss, list(maps.values()), retain_graph=True, allow_unused=True)
    return {
        stride: torch.zeros(level.shape[-2:]) if grad is None else grad[0].float().norm(dim=0)
        for (stride, level), grad in zip(maps.items(), grads, strict=True)
    }


def draw_rows(rows: Sequence[tuple[dict, Row]], input_format: str) -> plt.Figure:
    """Rows, each with the training image that it is of, one below the other."""
    columns = 1 + max(len(row.cells) for _, row in rows)
    size = (2.2 * columns, 2.8 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for (first, *others), (item, row) in zip(axes, rows, strict=True):
        draw_image(first, item, input_format, textwrap.fill(row.title, 36))
        for axis, (title, (place, values)) in zip(others, row.cells.items(), strict=False):
            draw_image(axis, item, input_format, title, grey=True)
            if isinstance(place, int):
                draw_map(axis, values.cpu(), place)
            else:
                draw_graph(axis, place.cpu(), values.cpu())
    figure.tight_layout(pad=0.5)
    return figure


def draw_image(axis: Any, item: dict, input_format: str, title: str, grey: bool = False) -> None:
    """A training image with its boxes; ``grey``: faint, so that colours over it carry the
    meaning."""
    image = item["image"].permute(1, 2, 0).numpy()
    if input_format == "BGR":
        image = image[..., ::-1]
    if grey:
        image = np.repeat(image.mean(axis=2, keepdims=True) * 0.5 + 127, 3, axis=2).astype(np.uint8)
    axis.imshow(image)
    for x1, y1, x2, y2 in item["instances"].gt_boxes.tensor.tolist():
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=0.7, ec="#0050ff"))
    axis.set_title(title, fontsize=8)


def draw_map(axis: Any, values: Tensor, stride: int) -> None:
    """Lay a map over the image, a square per cell, transparent where it is zero."""
    height, width = values.shape
    limits = axis.axis()
    extent = (-0.5, width * stride - 0.5, height * stride - 0.5, -0.5)
    top = max(float(values.max()), 1e-6)
    shown = np.ma.masked_equal(values.numpy(), 0)
    axis.imshow(shown, extent=extent, cmap="YlOrRd", vmin=0, vmax=top, alpha=0.75)
    axis.axis(limits)


def draw_graph(axis: Any, boxes: Tensor, edges: Tensor) -> None:
    """Boxes as points, and the strongest edges between them, the stronger the more opaque."""
    limits = axis.axis()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    axis.scatter(*centres.T.numpy(), s=4, c="#d00000")
    if len(boxes) < 2:
        return
    first, second = torch.triu_indices(len(boxes), len(boxes), 1)
    shown, chosen = edges[first, second].abs().topk(min(MAX_EDGES, len(first)))
    pairs = torch.stack([first, second], dim=1)[chosen]
    alphas = (shown / shown.max().clamp(min=1e-12)).tolist()
    colours = [(0.8, 0.0, 0.0, alpha) for alpha in alphas]
    axis.add_collection(LineCollection(centres[pairs].numpy(), colors=colours, linewidths=0.8))
    axis.axis(limits)
