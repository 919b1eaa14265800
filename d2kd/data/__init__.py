"""Datasets: importing this package registers the built-in ones with Detectron2's catalogs."""

from . import builtin  # noqa: F401  (registers)
from .custom import check_datasets

__all__ = ["check_datasets"]
