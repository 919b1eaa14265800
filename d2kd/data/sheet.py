"""A sheet of sample images with their boxes and masks, to see that annotations fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw

from .image_files import load_image
from .records import box_of

_COLOURS = ("yellow", "cyan", "magenta", "lime", "orange", "deepskyblue", "red", "white")


# Name of a dataset, Detectron2's records, names of the classes.
SheetRow = tuple[str, list[dict], list[str]]


def draw_sheet(rows: Sequence[SheetRow], columns: int = 6, tile: int = 320) -> Image.Image:
    """Random images of each dataset, each with its annotations, in tiles of so many pixels."""
    heading = 18
    sheet = Image.new("RGB", (columns * tile, len(rows) * (tile + heading)), "black")
    for row, (name, records, classes) in enumerate(rows):
        top = row * (tile + heading)
        ImageDraw.Draw(sheet).text((4, top + 3), name, fill="white")
        for column, record in enumerate(choose(records, columns)):
            picture = draw_record(record, classes, tile)
            sheet.paste(picture, (column * tile, top + heading))
    return sheet


def choose(records: list[dict], count: int) -> list[dict]:
    """At most ``count`` random records, the same each time, those with objects first."""
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = [records[index] for index in order]
    return sorted(shuffled, key=lambda record: not record.get("annotations"))[:count]


def draw_record(record: dict, classes: Sequence[str], tile: int) -> Image.Image:
    """One image with its annotations, to fit into ``tile`` by ``tile`` pixels."""
    image = Image.fromarray(np.ascontiguousarray(load_image(record["file_name"], "RGB")))
    scale = tile / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size)
    entries = record.get("annotations", ())
    for entry in entries:
        colour = _COLOURS[entry["category_id"] % len(_COLOURS)]
        _shade(image, entry.get("segmentation"), scale, colour)
    draw = ImageDraw.Draw(image)
    for entry in entries:
        colour = _COLOURS[entry["category_id"] % len(_COLOURS)]
        box = box_of(entry)
        if box is not None:
            x, y, width, height = (scale * value for value in box)
            draw.rectangle((x, y, x + max(width, 0), y + max(height, 0)), outline=colour)
            draw.text((x + 2, y + 1), _label(entry, classes), fill=colour)
        for px, py, visible in np.reshape(entry.get("keypoints", ()), (-1, 3)) * [scale, scale, 1]:
            if visible > 0:
                draw.ellipse((px - 2, py - 2, px + 2, py + 2), fill=colour)
    return image


def _label(entry: dict, classes: Sequence[str]) -> str:
    number = entry["category_id"]
    name = classes[number] if number < len(classes) else f"class {number}"
    return f"{name} (crowd)" if entry.get("iscrowd") else name


def _shade(image: Image.Image, mask: list | dict | None, scale: float, colour: str) -> None:
    """Lays a half transparent mask over the image."""
    if not mask:
        return
    cover = Image.new("L", image.size)
    if isinstance(mask, list):
        for polygon in mask:
            ImageDraw.Draw(cover).polygon([scale * value for value in polygon], fill=110)
    else:
        cover = Image.fromarray(mask_util.decode(mask) * np.uint8(110)).resize(image.size)
    image.paste(Image.new("RGB", image.size, colour), mask=cover)
