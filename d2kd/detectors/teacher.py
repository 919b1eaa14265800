"""The teacher: any Detectron2 detector, frozen, that computes only what is asked of it.

It is not a submodule of anything: no state dict, optimiser, DDP bucket or name matching ever sees
it. It normalises the student's images its own way and is read on the student's boxes.
"""

from __future__ import annotations

import contextlib
import functools
import logging

import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ..config import PRECISIONS, add_distillation_config
from ..config_files import load_config, similar_files
from ..errors import ConfigError, first_line
from .bundle import DenseView, FeatureBundle, Lazy, MaskView, RoIView, RPNView
from .spec import DetectorSpec, box_stages, dense_delta_weights, describe_detector, feature_strides
from .taps import Taps, flatten_maps

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"


class Teacher:
    """A frozen detector, read through a :class:`~d2kd.bundle.FeatureBundle`.

    Args:
        model: a Detectron2 detector.
        input_format: channel order ("BGR" or "RGB") the model expects.
        student_format: channel order of the images it is given.
        precision: "" to follow the student's autocast, or "fp32", "bf16", "fp16".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_format: str = "BGR",
        student_format: str = "BGR",
        precision: str = "",
    ):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"DISTILL.TEACHER.PRECISION is '{precision}'; valid: {list(PRECISIONS)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.flip_channels = input_format != student_format
        self.precision = precision

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
        )

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever ``mode`` is."""
        self.model.eval()
        return self

    def _apply(self, fn, recurse: bool = True) -> Teacher:
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
        return describe_detector(self.model, "teacher", student)

    @contextlib.contextmanager
    def context(self):
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

    def preprocess(self, inputs: list[dict], padded_size: tuple[int, int]) -> Tensor:
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
        self, inputs: list[dict], spec: DetectorSpec, student: FeatureBundle, taps: Taps
    ) -> FeatureBundle:
        """The teacher's view of the student's step; a field is computed when it is first read.

        Args:
            inputs: Detectron2's ``batched_inputs``, as the student got them.
            spec: :meth:`describe` of this teacher.
            student: the student's bundle, for its boxes and the sizes of its maps.
            taps: the student's taps, for the poolers that its RoIs were pooled with.
        """
        return _TeacherStep(self, spec, student, taps, inputs).bundle()


class _TeacherStep:
    """Computes the teacher's fields of one step. Each method is one forward of one part."""

    def __init__(
        self, teacher: Teacher, spec: DetectorSpec, student: FeatureBundle, taps: Taps, inputs
    ):
        self.teacher = teacher
        self.model = teacher.model
        self.spec = spec
        self.student = student
        self.student_model = taps.student
        self.inputs = inputs

    def lazy(self, compute, *args) -> Lazy:
        def run():
            with self.teacher.context():
                return compute(*args)

        return Lazy(run)

    def bundle(self) -> FeatureBundle:
        fields = {"pyramid": self.lazy(self.compute_pyramid)}
        if "roi" in self.spec.fields:
            fields["rois"] = [self.roi_view(k) for k in range(self.student.spec.num_stages)]
        if "mask" in self.spec.fields:
            fields["mask"] = self.mask_view()
        if "rpn.features" in self.spec.fields:
            fields["rpn"] = self.rpn_view()
        if "dense.logits" in self.spec.fields:
            fields["dense"] = self.dense_view()
        self._bundle = FeatureBundle(
            self.spec, self.teacher.context, image_sizes=self.student.image_sizes, **fields
        )
        return self._bundle

    @property
    def pyramid(self) -> dict[int, Tensor]:
        return self._bundle.pyramid

    def compute_pyramid(self) -> dict[int, Tensor]:
        images = self.teacher.preprocess(self.inputs, self.student.padded_size)
        maps = self.model.backbone(images)
        maps = {stride: maps[name] for name, stride in feature_strides(self.model).items()}
        return {stride: self._crop(stride, m) for stride, m in maps.items()}

    def _crop(self, stride: int, feature: Tensor) -> Tensor:
        """Cut off padding that only the teacher has, so that maps of one stride have one size."""
        like = self.student.pyramid.get(stride)
        if like is None:
            return feature
        return feature[..., : like.shape[-2], : like.shape[-1]]

    # --- RoIs of the student ---------------------------------------------------------------------

    def _pool(self, branch: str, boxes: list[Tensor]) -> Tensor:
        """Pool ``boxes`` on the teacher's pyramid as the student's ``branch`` pools its own."""
        pooler = getattr(self.student_model.roi_heads, f"{branch}_pooler")
        maps = [self.pyramid[s] for s in _branch_strides(self.student.spec, branch)]
        # Pooling rounds the boxes to the precision of the maps: let it be the student's.
        like = next(iter(self.student.pyramid.values()))
        is_half = like.dtype.itemsize == 2
        with torch.autocast(like.device.type, like.dtype if is_half else None, is_half):
            # forward() and not a call: a call would fire the student's taps.
            pooled = pooler.forward([m.to(like.dtype) for m in maps], [Boxes(b) for b in boxes])
        return pooled.to(maps[0].dtype)

    def _pool_own(self, branch: str, boxes: list[Tensor], shared: RoIView | MaskView) -> Tensor:
        """Pool ``boxes`` as the teacher's own ``branch`` expects; once where that is the same."""
        heads = self.model.roi_heads
        pooler = getattr(heads, f"{branch}_pooler")
        own_strides = _branch_strides(self.spec, branch)
        student_pooler = getattr(self.student_model.roi_heads, f"{branch}_pooler")
        same_levels = own_strides == _branch_strides(self.student.spec, branch)
        if same_levels and _pooling(pooler) == _pooling(student_pooler):
            return shared.features
        return pooler([self.pyramid[s] for s in own_strides], [Boxes(b) for b in boxes])

    def roi_view(self, stage: int) -> RoIView:
        boxes = self.student.rois[stage].boxes
        fields: dict = {
            # read from the student only when asked: its own fields may be lazy
            "labels": Lazy(lambda: self.student.rois[stage].labels),
            "image_index": Lazy(lambda: self.student.rois[stage].image_index),
        }
        if "roi.features" in self.spec.fields:
            fields["features"] = self.lazy(self._pool, "box", boxes)
        if "roi.logits" in self.spec.fields:
            stages = box_stages(self.model.roi_heads)
            _, head, predictor = stages[min(stage, len(stages) - 1)]
            fields["hidden"] = self.lazy(lambda: head(self._pool_own("box", boxes, view)))
            outputs = functools.cache(lambda: predictor(view.hidden))
            fields["logits"] = self.lazy(lambda: outputs()[0])
            fields["deltas"] = self.lazy(lambda: outputs()[1])
            fields["delta_weights"] = tuple(predictor.box2box_transform.weights)
        view = RoIView("teacher", boxes=boxes, **fields)
        return view

    def mask_view(self) -> MaskView:
        student = self.student.mask
        fields: dict = {
            "labels": Lazy(lambda: student.labels),
            "image_index": Lazy(lambda: student.image_index),
        }
        if "mask.features" in self.spec.fields:
            fields["features"] = self.lazy(self._pool, "mask", student.boxes)
        if "mask.logits" in self.spec.fields:
            head = self.model.roi_heads.mask_head
            fields["logits"] = self.lazy(
                lambda: head.layers(self._pool_own("mask", student.boxes, view))
            )
        view = MaskView("teacher", boxes=student.boxes, **fields)
        return view

    # --- the region proposal network and dense heads ---------------------------------------------

    def rpn_view(self) -> RPNView:
        rpn = self.model.proposal_generator
        names = rpn.in_features
        strides = [feature_strides(self.model)[name] for name in names]

        def over(compute, maps) -> Lazy:
            return self.lazy(lambda: {s: compute(maps()[s]) for s in strides})

        def anchors() -> dict[int, Tensor]:
            boxes = rpn.anchor_generator([self.pyramid[s] for s in strides])
            return {s: a.tensor for s, a in zip(strides, boxes, strict=True)}

        view = RPNView(
            "teacher",
            features=over(rpn.rpn_head.conv, lambda: self.pyramid),
            logits=over(rpn.rpn_head.objectness_logits, lambda: view.features),
            deltas=over(rpn.rpn_head.anchor_deltas, lambda: view.features),
            anchors=self.lazy(anchors),
        )
        return view

    def dense_view(self) -> DenseView:
        model, head = self.model, self.model.head
        strides = [feature_strides(model)[name] for name in model.head_in_features]

        def maps(stride_maps) -> list[Tensor]:
            return [stride_maps[s] for s in strides]

        fields: dict = {}
        if "dense.class_tower" in self.spec.fields:
            # Every level, in order: with BN the towers keep one norm a level and count the calls.
            fields["class_tower"] = self.lazy(
                lambda: {s: head.cls_subnet(self.pyramid[s]) for s in strides}
            )
            fields["box_tower"] = self.lazy(
                lambda: {s: head.bbox_subnet(self.pyramid[s]) for s in strides}
            )
            logits = lambda: [head.cls_score(m) for m in maps(view.class_tower)]  # noqa: E731
            deltas = lambda: [head.bbox_pred(m) for m in maps(view.box_tower)]  # noqa: E731
        else:
            outputs = functools.cache(lambda: head(maps(self.pyramid)))
            logits = lambda: outputs()[0]  # noqa: E731
            deltas = lambda: outputs()[1]  # noqa: E731

        def anchors() -> dict[int, Tensor]:
            boxes = model.anchor_generator(maps(self.pyramid))
            return {s: a.tensor for s, a in zip(strides, boxes, strict=True)}

        view = DenseView(
            "teacher",
            logits=self.lazy(lambda: flatten_maps(strides, logits(), model.num_classes)),
            deltas=self.lazy(lambda: flatten_maps(strides, deltas(), 4)),
            anchors=self.lazy(anchors),
            delta_weights=dense_delta_weights(model),
            decode=model.box2box_transform.apply_deltas,
            **fields,
        )
        return view


def _branch_strides(spec: DetectorSpec, branch: str) -> tuple[int, ...]:
    """The levels that the "box" or the "mask" branch pools from."""
    return spec.mask_strides if branch == "mask" else spec.roi_strides


def _pooling(pooler: nn.Module) -> tuple:
    """What decides a ROIPooler's output beside its inputs."""
    levels = [
        (
            type(p).__name__,
            p.spatial_scale,
            getattr(p, "sampling_ratio", 0),
            getattr(p, "aligned", 0),
        )
        for p in pooler.level_poolers
    ]
    return (pooler.output_size, pooler.canonical_level, pooler.canonical_box_size, levels)


# --- config and weights -------------------------------------------------------------------------


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's full config: its file or zoo entry, then ``DISTILL.TEACHER.OPTS``.

    Raises:
        ConfigError: in one line, if the file, a key or the weights are not there.
    """
    node = cfg.DISTILL.TEACHER
    teacher_cfg = get_cfg()
    add_distillation_config(teacher_cfg)
    # How the teacher itself was distilled, perhaps with a head that is not imported, is no concern.
    teacher_cfg.DISTILL.set_new_allowed(True)
    load_config(teacher_cfg, node.CONFIG_FILE, key="DISTILL.TEACHER.CONFIG_FILE")
    try:
        teacher_cfg.merge_from_list(list(node.OPTS))
    except (KeyError, AssertionError, ValueError) as error:
        raise ConfigError(f"DISTILL.TEACHER.OPTS: {error}") from error
    if teacher_cfg.MODEL.META_ARCHITECTURE == "Distiller":
        # A distilled student can teach: its config says how it was trained, its weights are plain.
        teacher_cfg.MODEL.META_ARCHITECTURE = teacher_cfg.DISTILL.STUDENT_META_ARCH
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher_cfg.MODEL.WEIGHTS = find_teacher_weights(node, teacher_cfg)
    teacher_cfg.freeze()
    return teacher_cfg


def find_teacher_weights(node: CfgNode, teacher_cfg: CfgNode) -> str:
    """``DISTILL.TEACHER.WEIGHTS``, else the zoo's checkpoint, else the config's own."""
    weights = node.WEIGHTS
    if not weights:
        try:
            weights = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
        except RuntimeError:
            weights = teacher_cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(
            "the teacher has no weights: set DISTILL.TEACHER.WEIGHTS to a checkpoint of "
            f"'{node.CONFIG_FILE}' (or to '{RANDOM_WEIGHTS}' for a test without any)"
        )
    is_local = "://" not in weights and weights != RANDOM_WEIGHTS
    if is_local and not PathManager.isfile(weights):
        near = similar_files(weights)
        raise ConfigError(
            f"DISTILL.TEACHER.WEIGHTS: no file '{weights}'" + (f"; there is {near}" if near else "")
        )
    return weights


class _StrictCheckpointer(DetectionCheckpointer):
    """Loads weights, and raises where Detectron2 would only warn."""

    def _log_incompatible_keys(self, incompatible) -> None:
        misfits = {key for key, *_ in incompatible.incorrect_shapes}
        missing = set(incompatible.missing_keys) - misfits
        wrong = [f"{key} (not in the file)" for key in missing]
        wrong += [
            f"{key} ({tuple(found)} in the file, {tuple(wanted)} in the model)"
            for key, found, wanted in incompatible.incorrect_shapes
        ]
        if wrong:
            raise ConfigError(
                f"{len(wrong)} of the teacher's weights did not load: {', '.join(sorted(wrong))}"
            )
        ignored = [k for k in incompatible.unexpected_keys if not k.startswith("distill_heads.")]
        if ignored:
            logger.info("The teacher's file has keys that its model lacks: %s", ", ".join(ignored))


def load_teacher_weights(model: nn.Module, weights: str) -> None:
    """Load ``weights`` into ``model``, completely.

    Raises:
        ConfigError: the file cannot be read, or a weight of the model did not load (all are named).
    """
    if weights == RANDOM_WEIGHTS:
        logger.warning("The teacher has random weights: good for a test, not for distillation.")
        return
    try:
        _StrictCheckpointer(model).load(weights)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the teacher's weights '{weights}' cannot be read: {first_line(error)}"
        ) from error
