"""The teacher: any Detectron2 detector, frozen, that computes only what is asked of it.

It is not a submodule of anything: no state dict, optimiser, DDP bucket or name matching ever sees
it. It normalises the student's images its own way and is read on the student's boxes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn

from ..config import PRECISIONS, add_distillation_config
from ..errors import ConfigError
from .bundle import Context, FeatureBundle, Lazy
from .class_map import UNKNOWN, match_classes
from .folding import fold_norms, in_precision
from .foreign import MapsDetector, as_detector
from .inputs import batch_size, normalisation, normalise, pad_images, to_device
from .part import TeacherStep, detector_parts
from .pyramid import LazyLevels, last_convolutions_left_out
from .source import build_source
from .spec import DetectorSpec, describe_detector, feature_strides
from .taps import Taps
from .weights import load_teacher_weights

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen detector, read through a :class:`~d2kd.detectors.bundle.FeatureBundle`.

    The model is kept as it was loaded until :meth:`prepare`, which the first step calls if no one
    did before.

    Args:
        model: a Detectron2 detector, or a :class:`~d2kd.detectors.foreign.GivesMaps`.
        input_format: channel order ("BGR" or "RGB") the model expects; one that gives maps says it.
        student_format: channel order of the images it is given.
        precision: "" to follow the student's autocast, or "fp32", "bf16", "fp16".
        class_names: of the classes that it predicts, in order, where they are known.
        class_pairs: (student's class, teacher's) of classes that are one under two names.
        student_classes: names of the student's classes, where the student's spec has none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        student_format: str = "BGR",
        precision: str = "",
        class_names: tuple[str, ...] | None = None,
        class_pairs: Sequence[Any] = (),
        student_classes: Sequence[str] | None = None,
    ):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"DISTILL.TEACHER.PRECISION is '{precision}'; valid: {list(PRECISIONS)}"
            )
        model = as_detector(model)
        if isinstance(model, MapsDetector):
            input_format = model.input_format
        self.model: Any = model.eval().requires_grad_(False)
        self.flip_channels = input_format != student_format
        self.precision = precision
        self.class_names = class_names
        self.class_pairs = class_pairs
        self.student_classes = student_classes
        self.normalisation = normalisation(model)
        self.is_prepared = False
        self._in_precision: dict[torch.dtype, nn.Module] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Teacher:
        """Build and load the teacher that ``cfg.DISTILL.TEACHER`` names.

        Raises:
            ConfigError: its config or weights are not found, or a weight did not load.
        """
        # Drawing the teacher's initial weights must not shift the random numbers the student sees.
        with torch.random.fork_rng(devices=[]):
            source = build_source(cfg)
        if source.weights:
            load_teacher_weights(source.model, source.weights)
        return cls(
            source.model,
            input_format=source.input_format,
            student_format=cfg.INPUT.FORMAT,
            precision=cfg.DISTILL.TEACHER.PRECISION,
            class_names=source.class_names,
            class_pairs=cfg.DISTILL.TEACHER.CLASS_MAP,
        )

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever ``mode`` is."""
        self.model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """What ``.to()``, ``.cuda()`` or ``.to(memory_format=...)`` of the Distiller calls."""
        self.model._apply(fn, recurse)
        self._in_precision.clear()
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
        names = self.class_names
        if names is not None and spec.num_classes not in (None, len(names)):
            names = None  # those of what its config names, but it was built for others
        matched = match_classes(
            student.class_names or student.num_classes, names or spec.num_classes, self.class_pairs
        )
        same_places = student.two_stage or (
            student.anchors_per_location == spec.anchors_per_location
        )
        if student.kind != spec.kind or not same_places:  # outputs that are not compared
            matched = None
        if matched is not None:
            known = sum(number != UNKNOWN for number in matched.numbers)
            words = (
                "The teacher knows %d of the student's %d classes: terms of classes act on those"
            )
            logger.info(words, known, len(matched.numbers))
        return dataclasses.replace(spec, class_names=names, class_map=matched)

    def context(self) -> contextlib.AbstractContextManager[None]:
        """No gradient, and the teacher's own precision, else that of the caller's autocast."""
        return _frozen(self._device.type, self._dtype())

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def _dtype(self) -> torch.dtype:
        """What the teacher computes in, called now."""
        if self.precision:
            return PRECISIONS[self.precision] or torch.float32
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32

    def preprocess(self, inputs: list[dict[str, Any]], padded_size: tuple[int, int]) -> Tensor:
        """Normalise and pad the student's images for the teacher.

        Channels are reordered first, then normalised. The result (B, 3, H', W') is at least as
        large as ``padded_size``, the student's (H, W), so that the teacher's maps cover its own.
        """
        images = [item["image"] for item in to_device(inputs, self._device)]
        if self.normalisation is None:
            images = [image.flip(0) if self.flip_channels else image for image in images]
            own: Tensor = self.model.preprocess_image([{"image": image} for image in images]).tensor
            return pad_images(own, batch_size(own, self.model.backbone, padded_size))
        size = batch_size(images, self.model.backbone, padded_size)
        mean, std = self.model.pixel_mean, self.model.pixel_std
        return normalise(images, mean, std, size, self.flip_channels)

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
        dtype = self._dtype()
        model = self._model_for(dtype)
        # Of this moment, whatever autocast is where a field is read.
        context = functools.partial(_frozen, self._device.type, dtype)

        def images() -> Tensor:
            if not self.flip_channels and taps.normalisation == self.normalisation is not None:
                size = batch_size(student.images, model.backbone, student.padded_size)
                return pad_images(student.images, size)
            return self.preprocess(inputs, student.padded_size)

        bundle = FeatureBundle(
            spec,
            context,
            image_sizes=student.image_sizes,
            pyramid=Lazy(lambda: _pyramid(model, images(), student, context)),
        )
        step = TeacherStep(model, spec, bundle, taps.student, student)
        for part in detector_parts():
            if part.is_served(spec):
                part.join(bundle, part.teacher_view(step))
        return bundle

    def prepare(self) -> None:
        """Fold the model's norms into its convolutions: its state dict has other keys from then on,
        and its outputs are the same."""
        if not self.is_prepared:
            fold_norms(self.model)
            self.is_prepared = True

    def _model_for(self, dtype: torch.dtype) -> Any:
        """The prepared model, with the weights that it needs in autocast to ``dtype``."""
        self.prepare()
        if dtype == torch.float32:
            return self.model
        if dtype not in self._in_precision:
            self._in_precision[dtype] = in_precision(self.model, dtype)
        return self._in_precision[dtype]


def load_teacher(
    config_file: str,
    weights: str = "",
    opts: Sequence[Any] = (),
    *,
    precision: str = "",
    class_map: Sequence[Any] = (),
    student_format: str = "BGR",
    student_classes: Sequence[str] | None = None,
) -> Teacher:
    """The teacher of a config file, of the zoo or of another library, on the CPU; its arguments are
    the keys of ``DISTILL.TEACHER``. ``L(load_teacher)(config_file=...)`` is one of a LazyConfig.

    Args:
        student_format: order of channels of the student's images.
        student_classes: names of the student's classes, where they are known.

    Raises:
        ConfigError: in one line, for whatever is wrong with it.
    """
    cfg = get_cfg()
    add_distillation_config(cfg)
    node = cfg.DISTILL.TEACHER
    node.CONFIG_FILE, node.WEIGHTS, node.OPTS = config_file, weights, list(opts)
    node.PRECISION, node.CLASS_MAP = precision, [list(pair) for pair in class_map]
    cfg.INPUT.FORMAT, cfg.MODEL.DEVICE = student_format, "cpu"
    teacher = Teacher.from_config(cfg)
    teacher.student_classes = tuple(student_classes) if student_classes else None
    return teacher


@contextlib.contextmanager
def _frozen(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Without gradients, in autocast to ``dtype``, or without it where that is float32."""
    # Not inference_mode: its tensors cannot be saved for the student's backward.
    is_half = dtype != torch.float32
    with torch.no_grad(), torch.autocast(device, dtype if is_half else None, is_half):
        yield


def _pyramid(
    model: Any, images: Tensor, student: FeatureBundle, context: Context
) -> Mapping[int, Tensor]:
    """The teacher's maps by stride, without padding that only the teacher has: maps of one stride
    have one size."""
    with last_convolutions_left_out(model.backbone) as left_out:
        maps = model.backbone(images)

    def level(name: str, stride: int) -> Tensor:
        with context():
            finished: Tensor = left_out[name](maps[name]) if name in left_out else maps[name]
        like = student.pyramid.get(stride)
        return finished if like is None else finished[..., : like.shape[-2], : like.shape[-1]]

    strides = feature_strides(model)
    return LazyLevels({s: functools.partial(level, name, s) for name, s in strides.items()})
