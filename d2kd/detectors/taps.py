"""Taps: what the student computed, captured from its own unmodified forward by forward hooks.

The hooks sit on named submodules, which are looked up when the model is built. They only keep
references to tensors that the student's own losses hold on to anyway, and drop them after the step.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn

from .bundle import Batch, DenseView, FeatureBundle, Lazy, MaskView, RoIView, RPNView, image_index
from .spec import DetectorSpec, box_stages, dense_delta_weights, feature_strides


class Taps:
    """Forward hooks on a student; ``with taps:`` records one forward, :meth:`bundle` reads it.

    Args:
        student: the detector to tap.
        spec: its :func:`~d2kd.bundle.describe_detector`.
    """

    def __init__(self, student: nn.Module, spec: DetectorSpec):
        self.student = student
        self.spec = spec
        self._recording = False
        self._calls: dict[str, list[tuple]] = defaultdict(list)
        for name in self._paths():
            # Not a closure: a copy of the Distiller records into its own taps, and can be pickled.
            hook = functools.partial(self._record, name)
            student.get_submodule(name).register_forward_hook(hook)

    def _paths(self) -> list[str]:
        """Names of the submodules to tap: those that the student's fields come from."""
        fields, paths = self.spec.fields, ["backbone"]
        if "roi" in fields:
            paths += ["roi_heads", "roi_heads.box_pooler"]
            for suffix, _, _ in box_stages(self.student.roi_heads):
                paths += [f"roi_heads.box_head{suffix}", f"roi_heads.box_predictor{suffix}"]
        if "mask" in fields:
            paths += ["roi_heads.mask_pooler", "roi_heads.mask_head"]
        if "mask.logits" in fields:
            paths.append("roi_heads.mask_head.predictor")
        if "rpn.anchors" in fields:
            paths.append("proposal_generator.anchor_generator")
        if "rpn.features" in fields:
            paths += ["proposal_generator.rpn_head", "proposal_generator.rpn_head.conv"]
        if "dense.logits" in fields:
            paths += ["head", "anchor_generator"]
        if "dense.class_tower" in fields:
            paths += ["head.cls_subnet", "head.bbox_subnet"]
        return paths

    def _record(self, name: str, module: nn.Module, inputs: tuple, output) -> None:
        if self._recording:
            self._calls[name].append((inputs, output))

    def __enter__(self) -> Taps:
        self._calls.clear()
        self._recording = True
        return self

    def __exit__(self, *_) -> None:
        self._recording = False

    def clear(self) -> None:
        """Drop the references to the last step's tensors."""
        self._calls.clear()

    def _outputs(self, name: str) -> list:
        return [output for _, output in self._calls[name]]

    def bundle(self, batch: Batch) -> FeatureBundle:
        """The student's view of the forward that was recorded last."""
        (images, *_), features = self._calls["backbone"][0]
        fields = {
            "image_sizes": batch.image_sizes,
            "padded_size": tuple(images.shape[-2:]),
            "pyramid": {s: features[name] for name, s in feature_strides(self.student).items()},
        }
        if "roi" in self.spec.fields:
            fields["rois"] = [self._roi_view(k, batch) for k in range(self.spec.num_stages)]
        if "mask" in self.spec.fields:
            fields["mask"] = self._mask_view()
        if "rpn.anchors" in self.spec.fields:
            fields["rpn"] = self._rpn_view()
        if "dense.logits" in self.spec.fields:
            fields["dense"] = self._dense_view(batch)
        return FeatureBundle(self.spec, **fields)

    # Boxes come from the pooler's inputs: with TRAIN_ON_PRED_BOXES the proposals that roi_heads
    # returns are overwritten after pooling.
    def _roi_view(self, stage: int, batch: Batch) -> RoIView:
        (_, pooler_boxes), features = self._calls["roi_heads.box_pooler"][stage]
        boxes = [b.tensor.detach() for b in pooler_boxes]
        suffix, _, predictor = box_stages(self.student.roi_heads)[stage]
        logits, deltas = self._outputs(f"roi_heads.box_predictor{suffix}")[0]
        return RoIView(
            "student",
            boxes=boxes,
            labels=Lazy(lambda: self._roi_labels(stage, boxes, batch)),
            image_index=Lazy(lambda: image_index(boxes)),
            features=features,
            hidden=self._outputs(f"roi_heads.box_head{suffix}")[0],
            logits=logits,
            deltas=deltas,
            delta_weights=tuple(predictor.box2box_transform.weights),
        )

    def _roi_labels(self, stage: int, boxes: list[Tensor], batch: Batch) -> Tensor:
        if stage == 0:
            proposals, _ = self._outputs("roi_heads")[0]
            return torch.cat([p.gt_classes for p in proposals])
        # A cascade labels its later stages inside its forward; the same matcher gives the same.
        roi_heads = self.student.roi_heads
        labels = []
        for boxes_i, gt in zip(boxes, batch.instances, strict=True):
            quality = pairwise_iou(gt.gt_boxes, Boxes(boxes_i))
            matched, foreground = roi_heads.proposal_matchers[stage](quality)
            background = torch.full_like(matched, roi_heads.num_classes)
            classes = gt.gt_classes[matched] if len(gt) else background
            labels.append(torch.where(foreground == 1, classes, background))
        return torch.cat(labels)

    def _mask_view(self) -> MaskView:
        (_, pooler_boxes), features = self._calls["roi_heads.mask_pooler"][0]
        boxes = [b.tensor.detach() for b in pooler_boxes]
        (_, instances), _ = self._calls["roi_heads.mask_head"][0]
        fields = {"features": features}
        if "mask.logits" in self.spec.fields:
            fields["logits"] = self._outputs("roi_heads.mask_head.predictor")[0]
        return MaskView(
            "student",
            boxes=boxes,
            labels=torch.cat([i.gt_classes for i in instances]),
            image_index=Lazy(lambda: image_index(boxes)),
            **fields,
        )

    def _rpn_view(self) -> RPNView:
        names = self.student.proposal_generator.in_features
        strides = [feature_strides(self.student)[name] for name in names]
        anchors = self._outputs("proposal_generator.anchor_generator")[0]
        fields = {"anchors": _by_stride(strides, [a.tensor for a in anchors])}
        if "rpn.features" in self.spec.fields:
            logits, deltas = self._outputs("proposal_generator.rpn_head")[0]
            fields["logits"] = _by_stride(strides, logits)
            fields["deltas"] = _by_stride(strides, deltas)
            fields["features"] = _by_stride(
                strides, self._outputs("proposal_generator.rpn_head.conv")
            )
        return RPNView("student", **fields)

    def _dense_view(self, batch: Batch) -> DenseView:
        student = self.student
        strides = [feature_strides(student)[name] for name in student.head_in_features]
        anchors = self._outputs("anchor_generator")[0]
        logits, deltas, *_ = self._outputs("head")[0]
        fields = {}
        if "dense.class_tower" in self.spec.fields:
            fields["class_tower"] = _by_stride(strides, self._outputs("head.cls_subnet"))
            fields["box_tower"] = _by_stride(strides, self._outputs("head.bbox_subnet"))
        if "dense.labels" in self.spec.fields:
            # Dense detectors match anchors inside their forward without randomness: doing it again
            # gives the same labels, and only where a head asks for them.
            @functools.cache
            def matching() -> tuple[Tensor, Tensor]:
                labels, boxes = student.label_anchors(anchors, batch.instances)
                return torch.stack(list(labels)), torch.stack(list(boxes))

            fields["labels"] = Lazy(lambda: matching()[0])
            fields["matched_boxes"] = Lazy(lambda: matching()[1])
        return DenseView(
            "student",
            logits=Lazy(lambda: flatten_maps(strides, logits, student.num_classes)),
            deltas=Lazy(lambda: flatten_maps(strides, deltas, 4)),
            anchors=_by_stride(strides, [a.tensor for a in anchors]),
            delta_weights=dense_delta_weights(student),
            decode=student.box2box_transform.apply_deltas,
            **fields,
        )


def _by_stride(strides: list[int], values: list) -> dict[int, Tensor]:
    return dict(zip(strides, values, strict=True))


def flatten_maps(strides: list[int], maps: list[Tensor], width: int) -> dict[int, Tensor]:
    """Dense predictions (B, A x width, H, W) by level -> stride -> (B, H W A, width)."""
    return _by_stride(strides, [permute_to_N_HWA_K(m, width) for m in maps])
