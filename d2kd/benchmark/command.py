"""What distillation costs: a full step against the student's step plus the teacher's needed part.

    d2kd benchmark --json output/benchmark.json             # all methods
    d2kd benchmark --json output/benchmark.json --growth    # larger images, batches, ...
    d2kd benchmark --json output/benchmark.json --heads SSIM --teacher-precision bf16
    d2kd benchmark --archs retinanet --heads "SSIM DISTILL.SSIM.WINDOW_SIZE 7" DSIG,SSIM

For each pair of detectors and each list of heads it times, interleaved in one run:

* student: forward, backward and update of the plain student;
* teacher: only the teacher's fields that the heads read;
* full: forward, backward and update of the Distiller;
* inference: the teacher's whole inference, for comparison.

overhead = full / (student + teacher), from the medians. The FLOP ratio is the same ratio of
floating-point operations (products and convolutions, forward and backward). Memory is what a step
needs at its peak beyond what is held before it, gradients included. Operators are those that would
launch a kernel on a GPU, waits the places of d2kd at which the host would wait for it; on a GPU the
kernels themselves, the time that they take and the real waits are columns too. Weights are random,
but behave as trained ones do: maps stay finite, and the teacher knows background.

A GPU's rows, within minutes; called again, it measures what is missing:

    d2kd benchmark --json output/gpu.json --pairs 50-101 --size 800 --batch 4 --precision bf16 \
        --minutes 8

With --json the file is written after each row, with a plot in its folder. Rows in the file are not
measured again, so a run that was stopped goes on, and runs with other options add their rows;
what is printed is what the file holds. The first run fixes the size, batch and objects that the
tables are about.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ..arguments import CommandParser, file_to_write, natural, positive, positive_number
from ..errors import ConfigError
from ..files import write_atomically, write_json
from ..meta_arch import Distiller
from . import tables as report
from .counts import count_operators, count_waits, profile_kernels
from .machine import machine
from .steps import (
    BASES,
    PRECISIONS,
    TeacherPart,
    TrainingStep,
    build_models,
    count_flops,
    interleaved,
    operator_seconds,
    phases,
    random_batch,
    whole_inference,
    working_memory,
)

HEADS = (
    *("FeatureMimic", "PKD", "CWD", "Logits", "SSIM", "DSIG", "DRKD", "GlobalKnowledge"),
    "GlobalKnowledge DISTILL.GLOBAL_KNOWLEDGE.LOCAL.ADAPTER_KERNEL 1",
    "MAR",
)
ONE_STAGE_HEADS = ("CrossKD",)
# One term of DRKD at a time: graph units, relation units, plain instances.
PARTS = (
    "DRKD DISTILL.DRKD.RELATION_WEIGHT 0 DISTILL.DRKD.INSTANCE_WEIGHT 0",
    "DRKD DISTILL.DRKD.PIXEL_WEIGHT 0 DISTILL.DRKD.INSTANCE_WEIGHT 0",
    "DRKD DISTILL.DRKD.PIXEL_WEIGHT 0 DISTILL.DRKD.RELATION_WEIGHT 0",
)
DEPTHS = ("18", "34", "50", "101", "152")
WARM_UP = {"cpu": 1, "cuda": 5}
# The parts that make the overhead: a student's step, the teacher's part, the full step.
COUNTED = ("student", "teacher", "full")
# Functions that may wait: suppression decides how many boxes are left.
MAY_WAIT = ("nms",)


def parse_variant(text: str) -> tuple[list[str], list[str]]:
    """``DSIG,SSIM KEY VALUE ...`` -> heads, and a flat list of keys and values."""
    heads, *opts = shlex.split(text) or [""]
    if len(opts) % 2:
        raise ConfigError(f"--heads '{text}': after the heads come KEY VALUE pairs")
    return heads.split(","), opts


def parse_pair(text: str) -> tuple[int, int]:
    """``18-50`` -> the depths of the student's and the teacher's ResNet."""
    student, _, teacher = text.partition("-")
    if student not in DEPTHS or teacher not in DEPTHS:
        raise ConfigError(f"--pairs '{text}': two depths of {', '.join(DEPTHS)}, as in 18-50")
    return int(student), int(teacher)


def settings(args: argparse.Namespace) -> list[dict]:
    """What is to be measured, a setting a row."""
    names = (*report.GROWTH, "precision", "teacher_precision", "channels_last")
    base = {name: getattr(args, name) for name in names}
    places = [base]
    if args.growth:
        grown = {"size": args.sizes, "batch": args.batches, "objects": args.object_counts}
        for name, values in grown.items():
            places += [{**base, name: value} for value in values if value != base[name]]
    found = []
    for place, pair, arch in itertools.product(places, map(parse_pair, args.pairs), args.archs):
        detectors = {"arch": arch, "student": pair[0], "teacher": pair[1]}
        for variant in args.heads or default_heads(arch, args.profile):
            heads, opts = parse_variant(variant)
            found.append({**detectors, "heads": heads, "opts": [*opts, *args.opts], **place})
    return found


def default_heads(arch: str, profile: bool) -> list[str]:
    """A row for each method that two detectors of this kind can serve."""
    also = ONE_STAGE_HEADS if arch == "retinanet" else ()
    return [*HEADS, *also, *(PARTS if profile else ())]


def measure(setting: dict, args: argparse.Namespace) -> dict:
    """The setting, median seconds, ratios, FLOPs, memory in MiB and parameters."""
    torch.manual_seed(0)
    batch = random_batch(setting["batch"], setting["size"], setting["objects"], 80)
    student, distiller, plain_teacher = build_models(setting, args.device, batch)
    precision = setting["precision"]
    # After every warm-up and before every decay: each head at its full cost.
    with EventStorage(distiller.max_iter // 2):
        teacher_part = TeacherPart(distiller, batch, precision)
        parts: dict[str, Callable[[], None]] = {
            "student": TrainingStep(student, batch, precision),
            "teacher": teacher_part,
            "full": TrainingStep(distiller, batch, precision),
            "inference": lambda: whole_inference(distiller.teacher, batch, precision),
        }
        if plain_teacher is not None:
            parts["plain_teacher"] = teacher_part.of(plain_teacher)
        for part in parts.values():
            for _ in range(WARM_UP[args.device]):
                part()
        check_finite(parts)
        memory = {name: working_memory(part, args.device) for name, part in parts.items()}
        seconds = interleaved(parts, args.repeats, args.device)
        flops = {name: count_flops(parts[name]) for name in COUNTED}
        counts = count_parts(parts, student, distiller, trace_file(setting, args), args.device)
        profile = profile_parts(parts, args) if args.profile else None
    return {
        **setting,
        "repeats": args.repeats,
        **summary(seconds, setting["batch"]),
        "flops": flops,
        "memory_mib": memory,
        **counts,
        "parameters_added": sum(p.numel() for p in distiller.distill_heads.parameters()),
        "teacher_fields": [".".join(map(str, path)) for path in teacher_part.paths],
        "profile": profile,
    }


def check_finite(parts: dict) -> None:
    """Refuse to time steps whose losses are not numbers."""
    for name in ("student", "full"):
        if not torch.isfinite(parts[name].last_loss):
            raise ConfigError(f"the {name} step's loss is not finite: other sizes or a precision")


def count_parts(
    parts: dict, student: nn.Module, distiller: Distiller, trace: str, device: str
) -> dict:
    """Operators and waits of the steps; on a GPU kernels and the time that it is busy, too."""
    students = {"student": student, "teacher": distiller.student, "full": distiller.student}
    steps = {"teacher": parts["teacher"]}
    steps |= {name: parts[name].pass_both_ways for name in ("student", "full")}
    counted = {n: count_operators(steps[n], students[n], MAY_WAIT) for n in COUNTED}
    found: dict[str, Any] = {"operators": {n: c.operators for n, c in counted.items()}}
    waits = counted["full"].waits
    if device == "cuda":
        waits = count_waits(steps["full"], distiller.student, MAY_WAIT).waits
        profiles = {n: profile_kernels(parts[n], trace if n == "full" else "") for n in COUNTED}
        found["kernels"] = {n: kernels for n, (kernels, _) in profiles.items()}
        found["device_seconds"] = {n: busy for n, (_, busy) in profiles.items()}
    return {**found, "waits": waits}


def trace_file(setting: dict, args: argparse.Namespace) -> str:
    """Where the profiler's trace of the full step goes, "" for nowhere."""
    if args.traces is None:
        return ""
    args.traces.mkdir(parents=True, exist_ok=True)
    words = f"{report.pair_name(setting)} {report.label(setting)}"
    return str(args.traces / f"{'_'.join(re.findall(r'[A-Za-z0-9]+', words))}.json")


def summary(seconds: dict[str, list[float]], images: int) -> dict:
    """Medians and ratios of the parts' seconds."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [
        full / (alone + needed)
        for alone, needed, full in zip(*(seconds[name] for name in COUNTED), strict=True)
    ]
    return {
        "seconds": median,
        "overhead": median["full"] / (median["student"] + median["teacher"]),
        "overhead_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
        "teacher_share_of_step": median["teacher"] / median["full"],
        "teacher_share_of_inference": median["teacher"] / median["inference"],
        "images_per_second": images / median["full"],
    }


def profile_parts(parts: dict, args: argparse.Namespace) -> dict:
    """Where the time goes: median seconds of the steps' phases, and of kinds of operators."""
    runs = {
        name: [phases(parts[name], args.device) for _ in range(args.repeats)]
        for name in ("student", "full")
    }
    return {
        "phases": {
            name: {phase: statistics.median(run[phase] for run in found) for phase in found[0]}
            for name, found in runs.items()
        },
        "operators": {name: operator_seconds(parts[name], args.device) for name in COUNTED},
    }


# --- the file -----------------------------------------------------------------------------------


def open_results(args: argparse.Namespace) -> dict:
    """The file's content, or that of a new file."""
    base = {name: getattr(args, name) for name in (*report.GROWTH, "precision")}
    data = {"environment": machine(args.device), "base": base, "rows": []}
    if args.json is None or not args.json.exists():
        return data
    try:
        found = json.loads(args.json.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != data.keys():
        raise ConfigError(f"--json {args.json} is no file of d2kd benchmark: name another file")
    if found["environment"] != data["environment"]:
        raise ConfigError(f"--json {args.json} was measured elsewhere: name another file")
    return found


def identity(row: dict) -> str:
    return json.dumps([row[name] for name in report.SETTING])


def tables(data: dict) -> str:
    """All tables that the rows have something for."""
    others = (report.growth_table, report.teacher_table, report.profile_table)
    found = [report.main_table(data), *(table(data) for table in others)]
    measured = [text for text in found if text != report.NOT_MEASURED]
    return "\n\n".join(measured) or report.NOT_MEASURED


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--archs", nargs="+", default=["faster", "retinanet"], choices=BASES)
    add("--pairs", nargs="+", default=["18-50"], help="depths of student's and teacher's ResNets")
    add("--heads", nargs="+", help="a row each: HEAD[,HEAD ...], or in quotes with KEY VALUE pairs")
    add("--size", type=positive, default=320, help="side of the images in pixels")
    add("--batch", type=positive, default=2, help="images per step")
    add("--objects", type=natural, default=8, help="objects per image")
    add("--growth", action="store_true", help="also with one of the next three at another value")
    add("--sizes", type=positive, nargs="+", default=[160, 320, 480, 640])
    add("--batches", type=positive, nargs="+", default=[1, 2, 4])
    add("--object-counts", type=natural, nargs="+", default=[0, 8, 30, 100])
    add("--precision", default="", choices=PRECISIONS, help="autocast of the whole step")
    add("--teacher-precision", default="", choices=PRECISIONS, help="the teacher's own")
    add("--channels-last", action="store_true", help="the teacher in channels_last")
    add("--profile", action="store_true", help="phases and operators too, and each term of DRKD")
    add("--traces", type=Path, help="folder for a profiler's trace of each row's full step (GPU)")
    add("--repeats", type=positive, default=9)
    rest = "start no row after so many; call again for the rest"
    add("--minutes", type=positive_number, help=rest)
    add("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=WARM_UP)
    add("--json", type=file_to_write(), help="add the rows to this file, a plot to its folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the file lacks, and print its tables.

    Raises:
        ConfigError: a head or a value is not valid, or the file is of another machine.
    """
    args = build_parser().parse_command(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = open_results(args)
    _measure_rows(data, settings(args), args)
    print(tables(data))
    if args.json:
        picture = args.json.with_suffix(".png")
        write_atomically(picture, lambda temporary: report.plot(data, temporary))
        print(f"\nwrote {args.json} and {picture}")


def _measure_rows(data: dict, wanted: list[dict], args: argparse.Namespace) -> None:
    """Add what ``data`` lacks of the ``wanted`` settings, and write the file after each row."""
    done = {identity(row): row for row in data["rows"]}
    start, too_large = time.monotonic(), set[str]()
    for number, setting in enumerate(wanted, start=1):
        old = done.get(identity(setting))
        kind = identity({**setting, "batch": 0, "size": 0})
        if old is not None and not (args.profile and not old["profile"]):
            state = "done before"
        elif kind in too_large:
            state = "left out, a smaller one did not fit"
        elif args.minutes and time.monotonic() - start > 60 * args.minutes:
            state = "left for another call (--minutes)"
        else:
            try:
                row = measure(setting, args)
            except torch.OutOfMemoryError:
                too_large.add(kind)
                state = "does not fit in memory"
            else:
                data["rows"] = [other for other in data["rows"] if other is not old] + [row]
                state = f"overhead {row['overhead']:.3f}"
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    write_json(data, args.json)
            if args.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        name = f"{report.pair_name(setting)}, {report.label(setting)}"
        print(f"[{number}/{len(wanted)}] {name}: {state}", file=sys.stderr)
