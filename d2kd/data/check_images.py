"""Opens the images of a dataset: what can be seen only there."""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import first_line
from .check_files import judge_headers
from .coco import Table
from .image_files import UNREADABLE, Header, header_of, image_path, missing_files
from .report import Finding, shown, some

# Images are decoded at about this size where the format can: enough to tell that a file is whole.
_SMALL = 64
_HASH_SIDE = 16


@dataclass(frozen=True)
class Look:
    """What opening one image showed.

    Attributes:
        header: its header, or why the image cannot be read.
        digest: of the file's bytes; "" where there is no file.
        picture: of what it shows: the signs of differences of neighbours in a tiny grey copy; ""
            where it cannot be read, or shows one colour.
    """

    header: Header | str
    digest: bytes = b""
    picture: bytes = b""


def look_at(path: str) -> Look:
    """Reads and decodes one image file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return Look(first_line(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            header = header_of(image)
            image.draft("L", (_SMALL, _SMALL))  # of JPEG: a small copy, at a fraction of the time
            image.load()
            small = image.convert("L").resize((_HASH_SIDE + 1, _HASH_SIDE), Image.Resampling.BOX)
    except UNREADABLE as error:
        return Look(first_line(error), digest)
    grey = np.asarray(small, np.int16)
    signs = np.packbits(grey[:, 1:] > grey[:, :-1])
    return Look(header, digest, signs.tobytes() if grey.std() > 2 else b"")


def look_at_all(
    table: Table, root: str, threads: int = 0, progress: Callable[[int], None] = lambda count: None
) -> dict[int, Look]:
    """Looks at all images of a dataset that are there.

    Args:
        threads: 0 for as many as there are processors; decoding does not hold Python's lock.
        progress: called with the number of images that are done.

    Returns:
        Position in ``table.images`` -> what was seen.
    """
    names = [name if type(name) is str else "" for name in table.names]
    places = np.flatnonzero(~missing_files(root, names)).tolist()
    looks: dict[int, Look] = {}
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        paths = (image_path(root, names[place]) for place in places)
        for place, look in zip(places, pool.map(look_at, paths), strict=True):
            looks[place] = look
            progress(len(looks))
    return looks


def judge(table: Table, looks: dict[int, Look]) -> Iterator[Finding]:
    """Findings about the images of one dataset."""
    yield from judge_headers(table, {place: look.header for place, look in looks.items()})
    turned = [
        place
        for place, look in looks.items()
        if isinstance(look.header, Header) and look.header.has_orientation
    ]
    if turned:
        yield Finding(
            f"{len(turned):,} of {len(looks):,} images are turned or mirrored by EXIF",
            "Detectron2 turns them: boxes must be those of the turned image",
            some(shown(table.names[place]) for place in turned),
        )
    for places in _groups(looks, "digest"):
        yield Finding(
            f"{len(places):,} images are the same file",
            "the objects of one are background in the other, unless all have the same annotations",
            some(shown(table.names[place]) for place in places),
        )


def _groups(looks: dict[int, Look], attribute: str) -> list[list[int]]:
    """Places of images that agree in an attribute, in groups of two and more."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for place, look in looks.items():
        if getattr(look, attribute):
            groups[getattr(look, attribute)].append(place)
    return [places for places in groups.values() if len(places) > 1]


def compare(
    trained: tuple[str, Table, dict[int, Look]], tested: tuple[str, Table, dict[int, Look]]
) -> Iterator[Finding]:
    """Images of a test set that a training set has, too.

    Args:
        trained, tested: name, table and looks of a dataset.
    """
    name, table, looks = trained
    _, tested_table, tested_looks = tested
    remedy = "take them out of one: AP says nothing about images that were trained on"
    seen: set[int] = set()
    for attribute, text in (
        ("digest", f"are in '{name}', too: the same file"),
        ("picture", f"look like one in '{name}'"),
    ):
        known = {getattr(look, attribute): place for place, look in looks.items()}
        known.pop(b"", None)
        pairs = [
            (place, known[getattr(look, attribute)])
            for place, look in tested_looks.items()
            if getattr(look, attribute) in known and place not in seen
        ]
        if pairs:
            seen |= {place for place, _ in pairs}
            examples = (
                f"{shown(tested_table.names[mine])} and {shown(table.names[other])}"
                for mine, other in pairs
            )
            yield Finding(
                f"{len(pairs):,} of {len(tested_looks):,} images {text}",
                remedy,
                some(examples),
            )
    yield from _same_source(name, table, tested_table)


def _same_source(name: str, table: Table, tested: Table) -> Iterator[Finding]:
    """Images that Roboflow made of one original: "cat_jpg.rf.<hash>.jpg"."""

    def sources(names: list) -> dict[str, str]:
        return {
            os.path.basename(n).rpartition(".rf.")[0]: n
            for n in names
            if type(n) is str and ".rf." in n
        }

    mine, theirs = sources(tested.names), sources(table.names)
    both = sorted(mine.keys() & theirs.keys())
    if both:
        yield Finding(
            f"{len(both):,} of {len(tested.names):,} images have the name of one in '{name}' up to "
            "'.rf.'",
            "they may be made of one photograph: split by photograph",
            some(f"{shown(mine[source])} and {shown(theirs[source])}" for source in both),
        )
