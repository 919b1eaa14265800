"""DRKD: dual relation distillation, between the pixels of a map and between the instances of an
image.

``head`` has keys and terms; ``graph`` the graph units, ``pixels`` the gap of the pixel-wise
relation; ``instances`` the relation units.
"""

from .head import DRKD, DRKDOptions

__all__ = ["DRKD", "DRKDOptions"]
