"""Detectors as files that run without Detectron2: ``d2kd export``, and how such a file is used."""
