"""The built-in dataset: handwritten digits on photographs, made on first use, never downloaded.

    digits/meta.json                what it was made from; its absence marks a foreign directory
    digits/annotations/train.json   COCO format: boxes, polygons and areas of the visible parts
    digits/train/000000.jpg ...
    (the same for val)

`digits_large` begins with the same images and has more to train on, for detectors that would learn
those by heart; `digits_tiny` is a small copy of the same make for tests. `digits_plain` has large
digits of strong contrast, which a detector learns in minutes on a CPU: the demo's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import ConfigError
from .classes import Classes
from .coco import Table, read_json
from .digits_render import PLAIN, Look, Material, render_image
from .files import build_directory, coco_content, is_empty, json_path
from .polygons import mask_to_polygons
from .records import Reading, make_records
from .sheet import SheetRow, draw_sheet

logger = logging.getLogger(__name__)

CLASSES = [str(digit) for digit in range(10)]
SPLITS = ("train", "val")
VERSION = 3  # raised whenever the same spec gives other bytes
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # thin coloured strokes need full chroma
EMPTY_EVERY = 50  # each 50th image shows clutter only, in both splits


@dataclass(frozen=True)
class DigitsSpec:
    """All that the content of a copy of the dataset depends on."""

    size: int = 160  # side of the square images, px
    train: int = 2000  # images
    val: int = 400
    seed: int = 0
    plain: bool = False  # large digits of strong contrast, at most 5 in an image, no clutter

    def __post_init__(self) -> None:
        if self.size < 48:
            raise ConfigError(f"digits: size is {self.size}, at least 48 px are needed")
        if min(self.train, self.val) < 1 or self.seed < 0:
            raise ConfigError("digits: train and val must be at least 1, seed at least 0")


SPECS = {
    "digits": DigitsSpec(),
    "digits_large": DigitsSpec(train=10_000),
    "digits_tiny": DigitsSpec(size=112, train=16, val=8, seed=1),
    "digits_plain": DigitsSpec(size=128, train=1200, val=200, plain=True),
}


def make_digits(directory: Path, spec: DigitsSpec) -> bool:
    """Makes exactly `spec` in `directory`; another make of digits there is replaced.

    Returns:
        Whether anything had to be made.

    Raises:
        ConfigError: `directory` holds something that is not a digits dataset.
    """

    def fill(fresh: Path) -> None:
        for split in SPLITS:
            _write_split(fresh, split, spec)
        meta = {"version": VERSION, **dataclasses.asdict(spec)}
        (fresh / "meta.json").write_text(json.dumps(meta) + "\n")

    def is_current() -> bool:
        return read_meta(directory) == (VERSION, spec)

    return not is_current() and build_directory(directory, fill, is_current)


def ensure_digits(directory: Path, spec: DigitsSpec) -> None:
    """Makes the dataset where there is none, and again where another version of d2kd made it.

    A copy with a size, counts or seed of the user's own (`datasets/prepare_digits.py`) is kept;
    `spec` serves only where there is nothing yet.
    """
    meta = read_meta(directory)
    if meta is None:
        make_digits(directory, spec)
    elif meta[0] != VERSION:
        logger.warning(f"{directory} was made by version {meta[0]} of digits; making it again.")
        make_digits(directory, meta[1])


def read_meta(directory: Path) -> tuple[int, DigitsSpec] | None:
    """Version and spec of the copy in `directory`; None where the directory is absent or empty.

    Raises:
        ConfigError: `directory` holds something that is not a digits dataset.
    """
    if is_empty(directory):
        return None
    try:
        meta = json.loads((directory / "meta.json").read_text())
        fields = [field.name for field in dataclasses.fields(DigitsSpec)]
        meta.setdefault("plain", False)  # version 3 began without it
        return meta["version"], DigitsSpec(**{name: meta[name] for name in fields})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{directory} exists but is no digits dataset (no readable meta.json): "
            "move it away, or set DETECTRON2_DATASETS to another directory"
        ) from error


def _write_split(directory: Path, split: str, spec: DigitsSpec) -> None:
    (directory / split).mkdir()
    info = {"description": f"digits, {split}", "version": str(VERSION)}
    content = coco_content(info, CLASSES, _draw_images(directory / split, split, spec))
    path = json_path(directory, split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))


def _draw_images(folder: Path, split: str, spec: DigitsSpec) -> Iterator[tuple]:
    """Writes the images of a split to `folder`; yields what :func:`coco_content` takes."""
    material = Material.load(split, PLAIN if spec.plain else Look())
    count = getattr(spec, split)
    progress = tqdm(
        range(count), f"Making digits, {split}", miniters=max(1, count // 10), mininterval=0
    )
    for index in progress:
        # Seeded an image each: a bigger dataset begins with the smaller one.
        rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
        with_digits = index % EMPTY_EVERY != EMPTY_EVERY - 1
        image, digits = render_image(rng, material, spec.size, with_digits)
        name = f"{index:06d}.jpg"
        Image.fromarray(image).save(folder / name, **JPEG)
        yield name, (spec.size, spec.size), [(label, _annotation(mask)) for label, mask in digits]


def _annotation(mask: np.ndarray) -> dict:
    """COCO fields of one digit with the visible `mask` (H, W); the box is tight around it."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return {
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": mask_to_polygons(mask),
    }


def contact_sheet(directory: Path, columns: int = 6, tile: int = 160) -> Image.Image:
    """The first images of each split, once as they are and once with their annotations."""
    reading = Reading(Classes(tuple(CLASSES), tuple(range(1, len(CLASSES) + 1))))
    rows: list[SheetRow] = []
    for split in SPLITS:
        table = Table(read_json(str(json_path(directory, split))))
        records = make_records(table, str(directory / split), reading)[:columns]
        rows.append((split, [{**record, "annotations": []} for record in records], CLASSES))
        rows.append((f"{split}, annotated", records, CLASSES))
    return draw_sheet(rows, columns, tile)
