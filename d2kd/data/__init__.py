"""Datasets: importing this package registers the built-in ones with Detectron2's catalogs."""

from . import builtin, custom  # noqa: F401  (registers)
