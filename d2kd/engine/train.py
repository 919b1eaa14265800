"""Training and evaluation in one call: :func:`main` for a command line, :func:`train` in Python."""

from __future__ import annotations

import argparse
import logging
import sys

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.multiprocessing import ProcessRaisedException

from ..config import student_config
from ..data.loader import ImageError, validate_loader_config
from ..data.loading import release
from ..errors import ConfigError
from ..meta_arch import moments_of
from .hooks import check_teacher, read_teacher_results
from .setup import add_import_argument, model_config, read_config, start_logging
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's arguments, and ``--import``."""
    parser = default_argument_parser(epilog=description or __doc__)
    add_import_argument(parser)
    return parser


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict:
    """Evaluate the plain student of ``cfg``; no teacher is built."""
    cfg = student_config(cfg)
    model = build_model(model_config(cfg, args))
    start_logging(cfg, args)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    return DistillTrainer.test(cfg, model)


def train_process(cfg: CfgNode, args: argparse.Namespace) -> dict:
    """Train ``cfg`` in this process of a job, from the last checkpoint with ``--resume``."""
    # First of all, because the heads' schedules end with SOLVER.MAX_ITER.
    cfg = DistillTrainer.auto_scale_workers(cfg, comm.get_world_size())
    validate_loader_config(cfg, comm.get_world_size())
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed() % 2**31
    seed_all_rng(seed)
    # Before the output folder is made: a head may refuse the pair.
    model = build_model(model_config(cfg, args))
    start_logging(cfg, args)
    if cfg.DISTILL.HEADS and cfg.MODEL.META_ARCHITECTURE != "Distiller":
        logger.warning(
            "Training %s without distillation: DISTILL.HEADS is for the Distiller of "
            "MODEL.META_ARCHITECTURE",
            cfg.MODEL.META_ARCHITECTURE,
        )
    trainer = DistillTrainer(cfg, seed, model)
    trainer.resume_or_load(resume=args.resume)
    teacher = moments_of(model).teacher
    if teacher is not None:
        # All ranks take part, or none: that of the folder's machine knows.
        checked = trainer.start_iter > 0 and bool(read_teacher_results(cfg.OUTPUT_DIR))
        if cfg.DISTILL.TEACHER.CHECK and not comm.all_gather(checked)[0]:
            check_teacher(cfg, teacher, DistillTrainer)
    trainer.train()
    return trainer.last_results


def train(cfg: CfgNode, resume: bool = False) -> dict:
    """Train what ``cfg`` says in this process, into ``cfg.OUTPUT_DIR``.

    Args:
        cfg: a full config, of ``get_cfg()`` and :func:`d2kd.add_distillation_config`.
        resume: go on from the last checkpoint of ``OUTPUT_DIR``, if there is one.

    Returns:
        Results of the last evaluation: task -> metrics.

    Raises:
        ConfigError: in one line, before anything is written.
    """
    args = build_parser().parse_args(["--resume"] if resume else [])
    return train_process(cfg, args)


def process(args: argparse.Namespace) -> dict:
    """One process of a job."""
    cfg = read_config(args)
    return evaluate(cfg, args) if args.eval_only else train_process(cfg, args)


def main(argv: list[str] | None = None, description: str | None = None) -> None:
    """Train or evaluate as the command line says; a user's mistake ends it in one line.

    Args:
        argv: arguments without the program's name; default: those of this process.
        description: what ``--help`` shows below the options.
    """
    args = build_parser(description).parse_args(argv)
    try:
        read_config(args)
        if args.num_gpus > 1:
            release()  # each process reads its own
        launch(
            process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except ProcessRaisedException as error:  # carries a traceback of the process as text
        name, _, message = str(error).strip().splitlines()[-1].partition(": ")
        if name not in (f"{kind.__module__}.{kind.__name__}" for kind in (ConfigError, ImageError)):
            raise
        sys.exit(f"error: {message}")
