"""Time and memory of choosing prototypes from given features, and what the naive form would cost.

    d2kd prototypes time --json output/selection.json     # COCO's size
    d2kd prototypes time --classes 8 --instances 500 --naive-instances 0

Features are random, made class by class: a whole data set of them would be larger than what the
selection needs. The naive form, which computes all residuals for each candidate, is timed on one
class and level of a smaller case.
"""

from __future__ import annotations

import argparse
import time

import torch
from tabulate import tabulate
from torch import Tensor

from ..arguments import file_to_write, natural, positive
from ..engine.cost import peak_memory
from ..files import write_json
from ..prototypes.select import dense_candidates, matching_pursuit, select_prototypes
from .machine import machine, machine_text


def draw_features(instances: int, channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Teacher and student features (instances, channels) of one class, with a common structure."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(instances, 32, generator=generator) + 1
    maps = torch.randn(2, 32, channels, generator=generator)
    noise = torch.randn(2, instances, channels, generator=generator)
    return tuple(hidden @ maps + noise)


def naive_pursuit(
    teacher: Tensor, student: Tensor, candidates: Tensor, count: int, alpha: float
) -> list[int]:
    """The definition: explicit residuals, and for each candidate all residuals after its choice."""
    rests, chosen = [teacher.clone(), student.clone()], []
    for _ in range(count):
        costs = []
        for k in candidates.tolist():
            p_t, p_s = rests[0] @ teacher[k], rests[1] @ student[k]
            w_t = (alpha * (p_t + p_s) + p_t) / (1 + 2 * alpha)
            w_s = (alpha * (p_t + p_s) + p_s) / (1 + 2 * alpha)
            after_t = rests[0] - torch.outer(w_t, teacher[k])
            after_s = rests[1] - torch.outer(w_s, student[k])
            cost = after_t.square().sum() + after_s.square().sum()
            costs.append((cost + alpha * (w_t - w_s).square().sum(), k, after_t, after_s))
            costs = [min((c for c in costs if c[1] not in chosen), default=costs[0])]
        _, pick, *rests = costs[0]
        chosen.append(pick)
    return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the case that is measured."""
    add = parser.add_argument
    add("--classes", type=positive, default=80)
    add("--instances", type=positive, default=3000, help="objects per class")
    add("--channels", type=positive, default=256)
    add("--levels", type=positive, default=5)
    add("--prototypes", type=positive, default=10, help="prototypes per class and level")
    add("--naive-instances", type=natural, default=300, help="of the naive form's case; 0: none")
    add("--json", type=file_to_write(), help="write the figures to this file")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and write the figures if asked to."""
    result = {
        "environment": machine(),
        "all": select_everything(args),
        "one": compare_with_naive(args) if args.naive_instances else None,
    }
    print(markdown(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, args.json)


def select_everything(args: argparse.Namespace) -> dict:
    """The whole selection: seconds, seconds of CPU time, and growth of the memory in MiB."""
    before, spent, busy, found = peak_memory(torch.device("cpu")), 0.0, 0.0, 0
    for case in range(args.classes * args.levels):
        features = draw_features(args.instances, args.channels, case)
        start, start_busy = time.perf_counter(), time.process_time()
        found += len(select_prototypes(*features, args.prototypes))
        spent += time.perf_counter() - start
        busy += time.process_time() - start_busy
    sizes = {name: getattr(args, name) for name in ("classes", "instances", "channels", "levels")}
    return {
        **sizes,
        "prototypes": found,
        "seconds": spent,
        "cpu_seconds": busy,
        "memory_growth_mib": peak_memory(torch.device("cpu")) - before,
    }


def compare_with_naive(args: argparse.Namespace) -> dict:
    """Both forms of the pursuit on one class and level of ``--naive-instances`` objects."""
    features = draw_features(args.naive_instances, args.channels, 0)
    units = [torch.nn.functional.normalize(f.double(), dim=1) for f in features]
    candidates = dense_candidates(*units)
    timed = {}
    for form in (matching_pursuit, naive_pursuit):
        start = time.perf_counter()
        chosen = form(*units, candidates, args.prototypes, 10.0)
        timed[form] = time.perf_counter() - start, chosen
    (fast, chosen), (naive, reference) = timed[matching_pursuit], timed[naive_pursuit]
    return {
        "instances": args.naive_instances,
        "channels": args.channels,
        "candidates": len(candidates),
        "prototypes": len(chosen),
        "seconds": fast,
        "naive_seconds": naive,
        "same_choice": chosen == reference,
    }


def markdown(result: dict) -> str:
    """The figures as a Markdown table."""
    every, one = result["all"], result["one"]
    case = (
        f"{every['classes']} classes x {every['instances']} objects x {every['channels']} channels "
        f"x {every['levels']} levels, density filter and pursuit"
    )
    seconds = f"{every['seconds']:.1f} s ({every['cpu_seconds']:.1f} s of CPU time)"
    rows = [[case, every["prototypes"], seconds, f"{every['memory_growth_mib']:.0f} MiB"]]
    if one:
        case = f"1 class x {one['instances']} objects x {one['channels']} channels x 1 level"
        rows.append([f"{case}, pursuit", one["prototypes"], f"{one['seconds']:.4f} s", "-"])
        choice = "the same choice" if one["same_choice"] else "another choice"
        times = one["naive_seconds"] / one["seconds"]
        seconds = f"{one['naive_seconds']:.2f} s ({times:.0f} times)"
        rows.append([f"{case}, pursuit in the naive form", choice, seconds, "-"])
    headers = ["case", "prototypes", "time", "memory grows by"]
    text = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{text}\n\n{machine_text(result['environment'])}."


def refresh_markdown(report: dict) -> str:
    """What the refreshes of a training took, from the prototypes.json in its output folder."""
    rows = []
    for made in report["refreshes"]:
        counts = [made[name] for name in ("iteration", "objects", "images", "prototypes")]
        seconds = [made[name] for name in ("feature_seconds", "selection_seconds", "seconds")]
        rate = f"{1000 * made['seconds'] / report['period']:.1f}" if report["period"] else "-"
        rows.append([*counts, *(f"{value:.1f}" for value in seconds), rate])
    headers = ["iteration", "objects", "images", "prototypes", "features s", "selection s"]
    headers += ["in all s", "s a thousand iterations"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)
