"""The instance masks of an annotation file: which kind each is, and whether it can be used.

COCO format has three kinds: lists of polygons, run-length encoding (RLE) as a list of counts, and
RLE with the counts packed into a string, as pycocotools writes it.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from .coco import Table, numbers, types_of

NO_MASK, POLYGONS, RLE, PACKED_RLE, BROKEN = range(5)

# Of a packed count: 35 bits hold any that pycocotools can read.
_MOST_CHARACTERS = 7


class Masks:
    """The masks of a :class:`~d2kd.data.coco.Table`. M annotations.

    Attributes:
        kind: (M,) one of NO_MASK, POLYGONS, RLE, PACKED_RLE, BROKEN. BROKEN is what is none of the
            three, such as polygons whose points are no numbers.
        flat: (M,) bool, polygons that lack the outer list: [x, y, x, y, ...].
        usable: (M,) bool, whether Detectron2 can use it: an RLE, or at least one polygon of three
            points or more.
        some_short: (M,) bool, a usable one that has polygons of fewer points, or half points.
        extent: (M, 4) float, smallest x, smallest y, largest x, largest y of the usable polygons;
            NaN for other kinds.
        wrong_size: (M,) bool, RLE whose size is not [height, width] of its image.
        wrong_sum: (M,) bool, RLE whose counts do not add up to its size.
        empty: (M,) bool, RLE without a pixel.
    """

    def __init__(self, table: Table):
        self.values = table.column(table.annotations, "segmentation")
        count = len(self.values)
        self.kind = np.fromiter(map(_kind_of, self.values), np.uint8, count)
        self.usable = (self.kind == RLE) | (self.kind == PACKED_RLE)
        self.extent = np.full((count, 4), np.nan, np.float32)
        self.flat, self.some_short, self.wrong_size, self.wrong_sum, self.empty = (
            np.zeros(count, bool) for _ in range(5)
        )
        for place in np.flatnonzero(self.usable):
            self._look_at_rle(place, table.annotation_sizes[place])
        for place in np.flatnonzero(self.kind == POLYGONS):
            self._look_at_polygons(place)

    def _look_at_polygons(self, place: int) -> None:
        """Fills ``usable``, ``some_short`` and ``extent`` of one annotation."""
        polygons = self.values[place]
        types = types_of(polygons)
        points = numbers(list(chain.from_iterable(polygons))) if types == {list} else None
        if points is None:
            self.kind[place], self.flat[place] = BROKEN, types <= {int, float}
            return
        usable = usable_polygons(polygons)
        self.usable[place] = bool(usable)
        if usable and len(usable) < len(polygons):
            self.some_short[place] = True
            points = numbers(list(chain.from_iterable(usable)))
        if usable:
            xy = points.reshape(-1, 2)
            self.extent[place, :2] = xy.min(axis=0)
            self.extent[place, 2:] = xy.max(axis=0)

    def _look_at_rle(self, place: int, image_size: np.ndarray) -> None:
        """Fills ``wrong_size``, ``wrong_sum`` and ``empty`` of one annotation of an image of this
        width and height, NaN where they are not known."""
        size, counts = self.values[place]["size"], _counts(self.values[place]["counts"])
        own = numbers(size) if type(size) is list and len(size) == 2 else None
        if own is None or counts is None:
            self.kind[place], self.usable[place] = BROKEN, False
            return
        is_known = not np.isnan(image_size).any()
        self.wrong_size[place] = is_known and (own != image_size[::-1]).any()
        self.wrong_sum[place] = counts.sum() != own.prod()
        self.empty[place] = counts[1::2].sum() == 0


def usable_polygons(polygons: list) -> list:
    """The polygons of at least three points, as Detectron2 keeps them."""
    return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _kind_of(value) -> int:
    if not value:
        return NO_MASK
    if type(value) is list:
        return POLYGONS
    if type(value) is dict and "size" in value:
        return {list: RLE, str: PACKED_RLE}.get(type(value.get("counts")), BROKEN)
    return BROKEN


def _counts(values: list | str) -> np.ndarray | None:
    """Lengths of the runs outside and inside the mask, in turn; None where they are none."""
    counts = numbers(values) if isinstance(values, list) else _unpack(values)
    if counts is None or (counts < 0).any() or (counts != np.floor(counts)).any():
        return None
    return counts


def _unpack(packed: str) -> np.ndarray | None:
    """The counts in a string; None where it holds something else.

    pycocotools packs a count into characters of 5 bits and a flag "more follows"; from the fourth
    on, it packs the difference to the count two places before.
    """
    codes = np.frombuffer(packed.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() >= 64 or codes[-1] & 0x20:
        return None
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_CHARACTERS:
        return None
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    counts -= ((codes[ends] & 0x10) != 0) * (np.int64(1) << (5 * lengths))  # negative ones
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    return counts
