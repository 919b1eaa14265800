"""From the command line to a config and a logger, with every check before anything is written."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.file_io import PathManager

from ..arguments import CommandParser
from ..config import add_distillation_config, validate_distillation_config, validate_solver
from ..config_files import (
    SHARED_OUTPUT,
    default_output_dir,
    foreign_teacher,
    load_config,
    merge_overrides,
    resolve_config_file,
    similar_files,
)
from ..config_paths import looked_in, set_absolute_paths
from ..config_rules import check_detectron2_keys
from ..data.custom import check_datasets, log_reports
from ..data.loader import validate_loader_config
from ..detectors.weights import RANDOM_WEIGHTS
from ..errors import ConfigError, first_line
from ..files import shown
from ..keys import adds_config
from ..lazy_config import line_of_module
from . import logs, output
from .checkpoint import find_checkpoint
from .launch import add_launch_arguments
from .trainer import find_evaluator

logger = logging.getLogger(__name__)


def build_parser(epilog: str | None = None) -> CommandParser:
    """Detectron2's arguments, ``--import`` and ``--dist-timeout``."""
    parser = CommandParser(epilog=epilog, parents=[default_argument_parser()], add_help=False)
    add_import_argument(parser)
    add_launch_arguments(parser)
    return parser


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """``--import MODULE``, as often as needed: ``imports``, for :func:`import_user_module`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a file or module to import first: it registers a head of yours, or adds config keys",
    )


def import_user_module(name: str) -> None:
    """Import a user's module, by dotted name or by file, so that what it registers is known.

    Its functions called ``add_..._config``, as Detectron2's projects call theirs, add their keys to
    every config that is read from then on.
    """
    try:
        module = _import_file(name) if name.endswith(".py") else importlib.import_module(name)
    except ConfigError:
        raise
    except SyntaxError as error:
        place = f"{shown(str(error.filename))}:{error.lineno}"
        raise ConfigError(f"--import: {place}: {error.msg}") from error
    except Exception as error:
        raise ConfigError(f"--import: {line_of_module(error, 0) or first_line(error)}") from error
    for key, value in vars(module).items():
        of_detectron2s_form = re.fullmatch(r"add_(\w+_)?config", key) and inspect.isfunction(value)
        if of_detectron2s_form and value is not add_distillation_config:
            adds_config(value)


def _import_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise ConfigError(f"--import: no file '{path}'; give a .py file or the name of a module")
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:
        found = getattr(sys.modules[name], "__file__", None)
        if found is None or not os.path.exists(found) or not os.path.samefile(found, path):
            raise ConfigError(f"--import: another module is called '{name}': rename '{path}'")
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def merged_config(config_file: str, opts: list[str]) -> CfgNode:
    """The config of a file and KEY VALUE overrides, before any check of what they say.

    Its paths are absolute as far as the files are there, looked for in the working directory and
    in the folder of ``config_file``.

    Raises:
        ConfigError: in one line, for a missing file or an unknown key.
    """
    cfg = get_cfg()
    add_distillation_config(cfg)
    path = load_config(cfg, config_file)
    if cfg.OUTPUT_DIR == SHARED_OUTPUT:
        cfg.OUTPUT_DIR = default_output_dir(config_file)
    merge_overrides(cfg, opts)
    set_absolute_paths(cfg, [os.path.dirname(path)])
    return cfg


def read_config(args: argparse.Namespace) -> CfgNode:
    """The checked config of ``--config-file`` and the KEY VALUE overrides; a ConfigError for
    whatever is wrong with them."""
    for name in getattr(args, "imports", []):
        import_user_module(name)
    cfg = merged_config(args.config_file, args.opts)
    folders = [os.path.dirname(resolve_config_file(args.config_file))]
    check_config(cfg, folders, train=not args.eval_only, resume=args.resume)
    if not args.eval_only and not cfg.SOLVER.REFERENCE_WORLD_SIZE:  # else the batch is scaled
        validate_loader_config(cfg, max(args.num_gpus * args.num_machines, 1))
    cfg.freeze()
    return cfg


def check_config(
    cfg: CfgNode, folders: Sequence[str] = (), *, train: bool, resume: bool = False
) -> None:
    """Check all that can be checked of ``cfg`` without building a model; a GPU that is not there
    becomes the CPU.

    Args:
        folders: where its files were looked for besides the working directory, for messages.
        train: for training, else for evaluation.
        resume: a checkpoint in ``OUTPUT_DIR`` takes the place of ``MODEL.WEIGHTS``.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_detectron2_keys(cfg, train=train)
    if train:
        validate_solver(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller" and train:
        validate_distillation_config(cfg, folders)
        teacher, is_built = cfg.DISTILL.TEACHER, cfg.DISTILL.HEADS or cfg.DISTILL.INHERIT
        if is_built and teacher.WEIGHTS != RANDOM_WEIGHTS:
            if not foreign_teacher(teacher.CONFIG_FILE):
                check_weights(teacher.WEIGHTS, "DISTILL.TEACHER.WEIGHTS", folders)
    elif cfg.DISTILL.HEADS and train:
        raise ConfigError(
            f"DISTILL.HEADS {list(cfg.DISTILL.HEADS)} need MODEL.META_ARCHITECTURE Distiller, it "
            f"is {cfg.MODEL.META_ARCHITECTURE}; without distillation, set DISTILL.HEADS []"
        )
    if not (resume and find_checkpoint(cfg.OUTPUT_DIR, weights_only=not train)):
        check_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", folders)
    check_datasets(cfg, train=train)
    for name in cfg.DATASETS.TEST:
        find_evaluator(name)


def check_devices(cfg: CfgNode) -> None:
    """Refuse processes on this machine of which not all have the device that the config wants."""
    processes, gpus = comm.get_local_size(), torch.cuda.device_count()
    if processes == 1:
        return
    if cfg.MODEL.DEVICE.startswith("cuda") and processes > gpus:
        raise ConfigError(f"--num-gpus {processes}, but this machine has {gpus}")
    if cfg.MODEL.DEVICE == "cpu" and torch.distributed.get_backend() == "nccl":
        raise ConfigError(
            "MODEL.DEVICE cpu in several processes: hide the GPUs, by CUDA_VISIBLE_DEVICES=''"
        )


def check_weights(path: str, key: str, folders: Sequence[str] = ()) -> None:
    """Refuse a checkpoint, the value of ``key``, that is a local file and not there (nor in
    ``folders``); names the command that makes it, or files like it."""
    name = (path or "").partition("?")[0]  # what follows is Detectron2's
    if not name or "://" in name or PathManager.isfile(name):
        return
    hint = ""
    if path.endswith("_pretrained.pth"):
        hint = "; d2kd pretrain makes it"
    elif re.search(r"R-\d+\.pkl$", path):
        hint = "; d2kd convert makes it"
    elif similar_files(path):
        hint = f"; there is {similar_files(path)}"
    raise ConfigError(f"{key}: no file '{path}'{hint}{looked_in(path, folders)}")


def setup(args: argparse.Namespace, cfg: CfgNode | None = None) -> CfgNode:
    """The config of a job, read (unless that is done) and checked, and a log on the console;
    nothing is written yet."""
    logs.start()
    cfg = read_config(args) if cfg is None else cfg
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; give names of datasets to evaluate on")
    check_devices(cfg)
    if comm.is_main_process():
        output.check_folder_of_run(cfg.OUTPUT_DIR, begins=not (args.eval_only or args.resume))
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    logger.info("Rank %d of %d processes", comm.get_rank(), comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Arguments: %s", args)
    logger.info("Config:\n%s", cfg.dump())
    if not torch.cuda.is_available():
        logger.warning("Running on the CPU: no CUDA GPU is available")
    log_reports(logger)
    return cfg
