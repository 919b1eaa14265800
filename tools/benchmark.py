#!/usr/bin/env python
"""What distillation costs: a full step against the student's step plus the teacher's needed part.

    python tools/benchmark.py
    python tools/benchmark.py --archs retinanet --heads SSIM DSIG,SSIM --json output/benchmark.json

For each architecture and each list of heads it times, interleaved in one run:

* student: forward, backward and update of the plain student;
* teacher: the teacher's fields that the heads read, alone;
* full: forward, backward and update of the Distiller;
* inference: the teacher's whole inference, for comparison.

overhead = full / (student + teacher), from the medians. Weights are random and the learning rate is
0, so that every repetition does the same work.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from d2kd import Batch, Teacher, add_distillation_config
from d2kd.bundle import FeatureBundle, Lazy, View
from d2kd.config import ConfigError, load_config
from d2kd.engine.hooks import write_json
from d2kd.engine.trainer import unwrap
from d2kd.meta_arch import Distiller

BASES = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
HEADS = ("FeatureMimic", "Logits", "SSIM", "DSIG", "DRKD", "GlobalKnowledge", "MAR")


def detector_config(arch: str, depth: int, device: str) -> CfgNode:
    """The zoo's config of ``arch`` with a ResNet of ``depth``, random weights, on ``device``."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, BASES[arch])
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
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        file.write(teacher.dump())
    cfg.DISTILL.TEACHER.CONFIG_FILE = file.name
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    cfg.merge_from_list(opts)
    return cfg


def random_batch(images: int, size: int, objects: int, num_classes: int) -> list[dict]:
    """``images`` random images of ``size`` pixels with ``objects`` objects each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(objects, 2, generator=generator) * size * 0.7
        boxes = torch.cat([corner, corner + size * (0.04 + 0.26 * torch.rand_like(corner))], dim=1)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(num_classes, (objects,), generator=generator)
        instances.gt_masks = BitMasks(torch.ones(objects, size, size, dtype=torch.bool))
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


# --- the teacher's needed part ------------------------------------------------------------------


def computed_fields(view: View, path: tuple = ()) -> list[tuple]:
    """Paths of the lazy fields of a bundle that have been read."""
    paths = []
    for name, field in view._fields.items():
        if isinstance(field, Lazy) and name in view.__dict__:
            paths.append((*path, name))
        items = field if isinstance(field, list) else [field]
        for index, item in enumerate(items):
            if isinstance(item, View):
                step = (name, index) if isinstance(field, list) else (name,)
                paths += computed_fields(item, (*path, *step))
    return paths


def read_path(view: View, path: tuple):
    """Follow a path of :func:`computed_fields`."""
    for step in path:
        view = view[step] if isinstance(step, int) else getattr(view, step)
    return view


class TeacherPart:
    """What the heads of a Distiller read of the teacher in one step, to be repeated alone."""

    def __init__(self, distiller: Distiller, batch: list[dict]):
        self.distiller = distiller
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
        self.paths = computed_fields(teacher)
        teacher.release()

    def bundle(self) -> FeatureBundle:
        d = self.distiller
        return d.teacher.bundle(self.inputs, d.teacher_spec, self.student, d.taps)

    def __call__(self) -> None:
        teacher = self.bundle()
        for path in self.paths:
            read_path(teacher, path)
        for args, kwargs in self.pooled:
            teacher.pool(*args, **kwargs)
        teacher.release()


# --- measuring ----------------------------------------------------------------------------------


def peak_memory(device: str, reset: bool = False) -> float:
    """Peak memory in MiB since the last reset: of the GPU's allocator, or of the process."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        if reset:
            clear.write_text("5")  # resets VmHWM
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of one call, to the end of its work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_step(model: torch.nn.Module, batch: list[dict], bf16: bool) -> Callable[[], None]:
    """Forward, backward and update with learning rate 0, from the same random numbers each time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        torch.manual_seed(0)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def measure(arch: str, heads: list[str], args: argparse.Namespace) -> dict:
    """Median times in seconds, ratios, memory in MiB and parameters of one pair and head list."""
    torch.manual_seed(0)
    student_cfg = detector_config(arch, args.student, args.device)
    teacher_cfg = detector_config(arch, args.teacher, args.device)
    student = build_model(student_cfg).train()
    distiller = build_model(distiller_config(student_cfg, heads, teacher_cfg, args.opts)).train()
    distiller.student.load_state_dict(student.state_dict())
    if args.channels_last:
        distiller.teacher.model.to(memory_format=torch.channels_last)
    distiller.max_iter = 90000
    batch = random_batch(args.batch, args.size, args.objects, 80)
    # After every warm-up and before every decay: each head at its full cost.
    with EventStorage(distiller.max_iter // 2):
        teacher_part = TeacherPart(distiller, batch)
        parts = {
            "student": training_step(student, batch, args.bf16),
            "teacher": teacher_part,
            "full": training_step(distiller, batch, args.bf16),
            "inference": lambda: whole_inference(distiller.teacher, batch),
        }
        memory = {}
        for name, part in parts.items():  # warm-up
            part()
            peak_memory(args.device, reset=True)
            part()
            memory[name] = peak_memory(args.device)
        seconds = {name: [] for name in parts}
        for _ in range(args.repeats):
            for name, part in parts.items():
                seconds[name].append(timed(part, args.device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [
        full / (alone + needed)
        for alone, needed, full in zip(
            seconds["student"], seconds["teacher"], seconds["full"], strict=True
        )
    ]
    return {
        "arch": arch,
        "heads": heads,
        "seconds": median,
        "overhead": median["full"] / (median["student"] + median["teacher"]),
        "overhead_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
        "teacher_share_of_step": median["teacher"] / median["full"],
        "teacher_share_of_inference": median["teacher"] / median["inference"],
        "images_per_second": args.batch / median["full"],
        "peak_memory_mib": memory,
        "parameters_added": sum(p.numel() for p in distiller.distill_heads.parameters()),
        "teacher_fields": [".".join(map(str, path)) for path in teacher_part.paths],
    }


def whole_inference(teacher: Teacher, batch: list[dict]) -> None:
    """What evaluating the teacher on the batch would cost."""
    with teacher.context():
        teacher.model(batch)


def environment(args: argparse.Namespace) -> dict:
    """The machine and the setting of a run."""
    cuda = torch.cuda.get_device_name() if args.device == "cuda" else None
    names = ("student", "teacher", "size", "batch", "objects", "repeats", "bf16", "channels_last")
    return {
        "torch": torch.__version__,
        "device": cuda or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "setting": {name: getattr(args, name) for name in names} | {"opts": args.opts},
    }


def table(rows: list[dict]) -> str:
    """A Markdown table of :func:`measure`'s rows."""
    cells = [
        [
            row["arch"],
            " + ".join(row["heads"]),
            *(f"{1000 * row['seconds'][part]:.0f}" for part in ("student", "teacher", "full")),
            f"{row['overhead']:.2f}",
            f"{100 * row['teacher_share_of_inference']:.0f} %",
            f"{row['peak_memory_mib']['student']:.0f}",
            f"{row['peak_memory_mib']['full']:.0f}",
            f"{row['parameters_added'] / 1e6:.2f} M",
        ]
        for row in rows
    ]
    headers = [
        "detector",
        "heads",
        "student ms",
        "teacher part ms",
        "full step ms",
        "overhead",
        "of teacher inference",
        "student MiB",
        "full MiB",
        "added",
    ]
    return tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["faster", "retinanet"], choices=BASES)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), help="lists joined by commas")
    parser.add_argument("--student", type=int, default=18, help="depth of the student's ResNet")
    parser.add_argument("--teacher", type=int, default=50, help="depth of the teacher's ResNet")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    parser.add_argument("--objects", type=int, default=8, help="objects an image")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true", help="the teacher in channels_last")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs of the Distiller")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    try:
        for arch in args.archs:
            for heads in args.heads:
                rows.append(measure(arch, heads.split(","), args))
                print(f"{arch} {heads}: overhead {rows[-1]['overhead']:.3f}", file=sys.stderr)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(table(rows))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json({**environment(args), "rows": rows}, args.json)
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
