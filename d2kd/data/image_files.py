"""The image files of a dataset, without decoding them: there or not, inside their folder or not,
and what their headers say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import first_line

# Pillow's modes with more than 8 bits per channel. Detectron2 converts them by Pillow's convert(),
# which clips at 255: nearly all of a 16-bit picture becomes white.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# What Pillow raises for files that are no image, or a broken one.
UNREADABLE = (OSError, SyntaxError, ValueError, ArithmeticError, Image.DecompressionBombError)
_ORIENTATION = 274  # EXIF tag


@dataclass(frozen=True)
class Header:
    """What the header of an image file says.

    Attributes:
        size: width and height in pixels as stored.
        mode: Pillow's.
        turned: whether its EXIF orientation swaps width and height, which Detectron2 heeds.
        has_orientation: whether EXIF asks for any rotation or mirroring.
    """

    size: tuple[int, int]
    mode: str
    turned: bool = False
    has_orientation: bool = False

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
    """The header of an image file.

    Raises:
        One of ``UNREADABLE``: it is not there, or no image.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        return header_of(image)


def image_path(root: str, name: str) -> str:
    """Path of an image, joined as Detectron2 does it."""
    return os.path.join(root, name)


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
        missing[index] = not os.path.isfile(image_path(root, names[index]))
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
    return os.path.commonpath([top, os.path.abspath(image_path(root, name))]) != top


def where_it_may_be(root: str, name: str) -> str:
    """A hint for a missing image: a folder or spelling that has it; "" for none."""
    base = os.path.basename(name.replace("\\", "/"))
    stem, extension = os.path.splitext(name)
    other_case = extension.upper() if extension.islower() else extension.lower()
    parent = os.path.dirname(os.path.abspath(root))
    if "\\" in name and os.path.isfile(image_path(root, name.replace("\\", "/"))):
        return "file names are written with '\\' where this system needs '/'"
    if os.path.isfile(os.path.join(parent, name)):
        return f"it is there with the image directory {parent}"
    if os.path.isfile(image_path(root, base)):
        return "it is there without the folder in its file_name"
    if os.path.isfile(image_path(root, stem + other_case)):
        return f"it is there as '{os.path.basename(stem)}{other_case}'"
    for entry in _folders_in(root):
        if os.path.isfile(os.path.join(root, entry, name)):
            return f"it is there with the image directory {os.path.join(root, entry)}"
    return ""


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())[:100]
    except OSError:
        return []


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
        return "" if deep_only else f"image {path} cannot be read ({first_line(error)})"
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
