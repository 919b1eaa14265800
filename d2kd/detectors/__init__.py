"""All knowledge of how Detectron2 builds detectors inside. Importing it registers the parts."""

from . import roi, mask, rpn, dense  # isort: skip

__all__ = ["dense", "mask", "roi", "rpn"]
