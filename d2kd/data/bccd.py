"""Converts BCCD (blood cells, Pascal-VOC style) to COCO format.

bccd/meta.json, bccd/annotations/{train,val,test}.json, bccd/images/*.jpg
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

from ..errors import ConfigError
from .files import check_replaceable, coco_content, write_dataset
from .report import shown

CLASSES = ["RBC", "WBC", "Platelets"]
SPLITS = ("train", "val", "test")
PREPARE = "python datasets/prepare_bccd.py CLONE_OF_BCCD"


def convert_bccd(clone: Path, output: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Writes the clone's three splits to `output`, all of them or nothing.

    Returns:
        Images and boxes a split and class, and one line for each box that was dropped or clipped.

    Raises:
        ConfigError: `clone` is not BCCD or not complete, or `output` holds something else.
    """
    source = _find_source(clone)
    check_replaceable(output, "bccd")
    changes: list[str] = []
    contents = {split: _read_split(source, split, changes) for split in SPLITS}

    def write(images: Path) -> dict[str, dict]:
        for content in contents.values():
            for image in content["images"]:
                name = image["file_name"]
                shutil.copyfile(source / "JPEGImages" / name, images / name)
        return contents

    return write_dataset(output, {"dataset": "bccd", "version": 1}, write), changes


def _find_source(clone: Path) -> Path:
    """The folder that holds the data: the clone itself, or BCCD/ in it as in the repository."""
    parts = ("Annotations", "ImageSets/Main", "JPEGImages")
    for source in (clone, clone / "BCCD"):
        if all((source / part).is_dir() for part in parts):
            return source
    raise ConfigError(
        f"{clone} is no clone of BCCD: neither it nor its folder BCCD has {', '.join(parts)}; "
        "get one with 'git clone https://github.com/Shenggan/BCCD_Dataset'"
    )


def _read_split(source: Path, split: str, changes: list[str]) -> dict:
    """COCO content of one split. What is wrong with single boxes is noted in `changes`."""
    names = _names(source / "ImageSets" / "Main" / f"{split}.txt")
    images = ((f"{name}.jpg", *_read_image(source, name, changes)) for name in names)
    return coco_content({"description": f"BCCD, {split}"}, CLASSES, images)


def _names(path: Path) -> list[str]:
    """Names of images, one a line, without extension."""
    names = _read(path).split()
    if not names:
        raise ConfigError(f"BCCD: {path} names no image")
    for name in names:
        # With folders in it, files outside of the clone would be read, and of the output written.
        if Path(name).name != name or name == ".." or "\0" in name:
            raise ConfigError(
                f"BCCD: {path} names {shown(name, 60)}, which is not the plain name of an image"
            )
    return names


def _read_image(source: Path, name: str, changes: list[str]) -> tuple[tuple[int, int], list]:
    """Size (width, height) of image `name`, and class, box and area of its usable objects."""
    annotation_path = source / "Annotations" / f"{name}.xml"
    try:
        with Image.open(source / "JPEGImages" / f"{name}.jpg") as image:
            size = image.size
        root = ET.fromstring(_read(annotation_path))
    except OSError as error:
        raise ConfigError(f"BCCD: image {name}.jpg is missing or broken ({error})") from error
    except ET.ParseError as error:
        raise ConfigError(f"BCCD: {annotation_path} is no valid XML ({error})") from error

    objects = []
    for index, item in enumerate(root.iter("object"), start=1):
        label = (item.findtext("name") or "").strip()
        try:
            corners = [
                float(item.findtext(f"bndbox/{key}") or "nan")
                for key in ("xmin", "ymin", "xmax", "ymax")
            ]
        except ValueError:
            corners = [float("nan")] * 4
        box = _usable_box(corners, size)
        if label not in CLASSES:
            changes.append(f"{name}: dropped box {index}, unknown class '{label}'")
        elif box is None:
            changes.append(f"{name}: dropped box {index} ({label}), no extent {corners}")
        else:
            if box != _from_one_based(corners):
                changes.append(f"{name}: clipped box {index} ({label}) to the image {corners}")
            left, top, right, bottom = box
            width, height = right - left, bottom - top
            values = {"bbox": [left, top, width, height], "area": width * height}
            objects.append((CLASSES.index(label), values))
    return size, objects


def _from_one_based(corners: list[float]) -> tuple[float, ...]:
    """Pascal VOC counts pixels from 1 and includes the last: xmin 1, xmax W is the full width."""
    return (corners[0] - 1, corners[1] - 1, corners[2], corners[3])


def _usable_box(corners: list[float], size: tuple[int, int]) -> tuple[float, ...] | None:
    """The part of a VOC box that lies in the image; None for a box without extent, or unreadable.

    A box whose corners coincide is a stray click, though Pascal VOC would call it one pixel.
    """
    if not (corners[0] < corners[2] and corners[1] < corners[3]):  # also false for nan
        return None
    left, top, right, bottom = _from_one_based(corners)
    box = (max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1])))
    return box if box[0] < box[2] and box[1] < box[3] else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"BCCD: cannot read {path} ({error})") from error
