"""Distil a student from a teacher on your data, in one command.

    d2kd distill --student COCO-Detection/retinanet_R_50_FPN_1x.yaml \\
        --teacher COCO-Detection/retinanet_R_101_FPN_3x.yaml \\
        --data train.json images/ val.json images/ --iterations 3000 --out output/mine

Student and teacher are YAML files, configs that d2kd ships, or names in Detectron2's model zoo. The
data are annotation file and image folder of training, then of evaluation, in COCO format; or two
names of registered datasets. Both detectors get the classes of the data. A teacher that has no
weights for these classes is trained first, from the weights that it has; a teacher that is a
LazyConfig (.py) or of another library (timm:resnet50) is used as it is. All is checked before
anything is written. KEY VALUE pairs are the student's; the teacher's are DISTILL.TEACHER.OPTS, and
its own weights DISTILL.TEACHER.WEIGHTS. The same command goes on where it was stopped.

OUT holds teacher.yaml and student.yaml, by which d2kd train repeats what was done; report.md;
gain.yaml, a suite for d2kd compare that measures what distillation gains; and the folders of the
two trainings, student/ with student_final.pth, student_config.yaml and receipt.json.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..arguments import CommandParser, folder_to_write, positive
from ..compare.suite import as_list
from ..config import stretched, student_config
from ..config_files import foreign_teacher, merge_overrides
from ..config_paths import absolute_path
from ..data.classes import list_of
from ..data.loading import release
from ..data.model_classes import trained_classes
from ..data.report import plural
from ..detectors.weights import RANDOM_WEIGHTS
from ..engine import logs, output, train
from ..engine.checkpoint import STUDENT_FILE
from ..engine.deliverable import STUDENT_CONFIG
from ..engine.identity import changed_settings
from ..engine.launch import ending_in_one_line, start, under_torchrun
from ..engine.setup import add_import_argument, import_user_module, merged_config
from ..engine.summary import metrics_table
from ..errors import ConfigError
from ..files import null_to_nan, read_json, shown, write_text
from ..lazy_config import is_lazy
from .distill_configs import (
    as_yaml,
    check_training,
    class_names,
    read_config,
    set_classes,
    set_data,
    silent,
    teacher_weights,
    why_train,
)

DEFAULT_HEADS = ("SSIM",)
CHECKPOINTS = 10  # at least, in a training
SEED = 1  # where the config has none: what is done can be repeated
SUITE = """# What distillation gains over the same training without it:
#   {command}
title: {title}
baseline: baseline
seeds: [1, 2, 3]
arms:
  baseline: &baseline
    config: student.yaml
    opts: {{DISTILL.HEADS: [], DISTILL.INHERIT: []}}
  distilled: {{config: student.yaml}}
  baseline, same time: {{<<: *baseline, same_time_as: distilled}}
"""


@dataclass(frozen=True)
class DistillResult:
    """What :func:`distill` made.

    Attributes:
        folder: of the student's training.
        weights: the student's checkpoint. config: a config that reads it.
        results: the student's, task -> metrics, e.g. ``results["bbox"]["AP"]``.
        teacher_results: the teacher's on the student's input; {} where it was not evaluated.
        teacher_weights: those that taught.
        receipt: the content of ``receipt.json``: pair, data, cost, hashes, versions.
    """

    folder: str
    weights: str
    config: str
    results: dict[str, Any]
    teacher_results: dict[str, Any]
    teacher_weights: str
    receipt: dict[str, Any]


def distill(
    student: str | CfgNode,
    teacher: str | CfgNode,
    data: Sequence[str] = (),
    *,
    heads: Sequence[str] = (),
    out: str = "output/distill",
    iterations: int | None = None,
    batch: int | None = None,
    num_gpus: int = 1,
    opts: Sequence[Any] = (),
    imports: Sequence[str] = (),
) -> DistillResult:
    """Distil ``student`` from ``teacher`` on ``data``: train the teacher if need be, then the
    student, evaluate it and write a report. A second call goes on, or gives what is there.

    Args:
        student, teacher: a YAML file, a config that d2kd ships, a name in Detectron2's model zoo,
            or a config of ``get_cfg()``. Weights are those of ``MODEL.WEIGHTS``; a teacher from the
            zoo has its checkpoint there. A teacher that is a LazyConfig, or "timm:resnet50" and
            the like, is used as it is.
        data: ``[train.json, images, val.json, images]`` in COCO format, or two names of registered
            datasets; () for those of the student's config.
        heads: names of heads; () for those of the student's config, else SSIM.
        out: folder of all that is written.
        iterations: of either training; their schedules keep their proportions. None: the configs'.
        batch: images in a step, by which learning rates are scaled. None: the configs'.
        num_gpus: processes, with a GPU each where there are GPUs.
        opts: KEY VALUE pairs of the student; ``DISTILL.TEACHER.OPTS`` are the teacher's, and
            ``DISTILL.TEACHER.WEIGHTS`` its weights. (Those of the student's config are of the
            teacher that it names itself, and do not count.)
        imports: files or modules to import first, e.g. with a head of yours.

    Raises:
        ConfigError: a mistake, in one line, before anything is written; or ``out`` holds another
            distillation.
        TrainingError: a fault, in one line; the same call goes on from the last checkpoint.
    """
    if under_torchrun():
        raise ConfigError("d2kd distill starts its own processes: use --num-gpus, not torchrun")
    for name in imports:
        import_user_module(name)
    plan = Plan(student, teacher, data, heads, out, opts, imports)
    plan.set_length(iterations, batch)
    plan.check(num_gpus)
    plan.write()
    print(plan.words(), flush=True)
    if plan.trains_teacher:
        run_training(plan.teacher_file, num_gpus, imports)
    run_training(plan.student_file, num_gpus, imports)
    result = plan.result()
    write_text(plan.report(result), os.path.join(plan.out, "report.md"))
    return result


class Plan:
    """The two trainings that a call of :func:`distill` asks for.

    Attributes:
        student: its config.
        teacher: its config; None of a LazyConfig or another library's model, which stays as it is.
        classes: names of the data's classes.
        why: why the teacher is trained first; "" where it is not.
    """

    def __init__(self, student, teacher, data, heads, out, opts, imports):
        self.out, self.imports = os.path.abspath(out), imports
        self.student_file, self.teacher_file = (
            os.path.join(self.out, f"{name}.yaml") for name in ("student", "teacher")
        )
        self.student = read_config(student, opts, other_teacher=True)
        output.check_output_dir(self.out)
        set_data(self.student, data)
        self.classes = class_names(self.student)
        self.teacher: CfgNode | None = None
        self.why, self.is_unsure = "", False
        self._prepare(self.student, "student")
        node = self.student.DISTILL.TEACHER
        if isinstance(teacher, str) and (is_lazy(teacher) or foreign_teacher(teacher)):
            node.CONFIG_FILE = absolute_path(teacher)
        else:
            self._plan_teacher(teacher)
        self._make_distiller(heads)

    def _prepare(self, cfg: CfgNode, name: str) -> None:
        set_classes(cfg, len(self.classes))
        cfg.OUTPUT_DIR = os.path.join(self.out, name)
        cfg.SEED = SEED if cfg.SEED < 0 else cfg.SEED

    def _plan_teacher(self, teacher: str | CfgNode) -> None:
        """The teacher's config on the data, and whether it is trained."""
        node = self.student.DISTILL.TEACHER
        cfg = self.teacher = student_config(read_config(teacher, node.OPTS)).clone()
        cfg.defrost()
        weights = teacher_weights(teacher, cfg, node.WEIGHTS)
        known = trained_classes(cfg)  # of the data that its config names
        for key in ("TRAIN", "TEST", "COCO_FORMAT"):
            cfg.DATASETS[key] = self.student.DATASETS[key]
        self._prepare(cfg, "teacher")
        cfg.DISTILL.HEADS = []
        cfg.MODEL.WEIGHTS = "" if weights == RANDOM_WEIGHTS else weights
        self.is_unsure = known is None
        self.why = why_train(cfg, weights, known, self.classes)
        own = os.path.join(cfg.OUTPUT_DIR, STUDENT_FILE)
        node.CONFIG_FILE, node.OPTS = self.teacher_file, []
        node.WEIGHTS = own if self.trains_teacher else weights

    @property
    def trains_teacher(self) -> bool:
        """Whether its weights are not for the classes of the data."""
        return bool(self.why)

    def _make_distiller(self, heads: Sequence[str]) -> None:
        cfg = self.student
        if cfg.MODEL.META_ARCHITECTURE != "Distiller":
            cfg.DISTILL.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
            cfg.MODEL.META_ARCHITECTURE = "Distiller"
        cfg.DISTILL.HEADS = list(heads or cfg.DISTILL.HEADS or DEFAULT_HEADS)

    def set_length(self, iterations: int | None, batch: int | None) -> None:
        """Change the number of iterations and the batch of both trainings, and let either keep its
        last checkpoint, to go on from."""
        for cfg in self._files().values():
            if iterations:
                merge_overrides(cfg, as_list(stretched(cfg, iterations)))
            if batch:
                cfg.SOLVER.BASE_LR *= batch / cfg.SOLVER.IMS_PER_BATCH
                cfg.SOLVER.IMS_PER_BATCH = batch
            period = max(cfg.SOLVER.MAX_ITER // CHECKPOINTS, 1)
            cfg.SOLVER.CHECKPOINT_PERIOD = min(cfg.SOLVER.CHECKPOINT_PERIOD, period)
            cfg.SOLVER.CHECKPOINT_KEEP = cfg.SOLVER.CHECKPOINT_KEEP or 1

    # --- before anything is written -------------------------------------------------------------

    def check(self, num_gpus: int) -> None:
        """Check both configs, the data, the pair, the weights to start from, and ``out``."""
        self._check_same()
        with tempfile.TemporaryDirectory() as folder:
            student = self.student.clone()
            if self.teacher is not None:
                file = os.path.join(folder, "teacher.yaml")
                write_text(as_yaml(self.teacher), file)
                student.DISTILL.TEACHER.CONFIG_FILE = file
            if self.trains_teacher:
                student.DISTILL.TEACHER.WEIGHTS = RANDOM_WEIGHTS  # the right ones come later
                check_training(self.teacher.clone(), num_gpus)
            with silent("d2kd.detectors.weights"):
                check_training(student, num_gpus)
        for cfg in self._files().values():
            output.check_free(cfg.OUTPUT_DIR)

    def _check_same(self) -> None:
        """Refuse ``out`` where it holds a distillation of other settings."""
        for path, cfg in self._files().items():
            if not os.path.isfile(path):
                continue
            old, new = (changed_settings(c) for c in (merged_config(path, []), cfg))
            for key in sorted(old.keys() | new.keys()):
                was, now = (found.get(key, "its default") for found in (old, new))
                if was != now:
                    raise ConfigError(
                        f"'{shown(self.out)}' holds a distillation with other settings: {key} of "
                        f"{os.path.basename(path)} was {was} and is {now}; name another --out"
                    )

    def _files(self) -> dict[str, CfgNode]:
        """File -> its config."""
        teacher = {} if self.teacher is None else {self.teacher_file: self.teacher}
        return {**teacher, self.student_file: self.student}

    # --- what is written ------------------------------------------------------------------------

    def write(self) -> None:
        """Write the two configs, and the suite that measures the gain."""
        os.makedirs(self.out, exist_ok=True)
        for path, cfg in self._files().items():
            write_text(as_yaml(cfg), path)
        suite = os.path.join(self.out, "gain.yaml")
        title = json.dumps(f"Distilled by {', '.join(self.student.DISTILL.HEADS)}")
        write_text(SUITE.format(title=title, command=self._compare()), suite)

    def _compare(self) -> str:
        gain = shown(os.path.join(self.out, "gain"))
        return self._command("compare", "--suite", f"{gain}.yaml", "--output", gain)

    def _command(self, *words: str) -> str:
        """A command to be copied, which imports what this one did."""
        return shlex.join(["d2kd", *words, *(f"--import={name}" for name in self.imports)])

    def words(self) -> str:
        """What will be done, a line for the data and for each training."""
        names = self.student.DATASETS
        lines = [
            f"data: {plural(len(self.classes), 'class')} ({list_of(self.classes)}), trained on "
            f"{', '.join(names.TRAIN)}, evaluated on {', '.join(names.TEST)}"
        ]
        how = "has weights for these classes" + " (it does not tell their names)" * self.is_unsure
        if self.why:
            how = f"trained first: {self.why}; {length(self.teacher)}"
        name = self.student.DISTILL.TEACHER.CONFIG_FILE
        if self.teacher is not None:
            name = self.teacher.MODEL.META_ARCHITECTURE
        lines.append(f"teacher: {name}, {how if self.teacher is not None else 'as it is'}")
        arch, heads = self.student.DISTILL.STUDENT_META_ARCH, ", ".join(self.student.DISTILL.HEADS)
        lines.append(f"student: {arch}, distilled by {heads}; {length(self.student)}")
        return "\n".join(lines)

    def result(self) -> DistillResult:
        """What is there at the end."""
        folder = self.student.OUTPUT_DIR
        receipt = read_json(os.path.join(folder, output.RECEIPT_FILE))
        results = read_json(os.path.join(folder, output.RESULTS_FILE))["results"]
        return DistillResult(
            folder=folder,
            weights=os.path.join(folder, STUDENT_FILE),
            config=os.path.join(folder, STUDENT_CONFIG),
            results=null_to_nan(results),
            teacher_results=null_to_nan(receipt["teacher"]["results"]),
            teacher_weights=self.student.DISTILL.TEACHER.WEIGHTS,
            receipt=receipt,
        )

    def report(self, result: DistillResult) -> str:
        """report.md: AP, per class too, cost, and how to go on."""
        found = {"student": result.results, "teacher": result.teacher_results}
        cost = result.receipt["cost"]
        files = [*self._files()] if self.trains_teacher else [self.student_file]
        again = [self._command("train", "--config-file", shown(path)) for path in files]
        return (
            f"# {self.student.DISTILL.STUDENT_META_ARCH} distilled by "
            f"{', '.join(self.student.DISTILL.HEADS)}\n\n```\n{self.words()}\n```\n\n"
            f"{metrics_table(found, 'pipe')}\n\n{class_table(found, self.classes)}\n\n"
            f"The student has {cost['student_parameters']:,} parameters. {cost['iterations']} "
            f"steps took {cost['train_seconds'] / 60:.1f} minutes on {cost['device']}, a "
            f"step {cost['step_seconds']:.3f} s (median), and {cost['peak_memory_mib']:.0f} MiB. "
            f"Weights, config and receipt are in `{shown(result.folder)}`.\n\n"
            "Whether distillation helped cannot be seen from one run. This trains the same student "
            "without it, from three seeds, and for the same time:\n\n```bash\n"
            f"{self._compare()}\n```\n\n"
            "The same trainings again, each into another `OUTPUT_DIR`:\n\n```bash\n"
            + "\n".join(f"{line} OUTPUT_DIR again" for line in again)
            + f"\n```\n\nThe student as a file for deployment, with its latency:\n\n```bash\n"
            f"{self._command('export', shown(result.folder))}\n```\n"
        )


# --- running and reporting ----------------------------------------------------------------------


def run_training(config_file: str, num_gpus: int, imports: Sequence[str]) -> None:
    """Train what a config says, from where it was left; a finished training is kept."""
    folder = merged_config(config_file, []).OUTPUT_DIR
    complete = (output.RESULTS_FILE, STUDENT_FILE, output.RECEIPT_FILE)
    is_whole = all(os.path.isfile(os.path.join(folder, name)) for name in complete)
    if output.read_record(folder).get("finished") and is_whole:
        print(f"{shown(folder)}: done before", flush=True)
        return
    words = ["--config-file", config_file, "--resume", "--num-gpus", str(num_gpus)]
    args = train.build_parser().parse_args([*words, *(f"--import={name}" for name in imports)])
    if num_gpus > 1:
        release()  # the datasets that the check read: the processes read their own
    start(train.process, args)


def length(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    return f"{solver.MAX_ITER} iterations of {plural(solver.IMS_PER_BATCH, 'image')}"


def class_table(found: dict[str, dict], classes: Sequence[str]) -> str:
    """Box AP of each class, of student and teacher, as Markdown; "" where there is none."""
    per_class = {
        name: {c: results["bbox"].get(f"AP-{c}") for c in classes}
        for name, results in found.items()
        if "bbox" in results
    }
    if not any(value is not None for values in per_class.values() for value in values.values()):
        return ""
    head = f"| class | {' | '.join(per_class)} |\n|:--|{'--:|' * len(per_class)}"
    rows = [
        f"| {c} | {' | '.join(_ap(values[c]) for values in per_class.values())} |" for c in classes
    ]
    return "\n".join([head, *rows])


def _ap(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1f}"


def build_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--student", required=True, metavar="CONFIG")
    parser.add_argument("--teacher", required=True, metavar="CONFIG")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="train.json images val.json images, or two names (default: the student's DATASETS)",
    )
    parser.add_argument(
        "--heads", default="", metavar="A,B", help="default: the student's DISTILL.HEADS, else SSIM"
    )
    parser.add_argument(
        "--out", type=folder_to_write, default="output/distill", help="default: %(default)s"
    )
    parser.add_argument("--iterations", type=positive, help="of either training; schedules scale")
    parser.add_argument("--batch", type=positive, help="images in a step; learning rates scale")
    parser.add_argument("--num-gpus", type=positive, default=1, help="default: %(default)s")
    add_import_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Distil as the arguments say; what goes wrong ends the program in one line."""
    args = build_parser().parse_command(argv)
    with ending_in_one_line():
        logs.start()
        result = distill(
            args.student,
            args.teacher,
            args.data,
            heads=[name.strip() for name in args.heads.split(",") if name.strip()],
            out=str(args.out),
            iterations=args.iterations,
            batch=args.batch,
            num_gpus=args.num_gpus,
            opts=args.opts,
            imports=args.imports,
        )
    found = {"student": result.results, "teacher": result.teacher_results}
    report = shown(os.path.join(os.path.abspath(args.out), "report.md"))
    print(f"\n{metrics_table(found)}\n\nstudent: {shown(result.weights)}   report: {report}")
