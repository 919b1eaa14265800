"""The demo: a light detector alone and distilled, with the same few minutes to learn in.

    d2kd demo
    d2kd demo --photos Applying-Mask-RCNN-in-endangered-animals-detection

It makes the data, trains a teacher, a student without and with distillation and a student that gets
twice the iterations instead, prints their AP, and saves a picture of detections side by side. With
--photos it does so on photographs of animals, from a clone of the repository that
datasets/prepare_animals.py names. Finished trainings are kept: a second call, or a call after a
kill, goes on where the last one ended. KEY VALUE pairs override keys of all trainings. In a clone,
`make demo` does the same, set-up included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..arguments import CommandParser, folder_to_write, natural
from ..compare.comparison import Comparison
from ..compare.pictures import pick_records, save_picture
from ..compare.processes import run_in_order, stopping_by_sigterm
from ..compare.suite import Arm, Suite, as_list, read_suite, uses_teacher, weights_of
from ..compare.tables import Table, by_arm, error_text, mean_of, paired_gains, prepared, read_lines
from ..config_files import resolve_config_file
from ..config_paths import SHIPPED
from ..data.files import dataset_root, json_path
from ..data.photographs import ANIMALS, convert
from ..engine.setup import merged_config
from ..errors import ConfigError

TWICE, DISTILLED = "baseline x2", "DSIG"  # labels in the suites
METRICS = ("AP", "AP50", "AP75")
# Of five seeds, in a clone: python tools/update_docs.py --copy output/demo
COMMITTED = SHIPPED.parent / "docs/results/demo.jsonl"
IMAGES = 5
NEXT = (
    "d2kd distill --student COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml "
    "--teacher COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml --heads DSIG "
    "--data train.json images val.json images"
)


# --- training ----------------------------------------------------------------------------------


def demo_suite(data: str, output: Path, opts: dict, seeds: list[int] | None = None) -> Suite:
    """The suite of "digits" or "animals" with overrides of all trainings, whose teacher is trained
    in ``output`` too.

    Args:
        seeds: None for the suite's own.
    """
    folder = output / "teacher"
    opts = {**opts, "DISTILL.TEACHER.WEIGHTS": str(folder / "student_final.pth")}
    path = resolve_config_file(f"suites/demo_{data}.yaml", "d2kd demo")
    suite = read_suite(Path(path), seeds, opts)
    teacher = replace(suite.prepared[0], opts={**opts, "OUTPUT_DIR": str(folder)})
    return replace(suite, prepared=(teacher,))


def train(comparison: Comparison, seeds: list[int]) -> None:
    """All trainings, two at a time; those that need no teacher do not wait for it. A failure is
    raised when all others are done."""
    teacher, runs = comparison.suite.prepared[0], comparison.runs(seeds=seeds)
    comparison.check(runs)
    comparison.output.mkdir(parents=True, exist_ok=True)
    weights = Path(weights_of(teacher))

    def work(task: tuple[Arm, int]) -> None:
        if task[0] is teacher:
            comparison.prepare(teacher, comparison.threads)
        else:
            comparison.train(*task)

    def ready(task: tuple[Arm, int]) -> bool:
        distils = uses_teacher(merged_config(task[0].config, as_list(task[0].opts)))
        return task[0] is teacher or not distils or weights.is_file()

    tasks = [(teacher, 0), *runs]
    failed = run_in_order(tasks, work, jobs=2, ready=ready, processes=comparison.processes)
    if failed:
        raise ConfigError(failed[0][1])
    comparison.save()


def prepare_animals(clone: Path) -> None:
    """Convert the clone, if that was not done before."""
    folder = dataset_root() / ANIMALS.name
    if json_path(folder, "train").is_file():
        print(f"{ANIMALS.name}: prepared before, in {folder}", flush=True)
    else:
        print(f"{ANIMALS.name}: preparing {folder} ...", flush=True)
        convert(ANIMALS, clone, folder)


# --- showing -----------------------------------------------------------------------------------


def markdown(lines: list[dict]) -> str:
    """The table of a results.jsonl as Markdown, and what was gained."""
    rows = []
    for label, runs in by_arm(lines).items():
        iterations = str(next(iter(runs.values()))["iterations"])
        rows.append([_name(label), str(len(runs)), iterations, *_ap(list(runs.values()))])
    for line in prepared(lines):
        rows.append([line["role"], "1", str(line["iterations"]), *_ap([line])])
    table = Table("", ["", "seeds", "iterations", *METRICS], rows)
    return f"{table.markdown()}\n\n{gain_sentence(lines)}"


def _name(label: str) -> str:
    return f"student + {label}" if label == DISTILLED else label.replace("baseline", "student")


def _ap(lines: list[dict]) -> list[str]:
    return [error_text([line["results"]["bbox"][metric] for line in lines]) for metric in METRICS]


def gain_sentence(lines: list[dict]) -> str:
    """The gain, and where there are several seeds the ranges of gain and AP."""
    arms = by_arm(lines)
    base = arms[lines[0]["baseline"]]
    gains, longer = (paired_gains(arms[label], base) for label in (DISTILLED, TWICE))
    text = f"{gains.mean():+.1f} AP by {DISTILLED} in the same iterations"
    if len(gains) > 1:
        text += f" ({len(gains)} seeds: {gains.min():+.1f} to {gains.max():+.1f}; without it "
        text += f"{_range(base)} AP, with it {_range(arms[DISTILLED])})"
    return f"{text}; {longer.mean():+.1f} AP by twice the iterations without it."


def _range(runs: dict[int, dict]) -> str:
    values = [run["results"]["bbox"]["AP"] for run in runs.values()]
    return f"{min(values):.1f} to {max(values):.1f}"


def closing_lines(lines: list[dict], committed: list[dict]) -> list[str]:
    """What was gained, what it cost, what to type next; ``committed``: the lines of several seeds
    on the same data, if there are some."""
    arms, teacher = by_arm(lines), prepared(lines)[0]
    base, distilled = arms[lines[0]["baseline"]], arms[DISTILLED]
    step = mean_of(distilled, "step_seconds") / mean_of(base, "step_seconds")
    light, heavy = (
        run["student_parameters"] / 1e6 for run in (next(iter(distilled.values())), teacher)
    )
    spread = f" Measured before: {gain_sentence(committed)}" if committed else ""
    return [
        f"gained: {gain_sentence(lines)}{spread}",
        f"cost:   {step:.2f} times the baseline's time per step, and a teacher, trained once in "
        f"{teacher['train_seconds'] / 60:.1f} min. The student still has {light:.1f} million "
        f"parameters, the teacher {heavy:.1f}.",
        f"next:   {NEXT}  (your own data: docs/quickstart.md)",
    ]


def draw(comparison: Comparison, seed: int, path: Path) -> None:
    """Ground truth, baseline, distilled student and teacher side by side, on the first images with
    as many objects as the median image has."""
    suite, runs = comparison.suite, {}
    for label in (suite.baseline, DISTILLED):
        arm = suite.arms[label]
        weights = comparison.folder(arm, seed) / "student_final.pth"
        runs[_name(label)] = (merged_config(arm.config, as_list(arm.opts)), weights)
    teacher = suite.prepared[0]
    cfg = merged_config(teacher.config, as_list(teacher.opts))
    runs["teacher"] = (cfg, Path(weights_of(teacher)))
    save_picture(runs, path, records=pick_records(cfg.DATASETS.TEST[0], IMAGES))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the trainings that are not done yet, and report."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--photos", type=Path, metavar="CLONE", help=f"of {ANIMALS.repository}")
    parser.add_argument(
        "--output", type=folder_to_write, help="default: output/demo, output/demo_animals"
    )
    parser.add_argument("--seeds", type=natural, nargs="+", default=[2])
    args = parser.parse_command(argv)
    data = "animals" if args.photos else "digits"
    output = args.output or Path("output/demo" if data == "digits" else "output/demo_animals")
    output = output.resolve()
    if args.photos:
        prepare_animals(args.photos)
    opts = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    threads = max((os.cpu_count() or 2) // 2, 1)
    suite = demo_suite(data, output, opts, args.seeds)
    comparison = Comparison(suite, output, jobs=2, threads=threads)
    with stopping_by_sigterm("stopped; the same command goes on, finished trainings are kept"):
        train(comparison, args.seeds)
    lines = read_lines(output / "results.jsonl")
    picture = output / "detections.jpg"
    draw(comparison, args.seeds[0], picture)
    print(f"\n{markdown(lines)}\n")
    print(
        "This is a short budget, on purpose: what distillation gives first is that a student\n"
        "learns faster. What trained students gain: docs/results.md.\n"
        f"Picture: {picture}   figures: {output / 'results.jsonl'}\n"
    )
    comparable = data == "digits" and len(args.seeds) == 1 and not opts
    committed = read_lines(COMMITTED) if comparable else []
    print("\n".join(closing_lines(lines, committed)))
