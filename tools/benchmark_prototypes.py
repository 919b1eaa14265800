"""Time and memory of choosing prototypes from given features, and what the naive form would cost.

    python tools/benchmark_prototypes.py                        # COCO's size
    python tools/benchmark_prototypes.py --classes 8 --instances 500 --naive-instances 0

Features are random, made class by class: a whole data set of them would be larger than what the
selection needs.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from d2kd.prototypes.select import dense_candidates, matching_pursuit, select_prototypes


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


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--instances", type=int, default=3000, help="objects a class")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--prototypes", type=int, default=10, help="prototypes a class and level")
    parser.add_argument(
        "--naive-instances", type=int, default=300, help="size of the naive form's case; 0: none"
    )
    args = parser.parse_args()

    before, spent, busy, found = peak_memory_mib(), 0.0, 0.0, 0
    for case in range(args.classes * args.levels):
        features = draw_features(args.instances, args.channels, case)
        start, start_busy = time.perf_counter(), time.process_time()
        found += len(select_prototypes(*features, args.prototypes))
        spent += time.perf_counter() - start
        busy += time.process_time() - start_busy
    print(
        f"{args.classes} classes x {args.instances} objects x {args.channels} channels x "
        f"{args.levels} levels on {torch.get_num_threads()} threads: {found} prototypes in "
        f"{spent:.1f} s ({busy:.1f} s of CPU time), memory grew by "
        f"{peak_memory_mib() - before:.0f} MiB to {peak_memory_mib():.0f} MiB"
    )
    if args.naive_instances:
        compare_with_naive(args)


def compare_with_naive(args: argparse.Namespace) -> None:
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
    print(
        f"pursuit of one class and level with {args.naive_instances} objects, {len(candidates)} "
        f"of them candidates: {1e3 * fast:.1f} ms, naive form {1e3 * naive:.0f} ms "
        f"({naive / fast:.0f} times), same choice: {chosen == reference}"
    )


if __name__ == "__main__":
    main()
