"""The head of a one-stage detector: RetinaNet, FCOS, and what is built like them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn

from ..registry import DETECTOR_PART_REGISTRY
from .bundle import DenseView, lazy
from .part import DetectorPart, StudentStep, TeacherStep, by_stride
from .spec import DetectorSpec, Facts, has_all, strides_of

# Branch of a dense head -> names of its tower of convolutions and of the one that predicts.
_BRANCHES = {"cls": ("cls_subnet", "cls_score"), "box": ("bbox_subnet", "bbox_pred")}

# Of a RetinaNet or FCOS, beyond the head.
_ATTRIBUTES = ("head_in_features", "num_classes", "anchor_generator", "box2box_transform")


@DETECTOR_PART_REGISTRY.register()
class DensePart(DetectorPart):
    """``bundle.dense``."""

    name = "dense"
    optional = (
        *("class_tower", "box_tower", "tower_maps", "finish_tower"),
        *("labels", "matched_boxes"),
    )

    def describe(self, model: nn.Module, student: DetectorSpec | None) -> Facts:
        if not has_all(model, "head", *_ATTRIBUTES):
            return Facts()
        dense: Any = model
        fields = {"dense.logits", "dense.deltas", "dense.anchors"}
        sizes = {
            "num_classes": dense.num_classes,
            "anchors_per_location": dense.anchor_generator.num_anchors[0],
            "anchors": _anchor_numbers(dense),
            "head_strides": strides_of(dense, dense.head_in_features),
            "box_coding": type(dense.box2box_transform).__name__,
        }
        if student is None and hasattr(dense, "label_anchors"):
            fields |= {"dense.labels", "dense.matched_boxes"}
        if hasattr(dense.head, "cls_subnet") and hasattr(dense.head, "bbox_subnet"):
            sizes["class_tower_channels"] = dense.head.cls_score.in_channels
            fields |= {"dense.class_tower", "dense.box_tower"}
            widths = [_widths(getattr(dense.head, tower)) for tower, _ in _BRANCHES.values()]
            if widths[0] and widths[0] == widths[1]:
                sizes["tower_channels"] = widths[0]
                fields.add("dense.tower_maps" if student is None else "dense.finish_tower")
        return Facts(fields, sizes)

    def taps(self, model: nn.Module, spec: DetectorSpec) -> Iterable[str]:
        yield from ("head", "anchor_generator")
        if "dense.class_tower" in spec.fields:
            yield from ("head.cls_subnet", "head.bbox_subnet")
        if "dense.tower_maps" in spec.fields:
            for tower, _ in _BRANCHES.values():
                positions = _convolutions(model.get_submodule(f"head.{tower}"))
                yield from (f"head.{tower}.{position}" for position in positions)
        if "dense.labels" in spec.fields:
            yield "label_anchors"

    def student_view(self, step: StudentStep) -> DenseView:
        return _StudentDense(step)

    def teacher_view(self, step: TeacherStep) -> DenseView:
        return _TeacherDense(step)


def _convolutions(tower: nn.Module) -> list[int]:
    """Positions of the convolutions in a tower; [] for one that is no sequence that begins with a
    convolution, in which one map cannot be told from the next."""
    if not isinstance(tower, nn.Sequential):
        return []
    positions = [i for i, layer in enumerate(tower) if isinstance(layer, nn.Conv2d)]
    distinct = len({tower[i] for i in positions}) == len(positions)
    return positions if positions[:1] == [0] and distinct else []


def _widths(tower: nn.Module) -> tuple[int, ...]:
    """Channels of the map that each convolution of a tower reads, and of the tower's output."""
    layers: Any = tower
    convolutions = [layers[position] for position in _convolutions(tower)]
    return (*(c.in_channels for c in convolutions), *(c.out_channels for c in convolutions[-1:]))


def _anchor_numbers(model: Any) -> dict[int, tuple[float, ...]] | None:
    """The numbers are not there on the meta device, or of a generator that is not Detectron2's."""
    generator = model.anchor_generator
    cells = list(getattr(generator, "cell_anchors", []))
    if not cells or any(cell.is_meta for cell in cells):
        return None
    corners = ([round(corner, 3) for corner in cell.flatten().tolist()] for cell in cells)
    numbers = [(generator.offset, *cell) for cell in corners]
    return by_stride(strides_of(model, model.head_in_features), numbers)


def delta_weights(model: Any) -> tuple[float, ...]:
    """Factors of a dense detector's box deltas; ones for a transform that has none (FCOS)."""
    return tuple(getattr(model.box2box_transform, "weights", (1.0, 1.0, 1.0, 1.0)))


def flatten_maps(maps: Mapping[int, Tensor], width: int) -> dict[int, Tensor]:
    """Dense predictions, stride -> (B, A x width, H, W), by anchor: (B, H W A, width)."""
    return {stride: permute_to_N_HWA_K(level, width) for stride, level in maps.items()}


class _StudentDense(DenseView):
    def __init__(self, step: StudentStep):
        model, strides = step.model, step.spec.head_strides
        self._step, self._num_classes = step, model.num_classes
        logits, deltas, *_ = step.outputs("head")[0]
        anchors = step.outputs("anchor_generator")[0]
        fields = {
            "anchors": by_stride(strides, [a.tensor for a in anchors]),
            "logit_maps": by_stride(strides, logits),
            "delta_maps": by_stride(strides, deltas),
        }
        if "dense.class_tower" in step.spec.fields:
            fields["class_tower"] = by_stride(strides, step.outputs("head.cls_subnet"))
            fields["box_tower"] = by_stride(strides, step.outputs("head.bbox_subnet"))
        if "dense.labels" in step.spec.fields:
            self._matched: tuple[list[Tensor], list[Tensor]] = step.outputs("label_anchors")[0]
        super().__init__(
            "student",
            delta_weights=delta_weights(model),
            decode=model.box2box_transform.apply_deltas,
            **fields,
        )

    @lazy
    def logits(self) -> dict[int, Tensor]:
        return flatten_maps(self.logit_maps, self._num_classes)

    @lazy
    def deltas(self) -> dict[int, Tensor]:
        return flatten_maps(self.delta_maps, 4)

    @lazy
    def tower_maps(self) -> dict[str, dict[int, Sequence[Tensor]]]:
        step = self._step
        found: dict[str, dict[int, Sequence[Tensor]]] = {}
        for branch, (tower, _) in _BRANCHES.items():
            positions = _convolutions(getattr(step.model.head, tower))
            # What a convolution reads, not what the layer before it returns: all convolutions of a
            # tower may share one activation.
            maps = [[c.inputs[0] for c in step.calls(f"head.{tower}.{i}")] for i in positions]
            levels = zip(*maps, step.outputs(f"head.{tower}"), strict=True)
            found[branch] = by_stride(step.spec.head_strides, levels)
        return found

    @lazy
    def labels(self) -> Tensor:
        return torch.stack(list(self._matched[0]))

    @lazy
    def matched_boxes(self) -> Tensor:
        return torch.stack(list(self._matched[1]))


class _TeacherDense(DenseView):
    def __init__(self, step: TeacherStep):
        self._step, self._model = step, step.model
        self._strides = step.spec.head_strides
        super().__init__(
            "teacher",
            delta_weights=delta_weights(step.model),
            decode=step.model.box2box_transform.apply_deltas,
            finish_tower=self._finish_tower,
        )

    @lazy
    def class_tower(self) -> dict[int, Tensor]:
        return self._apply(self._model.head.cls_subnet)

    @lazy
    def box_tower(self) -> dict[int, Tensor]:
        return self._apply(self._model.head.bbox_subnet)

    def _apply(self, tower: nn.Module) -> dict[int, Tensor]:
        # Every level, in order: with BN the towers keep one norm per level and count the calls.
        return {s: tower(self._step.pyramid[s]) for s in self._strides}

    @lazy
    def _predicted(self) -> Sequence[list[Tensor]]:
        """Class and box predictions of a head without towers, (B, A x width, H, W) by level."""
        predicted: Sequence[list[Tensor]] = self._model.head(
            self._step.maps(self._model.head_in_features)
        )
        return predicted

    @lazy
    def logit_maps(self) -> dict[int, Tensor]:
        shared = self._step.spec.class_map
        if shared is None:
            return self.own_logit_maps
        mine, theirs = self._step.student.dense.logit_maps, self.own_logit_maps

        def by_class(maps: Mapping[int, Tensor], stride: int) -> Tensor:  # (B, A, K, H, W)
            return maps[stride].unflatten(1, (self._step.spec.anchors_per_location, -1))

        return {
            s: shared.fill(by_class(theirs, s), by_class(mine, s), dim=2).flatten(1, 2)
            for s in mine
            if s in theirs
        }

    @lazy
    def own_logit_maps(self) -> dict[int, Tensor]:
        if "dense.class_tower" in self._step.spec.fields:
            return {s: self._model.head.cls_score(m) for s, m in self.class_tower.items()}
        return by_stride(self._strides, self._predicted[0])

    @lazy
    def delta_maps(self) -> dict[int, Tensor]:
        if "dense.box_tower" in self._step.spec.fields:
            return {s: self._model.head.bbox_pred(m) for s, m in self.box_tower.items()}
        return by_stride(self._strides, self._predicted[1])

    @lazy
    def logits(self) -> dict[int, Tensor]:
        shared = self._step.spec.class_map
        width = len(shared.numbers) if shared else self._model.num_classes
        return flatten_maps(self.logit_maps, width)

    @lazy
    def deltas(self) -> dict[int, Tensor]:
        return flatten_maps(self.delta_maps, 4)

    @lazy
    def anchors(self) -> dict[int, Tensor]:
        own, students = (spec.anchors or {} for spec in (self._step.spec, self._step.student.spec))
        if own and all(students.get(stride) == own[stride] for stride in self._strides):
            made = self._step.student.dense.anchors
            return {stride: made[stride] for stride in self._strides}
        return self._step.anchors(self._model.anchor_generator, self._model.head_in_features)

    def _finish_tower(
        self, branch: str, maps: Mapping[int, Tensor], convolutions: int
    ) -> dict[int, Tensor]:
        tower, prediction = (getattr(self._model.head, name) for name in _BRANCHES[branch])
        start = [*_convolutions(tower), len(tower)][-1 - convolutions]
        rest, weight = tower[start:], prediction.weight
        # In place of a level that is not asked for, as towers may count the calls: see class_tower.
        empty = weight.new_zeros(1, self._step.spec.tower_channels[-1 - convolutions], 2, 2)
        # The teacher's own precision; its parameters are frozen, the maps are not.
        with self._context(), torch.enable_grad():
            levels = {stride: maps.get(stride, empty) for stride in self._strides}
            if not torch.is_autocast_enabled(weight.device.type):
                levels = {stride: level.to(weight.dtype) for stride, level in levels.items()}
            read = {stride: rest(level) for stride, level in levels.items()}
            return {stride: prediction(read[stride]) for stride in maps}
