"""Turns a binary mask into COCO polygons that rasterise back to exactly that mask.

COCO polygons cannot have holes, and the digits 0, 4, 6, 8 and 9 have them. A piece with a hole is
therefore cut in two through the hole, which leaves hole-free pieces whose outlines run along pixel
edges. Polygons rather than RLE because Detectron2's default `INPUT.MASK_FORMAT` is "polygon" and
reads only them, while "bitmask" reads both.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """
    Args:
        mask: (H, W) bool.

    Returns:
        Polygons `[x0, y0, x1, y1, ...]` in pixel-edge coordinates (pixel (x, y) covers
        [x, x+1] x [y, y+1]); their union is the mask. Empty for an empty mask.
    """
    polygons: list[list[int]] = []
    pieces, _ = ndimage.label(mask)  # 4-connected: pieces that touch at a corner stay apart
    for index, (rows, columns) in enumerate(ndimage.find_objects(pieces), start=1):
        polygons += _piece_polygons(pieces[rows, columns] == index, columns.start, rows.start)
    return polygons


def _piece_polygons(piece: np.ndarray, left: int, top: int) -> list[list[int]]:
    """Polygons of one connected piece, a tight crop whose corner lies at (left, top)."""
    holes = ndimage.binary_fill_holes(piece) & ~piece
    if not holes.any():
        return [_outline(piece, left, top)]
    first_hole = ndimage.find_objects(ndimage.label(holes)[0])[0][1]
    cut = (first_hole.start + first_hole.stop + 1) // 2
    polygons = []
    for start, part in ((0, piece[:, :cut]), (cut, piece[:, cut:])):
        for polygon in mask_to_polygons(part):
            shifted = np.asarray(polygon).reshape(-1, 2) + (left + start, top)
            polygons.append(shifted.ravel().tolist())
    return polygons


def _outline(piece: np.ndarray, left: int, top: int) -> list[int]:
    """Corners of the closed outline of a connected piece without holes, inside on the right.

    Such a piece's outline passes each corner of the pixel grid at most once, so "where does the
    edge that starts here end" is a plain dictionary.
    """
    padded = np.pad(piece.astype(np.int8), 1)
    follow: dict[tuple[int, int], tuple[int, int]] = {}
    down = np.diff(padded, axis=0)[:, 1:-1]  # (H+1, W): +1 at top edges, -1 at bottom edges
    across = np.diff(padded, axis=1)[1:-1]  # (H, W+1): +1 at left edges, -1 at right edges
    follow.update(((x, y), (x + 1, y)) for y, x in np.argwhere(down == 1).tolist())
    follow.update(((x + 1, y), (x, y)) for y, x in np.argwhere(down == -1).tolist())
    follow.update(((x, y + 1), (x, y)) for y, x in np.argwhere(across == 1).tolist())
    follow.update(((x, y), (x, y + 1)) for y, x in np.argwhere(across == -1).tolist())

    start = point = next(iter(follow))
    previous = next(corner for corner, target in follow.items() if target == start)
    outline: list[int] = []
    while True:
        target = follow[point]
        turns = (previous[0] == point[0]) != (point[0] == target[0])
        if turns:
            outline += (left + point[0], top + point[1])
        previous, point = point, target
        if point == start:
            return outline
