"""Make the prototypes of Global Knowledge once, look at them, and time their choice.

    d2kd prototypes make --config-file digits/faster_rcnn_R18_global_knowledge.yaml \\
        --output output/prototypes.pth \\
        MODEL.WEIGHTS output/digits/faster_rcnn_R18/student_final.pth
    d2kd prototypes show output/prototypes.pth --pictures output/prototypes
    d2kd prototypes time --json output/selection.json

``make`` writes a file that DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE can name. ``show`` draws one
picture per class: a row per level, and in it the training objects that represent the class, in the
order in which they were chosen, and prints how far a class's prototypes lie from those of others.
It reads the file that training writes, too. ``time`` measures the choice from random features.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..arguments import CommandParser, file_to_write, folder_to_write, positive
from ..benchmark import selection
from ..data.image_files import load_image
from ..detectors.building import building
from ..engine import setup
from ..engine.checkpoint import AtomicCheckpointer
from ..engine.launch import launch
from ..errors import ConfigError, first_line
from ..prototypes.generate import PrototypeGenerator
from ..prototypes.store import Instance, Prototypes

# Share of a box's size that a picture shows around it, and the pictures' inches an object.
_CONTEXT = 0.15
_INCHES = 1.1


def make(args: argparse.Namespace) -> None:
    """One process of ``make``."""
    setup_logger(distributed_rank=comm.get_rank(), name="d2kd")
    cfg = setup.read_config(args)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller" or "GlobalKnowledge" not in cfg.DISTILL.HEADS:
        raise ConfigError(
            f"a Distiller with the head GlobalKnowledge is needed: MODEL.META_ARCHITECTURE is "
            f"'{cfg.MODEL.META_ARCHITECTURE}', DISTILL.HEADS {list(cfg.DISTILL.HEADS)}"
        )
    with building("the model"):
        model = build_model(cfg)
    AtomicCheckpointer(model).load_weights(cfg.MODEL.WEIGHTS)
    bank = model.distill_heads["GlobalKnowledge"].bank
    if bank is None:
        raise ConfigError("DISTILL.GLOBAL_KNOWLEDGE: neither GLOBAL.WEIGHT nor RELIABILITY is on")
    prototypes = PrototypeGenerator(cfg, bank)(model.student, model.teacher)
    if comm.is_main_process():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        prototypes.save(str(args.output))
        print(f"wrote {args.output}")


def crop(instance: Instance) -> np.ndarray:
    """The object with a little of what is around it, RGB."""
    image = load_image(instance.file_name, "RGB")
    x1, y1, x2, y2 = instance.box
    margin_x, margin_y = _CONTEXT * (x2 - x1), _CONTEXT * (y2 - y1)
    rows = slice(max(int(y1 - margin_y), 0), int(y2 + margin_y) + 1)
    columns = slice(max(int(x1 - margin_x), 0), int(x2 + margin_x) + 1)
    return image[rows, columns]


def draw_class(prototypes: Prototypes, category: int, name: str, path: str) -> None:
    """Write the picture of one class to ``path``."""
    chosen = {}
    for stride, level in prototypes.levels.items():
        rows = slice(level.offsets[category], level.offsets[category + 1])
        chosen[stride] = [prototypes.instances[i] for i in level.instances[rows].tolist()]
    width = max(map(len, chosen.values()))
    figure, axes = plt.subplots(
        len(chosen),
        width,
        figsize=(_INCHES * width + 1, _INCHES * len(chosen) + 0.4),
        squeeze=False,
    )
    for row, (stride, instances) in zip(axes, chosen.items(), strict=True):
        row[0].set_ylabel(f"stride {stride}")
        for place, axis in enumerate(row):
            axis.set(xticks=[], yticks=[], frame_on=False)
            if place < len(instances):
                axis.imshow(crop(instances[place]))
    figure.suptitle(f"class {name}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show(args: argparse.Namespace) -> None:
    """Print how many prototypes there are, and draw them."""
    try:
        prototypes = Prototypes.load(args.file)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    counts = prototypes.counts
    print(f"{int(counts.sum())} prototypes of {len(prototypes.instances)} training objects")
    print("mean cosine of two prototypes of one class, and of two classes:")
    for stride, level in prototypes.levels.items():
        found = (f"{who} {one:.2f}, {two:.2f}" for who, (one, two) in level.likeness().items())
        print(f"  stride {stride}: {'; '.join(found)}")
    os.makedirs(args.pictures, exist_ok=True)
    names = prototypes.meta["classes"] or [str(c) for c in range(counts.shape[1])]
    for category, name in enumerate(names):
        found = ", ".join(
            f"{n} at stride {s}"
            for s, n in zip(prototypes.levels, counts[:, category].tolist(), strict=True)
        )
        print(f"  {name}: {found}")
        if counts[:, category].any():
            safe = "".join(c if c.isalnum() else "_" for c in name)
            draw_class(
                prototypes,
                category,
                name,
                os.path.join(args.pictures, f"{category:03d}_{safe}.png"),
            )
    print(f"pictures are in {args.pictures}")


def build_parser() -> CommandParser:
    """The options of the command, and of each of its parts."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{make,show,time}")
    maker = commands.add_parser("make", help="make prototypes and save them")
    maker.set_defaults(**vars(setup.build_parser().parse_args([])))  # a training's, for launch
    maker.add_argument(
        "--config-file", required=True, help="a config with the GlobalKnowledge head"
    )
    maker.add_argument("--output", type=file_to_write(), default="output/prototypes.pth")
    maker.add_argument("--num-gpus", type=positive, default=1)
    setup.add_import_argument(maker)
    shower = commands.add_parser("show", help="draw the objects behind prototypes")
    shower.add_argument("file")
    shower.add_argument(
        "--pictures",
        type=folder_to_write,
        default="output/prototypes",
        help="folder of the pictures",
    )
    timer = commands.add_parser("time", help="time the choice of prototypes")
    selection.add_arguments(timer)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make, show or time prototypes."""
    args = build_parser().parse_command(argv)
    if args.command == "make":
        launch(make, args)
    elif args.opts:
        raise ConfigError(f"{args.command} takes no KEY VALUE overrides")
    elif args.command == "time":
        selection.run(args)
    else:
        show(args)
