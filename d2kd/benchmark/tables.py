"""Tables and the plot of what the benchmark measured."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

from .machine import machine_text

# What a row is a measurement of.
SETTING = (
    *("arch", "student", "teacher", "heads", "opts", "size", "batch", "objects"),
    *("precision", "teacher_precision", "channels_last"),
)
GROWTH = {"size": "px", "batch": "images", "objects": "objects"}
NOT_MEASURED = "Not measured."
# The limit of the overhead of each method: two-stage, one-stage.
PROMISED_AT = {"student": 18, "teacher": 50, "size": 320, "batch": 2}
BOUNDS = {
    "FeatureMimic": (1.07, 1.07),
    "PKD": (1.07, 1.07),
    "CWD": (1.07, 1.07),
    "Logits": (1.05, 1.05),
    "SSIM": (1.15, 1.15),
    "DSIG": (1.10, 1.15),
    "DRKD": (1.30, 1.30),
    "GlobalKnowledge": (1.25, 1.25),
    "GlobalKnowledge, LOCAL.ADAPTER_KERNEL 1": (1.10, 1.10),
    "MAR": (1.10, 1.10),
}
# The same for a GPU, where a step is bound by launches.
PROMISED_ON_GPU_AT = {
    "student": 50,
    "teacher": 101,
    "size": 800,
    "batch": 4,
    "precision": "bf16",
}
GPU_BOUNDS = {
    "FeatureMimic": (1.05, 1.05),
    "Logits": (1.05, 1.05),
    "SSIM": (1.08, 1.08),
    "DSIG": (1.10, 1.10),
    "DRKD": (1.20, 1.20),
    "GlobalKnowledge": (1.15, 1.15),
    "GlobalKnowledge, LOCAL.ADAPTER_KERNEL 1": (1.10, 1.10),
    "MAR": (1.10, 1.10),
}


def label(row: dict) -> str:
    """The heads of a row, with the keys that are not at their defaults."""
    keys = [key.split(".", 2)[-1] for key in row["opts"][::2]]
    opts = [f"{key} {value}" for key, value in zip(keys, row["opts"][1::2], strict=True)]
    return ", ".join([" + ".join(row["heads"]), *opts])


def bound(row: dict) -> float | None:
    """The overhead that the row's method promises; None for other heads and other settings."""
    for place, bounds in ((PROMISED_AT, BOUNDS), (PROMISED_ON_GPU_AT, GPU_BOUNDS)):
        if place.items() <= row.items():
            pair = bounds.get(label(row))
            return pair and pair[row["arch"] == "retinanet"]
    return None


def flop_bound(row: dict) -> float:
    """The overhead if every floating-point operation cost the same and nothing else did."""
    flops = row["flops"]
    return flops["full"] / (flops["student"] + flops["teacher"])


def pair_name(row: dict) -> str:
    return f"{row['arch']} R{row['student']} from R{row['teacher']}"


def differences(row: dict, base: dict) -> list[str]:
    """Names of the parts of a row's setting that are not the file's base."""
    plain = {**base, "teacher_precision": "", "channels_last": False}
    return [name for name, value in plain.items() if row[name] != value]


def main_rows(data: dict) -> list[dict]:
    return [row for row in data["rows"] if not differences(row, data["base"])]


def _section(rows: list[dict[str, str | None]], data: dict, note: str = "") -> str:
    """Rows, header -> cell, as a table in which None is "-", and the line about its setting."""
    if not rows:
        return NOT_MEASURED
    table = tabulate(rows, "keys", tablefmt="pipe", disable_numparse=True, missingval="-")
    return f"{table}\n\n{note}{setting_line(data)}"


def _milliseconds(seconds: float, sign: str = "") -> str:
    return f"{1000 * seconds:{sign}.0f}"


def _added(counts: dict[str, int] | None) -> str | None:
    """What a head adds to the student's operators or kernels, the teacher's part included."""
    return counts and f"{counts['full'] - counts['student']}"


def _head_gflops(row: dict) -> str:
    flops = row["flops"]
    return f"{(flops['full'] - flops['student'] - flops['teacher']) / 1e9:.1f}"


def _quartiles(row: dict) -> str:
    """Between what the middle half of the repetitions' overheads lies."""
    quartiles = row["overhead_quartiles"]
    return f"{quartiles[0]:.2f} to {quartiles[-1]:.2f}"


def main_table(data: dict) -> str:
    """All methods at the base setting."""
    rows = []
    for row in main_rows(data):
        seconds, memory = row["seconds"], row["memory_mib"]
        limit, busy, waits = bound(row), row.get("device_seconds"), row.get("waits")
        cells = {
            "pair": pair_name(row),
            "heads": label(row),
            "student ms": _milliseconds(seconds["student"]),
            "teacher part ms": _milliseconds(seconds["teacher"]),
            "full step ms": _milliseconds(seconds["full"]),
            "overhead": f"{row['overhead']:.2f}",
            "quartiles": busy and _quartiles(row),
            "limit": limit and f"{limit:.2f}",
            "full / student": f"{seconds['full'] / seconds['student']:.2f}",
            "FLOP ratio": f"{flop_bound(row):.2f}",
            "heads GFLOP": _head_gflops(row),
            "images/s": f"{row['images_per_second']:.2f}",
            "of teacher inference": f"{100 * row['teacher_share_of_inference']:.0f} %",
            "operators added": _added(row.get("operators")),
            "kernels added": _added(row.get("kernels")),
            "GPU busy ms": busy and _milliseconds(busy["full"]),
            "waits": None if waits is None else f"{len(waits)}",
            "student MiB": f"{memory['student']:.0f}",
            "full MiB": f"{memory['full']:.0f}",
            "added": f"{row['parameters_added'] / 1e6:.2f} M",
        }
        rows.append(cells)
    # A CPU launches no kernels, and older files know no operators.
    for name in ("quartiles", "operators added", "kernels added", "GPU busy ms", "waits"):
        if all(cells[name] is None for cells in rows):
            for cells in rows:
                del cells[name]
    return _section(rows, data)


def growth_table(data: dict) -> str:
    """Overhead where one of image size, batch and objects is not the base's."""
    lines: dict[tuple, dict[tuple, float]] = {}
    bases = {(name, data["base"][name]) for name in GROWTH}
    for row in data["rows"]:
        changed = differences(row, data["base"])
        if set(changed) <= set(GROWTH) and len(changed) <= 1:
            found = lines.setdefault((pair_name(row), label(row)), {})
            found |= {(name, row[name]): row["overhead"] for name in changed or GROWTH}
    points = sorted(bases.union(*lines.values()), key=lambda p: (list(GROWTH).index(p[0]), p[1]))
    rows = [
        {
            "pair": pair,
            "heads": heads,
            **{f"{p[1]} {GROWTH[p[0]]}": f"{found[p]:.2f}" if p in found else None for p in points},
        }
        for (pair, heads), found in lines.items()
        if found.keys() - bases
    ]
    return _section(rows, data, "Overhead. ")


def teacher_table(data: dict) -> str:
    """What bf16 and channels_last save of the teacher's part."""
    rows = []
    for row in data["rows"]:
        options = [row["teacher_precision"], "channels_last" * row["channels_last"]]
        if not any(options):
            continue
        seconds = row["seconds"]
        plain, teacher = seconds["plain_teacher"], seconds["teacher"]
        cells = {
            "pair": pair_name(row),
            "heads": label(row),
            "teacher": " + ".join(filter(None, options)),
            "plain teacher part ms": _milliseconds(plain),
            "teacher part ms": _milliseconds(teacher),
            "times as fast": f"{plain / teacher:.2f}",
            "full step ms": _milliseconds(seconds["full"]),
            "of which saved": _milliseconds(plain - teacher),
        }
        rows.append(cells)
    return _section(rows, data)


def profile_table(data: dict) -> str:
    """Where the time that the heads add goes: by phase of the step and by kind of operator."""
    rows = []
    for row in main_rows(data):
        if not row["profile"]:
            continue
        phases, operators = row["profile"]["phases"], row["profile"]["operators"]
        teacher = {"forward": row["seconds"]["teacher"], **operators["teacher"]}
        full, student = ({**phases[part], **operators[part]} for part in ("full", "student"))
        added = {name: full[name] - student[name] - teacher.get(name, 0.0) for name in full}
        cells = {
            "pair": pair_name(row),
            "heads": label(row),
            "overhead": f"{row['overhead']:.2f}",
            "FLOP ratio": f"{flop_bound(row):.2f}",
            "heads GFLOP": _head_gflops(row),
            "added": f"{row['parameters_added'] / 1e6:.2f} M",
        }
        times = {f"{name} ms": _milliseconds(value, "+") for name, value in added.items()}
        rows.append({**cells, **times})
    note = (
        "Milliseconds that the full step has more than the student's step and the teacher's part "
        "together, by phase and, from one profiled step each, by kind of operator. "
    )
    return _section(rows, data, note)


def setting_line(data: dict) -> str:
    """Machine and base setting in one line."""
    where, base = data["environment"], data["base"]
    counts = sorted({row["repeats"] for row in data["rows"]})
    repeats = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    precision = f", {base['precision']} autocast" if base["precision"] else ""
    return (
        f"{machine_text(where)}; "
        f"{base['size']} px, batch {base['batch']}, {base['objects']} objects per image"
        f"{precision}, medians of {repeats}."
    )


# --- the plot -----------------------------------------------------------------------------------


def plot(data: dict, path: str) -> None:
    """Bars of overhead with its limit and the FLOP ratio, and curves of growth below."""
    rows = main_rows(data)
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    grown = [name for name in GROWTH if len({row[name] for row in data["rows"]}) > 1]
    curves = {(arch, name): _growth(data, arch, name) for arch in archs for name in grown}
    grown_archs = [arch for arch in archs if any(curves[arch, name] for name in grown)]
    heights = [0.8 + 0.25 * sum(row["arch"] == arch for row in rows) for arch in archs]
    heights += [2.6] * len(grown_archs)
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, arch in zip(parts, archs, strict=False):
        _draw_bars(part.subplots(), arch, [row for row in rows if row["arch"] == arch])
    for part, arch in zip(parts[len(archs) :], grown_archs, strict=True):
        axes = part.subplots(1, len(grown), squeeze=False)[0]
        for axis, name in zip(axes, grown, strict=True):
            _draw_growth(axis, arch, name, curves[arch, name])
    figure.savefig(path, dpi=80, format="png")
    plt.close(figure)


def _draw_bars(axis, arch: str, rows: list[dict]) -> None:
    places = range(len(rows))
    axis.barh(places, [row["overhead"] - 1 for row in rows], left=1, color="#4c72b0", height=0.6)
    limits = [bound(row) or math.nan for row in rows]
    axis.scatter(limits, places, marker="|", s=150, c="#c44e52", label="limit")
    flops = list(map(flop_bound, rows))
    axis.scatter(flops, places, marker="D", s=20, c="#222222", label="FLOP ratio")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(list(places), [label(row) for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(f"{arch}: full step / (student's step + teacher's part)", fontsize=9)
    axis.legend(fontsize=7)


def _growth(data: dict, arch: str, name: str) -> dict[str, list[tuple]]:
    """Heads -> points (``name``, overhead) of those measured with more than one ``name``."""
    curves: dict[str, dict] = {}
    for row in data["rows"]:
        if row["arch"] == arch and set(differences(row, data["base"])) <= {name}:
            curves.setdefault(label(row), {})[row[name]] = row["overhead"]
    return {heads: sorted(points.items()) for heads, points in curves.items() if len(points) > 1}


def _draw_growth(axis, arch: str, name: str, curves: dict[str, list[tuple]]) -> None:
    for heads, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=heads)
    unit = f" ({GROWTH[name]})" if GROWTH[name] != name else ""
    axis.set_xlabel(f"{arch}: {name}{unit}")
    axis.set_ylabel("overhead")
    if curves:
        axis.legend(fontsize=6)
