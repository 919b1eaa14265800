"""Comparing methods on one footing: suites of trainings, their tables, plots and pictures."""
