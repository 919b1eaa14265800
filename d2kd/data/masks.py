"""The instance masks of an annotation file: which kind each is, and whether it can be used.

COCO format has three kinds: lists of polygons, run-length encoding (RLE) as a list of counts, and
RLE with the counts packed into a string, as pycocotools writes it.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from .coco import Table, is_number, numbers, types_of

NO_MASK, POLYGONS, RLE, PACKED_RLE, BROKEN = range(5)

# Annotations whose polygons are looked at together, so that their points never lie in memory twice.
_CHUNK = 20_000
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
        polygons = np.flatnonzero(self.kind == POLYGONS)
        for start in range(0, len(polygons), _CHUNK):
            self._look_at_polygons(polygons[start : start + _CHUNK])
        for kind, decode in ((RLE, _sums_of_lists), (PACKED_RLE, _sums_of_strings)):
            chosen = np.flatnonzero(self.kind == kind)
            for start in range(0, len(chosen), _CHUNK):
                part = chosen[start : start + _CHUNK]
                self._look_at_rle(part, table.annotation_sizes[part], decode)

    def _look_at_polygons(self, chosen: np.ndarray) -> None:
        """Fills ``usable``, ``some_short`` and ``extent`` of some annotations."""
        lists = [self.values[index] for index in chosen]
        if types_of(list(chain.from_iterable(lists))) != {list}:
            good = np.array([types_of(one) == {list} for one in lists])
            bad = chosen[~good]
            self.kind[bad] = BROKEN
            self.flat[bad] = [types_of(self.values[index]) <= {int, float} for index in bad]
            if good.any():
                self._look_at_polygons(chosen[good])
            return
        owner = np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64, len(lists)))
        polygons = list(chain.from_iterable(lists))
        lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
        valid = (lengths >= 6) & (lengths % 2 == 0)
        points = numbers(
            list(chain.from_iterable(p for p, keep in zip(polygons, valid, strict=True) if keep))
        )
        if points is None:
            good = np.array([numbers(list(chain.from_iterable(one))) is not None for one in lists])
            self.kind[chosen[~good]] = BROKEN
            if good.any():
                self._look_at_polygons(chosen[good])
            return
        counts = np.bincount(owner[valid], lengths[valid] // 2, len(lists)).astype(np.int64)
        has_points = counts > 0
        self.usable[chosen] = has_points
        self.some_short[chosen[has_points]] = (
            np.bincount(owner[~valid], minlength=len(lists))[has_points] > 0
        )
        if len(points):
            starts = np.concatenate([[0], np.cumsum(counts[has_points])[:-1]])
            xy = points.reshape(-1, 2)
            self.extent[chosen[has_points]] = np.concatenate(
                [np.minimum.reduceat(xy, starts), np.maximum.reduceat(xy, starts)], axis=1
            )

    def _look_at_rle(self, chosen: np.ndarray, sizes: np.ndarray, decode) -> None:
        """Fills ``wrong_size``, ``wrong_sum`` and ``empty`` of some annotations.

        Args:
            sizes: (n, 2) width and height of their images.
            decode: list of counts -> (n,) sum and (n,) area; NaN where they cannot be read.
        """
        values = [self.values[index] for index in chosen]
        own = np.array([_rle_size(value) for value in values], float).reshape(-1, 2)
        broken = np.isnan(own).any(axis=1)
        total, area = decode([value["counts"] for value in values])
        self.kind[chosen[broken | np.isnan(total)]] = BROKEN
        self.usable[chosen] = self.kind[chosen] != BROKEN
        good = self.usable[chosen]
        known = ~np.isnan(sizes).any(axis=1)
        self.wrong_size[chosen] = good & known & (own != sizes[:, ::-1]).any(axis=1)
        self.wrong_sum[chosen] = good & (total != own.prod(axis=1))
        self.empty[chosen] = good & (area == 0)


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


def _rle_size(value: dict) -> tuple[float, float]:
    """Height and width as the RLE says; NaN where it is not two numbers."""
    size = value["size"]
    if type(size) is list and len(size) == 2 and all(map(is_number, size)):
        return float(size[0]), float(size[1])
    return np.nan, np.nan


def _sums_of_lists(counts: list[list]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) sum of all counts and (n,) sum of those inside the mask; NaN where unreadable."""
    total, area = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    for index, one in enumerate(counts):
        found = numbers(one)
        if found is not None and (found >= 0).all() and (found == np.floor(found)).all():
            total[index], area[index] = found.sum(), found[1::2].sum()
    return total, area


def _sums_of_strings(counts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same of packed counts, without a loop over the strings.

    pycocotools packs a count into characters of 5 bits and a flag "more follows"; from the fourth
    on, it packs the difference to the count two places before.
    """
    total, area = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    data = [one.encode() if one.isascii() else b"" for one in counts]
    readable = np.array([_is_packed(one) for one in data])
    if not readable.any():
        return total, area
    data = [one for one, keep in zip(data, readable, strict=True) if keep]
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    codes = np.frombuffer(b"".join(data), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[ends] & 0x10) != 0
    values -= negative * (np.int64(1) << (5 * (place[ends] + 1)))

    owner = np.repeat(np.arange(len(data)), lengths)[ends]
    first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(data)))[:-1]])
    number = np.arange(len(values)) - first[owner]
    # Undo the differences: a running sum along the odd counts and along the even ones from 2 on.
    line = 3 * owner + np.where(number == 0, 0, 1 + number % 2)
    order = np.argsort(line, kind="stable")
    running = np.cumsum(values[order])
    begins = np.flatnonzero(np.diff(line[order], prepend=-1))
    before = np.concatenate([[0], running])[begins]
    running -= np.repeat(before, np.diff(np.append(begins, len(running))))
    unpacked = np.empty_like(running)
    unpacked[order] = running

    sums = np.bincount(owner, unpacked, len(data))
    wrong = (unpacked < 0) | (place[ends] >= _MOST_CHARACTERS)
    sums[np.bincount(owner, wrong, len(data)) > 0] = np.nan
    total[readable] = sums
    odd = number % 2 == 1
    area[readable] = np.bincount(owner[odd], unpacked[odd], len(data))
    return total, area


def _is_packed(data: bytes) -> bool:
    """Whether bytes are packed counts: known characters, the last of which ends a count."""
    known = np.frombuffer(data, np.uint8)
    return bool(
        len(known) and known.min() >= 48 and known.max() < 112 and not (known[-1] - 48) & 0x20
    )
