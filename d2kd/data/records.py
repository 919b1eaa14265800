"""From an annotation file to what trains and what is evaluated: Detectron2's records, and the
content that pycocotools is given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

from .check import known_area, usable_ids
from .check_boxes import boxes_without_area
from .classes import Classes
from .coco import Table
from .masks import usable_polygons


@dataclass(frozen=True)
class Reading:
    """How a file is read."""

    classes: Classes  # in the order of the detector
    masks: bool = True  # they are used; else records have none, and no box is dropped for its mask
    keypoints: int = 0  # K, 0 where they are not used


def make_records(table: Table, root: str, reading: Reading) -> list[dict]:
    """Records in Detectron2's format, equal to those of its ``load_coco_json`` for a file that
    needs no repair.

    Args:
        table: N images, M annotations; keypoints in it are changed, as by Detectron2.
        root: image directory.
    """
    number_of = reading.classes.number_of
    objects: list[list[dict]] = [[] for _ in table.images]
    crowd = table.crowd.astype(int).tolist()
    for place, (image, entry) in enumerate(
        zip(table.image_of.tolist(), table.annotations, strict=True)
    ):
        if image < 0:
            continue
        item = {
            "iscrowd": crowd[place],
            "bbox": entry["bbox"],
            "category_id": number_of[entry["category_id"]],
            "bbox_mode": BoxMode.XYWH_ABS,
        }
        if reading.masks and entry.get("segmentation"):
            mask = _mask(entry["segmentation"])
            if not mask:
                continue  # as in Detectron2: no polygon of three points
            item["segmentation"] = mask
        if reading.keypoints:
            item["keypoints"] = _keypoints(entry.get("keypoints"), reading.keypoints)
        objects[image].append(item)
    order = sorted(range(len(table.images)), key=table.image_ids.__getitem__)
    sizes = table.sizes.astype(int).tolist()
    return [
        {
            "file_name": os.path.join(root, table.names[image]),
            "height": sizes[image][1],
            "width": sizes[image][0],
            "image_id": table.image_ids[image],
            "annotations": objects[image],
        }
        for image in order
    ]


def box_of(entry: dict) -> list[float] | None:
    """x, y, width, height of an object of a record; None for a rotated box."""
    if len(entry["bbox"]) != 4:
        return None
    return BoxMode.convert(list(entry["bbox"]), entry["bbox_mode"], BoxMode.XYWH_ABS)


def _mask(segmentation: list | dict) -> list | dict:
    """A mask as Detectron2's mapper takes it; [] for polygons of which none is usable."""
    if isinstance(segmentation, list):
        return usable_polygons(segmentation)
    rle = _of_whole_numbers(segmentation)
    if isinstance(rle["counts"], list):
        return mask_util.frPyObjects(rle, *rle["size"])
    return rle


def _of_whole_numbers(rle: dict) -> dict:
    """An RLE without floats, such as 96.0, which pycocotools does not take."""
    lists = [key for key in ("size", "counts") if isinstance(rle[key], list)]
    return {**rle, **{key: [int(value) for value in rle[key]] for key in lists}}


def _keypoints(values: list | None, count: int) -> list:
    """x, y, visibility of each, with pixel centres at half coordinates as in Detectron2."""
    if not values:
        return [0.5, 0.5, 0] * count
    return [value if place % 3 == 2 else value + 0.5 for place, value in enumerate(values)]


def repair_for_evaluation(content: dict, reading: Reading) -> None:
    """Change the content of an annotation file, in place, to what pycocotools reads correctly.

    Ids are positive, sizes are no floats, ``area``, ``iscrowd`` and ``num_keypoints`` are there,
    boxes without area in their image and categories that are no class are not. A file that is right
    means the same after it.
    """
    table = Table(content)
    content["categories"] = [c for c in table.categories if c["id"] in reading.classes.ids]
    for image, size in zip(table.images, table.sizes, strict=True):
        if not np.isnan(size).any():
            image["width"], image["height"] = map(int, size)
    if not table.has_annotations:
        return
    for entry in table.annotations:
        if entry.get("iscrowd") is None:
            entry["iscrowd"] = 0
    for place in np.flatnonzero(~known_area(table)):
        width, height = table.sizes[table.image_of[place]]
        table.annotations[place]["area"] = _area(table.annotations[place], width, height)
    if reading.masks:
        for place in np.flatnonzero(table.image_of >= 0):  # masks of the rest are not checked
            entry = table.annotations[place]
            if entry.get("segmentation"):
                entry["segmentation"] = _mask(entry["segmentation"])
    if reading.keypoints:
        _complete_keypoints(table, reading.keypoints)
    content["annotations"] = list(compress(table.annotations, ~boxes_without_area(table)))
    if not usable_ids(table).all():
        for number, entry in enumerate(content["annotations"], start=1):
            entry["id"] = number


def _area(entry: dict, width: float, height: float) -> float:
    """Pixels of the mask, or of the box where there is no usable mask."""
    mask = entry.get("segmentation")
    try:
        if isinstance(mask, list):
            parts = mask_util.frPyObjects(usable_polygons(mask), int(height), int(width))
            return float(mask_util.area(mask_util.merge(parts)))
        if isinstance(mask, dict) and [height, width] == mask["size"]:
            return float(mask_util.area(_mask(mask)))
    except Exception:
        pass  # a mask that is not used may be anything
    return float(entry["bbox"][2]) * float(entry["bbox"][3])


def _complete_keypoints(table: Table, count: int) -> None:
    for entry in table.annotations:
        if not entry.get("keypoints"):
            entry["keypoints"] = [0] * (3 * count)
        if entry.get("num_keypoints") is None:
            entry["num_keypoints"] = sum(visible > 0 for visible in entry["keypoints"][2::3])
