"""Export a student to TorchScript and ONNX, compare with the model, measure the latency.

    d2kd export output/my_student
    d2kd export output/my_student --size 480 640 --formats onnx
    d2kd export --config-file my_config.yaml MODEL.WEIGHTS my_student.pth

The first form takes the output folder of a training. The files have a fixed input size and take one
image; images of another size are scaled to fit and padded. Their detections on real images are
compared with the model's one by one, and a file that finds others ends the command with an error.
Then teacher, student and files are timed.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from torch import nn

from ..arguments import CommandParser, positive
from ..compare.pictures import pick_records
from ..config import student_config
from ..config_files import read_yaml
from ..data.custom import check_datasets
from ..data.image_files import load_image
from ..data.model_classes import trained_classes
from ..detectors.foreign import MapsDetector
from ..detectors.teacher import Teacher
from ..engine.checkpoint import STUDENT_FILE, AtomicCheckpointer
from ..engine.identity import versions
from ..engine.output import CONFIG_FILE, check_output_dir
from ..engine.setup import add_import_argument, import_user_module, merged_config
from ..engine.summary import metrics_table
from ..engine.trainer import DistillTrainer, without_start
from ..errors import ConfigError
from ..files import shown, write_json
from .detector import ExportedDetector
from .graph import Interface, check_onnx, detect, traceable, write_onnx, write_torchscript
from .latency import Latency, latency_table, measure
from .parity import Parity, compare, parity_table

FORMATS = ("torchscript", "onnx")
REPORT = "export.json"
IMAGES = 8
# Sides of the canvas are multiples of it: a pyramid's largest stride but one of P6 and P7.
STEP = 32


class Export:
    """A student, the images to compare on, and the files that it becomes.

    Args:
        cfg: of the student, or of the training that it comes from; ``MODEL.WEIGHTS`` is the
            student's checkpoint.
        images: files; () takes images of ``DATASETS.TEST``.
        size: (H, W) of the canvas; None: the smallest that holds all the images at the size of
            ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``.
        output: folder of the files.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        images: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        output: str = "",
    ):
        self.cfg, self.output = cfg, output or os.path.join(cfg.OUTPUT_DIR, "export")
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
        self.devices = ["cpu", "cuda"] if on_gpu else ["cpu"]
        cfg.MODEL.DEVICE = "cpu"
        check_output_dir(self.output)
        files, classes = images_and_classes(cfg, images)
        pictures = [load_image(name, cfg.INPUT.FORMAT) for name in files]
        self.student = load_student(cfg)
        blank = torch.zeros(3, *(size or canvas_size(cfg, pictures)))
        padding = self.student.pixel_mean.flatten().tolist()
        self.interface = Interface(
            cfg.INPUT.FORMAT,
            tuple(blank.shape[1:]),
            tuple(padding),
            classes,
            tuple(traceable(self.student, blank).outputs_schema.keys),
        )
        self.canvases = [self.interface.canvas(picture.copy())[0] for picture in pictures]
        self.files: dict[str, tuple[str, str]] = {}  # name -> path, device

    def write(self, formats: Sequence[str]) -> None:
        """Write the files; TorchScript for each device, as it runs only where it was made for."""
        os.makedirs(self.output, exist_ok=True)
        names = {"cpu": "student.ts", "cuda": "student_cuda.ts"}
        wanted = {names[d]: d for d in self.devices if "torchscript" in formats}
        wanted |= {"student.onnx": "cpu"} if "onnx" in formats else {}
        for name, device in wanted.items():
            path, canvas = os.path.join(self.output, name), self.canvases[0].to(device)
            write = write_onnx if name.endswith(".onnx") else write_torchscript
            write(traceable(self.student.to(device), canvas), canvas, self.interface, path)
            self.files[name] = path, device
            print(f"wrote {shown(path)}", flush=True)

    @torch.no_grad()
    def compare(self) -> dict[str, Parity]:
        """File -> how its detections differ from the model's, on all images."""
        found = {}
        for name, (path, device) in self.files.items():
            student, run = self.student.to(device), ExportedDetector(path, device).run
            pairs = (
                (detect(student, [{"image": canvas}]), run(canvas))
                for canvas in (c.to(device) for c in self.canvases)
            )
            found[name] = compare(pairs, self.cfg.TEST.DETECTIONS_PER_IMAGE)
        return found

    @torch.no_grad()
    def measure(self, teacher: nn.Module | None, repeats: int) -> list[Latency]:
        """The latency of teacher, student and files, on each device."""
        rows = []
        for device in self.devices:
            canvas = self.canvases[0].to(device)
            models: dict[str, tuple[Callable[[], object], float]] = {}
            for name, model in (("teacher", teacher), ("student", self.student)):
                if model is not None:
                    call = functools.partial(detect, model.to(device), [{"image": canvas}])
                    models[name] = call, megabytes(model)
            for name, (path, home) in self.files.items():
                if device != home and not (name == "student.onnx" and onnx_has_cuda()):
                    continue
                try:
                    run = functools.partial(ExportedDetector(path, device).run, canvas)
                except ConfigError as error:
                    print(f"{name} is not timed on {device}: {error}")
                else:
                    models[name] = run, os.path.getsize(path) / 1e6
            rows += measure(models, device, repeats)
        return rows

    def evaluate(self) -> dict[str, dict]:
        """File -> dataset of ``DATASETS.TEST`` -> its results, from the image files on."""
        cfg, found = self.cfg.clone(), {}
        check_datasets(cfg, train=False)
        cfg.OUTPUT_DIR = self.output
        for name, (path, device) in self.files.items():
            run = functools.partial(_detect_in_files, ExportedDetector(path, device))
            found[name] = {}
            for dataset in cfg.DATASETS.TEST:
                loader = DistillTrainer.build_test_loader(cfg, dataset)
                evaluator = DistillTrainer.build_evaluator(cfg, dataset)
                found[name][dataset] = inference_on_dataset(run, loader, evaluator)
        return found


def _detect_in_files(detector: ExportedDetector, inputs: list[dict]) -> list[dict]:
    """Detections in the image files that Detectron2's evaluation names."""
    return [detector(load_image(item["file_name"], "BGR")) for item in inputs]


def onnx_has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def megabytes(model: nn.Module) -> float:
    """Of the model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def load_student(cfg: CfgNode) -> nn.Module:
    """The student of ``cfg`` with its weights, on the CPU, in evaluation."""
    weights = cfg.MODEL.WEIGHTS
    # What follows a "?" is Detectron2's.
    if "://" not in weights and not os.path.isfile(weights.partition("?")[0]):
        raise ConfigError(f"no file '{weights}': name the student's weights as MODEL.WEIGHTS")
    model = build_model(without_start(student_config(cfg))).eval()
    AtomicCheckpointer(model).load_weights(weights, complete=True)
    if not hasattr(model, "pixel_mean"):
        raise ConfigError(f"a {type(model).__name__} has no pixel_mean to pad images with")
    return model


def images_and_classes(cfg: CfgNode, images: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Files to compare on, and the names of the classes."""
    for name in images:
        if not os.path.isfile(name):
            raise ConfigError(f"--images: no file '{name}'")
    if images:
        return list(images), trained_classes(cfg) or ()
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name images to compare on, by --images")
    check_datasets(cfg, train=False)
    name = cfg.DATASETS.TEST[0]
    files = [record["file_name"] for record in pick_records(name, IMAGES)]
    return files, tuple(MetadataCatalog.get(name).get("thing_classes", ()))


def canvas_size(cfg: CfgNode, pictures: Sequence) -> tuple[int, int]:
    """(H, W) of the smallest canvas for all pictures, as large as they are in evaluation."""
    short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    sizes = [p.shape[:2] for p in pictures]
    if short:
        sizes = [ResizeShortestEdge.get_output_shape(*s, short, longest) for s in sizes]
    height, width = (-(-max(sides) // STEP) * STEP for sides in zip(*sizes, strict=True))
    return height, width


def load_teacher(cfg: CfgNode) -> nn.Module | None:
    """The teacher of a training; None where there is none, or it cannot be loaded, which is said:
    a machine that a student is exported on need not have it."""
    if cfg.MODEL.META_ARCHITECTURE != "Distiller" or not cfg.DISTILL.TEACHER.CONFIG_FILE:
        return None
    try:
        model = Teacher.from_config(cfg).model
    except ConfigError as error:
        print(f"the teacher is not timed: {error}")
        return None
    if isinstance(model, MapsDetector):
        print("the teacher is not timed: it gives maps, and no detections")
        return None
    return model


def build_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("folder", nargs="?", help="output folder of a training")
    add("--config-file", metavar="FILE", help="without a folder: the config")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    size = "of the input (default: the smallest that holds the images, as in evaluation)"
    add("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    add("--images", nargs="+", default=[], metavar="FILE", help="default: 8 of DATASETS.TEST")
    add("--output", default="", help="default: 'export' in the output folder")
    add("--repeats", type=positive, default=30, help="calls that are timed (default: %(default)s)")
    add("--evaluate", action="store_true", help="also the AP of each file on DATASETS.TEST")
    add("--no-teacher", action="store_true", help="do not time the teacher")
    add_import_argument(parser)
    return parser


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config that the arguments name, with the student's weights."""
    if bool(args.folder) == bool(args.config_file):
        raise ConfigError("name the output folder of a training, or a --config-file")
    if not args.folder:
        return merged_config(args.config_file, args.opts)
    path = os.path.join(args.folder, CONFIG_FILE)
    if not os.path.isfile(path):
        raise ConfigError(f"'{args.folder}' is no output folder of a training: no {CONFIG_FILE}")
    _, lines = read_yaml(path)
    if "LAZY" in lines:
        raise ConfigError(f"'{args.folder}' is of a LazyConfig; students of YAML can be exported")
    weights = os.path.join(args.folder, STUDENT_FILE)
    own = ["OUTPUT_DIR", args.folder, "MODEL.WEIGHTS", weights]
    return merged_config(path, [*own, *args.opts])


def main(argv: Sequence[str] | None = None) -> None:
    """Export, compare and measure as the arguments say.

    Raises:
        ConfigError: in one line: a mistake, before anything is written; or a file that does not
            find what the model finds, which export.json shows.
    """
    args = build_parser().parse_command(argv)
    if "onnx" in args.formats:
        check_onnx()
    for name in args.imports:
        import_user_module(name)
    cfg = read_config(args)
    size = tuple(args.size) if args.size else None
    export = Export(cfg, images=args.images, size=size, output=args.output)
    export.write(args.formats)
    parity = export.compare()
    print(f"\n{parity_table(parity)}\n")
    if not any(p.detections for p in parity.values()):
        print("The model finds nothing in these images, which compares nothing: see --images.\n")
    rows = export.measure(None if args.no_teacher else load_teacher(cfg), args.repeats)
    height, width = export.interface.size
    print(
        f"{latency_table(rows)}\n\nOne image of {height} x {width}, pixels to detections, "
        f"{torch.get_num_threads()} CPU thread(s), {args.repeats} calls in turn."
    )
    report = {
        "weights": shown(cfg.MODEL.WEIGHTS),
        "interface": asdict(export.interface),
        "parity": {name: {**asdict(p), "holds": p.holds} for name, p in parity.items()},
        "latency": [asdict(row) for row in rows],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if args.evaluate:
        report["results"] = export.evaluate()
        print(f"\n{metrics_table(report['results'])}")
    write_json(report, os.path.join(export.output, REPORT))
    if wrong := [name for name, p in parity.items() if not p.holds]:
        raise ConfigError(
            f"{', '.join(wrong)} does not find what the model finds; see the table, and "
            f"'{shown(os.path.join(export.output, REPORT))}'"
        )
