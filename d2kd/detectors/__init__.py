"""All knowledge of how Detectron2 builds detectors inside."""
