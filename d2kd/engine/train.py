"""Training and evaluation in one call: :func:`main` for a command line, :func:`train` in Python."""

from __future__ import annotations

import argparse
import os

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..config import student_config
from ..detectors.building import building
from ..errors import ConfigError
from ..files import write_json, write_text
from ..lazy_config import is_lazy
from . import lazy, logs, output
from .checkpoint import AtomicCheckpointer, find_checkpoint
from .faults import on_main_process
from .launch import launch
from .setup import build_parser, check_config, setup
from .trainer import DistillTrainer, without_start


def main(argv: list[str] | None = None, description: str | None = None) -> dict | None:
    """Train or evaluate as a command line says; what goes wrong ends the program in one line.

    Returns:
        Results of the last evaluation; None where other processes did the work.
    """
    return launch(process, build_parser(description).parse_args(argv))


def process(args: argparse.Namespace) -> dict:
    """One process of a job: train_net.py's ``main``."""
    cfg, trainer_class = prepare(args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume, trainer_class=trainer_class)
    return trainer_class(cfg, resume=args.resume).train()


def prepare(
    args: argparse.Namespace, trainer_class: type[DistillTrainer] = DistillTrainer
) -> tuple[CfgNode, type[DistillTrainer]]:
    """The config of a job, checked, and its trainer, ``trainer_class`` itself or, of a LazyConfig,
    a class derived from it; nothing is written yet."""
    if is_lazy(args.config_file):
        return lazy.prepare(args, trainer_class)
    return setup(args), trainer_class


def train(cfg: CfgNode, resume: bool = False) -> dict:
    """Train what ``cfg`` says, in this process, into ``cfg.OUTPUT_DIR``.

    Args:
        cfg: a full config, of ``get_cfg()`` and :func:`d2kd.add_distillation_config`.
        resume: go on from the last checkpoint of ``OUTPUT_DIR``, if there is one.

    Returns:
        Results of the last evaluation: task -> metrics.

    Raises:
        ConfigError: in one line, before anything is written.
        TrainingError: a fault, in one line; what was trained is in the last checkpoint.
    """
    cfg = cfg.clone()
    cfg.defrost()
    check_config(cfg, train=True, resume=resume)
    cfg.freeze()
    logs.start()
    return DistillTrainer(cfg, resume=resume).train()


def evaluate(
    cfg: CfgNode, *, resume: bool = False, trainer_class: type[DistillTrainer] = DistillTrainer
) -> dict:
    """Evaluate the plain student of ``cfg`` on ``DATASETS.TEST``; no teacher is built. Where the
    results are not ``TEST.EXPECTED_RESULTS``, the program ends, as in Detectron2.

    What it writes is in ``OUTPUT_DIR``/inference; the files of a training in the folder stay.

    Args:
        resume: the last checkpoint of ``OUTPUT_DIR``, if there is one, and not ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: there are no weights, or not for all of the model.
    """
    folder = cfg.OUTPUT_DIR
    last = on_main_process(lambda: find_checkpoint(folder, weights_only=True)) if resume else ""
    weights = last or cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(
            "an evaluation needs weights: name a checkpoint as MODEL.WEIGHTS, or give --resume "
            "with an OUTPUT_DIR that has one"
        )
    cfg = student_config(cfg)
    with building("the model"):
        model = trainer_class.build_model(without_start(cfg))
    AtomicCheckpointer(model).load_weights(weights, complete=True)
    own = os.path.join(folder, output.EVALUATION_FOLDER)

    def claim() -> bool:
        output.check_output_dir(folder)
        is_new = output.lock(folder)
        os.makedirs(own, exist_ok=True)
        write_text(cfg.dump(), os.path.join(own, output.CONFIG_FILE))
        return is_new

    # A training of this process that evaluates on its way keeps its lock and its log.
    is_new, has_log = on_main_process(claim), logs.open_file(own)
    try:
        results = trainer_class.test(cfg, model)
        content = {"weights": weights, "results": results}
        on_main_process(lambda: write_json(content, os.path.join(own, output.RESULTS_FILE)))
        if comm.is_main_process():
            verify_results(cfg, results)
    finally:
        if is_new:
            output.unlock(folder)
        if has_log:
            logs.close()
    return results
