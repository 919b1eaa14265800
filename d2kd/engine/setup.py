"""From the command line to a config, a model and a logger, with every check before anything is
written."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import (
    add_distillation_config,
    validate_distillation_config,
    validate_meta_arch,
    validate_solver,
)
from ..config_files import (
    SHARED_OUTPUT,
    default_output_dir,
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
from ..errors import ConfigError
from .trainer import find_evaluator

logger = logging.getLogger(__name__)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """``--import MODULE``, as often as needed: ``imports``, for :func:`import_user_module`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a file or module to import first, e.g. one that registers a head of yours",
    )


def import_user_module(name: str) -> None:
    """Import a user's module, by dotted name or by file, so that what it registers is known.

    Raises:
        ConfigError: there is no such module.
    """
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--import: {error}") from error
        return
    if not os.path.isfile(name):
        raise ConfigError(f"--import: no file '{name}'")
    module_name = os.path.splitext(os.path.basename(name))[0]
    if module_name in sys.modules:
        found = getattr(sys.modules[module_name], "__file__", None)
        if found is None or not os.path.exists(found) or not os.path.samefile(found, name):
            raise ConfigError(
                f"--import: another module is called '{module_name}': rename '{name}'"
            )
        return
    spec = importlib.util.spec_from_file_location(module_name, name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)


def merged_config(config_file: str, opts: list[str]) -> CfgNode:
    """The config of a file and KEY VALUE overrides, before any check of what they say.

    Its paths are absolute as far as the files are there, looked for in the working directory and
    beside ``config_file``.

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
    """The checked config of ``--config-file`` and the KEY VALUE overrides.

    Raises:
        ConfigError: in one line, for whatever is wrong with them.
    """
    for name in getattr(args, "imports", []):
        import_user_module(name)
    cfg = merged_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_detectron2_keys(cfg, train=not args.eval_only)
    if not args.eval_only:
        validate_solver(cfg)
    validate_meta_arch("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)
    folders = [os.path.dirname(resolve_config_file(args.config_file))]
    if cfg.MODEL.META_ARCHITECTURE == "Distiller" and not args.eval_only:
        check_teacher_files(cfg, folders)
        validate_distillation_config(cfg)
    if not resumes(cfg, args):
        check_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", folders)
    check_datasets(cfg, train=not args.eval_only)
    for name in cfg.DATASETS.TEST:
        find_evaluator(name)
    if not args.eval_only and not cfg.SOLVER.REFERENCE_WORLD_SIZE:  # else the batch is scaled
        validate_loader_config(cfg, max(args.num_gpus * args.num_machines, 1))
    cfg.freeze()
    return cfg


def resumes(cfg: CfgNode, args: argparse.Namespace) -> bool:
    """Whether ``--resume`` finds a checkpoint, which then takes the place of all other weights."""
    return args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))


def model_config(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """``cfg`` to build the model from: without weights that a checkpoint replaces."""
    if not (args.eval_only or resumes(cfg, args)):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.DISTILL.INHERIT = []
    cfg.freeze()
    return cfg


def check_teacher_files(cfg: CfgNode, folders: Sequence[str]) -> None:
    """Check that the files of a teacher that will be built are there.

    Args:
        folders: where they were looked for besides the working directory, for the message.

    Raises:
        ConfigError: one is not.
    """
    teacher = cfg.DISTILL.TEACHER
    if not (cfg.DISTILL.HEADS or cfg.DISTILL.INHERIT) or not isinstance(teacher, CfgNode):
        return
    if teacher.CONFIG_FILE and isinstance(teacher.CONFIG_FILE, str):
        resolve_config_file(teacher.CONFIG_FILE, "DISTILL.TEACHER.CONFIG_FILE", folders)
    if teacher.WEIGHTS != RANDOM_WEIGHTS:
        check_weights(teacher.WEIGHTS, "DISTILL.TEACHER.WEIGHTS", folders)


def check_weights(path: str, key: str, folders: Sequence[str] = ()) -> None:
    """Check that a checkpoint is there, if it is a local file.

    Args:
        key: where the path stands, for the message.
        folders: where it was looked for besides the working directory.

    Raises:
        ConfigError: it is not; names the command that makes it, or files like it, and the folders.
    """
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


def start_logging(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's set-up of a job, which makes the output folder, and d2kd's own logger."""
    # It logs the file's text, and knows no names of the model zoo.
    file = args.config_file and resolve_config_file(args.config_file)
    args = argparse.Namespace(**{**vars(args), "config_file": file})
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2kd")
    if not torch.cuda.is_available():
        logger.warning("Running on the CPU: no CUDA GPU is available")
    log_reports(logger)
