"""Verbs of the command ``d2kd``, a module each, that have no package of their own."""
