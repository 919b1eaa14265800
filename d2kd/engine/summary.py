"""The one screen that a training ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from tabulate import tabulate

from ..errors import one_line
from ..registry import node_name

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _rows(name: str, results: dict) -> list[list]:
    """One row a task: ``results`` maps a task to its metrics, or a dataset to such a map."""
    rows = []
    for task, metrics in results.items():
        if metrics and isinstance(next(iter(metrics.values())), dict):
            rows += _rows(f"{name} on {task}", metrics)
        elif metrics:
            values = [metrics.get(metric, math.nan) for metric in METRICS]
            rows.append([name, task, *(f"{v:.1f}" if math.isfinite(v) else "-" for v in values)])
    return rows


def metrics_table(found: dict[str, dict], style: str = "simple") -> str:
    """AP of several detectors, "" without any, in a style of tabulate; ``found`` are results of
    Detectron2's evaluators, a map of tasks or of datasets."""
    rows = [row for name, results in found.items() for row in _rows(name, results)]
    headers = ["", "task", *METRICS]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True) if rows else ""


def summarise(
    cfg: CfgNode, student: dict, teacher: dict, cost: dict, changes: Sequence[dict] = ()
) -> str:
    """AP of student and teacher, what was distilled, what it cost, where the files are, and
    ``changes``: what was resumed with other settings."""
    table = metrics_table({"student": student, "teacher": teacher})
    lines = [table] if table else []
    heads = cfg.DISTILL.HEADS if cfg.MODEL.META_ARCHITECTURE == "Distiller" else []
    if heads:
        chosen = cfg.DISTILL.BALANCE.ENABLED and cfg.DISTILL.BALANCE.FREEZE_ITER
        parts = [
            f"{name} balanced" if chosen else f"{name} x {cfg.DISTILL[node_name(name)].WEIGHT:g}"
            for name in heads
        ]
        lines.append(f"distilled: {', '.join(parts)}   from: {cfg.DISTILL.TEACHER.CONFIG_FILE}")
    else:
        lines.append("distilled: nothing (a baseline)")
    for change in changes:
        words = one_line(", ".join(change["changed"]))
        lines.append(f"resumed at iteration {change['iteration']} with other settings: {words}")
    if cost["step_seconds"] is not None:
        lines.append(
            f"time per step: {cost['step_seconds']:.3f} s   iterations: {cfg.SOLVER.MAX_ITER}   "
            f"peak memory ({cost['memory_of']}): {cost['peak_memory_mib']:.0f} MiB"
        )
    lines.append(
        f"parameters: {cost['student_parameters']:,} of the student, "
        f"{cost['distillation_parameters']:,} of distillation, which are not kept"
    )
    lines.append(f"weights: {cfg.OUTPUT_DIR}/student_final.pth (plain Detectron2 student)")
    lines.append(f"         {cfg.OUTPUT_DIR}/student_config.yaml (a config that reads it)")
    lines.append(f"         {cfg.OUTPUT_DIR}/model_final.pth (the same with the heads' state)")
    return "\n".join(lines)
