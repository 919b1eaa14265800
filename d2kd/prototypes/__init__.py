"""Prototypes of Global Knowledge: which training objects they are, kept as tensors."""
