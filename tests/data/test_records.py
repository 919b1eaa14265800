"""Reading annotation files: the same records as Detectron2, and masks judged without decoding."""

from __future__ import annotations

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data.datasets import load_coco_json

from d2kd.data.classes import classes_of
from d2kd.data.coco import Table, read_json
from d2kd.data.masks import BROKEN, NO_MASK, PACKED_RLE, POLYGONS, RLE, Masks
from d2kd.data.records import Reading, make_records

from .parts import Parts, forget_datasets


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path)


def shuffle(content: dict) -> None:
    """Images, annotations and categories in no order, with gaps between ids."""
    random = np.random.default_rng(0)
    for key in ("images", "annotations", "categories"):
        content[key] = [content[key][i] for i in random.permutation(len(content[key]))]
    for image in content["images"]:
        image["id"] = image["id"] * 10
    for entry in content["annotations"]:
        entry["image_id"] *= 10
        entry["category_id"] += 4
    for category in content["categories"]:
        category["id"] += 4


def all_masks(content: dict) -> None:
    """Polygons, some too short, and both kinds of RLE."""
    packed = mask_util.frPyObjects({"size": [96, 128], "counts": [9, 90, 96 * 128 - 99]}, 96, 128)
    kinds = (
        [[1, 2, 30, 40, 5, 6], [1, 2]],
        [[1, 2, 30, 40]],
        {"size": [96, 128], "counts": [9, 90, 96 * 128 - 99]},
        {"size": [96, 128], "counts": packed["counts"].decode()},
    )
    for place, entry in enumerate(content["annotations"]):
        entry["segmentation"] = kinds[place % 4]


def keypoints(content: dict) -> None:
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry.update(keypoints=[x, y, 2, x + w, y + h, 0], num_keypoints=1)


@pytest.mark.parametrize("change", [lambda content: None, shuffle, all_masks, keypoints])
def test_records_are_those_of_detectron2(parts, change):
    """Key by key, for files that need no repair."""
    change(parts.train)
    parts.write()
    path, root = str(parts.folder / "train.json"), str(parts.folder / "images")
    expected = load_coco_json(path, root, "stock")
    table = Table(read_json(path))
    classes, _ = classes_of(table.categories, set(table.category_ids))
    points = 2 if change is keypoints else 0
    records = make_records(table, root, Reading(classes, masks=True, keypoints=points))
    assert records == expected


def test_unused_masks_are_not_kept(parts):
    """Boxes of objects whose mask is not usable stay, and masks take no memory."""
    all_masks(parts.train)
    parts.write()
    table = Table(read_json(str(parts.folder / "train.json")))
    classes, _ = classes_of(table.categories, set(table.category_ids))
    records = make_records(table, "", Reading(classes, masks=False))
    objects = [entry for record in records for entry in record["annotations"]]
    assert len(objects) == 18 and not any("segmentation" in entry for entry in objects)


def table_of(masks: list, size: tuple[int, int] = (128, 96)) -> Table:
    return Table(
        {
            "images": [{"id": 1, "file_name": "a", "width": size[0], "height": size[1]}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": m}
                for i, m in enumerate(masks, start=1)
            ],
            "categories": [{"id": 1, "name": "x"}],
        }
    )


def test_kinds_of_masks():
    """What Detectron2 can use and what not."""
    cases = [
        (None, NO_MASK, False),
        ([], NO_MASK, False),
        ({}, NO_MASK, False),
        ([[1, 2, 3, 4, 5, 6]], POLYGONS, True),
        ([[1, 2, 3, 4, 5, 6], [1, 2]], POLYGONS, True),
        ([[1, 2, 3, 4]], POLYGONS, False),
        ([[1, 2, 3, 4, 5, 6, 7]], POLYGONS, False),
        ([[]], POLYGONS, False),
        ([1, 2, 3, 4, 5, 6], BROKEN, False),
        ([["a"] * 6], BROKEN, False),
        ([[None] * 6], BROKEN, False),
        ([[True] * 6], BROKEN, False),
        ([[10**400] * 6], BROKEN, False),
        ([[1, 2, 3, 4, 5, 6], "x"], BROKEN, False),
        ("m.png", BROKEN, False),
        (7, BROKEN, False),
        ({"size": [96, 128], "counts": [96 * 128]}, RLE, True),
        ({"size": [96, 128], "counts": [-1, 96 * 128 + 1]}, BROKEN, False),
        ({"size": [96, 128], "counts": [0.5]}, BROKEN, False),
        ({"size": [96, 128], "counts": ["1"]}, BROKEN, False),
        ({"size": "big", "counts": [3]}, BROKEN, False),
        ({"size": [96, 128], "counts": "0`0"}, PACKED_RLE, True),
        ({"size": [96, 128], "counts": "ä"}, BROKEN, False),
        ({"size": [96, 128], "counts": "`"}, BROKEN, False),
        ({"size": [96, 128], "counts": "o" * 20 + "0"}, BROKEN, False),
        ({"size": [96, 128], "counts": None}, BROKEN, False),
        ({"counts": [3]}, BROKEN, False),
    ]
    masks = Masks(table_of([case[0] for case in cases]))
    for (value, kind, usable), found, is_usable in zip(
        cases, masks.kind, masks.usable, strict=True
    ):
        assert (found, is_usable) == (kind, usable), value
    assert masks.flat.sum() == 1 and masks.some_short.sum() == 1


def test_extent_of_polygons():
    """Smallest and largest coordinates over all polygons of an object."""
    masks = Masks(
        table_of([[[5, 6, 1, 9, 3, 2], [0, 0, 50, 60, 7, 7]], [[1, 2]], None, [[1, 2, 3, 4, 5, 6]]])
    )
    assert masks.extent[0].tolist() == [0, 0, 50, 60]
    assert np.isnan(masks.extent[1:3]).all()
    assert masks.extent[3].tolist() == [1, 2, 5, 6]


def random_masks(count: int, height: int, width: int) -> list[np.ndarray]:
    """Noise, blocks, empty and full masks."""
    random = np.random.default_rng(0)
    masks = [np.zeros((height, width), np.uint8), np.ones((height, width), np.uint8)]
    for number in range(count):
        mask = (random.uniform(size=(height, width)) < 0.5 ** (1 + number % 6)).astype(np.uint8)
        if number % 2:
            mask[: number % height, number % width :] = 1
        masks.append(mask)
    return [np.asfortranarray(mask) for mask in masks]


@pytest.mark.parametrize("shape", [(96, 128), (1, 1), (700, 900)])
def test_packed_rle_is_read_as_by_pycocotools(shape):
    """Sum and area of packed counts, without decoding."""
    height, width = shape
    masks = random_masks(20, height, width)
    rles = mask_util.encode(np.stack(masks, axis=-1).copy(order="F"))
    packed = [{"size": list(shape), "counts": rle["counts"].decode()} for rle in rles]
    found = Masks(table_of(packed, (width, height)))
    assert (found.kind == PACKED_RLE).all() and found.usable.all()
    assert not found.wrong_sum.any() and not found.wrong_size.any()
    assert found.empty.tolist() == [not mask.any() for mask in masks]
    other = Masks(table_of(packed, (width + 1, height)))
    assert other.wrong_size.all()
    longer = copy.deepcopy(packed)
    for rle in longer:
        rle["size"][0] += 1
    assert Masks(table_of(longer, (width, height + 1))).wrong_sum.all()


def test_a_table_marks_what_is_not_as_it_should_be():
    """No value of a file raises: the check names them all."""
    odd = [None, True, "x", [], {}, 1.5, -3, float("nan"), 10**400]
    table = Table(
        {
            "images": [{"id": v, "file_name": v, "width": v, "height": v} for v in odd],
            "annotations": [
                {"id": v, "image_id": v, "category_id": v, "bbox": v, "iscrowd": v} for v in odd
            ]
            + [{"bbox": [v, 1, 1, 1]} for v in odd],
            "categories": [],
        }
    )
    assert np.isnan(table.sizes).all()
    assert table.box_is_list.tolist() == [False] * 9 + [v in (1.5, -3) or v != v for v in odd]
    assert json.dumps([table.image_name(place) for place in range(18)])
