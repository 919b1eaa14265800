"""The whole report of a comparison: tables, plots and detections, report.html in one
file that needs no network."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from ..engine.checkpoint import STUDENT_FILE
from ..engine.setup import merged_config
from ..errors import ConfigError
from ..files import write_text
from .pictures import pick_records, save_picture
from .plots import plot_curves, plot_gains
from .suite import as_list
from .tables import by_arm, controls_of, notes, prepared, read_lines, tables, write_markdown

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
       color: #1c2430; }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: 4px 12px; text-align: left; white-space: nowrap }
td { border-bottom: 1px solid #dde2e8 }
th { border-bottom: 2px solid #8a94a3 } tr:hover td { background: #f3f6fa }
.wide { overflow-x: auto } img { max-width: 100%; height: auto } p { color: #4a5462 }
"""
TYPES = {".svg": "image/svg+xml", ".jpg": "image/jpeg"}
IMAGES = 3


def write_report(output: Path) -> str:
    """Write report.md, report.html and the pictures they show; returns the tables as Markdown."""
    lines = read_lines(output / "results.jsonl")
    pictures = draw_pictures(lines, output) if by_arm(lines) else {}
    page = page_of(lines, {title: output / name for title, name in pictures.items()})
    write_text(page, output / "report.html")
    return write_markdown(lines, output, pictures)


def draw_pictures(lines: list[dict], output: Path) -> dict[str, str]:
    """Draw what the finished runs allow; title -> name of the file in ``output``."""
    found = {}
    if plot_gains(lines, output / "gains.svg"):
        found["Gain in AP with its 95 % interval; dots are seeds, grey bars controls"] = "gains.svg"
    for curve, name in (("loss", "Detection loss"), ("AP", "AP")):
        if plot_curves(lines, output, curve, output / f"{curve.lower()}.svg"):
            found[f"{name} in training, mean over the seeds"] = f"{curve.lower()}.svg"
    if draw_detections(lines, output, output / "detections.jpg"):
        title = (
            "Detections on validation images, as many as there are objects, the most confident; "
            "green where box (IoU 0.5) and class are right"
        )
        found[title] = "detections.jpg"
    return found


def draw_detections(lines: list[dict], output: Path, path: Path) -> bool:
    """Detections of the first seed of each arm and of the teacher; controls are left out.

    Returns:
        Whether the weights of any run are still there.
    """
    arms, controls = by_arm(lines).items(), controls_of(lines)
    chosen = {label: next(iter(runs.values())) for label, runs in arms if label not in controls}
    chosen |= {line["role"]: line for line in prepared(lines) if line["role"] == "teacher"}
    found = {}
    for label, run in chosen.items():
        try:
            cfg = merged_config(run["config"], as_list(run["opts"]))
        except ConfigError as error:  # of a report that is written from another directory
            print(f"no picture of '{label}': {error}")
            continue
        folder = Path(cfg.OUTPUT_DIR) if run["role"] == "teacher" else output / run["folder"]
        if (folder / STUDENT_FILE).is_file():
            found[label] = (cfg, folder / STUDENT_FILE)
    if not found:
        return False
    dataset = next(iter(found.values()))[0].DATASETS.TEST[0]
    columns = -(-(len(found) + 1) // (1 + len(found) // 6))
    save_picture(found, path, records=pick_records(dataset, IMAGES), width=240, columns=columns)
    return True


def page_of(lines: list[dict], pictures: dict[str, Path]) -> str:
    """The HTML page; pictures become part of it."""
    title = html.escape((lines[0]["suite"] if lines else "") or "Comparison")
    parts = [f"<h1>{title}</h1>"]
    for table in tables(lines):
        parts.append(f"<h2>{table.title}</h2><div class='wide'>{table.html()}</div>")
    if parts[1:]:
        parts.append(f"<p>{html.escape(notes(lines))}</p>")
    for caption, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f"<img alt='' src='data:{TYPES[path.suffix]};base64,{data}'>"
        parts.append(f"<h2>{html.escape(caption)}</h2>{image}")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
