"""What opening the images of a dataset shows, sizes of objects, and the sheet of samples."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image, ImageFilter

from d2kd.data import check_images
from d2kd.data.coco import Table
from d2kd.data.object_sizes import (
    anchor_shapes,
    best_iou,
    check_sizes,
    sides_in_training,
    strides_of,
)
from d2kd.data.records import Reading, make_records
from d2kd.data.sheet import choose, draw_record, draw_sheet

from ..detectors import detector_config
from .parts import CLASSES, Parts, forget_datasets


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path)


def as_jpeg(parts: Parts, place: int, **options) -> None:
    """Stores an image of the training set as JPEG."""
    image = parts.train["images"][place]
    path = parts.folder / "images" / image["file_name"]
    image["file_name"] = f"photo_{place}.jpg"
    Image.open(path).save(parts.folder / "images" / image["file_name"], **options)


def cut(parts: Parts, place: int, share: float) -> None:
    path = parts.folder / "images" / parts.train["images"][place]["file_name"]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def image_findings(parts: Parts) -> str:
    table = Table(parts.train)
    looks = check_images.look_at_all(table, str(parts.folder / "images"), threads=2)
    return "\n".join(line for f in check_images.judge(table, looks) for line in f.lines())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["png", "jpg", "progressive"])
def test_truncated_images_are_found(parts, kind, share):
    """Wherever the file ends; JPEG is not decoded in full size."""
    if kind != "png":
        as_jpeg(parts, 2, quality=95, progressive=kind == "progressive")
    cut(parts, 2, share)
    assert re.search("1 of 6 images that were opened cannot be read", image_findings(parts))


def test_whole_images_have_nothing_to_say(parts):
    """Of all formats that occur."""
    as_jpeg(parts, 0)
    as_jpeg(parts, 1, progressive=True)
    Image.open(parts.folder / "images/train_3.png").convert("P").save(
        parts.folder / "images/train_3.png"
    )
    assert image_findings(parts) == ""


def test_deep_turned_and_other_images(parts):
    """16 bits, EXIF, another size, and the same file twice."""
    folder = parts.folder / "images"
    Image.fromarray(np.full((96, 128), 40_000, np.uint16)).save(folder / "train_1.png")
    exif = Image.Exif()
    exif[274] = 8
    as_jpeg(parts, 1, exif=exif)
    Image.new("RGB", (96, 128)).save(folder / "train_3.png")
    shutil.copy(folder / "train_4.png", folder / "train_5.png")
    text = image_findings(parts)
    for expected in (
        r"1 of 6 images that were opened have more than 8 bits.*\n.*train_1.png' \(mode I",
        r"2 of 6 images that were opened have another size.*\n.*'photo_1.jpg' is 96 x 128, turned",
        "1 of 6 images are turned or mirrored by EXIF",
        r"2 images are the same file.*\n.*'train_4.png'; 'train_5.png'",
    ):
        assert re.search(expected, text), expected


def compared(parts: Parts) -> str:
    root = str(parts.folder / "images")
    tables = Table(parts.train), Table(parts.val)
    looks = [check_images.look_at_all(table, root) for table in tables]
    found = check_images.compare(("t", tables[0], looks[0]), ("v", tables[1], looks[1]))
    return "\n".join(line for finding in found for line in finding.lines())


def photograph(seed: int) -> Image.Image:
    """Something with shapes of many sizes, as photographs have."""
    random = np.random.default_rng(seed)
    tiny = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return tiny.resize((128, 96), Image.Resampling.BICUBIC)


def test_images_of_train_in_val(parts):
    """The same file, the same picture stored otherwise, and Roboflow's copies of one original."""
    folder = parts.folder / "images"
    assert compared(parts) == ""
    for place in range(6):
        photograph(place).save(folder / f"train_{place + 1}.png")
    for place in range(4):
        photograph(100 + place).save(folder / f"val_{place + 1}.png")
    assert compared(parts) == ""
    shutil.copy(folder / "train_2.png", folder / "val_1.png")
    photograph(3).filter(ImageFilter.GaussianBlur(0.5)).save(folder / "val_3.jpg", quality=80)
    parts.val["images"][2]["file_name"] = "val_3.jpg"
    for content, mark in ((parts.train, "aa"), (parts.val, "bb")):
        name = content["images"][3]["file_name"]
        content["images"][3]["file_name"] = f"cat_jpg.rf.{mark}.png"
        shutil.copy(folder / name, folder / content["images"][3]["file_name"])
    text = compared(parts)
    for expected in (
        r"1 of 4 images are in 't', too: the same file.*\n.*'val_1.png' and 'train_2.png'",
        r"1 of 4 images look like one in 't'.*\n.*'val_3.jpg' and 'cat_jpg.rf.aa.png'",
        r"1 of 4 images have the name of one in 't' up to '.rf.'.*\n.*bb.png' and '.*aa.png'",
    ):
        assert re.search(expected, text), text


def test_images_of_one_colour_look_like_nothing(parts):
    """Else all black images of a dataset would be one."""
    for name in ("train_1", "train_2", "val_1"):
        Image.new("RGB", (128, 96), "black").save(parts.folder / f"images/{name}.jpg", quality=60)
    parts.train["images"][0]["file_name"] = "train_1.jpg"
    parts.val["images"][0]["file_name"] = "val_1.jpg"
    (parts.folder / "images/val_1.jpg").write_bytes(
        (parts.folder / "images/val_1.jpg").read_bytes() + b"\0"
    )
    assert "look like" not in compared(parts)


# --- sizes --------------------------------------------------------------------------------------


def test_sides_of_objects_in_training():
    """Scaled as their image is: to the shorter side, unless the longer gets too long."""
    cfg = detector_config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (300, 500, 400), 800
    box = {"bbox": [3, 4, 20, 10], "bbox_mode": BoxMode.XYWH_ABS}
    records = [
        {"width": 200, "height": 100, "annotations": [box, {**box, "iscrowd": 1}]},
        {"width": 100, "height": 1000, "annotations": [box]},
        {"width": 100, "height": 100, "annotations": []},
    ]
    assert sides_in_training(records, cfg).tolist() == [[80, 40], [16, 8]]
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    assert sides_in_training(records, cfg).tolist() == [[20, 10], [20, 10]]
    corners = {"bbox": np.array([3, 4, 23, 14]), "bbox_mode": BoxMode.XYXY_ABS}
    rotated = {"bbox": [3, 4, 20, 10, 45], "bbox_mode": BoxMode.XYWHA_ABS}
    records = [{"width": 200, "height": 100, "annotations": [corners, rotated]}]
    assert sides_in_training(records, cfg).tolist() == [[20, 10]]


@pytest.mark.parametrize(
    ("arch", "strides", "anchors"),
    [
        ("faster", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}, 15),
        ("retinanet", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}, 45),
        ("fcos", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}, 0),
    ],
)
def test_strides_and_anchors_of_a_config(arch, strides, anchors):
    """Of each family, without building its weights."""
    cfg = detector_config(arch)
    assert strides_of(cfg) == strides
    assert len(anchor_shapes(cfg)) == anchors


def test_strides_need_no_weights():
    """A light backbone's ImageNet weights are neither looked for nor read."""
    pytest.importorskip("timm", reason="needs timm (the extra 'timm')")
    cfg = detector_config("faster")
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS = "", "no/such/file.pth"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = "mobilenetv2_100", True
    assert strides_of(cfg) == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert cfg.MODEL.TIMM.PRETRAINED


def test_best_iou_is_that_of_boxes_at_one_centre():
    """Against Detectron2's IoU of centred boxes."""
    from detectron2.structures import Boxes, pairwise_iou

    random = np.random.default_rng(0)
    sides, anchors = random.uniform(1, 100, (20, 2)), random.uniform(1, 100, (7, 2))

    def centred(values):
        import torch

        return Boxes(torch.tensor(np.concatenate([-values / 2, values / 2], axis=1)))

    expected = pairwise_iou(centred(sides), centred(anchors)).max(dim=1).values.numpy()
    assert best_iou(sides, anchors) == pytest.approx(expected)


def test_small_objects_are_reported():
    """Against the finest level and the anchors; a dataset without objects has none."""
    sides = np.array([[2, 3], [3, 3], [40, 40], [300, 10]], float)
    findings = list(check_sizes(sides, {"p3": 8, "p2": 4}, np.array([[32.0, 32.0]])))
    text = "\n".join(map(str, findings))
    assert "2 of 4 objects are smaller than a cell of the finest level, p2 with stride 4" in text
    assert "3 of 4 objects have no anchor of IoU 0.5 at their centre" in text
    assert not any(finding.fatal for finding in findings)
    assert list(check_sizes(np.zeros((0, 2)), {"p2": 4}, np.array([[32.0, 32.0]]))) == []


# --- the sheet ----------------------------------------------------------------------------------


def records_of(parts: Parts) -> list[dict]:
    from d2kd.data.classes import classes_of

    classes, _ = classes_of(parts.train["categories"], {1, 2, 3})
    root = str(parts.folder / "images")
    return make_records(Table(parts.train), root, Reading(classes))


def test_the_sheet_shows_boxes_and_masks(parts):
    """Pixels of an object change inside its mask and on the edge of its box, and nowhere else."""
    entry = parts.train["annotations"][0]
    parts.train["annotations"] = [entry]
    entry.update(bbox=[20, 40, 60, 30], segmentation=[[50, 45, 70, 45, 70, 60, 50, 60]])
    record = records_of(parts)[0]
    drawn = np.asarray(draw_record(record, CLASSES, tile=128)).astype(int)
    plain = np.asarray(Image.open(record["file_name"]).convert("RGB")).astype(int)
    changed = (drawn != plain).any(axis=-1)
    assert drawn.shape == plain.shape
    assert changed[47:58, 52:68].mean() > 0.9  # shaded
    assert changed[40, 21:79].all() and changed[70, 21:79].all()  # the box
    assert not changed[:39].any() and not changed[72:].any() and not changed[:, 82:].any()


def test_the_sheet_shows_every_kind_of_annotation(parts):
    """RLE, crowds, keypoints, boxes beyond the image, images without objects."""
    entries = parts.train["annotations"]
    entries[0]["segmentation"] = {"size": [96, 128], "counts": [100, 500, 96 * 128 - 600]}
    entries[1].update(iscrowd=1, bbox=[100, 80, 90, 90])
    entries[2]["bbox"] = [5, 5, 0, 0]
    parts.train["annotations"] = [a for a in entries if a["image_id"] != 2]
    records = records_of(parts)
    records[3]["annotations"][1].update(bbox=[3, 4, 20, 10, 45], bbox_mode=BoxMode.XYWHA_ABS)
    records[5].pop("annotations")
    records[3]["annotations"][0]["keypoints"] = [30.5, 30.5, 2, 40.5, 40.5, 0]
    sheet = draw_sheet([("t", records, CLASSES), ("v", records[:2], CLASSES)], columns=6, tile=100)
    assert sheet.size == (600, 2 * 118)
    assert np.asarray(sheet)[118 + 18 :, 200:].sum() == 0  # two images in the second row
    chosen = choose(records, 5)
    assert sum(bool(record.get("annotations")) for record in chosen) == 4
    assert [r["image_id"] for r in choose(records, 5)] == [r["image_id"] for r in chosen]
