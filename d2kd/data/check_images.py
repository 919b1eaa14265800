"""Opens the images of a dataset: what can be seen only there."""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import first_line
from .coco import Table
from .image_files import UNREADABLE, Header, header_of, judge_headers, missing_files
from .report import Finding, shown, some

# Images are decoded at about this size where the format can: enough to tell that a file is whole.
_SMALL = 64
_HASH_SIDE = 16


@dataclass(frozen=True)
class Look:
    """What opening one image showed."""

    header: Header | str  # or why the image cannot be read
    digest: bytes = b""  # of the file's bytes; empty where there is no file
    # Signs of the differences of neighbours in a tiny grey copy; empty where it cannot be read, or
    # shows one colour.
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


def look_at_all(table: Table, root: str, threads: int = 0, title: str = "") -> dict[int, Look]:
    """Looks at all images of a dataset that are there, behind a progress bar of this title.

    Args:
        threads: 0 for as many as there are processors; decoding does not hold Python's lock.

    Returns:
        Position in ``table.images`` -> what was seen.
    """
    names = [name if type(name) is str else "" for name in table.names]
    places = np.flatnonzero(~missing_files(root, names)).tolist()
    paths = [os.path.join(root, names[place]) for place in places]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        looks = tqdm(pool.map(look_at, paths), title, len(paths), disable=None, leave=False)
        return dict(zip(places, looks, strict=True))


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
    same: dict[bytes, list[int]] = defaultdict(list)
    for place, look in looks.items():
        same[look.digest].append(place)
    same.pop(b"", None)
    for places in same.values():
        if len(places) > 1:
            yield Finding(
                f"{len(places):,} images are the same file",
                "the objects of one are background in the other, unless all have the same "
                "annotations",
                some(shown(table.names[place]) for place in places),
            )


def compare(
    trained: tuple[str, Table, dict[int, Look]], tested: tuple[str, Table, dict[int, Look]]
) -> Iterator[Finding]:
    """Images of a test set that a training set has, too; of each its name, table and looks."""
    name, table, looks = trained
    _, tested_table, tested_looks = tested
    remove = "take them out of one: AP says nothing about images that were trained on"
    split = "they may be made of one photograph: split by photograph"
    seen: set[int] = set()
    for text, remedy, sign in (
        (f"are in '{name}', too: the same file", remove, lambda file, look: look.digest),
        (f"look like one in '{name}'", remove, lambda file, look: look.picture),
        (f"have the name of one in '{name}' up to '.rf.'", split, lambda file, look: _source(file)),
    ):
        known = {sign(table.names[place], look): place for place, look in looks.items()}
        signs = {p: sign(tested_table.names[p], look) for p, look in tested_looks.items()}
        pairs = [(p, known[s]) for p, s in signs.items() if s and s in known and p not in seen]
        seen |= {place for place, _ in pairs}
        if pairs:
            examples = (
                f"{shown(tested_table.names[mine])} and {shown(table.names[other])}"
                for mine, other in pairs
            )
            head = f"{len(pairs):,} of {len(tested_looks):,} images {text}"
            yield Finding(head, remedy, some(examples))


def _source(file: str) -> str:
    """What Roboflow's copies of one original, "cat_jpg.rf.<hash>.jpg", have in common; else ""."""
    return os.path.basename(file).rpartition(".rf.")[0]
