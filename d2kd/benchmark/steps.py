"""The steps that the benchmark times: models, a batch, the teacher's part, and stopwatches.

Weights are random, but behave as trained ones do: see :func:`settle`. The learning rate is 0, so
that every repetition does the same work.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import validate_distillation_config
from ..config_files import merge_overrides
from ..detectors.bundle import Batch, FeatureBundle
from ..detectors.roi import box_stages
from ..detectors.taps import Taps
from ..detectors.teacher import Teacher
from ..engine.cost import peak_memory as process_peak
from ..engine.setup import merged_config
from ..engine.trainer import unwrap, use_fused_update
from ..meta_arch import Distiller

_FOLDER = tempfile.TemporaryDirectory()  # of the teachers' configs; goes with the process
BASES = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
PRECISIONS = {"": None, "bf16": torch.bfloat16}


# --- models and data ----------------------------------------------------------------------------


def detector_config(arch: str, depth: int, device: str) -> CfgNode:
    """The zoo's config of ``arch`` with a ResNet of ``depth``, random weights, on ``device``."""
    cfg = merged_config(BASES[arch], [])
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = device
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    return cfg


def distiller_config(student: CfgNode, heads: list[str], teacher: CfgNode, opts: list) -> CfgNode:
    """``student`` in distillation with ``heads`` from a random ``teacher``."""
    cfg = student.clone()
    cfg.DISTILL.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.DISTILL.HEADS = heads
    file = Path(_FOLDER.name) / f"{len(os.listdir(_FOLDER.name))}.yaml"
    file.write_text(teacher.dump())
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(file)
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    merge_overrides(cfg, opts)
    validate_distillation_config(cfg)
    return cfg


def random_batch(images: int, size: int, objects: int, num_classes: int) -> list[dict]:
    """``images`` random images of ``size`` pixels with ``objects`` objects each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(objects, 2, generator=generator) * size * 0.7
        extent = size * (0.04 + 0.26 * torch.rand(objects, 2, generator=generator))
        boxes = torch.cat([corner, corner + extent], dim=1)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (objects,), generator=generator)
        instances.gt_masks = BitMasks(torch.ones(objects, size, size, dtype=torch.bool))
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


# --- weights that behave as trained ones do -------------------------------------------------------

# The share of RoIs that a trained teacher finds hard to call background, and how hard at least
# (DSIG's MINING_THRESHOLD, the others being left out of its graph).
HARD_SHARE, HARDNESS = 0.1, 0.6


@torch.no_grad()
def settle(model: nn.Module, batch: list[dict]) -> None:
    """Make a detector with random weights behave as a trained one.

    Frozen norms take the statistics of what they normalise: at random they let a ResNet's maps grow
    until bfloat16 overflows. The box heads of a two-stage detector come to call most RoIs
    background: at random they are sure of nothing, which is the worst case of DSIG's mining.
    """
    detector: Any = model
    was_training = detector.training
    detector.eval()
    hooks = [
        module.register_forward_pre_hook(_take_statistics)
        for module in detector.modules()
        if isinstance(module, FrozenBatchNorm2d)
    ]
    images = detector.preprocess_image(batch)
    maps = detector.backbone(images.tensor)
    for hook in hooks:
        hook.remove()
    roi_heads = getattr(detector, "roi_heads", None)
    if hasattr(roi_heads, "box_pooler"):
        boxes = [_all_over(size, images.tensor.device) for size in images.image_sizes]
        pooled = roi_heads.box_pooler([maps[name] for name in roi_heads.box_in_features], boxes)
        for _, head, predictor in box_stages(roi_heads):
            _prefer_background(predictor.cls_score, head(pooled))
    detector.train(was_training)


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3))
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)


def _all_over(size: tuple[int, int], device: torch.device, count: int = 256) -> Boxes:
    """Random boxes of an image of ``size`` (height, width)."""
    generator = torch.Generator().manual_seed(0)
    limit = torch.tensor([size[1], size[0]])
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * limit
    return Boxes(corners.flatten(1).to(device))


def _prefer_background(scores: nn.Linear, hidden: Tensor) -> None:
    """Spread the logits, then move that of background, the last, until as few RoIs are hard as a
    trained detector finds."""

    def margins() -> Tensor:
        logits = scores(hidden).float()
        return logits[:, :-1].logsumexp(dim=1) - logits[:, -1]

    scores.weight.mul_(2 / margins().std().clamp(min=1e-6))
    # Background's cross-entropy is log(1 + exp(margin)).
    limit = math.log(math.expm1(HARDNESS))
    scores.bias[-1] += margins().quantile(1 - HARD_SHARE) - limit


def build_models(
    setting: dict, device: str, batch: list[dict]
) -> tuple[nn.Module, Distiller, Teacher | None]:
    """A plain student, a Distiller with the same student, and, where the teacher has options, its
    copy without."""
    student_cfg = detector_config(setting["arch"], setting["student"], device)
    teacher_cfg = detector_config(setting["arch"], setting["teacher"], device)
    opts = ["DISTILL.TEACHER.PRECISION", setting["teacher_precision"], *setting["opts"]]
    distiller_cfg = distiller_config(student_cfg, setting["heads"], teacher_cfg, opts)
    student = build_model(student_cfg).train()
    settle(student, batch)
    distiller: Distiller = build_model(distiller_cfg).train()
    distiller.student.load_state_dict(student.state_dict())
    distiller.max_iter = 90000
    teacher = distiller.teacher
    assert teacher is not None
    settle(teacher.model, batch)
    has_options = bool(setting["teacher_precision"] or setting["channels_last"])
    plain_teacher = plain_copy(teacher) if has_options else None
    if setting["channels_last"]:
        teacher.model.to(memory_format=torch.channels_last)
    return student, distiller, plain_teacher


# --- the teacher's needed part ------------------------------------------------------------------


class TeacherPart:
    """What the heads of a Distiller read of the teacher in one step, to be repeated by itself.

    Args:
        distiller: with its heads.
        batch: Detectron2's ``batched_inputs``.
        precision: of the step's autocast, which the teacher follows.
    """

    def __init__(self, distiller: Distiller, batch: list[dict], precision: str = ""):
        self.distiller, self.precision = distiller, precision
        self.teacher = distiller.teacher
        self.pooled: list[tuple] = []
        device = unwrap(distiller).device
        self.batch = Batch.from_inputs(batch, device, student_losses={"loss": torch.ones(())})
        # Of its own: the Distiller forgets what its taps recorded when its step ends.
        self.taps = Taps(distiller.student, distiller.taps.spec)
        with autocast(device, precision):
            self._record()

    def _record(self) -> None:
        with self.taps:
            self.distiller.student(self.batch.inputs)
        self.student = self.taps.bundle(self.batch)
        teacher = self.bundle()
        pool = teacher.pool

        def recorded(*args, **kwargs):
            self.pooled.append((args, kwargs))
            return pool(*args, **kwargs)

        teacher.pool = recorded
        for head in self.distiller.distill_heads.values():
            head(self.student, teacher, self.batch)
        self.paths = list(teacher.computed())
        teacher.release()

    def bundle(self) -> FeatureBundle:
        spec = self.distiller.teacher_spec
        return self.teacher.bundle(self.batch.inputs, spec, self.student, self.taps)

    def of(self, teacher: Teacher) -> TeacherPart:
        """The same part of another teacher of the same build."""
        other = copy.copy(self)
        other.teacher = teacher
        return other

    def __call__(self) -> None:
        with autocast(self.distiller.device, self.precision):
            teacher = self.bundle()
            for path in self.paths:
                teacher.at(path)
            for args, kwargs in self.pooled:
                teacher.pool(*args, **kwargs)
        teacher.release()


def plain_copy(teacher: Teacher) -> Teacher:
    """The teacher in the ordinary memory format and the student's precision."""
    model = copy.deepcopy(teacher.model).to(memory_format=torch.contiguous_format)
    plain = Teacher(model)
    plain.flip_channels = teacher.flip_channels
    return plain


def whole_inference(teacher: Teacher, batch: list[dict], precision: str = "") -> None:
    """What evaluating the teacher on the batch would cost."""
    device = next(teacher.model.parameters()).device
    with autocast(device, precision), teacher.context():
        teacher.model(batch)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Of a step in ``precision``, "" or "bf16"."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=bool(precision))


# --- training steps -----------------------------------------------------------------------------


class TrainingStep:
    """Forward, backward and update with learning rate 0, from the same random numbers each time.

    Args:
        model: returns a dict of losses.
        batch: Detectron2's ``batched_inputs``.
        precision: "" or "bf16", of autocast.
    """

    def __init__(self, model: nn.Module, batch: list[dict], precision: str = ""):
        self.model, self.batch, self.precision = model, batch, precision
        parameters = [p for p in model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        self.optimizer = use_fused_update(sgd)  # as in training

    def forward(self) -> None:
        torch.manual_seed(0)
        with autocast(self.model.device, self.precision):
            self.loss = sum(self.model(self.batch).values())

    def backward(self) -> None:
        self.loss.backward()
        self.last_loss = self.loss.detach()
        del self.loss

    def update(self) -> None:
        self.optimizer.step()
        # Here and not in the next step, so that gradients are part of this step's memory.
        self.optimizer.zero_grad()

    def pass_both_ways(self) -> None:
        """Without the update, which is the same for every head."""
        self.forward()
        self.backward()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.forward()
        self.backward()
        self.update()


# --- measuring ----------------------------------------------------------------------------------


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of one call, to the end of its work on the device."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(parts: dict, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each part, taken in turn, so that a change of the machine's pace hits all; as in
    ``timeit``, Python's garbage collector rests meanwhile."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, part in parts.items():
                seconds[name].append(timed(part, device))
    finally:
        gc.enable()
    return seconds


def phases(step: TrainingStep, device: str) -> dict[str, float]:
    """Seconds of the forward pass, the backward pass and the update of one step."""
    return {name: timed(getattr(step, name), device) for name in ("forward", "backward", "update")}


def _batched_product_flops(_, a: torch.Size, b: torch.Size, **__) -> int:
    """FLOPs of (B, M, K) times (B, K, N), from the shapes."""
    return 2 * a[0] * a[1] * a[2] * b[2]


# The counter knows the product itself, not the form that adds in place.
IN_PLACE_PRODUCTS = {torch.ops.aten.baddbmm_: _batched_product_flops}


def count_flops(function: Callable[[], None]) -> int:
    """Floating-point operations of the products and convolutions of one call, passes included."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as counter:
        function()
    return counter.get_total_flops()


def working_memory(function: Callable[[], None], device: str) -> float:
    """MiB that one call needs at its peak, beyond what is held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    held = reset_peak_memory()
    function()
    return peak_memory() - held


def reset_peak_memory() -> float:
    """Give freed memory back to the system, and return what this process still holds, in MiB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets VmHWM
    return peak_memory()


def peak_memory() -> float:
    """Largest memory of this process, in MiB, since the last reset where the system can do that."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return process_peak(torch.device("cpu"))


OPERATORS = {
    "convolution": ("convolution", "conv2d", "mkldnn"),
    "product": ("::mm", "::bmm", "::addmm", "baddbmm", "::addmv", "::mv", "::linear"),
    "RoIAlign": ("roi_align",),
    "NMS and sorting": ("nms", "sort", "topk"),
}


def operator_seconds(function: Callable[[], None], device: str) -> dict[str, float]:
    """Seconds of one call by kind of operator (the keys of ``OPERATORS``, and "other")."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
    seconds = dict.fromkeys([*OPERATORS, "other"], 0.0)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    for event in profile.key_averages():
        kinds = (kind for kind, names in OPERATORS.items() if any(n in event.key for n in names))
        seconds[next(kinds, "other")] += getattr(event, attribute) / 1e6
    return seconds
