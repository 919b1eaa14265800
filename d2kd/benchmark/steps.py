"""The steps that the benchmark times: models, a batch, the teacher's part, and stopwatches.

Weights are random and the learning rate is 0, so that every repetition does the same work.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from torch.utils.flop_counter import FlopCounterMode

from ..config import validate_distillation_config
from ..config_files import merge_overrides
from ..detectors.bundle import Batch, FeatureBundle
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


# --- the teacher's needed part ------------------------------------------------------------------


class TeacherPart:
    """What the heads of a Distiller read of the teacher in one step, to be repeated alone."""

    def __init__(self, distiller: Distiller, batch: list[dict]):
        self.distiller = distiller
        self.teacher = distiller.teacher
        self.inputs = batch
        self.pooled: list[tuple] = []
        with distiller.taps:
            distiller.student(batch)
        device = unwrap(distiller).device
        self.batch = Batch.from_inputs(batch, device, student_losses={"loss": torch.ones(())})
        self.student = distiller.taps.bundle(self.batch)
        teacher = self.bundle()
        pool = FeatureBundle.pool

        def recorded(bundle, *args, **kwargs):
            if bundle is teacher:
                self.pooled.append((args, kwargs))
            return pool(bundle, *args, **kwargs)

        FeatureBundle.pool = recorded
        try:
            for head in distiller.distill_heads.values():
                head(self.student, teacher, self.batch)
        finally:
            FeatureBundle.pool = pool
        self.paths = list(teacher.computed())
        teacher.release()

    def bundle(self) -> FeatureBundle:
        d = self.distiller
        return self.teacher.bundle(self.inputs, d.teacher_spec, self.student, d.taps)

    def of(self, teacher: Teacher) -> TeacherPart:
        """The same part of another teacher of the same build."""
        other = copy.copy(self)
        other.teacher = teacher
        return other

    def __call__(self) -> None:
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


def whole_inference(teacher: Teacher, batch: list[dict]) -> None:
    """What evaluating the teacher on the batch would cost."""
    with teacher.context():
        teacher.model(batch)


# --- training steps -----------------------------------------------------------------------------


class TrainingStep:
    """Forward, backward and update with learning rate 0, from the same random numbers each time.

    Args:
        model: returns a dict of losses.
        batch: Detectron2's ``batched_inputs``.
        precision: "" or "bf16", of autocast.
    """

    def __init__(self, model: torch.nn.Module, batch: list[dict], precision: str = ""):
        self.model, self.batch, self.precision = model, batch, precision
        parameters = [p for p in model.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        self.optimizer = use_fused_update(sgd)  # as in training

    def forward(self) -> None:
        torch.manual_seed(0)
        device, dtype = self.model.device.type, PRECISIONS[self.precision]
        with torch.autocast(device, dtype, enabled=bool(self.precision)):
            self.loss = sum(self.model(self.batch).values())

    def backward(self) -> None:
        self.loss.backward()
        del self.loss

    def update(self) -> None:
        self.optimizer.step()
        # Here and not in the next step, so that gradients are part of this step's memory.
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
