"""The check of image files: there, inside their folder, and of the size and kind that is stated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import first_line
from .check import Use
from .coco import Table, marked, repeated
from .image_files import (
    UNREADABLE,
    Header,
    image_path,
    leaves_folder,
    missing_files,
    read_header,
    where_it_may_be,
)
from .report import Finding, findings, shown, some


def check_files(table: Table, root: str, use: Use) -> Iterator[Finding]:
    """Image files: there, inside their folder, and of the size and kind that the JSON says."""
    names = [name if type(name) is str else "" for name in table.names]

    def example(place: int) -> str:
        return shown(names[place], 60)

    leaving = marked(names, lambda name: leaves_folder(root, name))
    yield from findings(
        leaving,
        f"image names lead out of the image directory {shown(root, 60)}",
        "refused by DATASETS.STRICT_PATHS"
        if use.strict_paths
        else "they are read all the same; DATASETS.STRICT_PATHS True refuses them",
        example,
        fatal=use.strict_paths,
    )
    missing = missing_files(root, names)
    if missing.any():
        first = names[int(np.flatnonzero(missing)[0])]
        hint = where_it_may_be(root, first)
        remedy = f"of the first, {hint}" if hint else "add them, or remove them from the JSON"
        text = f"images are not there, in {shown(root, 60)}"
        yield from findings(missing, text, remedy, example)
    yield from findings(
        repeated(names),
        "images share their file with another",
        "the objects of one are background in the other",
        example,
        fatal=False,
    )
    if use.headers:  # evenly spread: whole folders may be of another kind
        present = np.flatnonzero(~missing)
        step = max(1, len(present) // use.headers)
        yield from check_headers(table, root, present[::step][: use.headers])


def check_headers(table: Table, root: str, places: np.ndarray) -> Iterator[Finding]:
    """Opens some images, without decoding them.

    Args:
        places: (n,) positions in ``table.images``.
    """
    headers: dict[int, Header | str] = {}
    for place in places.tolist():
        try:
            headers[place] = read_header(image_path(root, table.names[place]))
        except UNREADABLE as error:
            headers[place] = first_line(error)
    yield from judge_headers(table, headers)


def judge_headers(table: Table, headers: Mapping[int, Header | str]) -> Iterator[Finding]:
    """Images that cannot be read, are too deep, or are of another size than the JSON says.

    Args:
        headers: position in ``table.images`` -> its header, or why it cannot be read.
    """
    unreadable, deep, other_size = [], [], []
    for place, header in headers.items():
        name = shown(table.names[place])
        if isinstance(header, str):
            unreadable.append(f"{name} ({header})")
            continue
        if header.deep:
            deep.append(f"{name} (mode {header.mode})")
        stated, seen = table.sizes[place], header.seen_size
        if not np.isnan(stated).any() and tuple(stated) != seen:
            turned = ", turned by its EXIF orientation" if header.turned else ""
            stated = f"{stated[0]:.0f} x {stated[1]:.0f}"
            other_size.append(f"{name} is {seen[0]} x {seen[1]}{turned}, not {stated}")
    for bad, text, remedy in (
        (unreadable, "cannot be read", "repair or remove them"),
        (
            deep,
            "have more than 8 bits per channel, which Detectron2 turns white",
            "convert them to 8 bits",
        ),
        (other_size, "have another size than the JSON says", "mend 'width' and 'height' there"),
    ):
        if bad:
            head = f"{len(bad):,} of {len(headers):,} images that were opened {text}"
            yield Finding(head, remedy, some(bad), fatal=True)
