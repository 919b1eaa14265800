"""The image files of a dataset, without decoding them: there or not, inside their folder or not,
and what their headers say."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import ConfigError, first_line
from .check import Use
from .coco import Table, marked, repeated
from .report import Finding, findings, shown, some

# Pillow's modes with more than 8 bits per channel. Detectron2 converts them by Pillow's convert(),
# which clips at 255: nearly all of a 16-bit picture becomes white.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# What Pillow raises for files that are no image, or a broken one.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, Image.DecompressionBombError),
    RuntimeError,  # of a broken AVIF
)
_ORIENTATION = 274  # EXIF tag


@dataclass(frozen=True)
class Header:
    """What the header of an image file says."""

    size: tuple[int, int]  # width and height in pixels as stored
    mode: str  # Pillow's
    turned: bool  # its EXIF orientation swaps width and height, which Detectron2 heeds
    has_orientation: bool  # EXIF asks for any rotation or mirroring

    @property
    def deep(self) -> bool:
        """Whether it has more than 8 bits per channel."""
        return self.mode in DEEP_MODES

    @property
    def seen_size(self) -> tuple[int, int]:
        """Width and height as Detectron2 sees them, with the EXIF orientation applied."""
        return self.size[::-1] if self.turned else self.size


def header_of(image: Image.Image) -> Header:
    """The header of an image that Pillow has opened."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF, which Detectron2 ignores as well
        orientation = 1
    return Header(image.size, image.mode, orientation in (5, 6, 7, 8), orientation in range(2, 9))


def read_header(path: str) -> Header:
    """The header of an image file; raises one of ``UNREADABLE`` where there is none."""
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        return header_of(image)


def missing_files(root: str, names: Sequence[str]) -> np.ndarray:
    """(N,) bool, which of ``names`` are no files below ``root``.

    Each folder is listed once: asking for 100,000 files one by one takes minutes on a network
    drive. What a listing does not show is asked for, as file names may ignore case.
    """
    listed: dict[str, set[str]] = {}
    missing = np.zeros(len(names), bool)
    for index, name in enumerate(names):
        folder, base = os.path.split(name)
        if folder not in listed:
            listed[folder] = _files_in(os.path.join(root, folder) if folder else root)
        missing[index] = base not in listed[folder]
    for index in np.flatnonzero(missing):
        missing[index] = not os.path.isfile(os.path.join(root, names[index]))
    return missing


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a null character in the name
        return set()


def leaves_folder(root: str, name: str) -> bool:
    """Whether ``name`` points to a file outside of ``root``: absolute, or with "..".

    Links inside the folder are the user's own and are followed.
    """
    if ".." not in name and not os.path.isabs(name):
        return False
    top = os.path.abspath(root)
    return os.path.commonpath([top, os.path.abspath(os.path.join(root, name))]) != top


def where_it_may_be(root: str, name: str) -> str:
    """A hint for a missing image: a folder or spelling that has it; "" for none."""
    base = os.path.basename(name.replace("\\", "/"))
    stem, extension = os.path.splitext(name)
    other_case = extension.upper() if extension.islower() else extension.lower()
    parent = os.path.dirname(os.path.abspath(root))
    if "\\" in name and os.path.isfile(os.path.join(root, name.replace("\\", "/"))):
        return "file names are written with '\\' where this system needs '/'"
    if os.path.isfile(os.path.join(parent, name)):
        return f"it is there with the image directory {parent}"
    if os.path.isfile(os.path.join(root, base)):
        return "it is there without the folder in its file_name"
    if os.path.isfile(os.path.join(root, stem + other_case)):
        return f"it is there as '{os.path.basename(stem)}{other_case}'"
    for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", glob.escape(name)))):
        if os.path.isfile(path):
            return f"it is there with the image directory {path.removesuffix(name).rstrip(os.sep)}"
    return ""


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
        headers: dict[int, Header | str] = {}
        for place in present[::step][: use.headers].tolist():
            try:
                headers[place] = read_header(os.path.join(root, names[place]))
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


def load_image(path: str, channels: str) -> np.ndarray:
    """(H, W, 3) uint8, Detectron2's ``read_image`` in the order "RGB" or "BGR"; a ConfigError that
    names the file where it cannot be read."""
    try:
        return read_image(path, channels)
    except UNREADABLE as error:
        raise ConfigError(_unreadable(path, error)) from error


def _unreadable(path: str, error: BaseException) -> str:
    return f"image {path} cannot be read ({first_line(error)})"


def explain_unreadable(record: dict, deep_only: bool = False) -> str:
    """Why the image of a record cannot be used, in words; "" if it can.

    Args:
        record: in Detectron2's format.
        deep_only: look at the header, for more than 8 bits per channel; all else shows by itself.
    """
    path = record["file_name"]
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            header = header_of(image)
            if not deep_only:
                image.load()
    except UNREADABLE as error:
        return "" if deep_only else _unreadable(path, error)
    if header.deep:
        return (
            f"image {path} has more than 8 bits per channel (mode {header.mode}), which "
            "Detectron2 turns white: convert it to 8 bits"
        )
    stated = record.get("width"), record.get("height")
    if not deep_only and None not in stated and stated != header.seen_size:
        seen = " x ".join(map(str, header.seen_size))
        return f"image {path} is {seen}, its annotation file says {stated[0]} x {stated[1]}"
    return ""
