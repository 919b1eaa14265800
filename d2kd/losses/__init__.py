"""Losses as pure functions, one file per paper: tensors in, a scalar out."""
