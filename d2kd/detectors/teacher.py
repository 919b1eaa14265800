"""The teacher: any Detectron2 detector, frozen, that computes only what is asked of it.

It is not a submodule of anything: no state dict, optimiser, DDP bucket or name matching ever sees
it. It normalises the student's images its own way and is read on the student's boxes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import PRECISIONS
from ..data.custom import trained_classes
from ..errors import ConfigError
from .bundle import FeatureBundle, Lazy
from .part import TeacherStep, detector_parts
from .spec import DetectorSpec, describe_detector, feature_strides
from .taps import Taps
from .weights import load_teacher_weights, teacher_config


class Teacher:
    """A frozen detector, read through a :class:`~d2kd.detectors.bundle.FeatureBundle`.

    Args:
        model: a Detectron2 detector.
        input_format: channel order ("BGR" or "RGB") the model expects.
        student_format: channel order of the images it is given.
        precision: "" to follow the student's autocast, or "fp32", "bf16", "fp16".
        class_names: of the classes that it predicts, in order, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        student_format: str = "BGR",
        precision: str = "",
        class_names: tuple[str, ...] | None = None,
    ):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"DISTILL.TEACHER.PRECISION is '{precision}'; valid: {list(PRECISIONS)}"
            )
        self.model: Any = model.eval().requires_grad_(False)
        self.flip_channels = input_format != student_format
        self.precision = precision
        self.class_names = class_names

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Teacher:
        """Build and load the teacher that ``cfg.DISTILL.TEACHER`` names.

        Raises:
            ConfigError: its config or weights are not found, or a weight did not load.
        """
        teacher_cfg = teacher_config(cfg)
        # Drawing the teacher's initial weights must not shift the random numbers the student sees.
        with torch.random.fork_rng(devices=[]):
            model = build_model(teacher_cfg)
        load_teacher_weights(model, teacher_cfg.MODEL.WEIGHTS)
        return cls(
            model,
            input_format=teacher_cfg.INPUT.FORMAT,
            student_format=cfg.INPUT.FORMAT,
            precision=cfg.DISTILL.TEACHER.PRECISION,
            class_names=trained_classes(teacher_cfg),
        )

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever ``mode`` is."""
        self.model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """What ``.to()``, ``.cuda()`` or ``.to(memory_format=...)`` of the Distiller calls."""
        self.model._apply(fn, recurse)
        return self

    def describe(self, student: DetectorSpec) -> DetectorSpec:
        """The teacher's build, with the RoI fields that it can compute on the student's RoIs.

        Raises:
            ConfigError: it cannot be given the student's images.
        """
        if not hasattr(self.model, "preprocess_image"):
            raise ConfigError(
                f"the teacher, a {type(self.model).__name__}, has no preprocess_image(), which "
                "normalises the student's images for it; a GeneralizedRCNN, RetinaNet or FCOS has"
            )
        spec = describe_detector(self.model, "teacher", student)
        return dataclasses.replace(spec, class_names=self.class_names)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """No gradient, and the teacher's own precision."""
        device = next(self.model.parameters()).device.type
        dtype = PRECISIONS[self.precision]
        with contextlib.ExitStack() as stack:
            # Not inference_mode: its tensors cannot be saved for the student's backward.
            stack.enter_context(torch.no_grad())
            if self.precision:
                enabled = dtype != torch.float32
                stack.enter_context(torch.autocast(device, dtype if enabled else None, enabled))
            yield

    def preprocess(self, inputs: list[dict[str, Any]], padded_size: tuple[int, int]) -> Tensor:
        """Normalise and pad the student's images for the teacher.

        Channels are reordered first, then normalised. The result is at least as large as the
        student's padded batch, so that the teacher's maps cover the student's.

        Args:
            inputs: Detectron2's ``batched_inputs``.
            padded_size: (H, W) of the student's padded images.

        Returns:
            (B, 3, H', W') with H' >= H and W' >= W.
        """
        images = [item["image"].flip(0) if self.flip_channels else item["image"] for item in inputs]
        tensor = self.model.preprocess_image([{"image": image} for image in images]).tensor
        divisor = max(self.model.backbone.size_divisibility, 1)
        target = [
            -(-max(mine, theirs) // divisor) * divisor
            for mine, theirs in zip(tensor.shape[-2:], padded_size, strict=True)
        ]
        return F.pad(tensor, (0, target[1] - tensor.shape[-1], 0, target[0] - tensor.shape[-2]))

    def bundle(
        self,
        inputs: list[dict[str, Any]],
        spec: DetectorSpec,
        student: FeatureBundle,
        taps: Taps,
    ) -> FeatureBundle:
        """The teacher's view of the student's step; a field is computed when it is first read.

        Args:
            inputs: Detectron2's ``batched_inputs``, as the student got them.
            spec: :meth:`describe` of this teacher.
            student: the student's bundle, for its boxes and the sizes of its maps.
            taps: the student's taps, for the poolers that its RoIs were pooled with.
        """
        bundle = FeatureBundle(
            spec,
            self.context,
            image_sizes=student.image_sizes,
            pyramid=Lazy(lambda: self._pyramid(inputs, student)),
        )
        step = TeacherStep(self.model, bundle, taps.student, student)
        for part in detector_parts():
            if part.is_served(spec):
                part.join(bundle, part.teacher_view(step))
        return bundle

    def _pyramid(self, inputs: list[dict[str, Any]], student: FeatureBundle) -> dict[int, Tensor]:
        """The teacher's maps by stride, without padding that only the teacher has: maps of one
        stride have one size."""
        named = self.model.backbone(self.preprocess(inputs, student.padded_size))
        maps = {stride: named[name] for name, stride in feature_strides(self.model).items()}
        for stride, like in student.pyramid.items():
            if stride in maps:
                maps[stride] = maps[stride][..., : like.shape[-2], : like.shape[-1]]
        return maps
