"""Tables and the plot of what the benchmark measured."""

from __future__ import annotations

from collections.abc import Callable

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


def flop_bound(row: dict) -> float | None:
    """The overhead if every floating-point operation cost the same and nothing else did."""
    flops = row["flops"]
    return flops and flops["full"] / (flops["student"] + flops["teacher"])


def pair_name(row: dict) -> str:
    return f"{row['arch']} R{row['student']} from R{row['teacher']}"


def differences(row: dict, base: dict) -> list[str]:
    """Names of the parts of a row's setting that are not the file's base."""
    plain = {**base, "teacher_precision": "", "channels_last": False}
    return [name for name, value in plain.items() if row[name] != value]


def main_rows(data: dict) -> list[dict]:
    return [row for row in data["rows"] if not differences(row, data["base"])]


def _markdown(rows: list[dict], columns: dict[str, Callable[[dict], object]]) -> str:
    """``columns``: header -> cell of a row; None becomes "-"."""
    cells = [["-" if (c := cell(row)) is None else c for cell in columns.values()] for row in rows]
    return tabulate(cells, headers=list(columns), tablefmt="pipe", disable_numparse=True)


def _section(rows: list[dict], columns: dict, data: dict, note: str = "") -> str:
    """A table and the line about its setting."""
    if not rows:
        return NOT_MEASURED
    return f"{_markdown(rows, columns)}\n\n{note} {setting_line(data)}".replace("\n ", "\n")


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _milliseconds(part: str) -> Callable[[dict], str]:
    return lambda row: f"{1000 * row['seconds'][part]:.0f}"


def _memory(part: str) -> Callable[[dict], str | None]:
    return lambda row: row["memory_mib"] and f"{row['memory_mib'][part]:.0f}"


def _head_gflops(row: dict) -> str | None:
    flops = row["flops"]
    return flops and f"{(flops['full'] - flops['student'] - flops['teacher']) / 1e9:.1f}"


def _added(name: str) -> Callable[[dict], str | None]:
    """What a head adds to the student's operators or kernels, the teacher's part included."""

    def cell(row: dict) -> str | None:
        counts = row.get(name)
        return counts and f"{counts['full'] - counts['student']}"

    return cell


def _busy(row: dict) -> str | None:
    seconds = row.get("device_seconds")
    return seconds and f"{1000 * seconds['full']:.0f}"


def main_table(data: dict) -> str:
    """All methods at the base setting."""
    columns = {
        "pair": pair_name,
        "heads": label,
        "student ms": _milliseconds("student"),
        "teacher part ms": _milliseconds("teacher"),
        "full step ms": _milliseconds("full"),
        "overhead": lambda row: f"{row['overhead']:.2f}",
        "limit": lambda row: _number(bound(row), 2),
        "full / student": lambda row: f"{row['seconds']['full'] / row['seconds']['student']:.2f}",
        "FLOP ratio": lambda row: _number(flop_bound(row), 2),
        "heads GFLOP": _head_gflops,
        "images/s": lambda row: f"{row['images_per_second']:.2f}",
        "of teacher inference": lambda row: f"{100 * row['teacher_share_of_inference']:.0f} %",
        "operators added": _added("operators"),
        "kernels added": _added("kernels"),
        "GPU busy ms": _busy,
        "waits": lambda row: None if row.get("waits") is None else f"{len(row['waits'])}",
        "student MiB": _memory("student"),
        "full MiB": _memory("full"),
        "added": lambda row: f"{row['parameters_added'] / 1e6:.2f} M",
    }
    rows = main_rows(data)
    # A CPU launches no kernels, and older files know no operators.
    for name in ("operators added", "kernels added", "GPU busy ms", "waits"):
        if all(columns[name](row) is None for row in rows):
            del columns[name]
    return _section(rows, columns, data)


def cost_table(data: dict) -> str:
    """Overhead of all methods in one line each, a column a pair, with its limit."""
    rows = main_rows(data)
    pairs = list(dict.fromkeys(map(pair_name, rows)))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        promised = bound(row)
        text = f"{row['overhead']:.2f}"
        if promised and row["overhead"] <= promised:
            text += f" (≤ {promised:.2f})"
        elif promised:
            text = f"{row['overhead']:.3f} (above {promised:.2f})"
        cells.setdefault(label(row), {})[pair_name(row)] = text
    table = [[heads, *(found.get(pair, "-") for pair in pairs)] for heads, found in cells.items()]
    text = tabulate(table, headers=["heads", *pairs], tablefmt="pipe", disable_numparse=True)
    return f"{text}\n\n{setting_line(data)}"


def growth_table(data: dict) -> str:
    """Overhead where one of image size, batch and objects is not the base's."""
    lines: dict[tuple, dict[tuple, float]] = {}
    points = {(name, data["base"][name]) for name in GROWTH}
    for row in data["rows"]:
        changed = differences(row, data["base"])
        if not set(changed) <= set(GROWTH) or len(changed) > 1:
            continue
        found = lines.setdefault((pair_name(row), label(row)), {})
        for name in changed or GROWTH:
            found[name, row[name]] = row["overhead"]
            points.add((name, row[name]))
    columns = sorted(points, key=lambda point: (list(GROWTH).index(point[0]), point[1]))
    table = [
        [*line, *(_number(found.get(point), 2) or "-" for point in columns)]
        for line, found in lines.items()
        if any(found.keys() - {(name, data["base"][name]) for name in GROWTH})
    ]
    headers = ["pair", "heads", *(f"{value} {GROWTH[name]}" for name, value in columns)]
    text = tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"{text}\n\nOverhead. {setting_line(data)}" if table else NOT_MEASURED


def teacher_table(data: dict) -> str:
    """What bf16 and channels_last save of the teacher's part."""
    rows = [row for row in data["rows"] if row["teacher_precision"] or row["channels_last"]]

    def option(row: dict) -> str:
        names = [row["teacher_precision"], "channels_last" * row["channels_last"]]
        return " + ".join(filter(None, names))

    columns = {
        "pair": pair_name,
        "heads": label,
        "teacher": option,
        "plain teacher part ms": _milliseconds("plain_teacher"),
        "teacher part ms": _milliseconds("teacher"),
        "times as fast": lambda r: f"{r['seconds']['plain_teacher'] / r['seconds']['teacher']:.2f}",
        "full step ms": _milliseconds("full"),
        "of which saved": lambda r: (
            f"{1000 * (r['seconds']['plain_teacher'] - r['seconds']['teacher']):.0f}"
        ),
    }
    return _section(rows, columns, data)


def profile_table(data: dict) -> str:
    """Where the time that the heads add goes: by phase of the step and by kind of operator."""
    rows = [row for row in main_rows(data) if row["profile"]]
    operators = list(rows[0]["profile"]["operators"]["full"]) if rows else []

    def phase(name: str) -> Callable[[dict], str]:
        def added(row: dict) -> str:
            found = row["profile"]["phases"]
            teacher = row["seconds"]["teacher"] if name == "forward" else 0.0
            return f"{1000 * (found['full'][name] - found['student'][name] - teacher):+.0f}"

        return added

    def operator(name: str) -> Callable[[dict], str]:
        def added(row: dict) -> str:
            found = row["profile"]["operators"]
            parts = found["full"][name] - found["student"][name] - found["teacher"][name]
            return f"{1000 * parts:+.0f}"

        return added

    columns = {
        "pair": pair_name,
        "heads": label,
        "overhead": lambda row: f"{row['overhead']:.2f}",
        "FLOP ratio": lambda row: _number(flop_bound(row), 2),
        "heads GFLOP": _head_gflops,
        "added": lambda row: f"{row['parameters_added'] / 1e6:.2f} M",
        **{f"{name} ms": phase(name) for name in ("forward", "backward", "update")},
        **{f"{name} ms": operator(name) for name in operators},
    }
    note = (
        "Milliseconds that the full step has more than the student's step and the teacher's part "
        "together, by phase and, from one profiled step each, by kind of operator."
    )
    return _section(rows, columns, data, note)


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
    for name, value, style in (
        ("limit", bound, {"marker": "|", "s": 150, "c": "#c44e52"}),
        ("FLOP ratio", flop_bound, {"marker": "D", "s": 20, "c": "#222222"}),
    ):
        found = [(value(row), place) for place, row in zip(places, rows, strict=True) if value(row)]
        if found:
            axis.scatter(*zip(*found, strict=True), label=name, **style)
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
