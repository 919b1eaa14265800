"""Tests of d2kd.export."""
