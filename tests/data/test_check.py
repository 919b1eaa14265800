"""The check of a dataset's content, through train_net.py: what is refused, what is said."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2kd import ConfigError
from d2kd.data import loading
from d2kd.data.custom import check_datasets, log_reports
from d2kd.data.model_classes import trained_classes
from d2kd.data.report import MAX_LINES, DatasetReport, Finding, error_line, report_lines
from d2kd.engine import train as train_net

from ..detectors import write_config
from .parts import CLASSES, Parts, forget_datasets


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path)


def each(entries: str, **values):
    """A change that sets values of all images, annotations or categories of the training set; None
    removes a key, a function is called with the entry."""

    def change(parts: Parts) -> None:
        for entry in parts.train[entries]:
            for key, value in values.items():
                if value is None:
                    del entry[key]
                else:
                    entry[key] = value(entry) if callable(value) else value

    return change


def one(entries: str, place: int = 4, split: str = "train", **values):
    """The same of one entry."""

    def change(parts: Parts) -> None:
        chosen = Parts.__new__(Parts)
        chosen.train = {entries: [getattr(parts, split)[entries][place]]}
        each(entries, **values)(chosen)

    return change


def replace_content(**values):
    """A change of whole lists of the training set."""
    return lambda parts: parts.train.update(values)


def remove(key: str):
    return lambda parts: parts.train.pop(key)


def join_twice(parts: Parts) -> None:
    """Two files with equal ids put one behind the other."""
    for key in ("images", "annotations"):
        parts.train[key] = parts.train[key] + copy.deepcopy(parts.train[key])


def mixed_boxes(parts: Parts) -> None:
    """The case data_05: a third negative, a third corners, a third relative."""
    for place, entry in enumerate(parts.train["annotations"]):
        x, y, w, h = entry["bbox"]
        kinds = [x, y, -w, -h], [x, y, x + w, y + h], [x / 128, y / 96, w / 128, h / 96]
        entry["bbox"] = kinds[place % 3]


def corners(entry: dict) -> list:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def relative(entry: dict) -> list:
    x, y, w, h = entry["bbox"]
    return [x / 128, y / 96, w / 128, h / 96]


def remove_image(parts: Parts, place: int = 3) -> None:
    os.remove(parts.folder / "images" / parts.train["images"][place]["file_name"])


def make_deep(parts: Parts) -> None:
    """The case data_04: grey images of 16 bits."""
    for image in parts.train["images"]:
        path = parts.folder / "images" / image["file_name"]
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)


def other_size(parts: Parts) -> None:
    path = parts.folder / "images" / parts.train["images"][2]["file_name"]
    Image.new("RGB", (96, 128)).save(path)


def turned(parts: Parts) -> None:
    """A photograph that EXIF turns, where the JSON has the size as stored."""
    image = parts.train["images"][1]
    exif = Image.Exif()
    exif[274] = 6
    image["file_name"] = "turned.jpg"
    Image.new("RGB", (128, 96)).save(parts.folder / "images/turned.jpg", exif=exif)


def no_image(parts: Parts) -> None:
    (parts.folder / "images" / parts.train["images"][5]["file_name"]).write_text("no image")


def rename_val(parts: Parts) -> None:
    parts.val["categories"][2]["name"] = "washer"


RLE = {"size": [96, 128], "counts": [100, 500, 96 * 128 - 600]}
MASKS = {"MODEL.MASK_ON": True}
KEYPOINTS = {"MODEL.KEYPOINT_ON": True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2}

# id -> (change of the dataset, config values, the error line).
REFUSED = {
    "boxes of three other kinds": (mixed_boxes, {}, r"6 of 18 boxes have a negative width"),
    "corners": (each("annotations", bbox=corners), {}, "boxes look like corners x1, y1, x2, y2"),
    "relative": (each("annotations", bbox=relative), {}, "18 of 18 boxes look relative"),
    "one negative": (one("annotations", bbox=[5, 5, -3, 4]), {}, "1 of 18 boxes have a negative"),
    "NaN": (one("annotations", bbox=[5, 5, float("nan"), 4]), {}, "1 of 18 boxes hold NaN"),
    "infinite": (one("annotations", bbox=[5, 5, float("inf"), 4]), {}, "boxes hold NaN or infin"),
    "three numbers": (one("annotations", bbox=[1, 2, 3]), {}, "boxes are not four numbers"),
    "empty box": (one("annotations", bbox=[]), {}, "1 of 18 boxes are not four numbers"),
    "text box": (one("annotations", bbox=["1", "2", "3", "4"]), {}, "not four numbers"),
    "true and false": (one("annotations", bbox=[True, 2, 3, 4]), {}, "not four numbers"),
    "a box too big to read": (one("annotations", bbox=[10**400, 2, 3, 4]), {}, "not four numbers"),
    "box is an object": (one("annotations", bbox={"x": 1}), {}, "not four numbers"),
    "no box": (each("annotations", bbox=None), {}, "18 of 18 annotations have no usable 'bbox'"),
    "no annotation id": (
        one("annotations", id=None),
        {},
        "1 of 18 annotations have no usable 'id'",
    ),
    "no image_id": (one("annotations", image_id=None), {}, "annotations have no usable 'image_id'"),
    "no category_id": (one("annotations", category_id=None), {}, "have no usable 'category_id'"),
    "ids twice": (one("annotations", id=1), {}, "1 of 18 annotation ids occurred before"),
    "joined files": (join_twice, {}, "6 of 12 image ids occurred before.*give the images of the"),
    "text image_id": (
        each("annotations", image_id=lambda a: str(a["image_id"])),
        {},
        "18 of 18 annotations belong to no image.*there it is str, here int",
    ),
    "image_id is a list": (each("annotations", image_id=[1]), {}, "have no usable 'image_id'"),
    "other images": (each("annotations", image_id=99), {}, "18 of 18 annotations belong to no ima"),
    "unknown category": (one("annotations", category_id=7), {}, "unknown category_id"),
    "categories from 0": (
        each("annotations", category_id=lambda a: a["category_id"] - 1),
        {},
        "unknown category_id.*numbered from 0, where ids start at 1",
    ),
    "text category": (one("annotations", category_id="nut"), {}, "category_id.*whole number"),
    "category is a list": (one("annotations", category_id=[1]), {}, "category_id"),
    "id is a list": (one("annotations", id=[1]), {}, "1 of 18 annotations have no usable 'id'"),
    "one image_id is a list": (one("annotations", image_id=[1]), {}, "no usable 'image_id'"),
    "ignore": (one("annotations", ignore=1), {}, "annotations have 'ignore' set"),
    "no area": (each("annotations", bbox=[5, 5, 0, 0]), {}, "no box has an area inside its image"),
    "iscrowd 2": (one("annotations", iscrowd=2), {}, "'iscrowd' that is not 0 or 1"),
    "iscrowd text": (one("annotations", iscrowd="0"), {}, "'iscrowd' that is not 0 or 1"),
    "iscrowd list": (one("annotations", iscrowd=[0]), {}, "'iscrowd' that is not 0 or 1"),
    "all crowd": (each("annotations", iscrowd=1), {}, "no image has an object.*all 18 annotations"),
    "no annotation": (replace_content(annotations=[]), {}, "no image has an object"),
    "nothing to evaluate": (
        lambda parts: parts.val.update(annotations=[]),
        {},
        "dataset 'v'.*no image has an object to evaluate; take it out of DATASETS.TEST",
    ),
    "only boxes outside to evaluate": (
        lambda parts: [a.update(bbox=[900, 9, 5, 5]) for a in parts.val["annotations"]],
        {},
        "dataset 'v'.*no image has an object to evaluate",
    ),
    "no annotations key": (remove("annotations"), {}, "it has no 'annotations'"),
    "no images": (replace_content(images=[]), {}, "it has no images"),
    "no images key": (
        remove("images"),
        {},
        "not in COCO format: 'images' must be a list, it is mi",
    ),
    "images are an object": (
        replace_content(images={}),
        {},
        "'images' must be a list, it is an obj",
    ),
    "an image is text": (replace_content(images=["a.jpg"]), {}, r"images\[0\] must be an object"),
    "an annotation is null": (
        lambda parts: parts.train["annotations"].insert(3, None),
        {},
        r"annotations\[3\] must be an object with named values, it is null",
    ),
    "no categories": (replace_content(categories=[]), {}, "it has no categories"),
    "categories are names": (
        replace_content(categories=list(CLASSES)),
        {},
        r"categories\[0\] must be an object with named values, it is text",
    ),
    "no image id": (one("images", id=None), {}, "1 of 6 images have no 'id'"),
    "image ids of two types": (one("images", id="4"), {}, "1 of 6 image ids are of another type"),
    "image id is a number with a point": (one("images", id=1.5), {}, "ids are of another type"),
    "no file name": (one("images", file_name=None), {}, "1 of 6 images have no usable 'file_name'"),
    "file name is a number": (one("images", file_name=5), {}, "no usable 'file_name'"),
    "no width": (each("images", width=None), {}, "6 of 6 images have no usable 'width'"),
    "height 0": (one("images", height=0), {}, "1 of 6 images have no usable 'width' and 'height'"),
    "width is text": (one("images", width="128"), {}, "no usable 'width' and 'height'"),
    "width with a fraction": (one("images", width=128.5), {}, "no usable 'width'"),
    "category without name": (
        one("categories", 1, name=None),
        {},
        "1 of 3 categories have no 'nam",
    ),
    "category named ''": (one("categories", 1, name=""), {}, "1 of 3 categories have no 'name'"),
    "category id is text": (one("categories", 1, id="2"), {}, "no whole number as 'id'"),
    "category ids twice": (one("categories", 1, id=1), {}, "category ids occur several times: 1"),
    "names twice": (one("categories", 1, name="nut"), {}, "stand for several ids: nut"),
    "other names in val": (rename_val, {}, "dataset 'v'.*only here: washer; only there: ring"),
    "too few classes": (
        lambda parts: None,
        {"MODEL.ROI_HEADS.NUM_CLASSES": 2},
        "MODEL.ROI_HEADS.NUM_CLASSES is 2, but it has 3 classes: nut, bolt, ring",
    ),
    "too many classes": (
        lambda parts: None,
        {"MODEL.ROI_HEADS.NUM_CLASSES": 80},
        "NUM_CLASSES is 80, but it has 3 classes: nut, bolt, ring; set it to 3",
    ),
    "missing image": (remove_image, {}, "1 of 6 images are not there.*; add them, or remove them"),
    "file name with a folder": (
        each("images", file_name=lambda i: "images/" + i["file_name"]),
        {},
        "6 of 6 images are not there.*it is there with the image directory",
    ),
    "windows separators": (
        each("images", file_name=lambda i: "..\\images\\" + i["file_name"]),
        {},
        r"6 of 6 images are not there.*file names are written with '\\'",
    ),
    "wrong case of the ending": (
        each("images", file_name=lambda i: i["file_name"].replace(".png", ".PNG")),
        {},
        "6 of 6 images are not there.*of the first, it is there as 'train_1.png'",
    ),
    "16 bits": (make_deep, {}, "6 of 6 images that were opened have more than 8 bits per channel"),
    "other size": (other_size, {}, "1 of 6 images that were opened have another size"),
    "turned by EXIF": (turned, {}, "have another size than the JSON says"),
    "not an image": (no_image, {}, "1 of 6 images that were opened cannot be read"),
    "out of the folder, strictly": (
        one("images", file_name=lambda i: "../images/../images/" + i["file_name"]),
        {"DATASETS.STRICT_PATHS": True},
        None,  # it comes back into the folder: nothing to say
    ),
    "no masks": (each("annotations", segmentation=None), MASKS, "18 of 18 instances have no mask"),
    "some without mask": (
        one("annotations", segmentation=[]),
        MASKS,
        "1 of 18 instances have no mask.*MODEL.MASK_ON False",
    ),
    "flat polygon": (
        each("annotations", segmentation=lambda a: a["segmentation"][0]),
        MASKS,
        r"masks lack the outer list of polygons; write \[\[x, y",
    ),
    "polygon of text": (
        one("annotations", segmentation=[["a"] * 6]),
        MASKS,
        "neither polygons nor",
    ),
    "mask is a name": (one("annotations", segmentation="m.png"), MASKS, "neither polygons nor RLE"),
    "NaN in a polygon": (
        one("annotations", segmentation=[[1, 2, float("nan"), 4, 5, 6]]),
        MASKS,
        "points that are NaN",
    ),
    "relative polygons": (
        each(
            "annotations",
            segmentation=lambda a: [[v / 128 for v in a["segmentation"][0]]],
        ),
        MASKS,
        "18 of 18 masks look relative",
    ),
    "RLE turned": (
        each("annotations", segmentation={"size": [128, 96], "counts": [96 * 128]}),
        MASKS,
        r"RLE masks are not of their image's size; 'size' is \[height, width\]",
    ),
    "RLE counts": (
        one("annotations", segmentation={"size": [96, 128], "counts": [5, 5]}),
        MASKS,
        "counts that do not add up",
    ),
    "RLE without size": (one("annotations", segmentation={"counts": [5]}), MASKS, "neither polyg"),
    "packed RLE broken": (
        one("annotations", segmentation={"size": [96, 128], "counts": "not ~ RLE"}),
        MASKS,
        "neither polygons nor RLE",
    ),
    "val without masks": (
        one("annotations", split="val", segmentation=[]),
        MASKS,
        "dataset 'v'.*1 of 12 instances have no mask",
    ),
    "short polygons in val": (
        one("annotations", split="val", segmentation=[[1, 2, 30, 40]]),
        MASKS,
        "dataset 'v'.*no polygon of three points; they cannot be evaluated",
    ),
    "no keypoints anywhere": (lambda parts: None, KEYPOINTS, "no image has 1 visible keypoint"),
    "pre-computed proposals": (
        lambda parts: None,
        {"MODEL.LOAD_PROPOSALS": True},
        "MODEL.LOAD_PROPOSALS is True; d2kd does not load pre-computed proposals",
    ),
    "proposal generator": (
        lambda parts: None,
        {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"},
        "PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'; valid: RPN",
    ),
    "format YUV": (
        lambda parts: None,
        {"INPUT.FORMAT": "YUV-BT.601"},
        "FORMAT is 'YUV-BT.601'; .*BGR.*RGB",
    ),
    "format L": (
        lambda parts: None,
        {"INPUT.FORMAT": "L"},
        "INPUT.FORMAT is 'L'; valid: .*BGR.*RGB",
    ),
    "mask format": (
        lambda parts: None,
        {**MASKS, "INPUT.MASK_FORMAT": "rle"},
        "INPUT.MASK_FORMAT is 'rle'; valid: .*polygon.*bitmask",
    ),
}
REFUSED = {name: case for name, case in REFUSED.items() if case[2]}


def refusal(parts: Parts, capsys, config=None, **values) -> tuple[str, list[str]]:
    """The error line and the report of a training that must not start; nothing is written."""
    parts.write()
    config = parts.config(**values) if config is None else config
    file = write_config(config, parts.folder / "config.yaml")
    before = parts.files()
    with pytest.raises(SystemExit) as stop:
        train_net.main(["--config-file", file])
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line and len(line) <= 300
    assert parts.files() == before
    report = capsys.readouterr().err.splitlines()
    return line, report


@pytest.mark.parametrize("name", REFUSED)
def test_a_dataset_that_cannot_be_right_is_refused(name, parts, capsys):
    """One line, after a report of at most 20; nothing is written."""
    change, values, message = REFUSED[name]
    change(parts)
    line, report = refusal(parts, capsys, **values)
    assert re.search(message, line), line
    assert len(report) <= MAX_LINES


BROKEN_FILES = {
    "truncated": (lambda text: text[: len(text) // 2], "it is not JSON in UTF-8"),
    "empty": (lambda text: "", "it is not JSON in UTF-8"),
    "binary": (lambda text: b"\x80\x81\x82" * 50, "it is not JSON in UTF-8"),
    "utf-16": (lambda text: text.encode("utf-16"), "it is not JSON in UTF-8"),
    "byte order mark": (lambda text: text.encode("utf-8-sig"), "starts with a byte order mark"),
    "a list": (lambda text: f"[{text}]", "it holds a list, not an object"),
    "null": (lambda text: "null", "it holds null, not an object"),
    "nested without end": (lambda text: "[" * 100_000, "not in COCO format"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused(name, parts, capsys):
    """Whatever an annotation file holds, there is one line."""
    change, message = BROKEN_FILES[name]
    parts.write()
    path = parts.folder / "train.json"
    content = change(path.read_text())
    parts.write = lambda: path.write_bytes(
        content.encode() if isinstance(content, str) else content
    )
    line, _ = refusal(parts, capsys)
    assert "dataset 't'" in line and message in line


def test_files_that_are_not_there(parts, capsys):
    """Missing or mistaken paths are told with what they should be."""
    cases = {
        "no/such.json": ("json_file", 1, "no/such.json not found; paths of DATASETS.COCO_FORMAT"),
        str(parts.folder): ("json_file", 1, "is not a file"),
        "no/such/dir": ("image_root", 2, "no/such/dir not found"),
        str(parts.folder / "train.json"): ("image_root", 2, "is not a directory"),
    }
    for path, (_, place, message) in cases.items():
        cfg = parts.config()
        cfg.DATASETS.COCO_FORMAT[0][place] = path
        cfg.DATASETS.COCO_FORMAT[0][0] = cfg.DATASETS.TRAIN[0] + str(len(path))
        cfg.DATASETS.TRAIN = (cfg.DATASETS.COCO_FORMAT[0][0],)
        line, _ = refusal(parts, capsys, cfg)
        assert message in line


def test_an_unreadable_file(parts, capsys, monkeypatch):
    """A file that may not be read is one line, too."""

    def refuse(path, *args, **kwargs):
        if str(path).endswith("train.json"):
            raise PermissionError(13, "Permission denied", path)
        return original(path, *args, **kwargs)

    original = open
    parts.write()
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="dataset 't'.*not readable.*Permission denied"):
        check_datasets(parts.config())


def test_all_mistakes_are_in_one_report(parts, capsys):
    """Of both files, each kind with its count, the first five examples and the remedy."""
    mixed_boxes(parts)
    remove_image(parts)
    parts.val["annotations"][3]["category_id"] = 9
    line, report = refusal(parts, capsys)
    assert "6 of 18 boxes have a negative width or height" in line and "(and 4 more, above)" in line
    text = "\n".join(report)
    for expected in (
        "6 of 18 boxes have a negative width or height",
        "look like corners x1, y1, x2, y2; COCO format wants",
        "6 of 18 boxes look relative",
        "1 of 6 images are not there",
        "dataset 'v'",
        "1 of 12 annotations have an unknown category_id",
    ):
        assert expected in text
    examples = report[report.index(next(row for row in report if "negative" in row)) + 1]
    assert examples.count(" of annotation ") == 5 and "(128 x 96)" in examples


def test_a_report_has_at_most_20_lines():
    """What is refused comes first; what does not fit is counted."""
    notes = [Finding(f"note {n}", "so it is", ("a", "b")) for n in range(15)]
    reports = [
        DatasetReport("first", "a.json", "3 images", notes),
        DatasetReport("second", "b.json", "", [Finding(f"bad {n}", fatal=True) for n in range(5)]),
    ]
    lines = report_lines(reports)
    assert len(lines) <= MAX_LINES and sum("bad" in line for line in lines) == 5
    shown = sum("note" in line for line in lines)
    assert 0 < shown < 15 and lines[-1] == f"  ... and {15 - shown} more; 'd2kd check' lists all"
    assert len(report_lines(reports, limit=None)) == 2 + 2 * 15 + 5
    assert error_line(reports).endswith("bad 0 (and 4 more, above)")
    long = [DatasetReport("x" * 500, "y" * 500, "", [Finding("z" * 500, fatal=True)])]
    assert len(error_line(long)) <= 300


def test_names_of_a_file_do_not_break_lines(parts, capsys):
    """A name with line breaks and escapes stays on its line."""
    parts.train["images"][0]["file_name"] = "a\nerror: b\x1b[31m.png"
    line, report = refusal(parts, capsys)
    assert "1 of 6 images are not there" in line
    assert not any("\x1b" in row or row.startswith("error") for row in [line[1:], *report])


# --- what is said -------------------------------------------------------------------------------


def spoken(parts: Parts, **values) -> str:
    """What the check of an accepted dataset says."""
    parts.write()
    reports = check_datasets(parts.config(**values))
    return "\n".join(report_lines(reports, limit=None))


def test_a_good_dataset_has_nothing_to_say(parts):
    """Not even with masks."""
    assert spoken(parts, **MASKS) == ""


def leave_folder(parts: Parts) -> None:
    """One image lies beside the folder, one is named by its absolute path."""
    for place, name in ((0, "../outside.png"), (1, str(parts.folder / "outside.png"))):
        image = parts.train["images"][place]
        shutil.copy(parts.folder / "images" / image["file_name"], parts.folder / "outside.png")
        image["file_name"] = name


def drop_objects_of_first_image(parts: Parts) -> None:
    parts.train["annotations"] = [a for a in parts.train["annotations"] if a["image_id"] != 1]


def same_names_other_ids(parts: Parts) -> None:
    """The case data_02."""
    new = {1: 2, 2: 3, 3: 1}
    parts.val["categories"] = [{"id": new[i + 1], "name": n} for i, n in enumerate(CLASSES)]
    for entry in parts.val["annotations"]:
        entry["category_id"] = new[entry["category_id"]]


def add_root(parts: Parts, name: str = "things") -> None:
    """The root category that exporters write, in both files."""
    for content in (parts.train, parts.val):
        for category in content["categories"]:
            category["supercategory"] = name
        content["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})


def number_names(parts: Parts) -> None:
    for content in (parts.train, parts.val):
        for number, category in enumerate(content["categories"]):
            category["name"] = number


SAID = {
    "zero boxes": (
        one("annotations", bbox=[5, 5, 0, 4]),
        {},
        "1 of 18 boxes have no area inside their image; Detectron2 drops them from training",
    ),
    "outside": (one("annotations", bbox=[500, 5, 9, 9]), {}, "1 of 18 boxes have no area inside"),
    "partly outside": (
        one("annotations", bbox=[100, 5, 31, 9]),
        {},
        "1 of 18 boxes reach beyond their image; Detectron2 clips them in training",
    ),
    "orphans": (one("annotations", image_id=99), {}, "1 of 18 annotations belong to no image"),
    "null iscrowd": (
        lambda parts: parts.train["annotations"][0].update(iscrowd=None),
        {},
        "1 of 18 annotations have no 'iscrowd'; taken as 0",
    ),
    "no iscrowd": (each("annotations", iscrowd=None), {}, "18 of 18 annotations have no 'iscrowd'"),
    "no area in val": (
        one("annotations", split="val", area=None),
        {},
        "1 of 12 annotations have no 'area'; computed from the mask",
    ),
    "id 0 in val": (
        one("annotations", split="val", id=0),
        {},
        "1 of 12 annotation ids are not whole numbers between 0 and 2.53; numbered from 1",
    ),
    "text ids in val": (one("annotations", split="val", id="x"), {}, "1 of 12 annotation ids are"),
    "an image without objects": (
        drop_objects_of_first_image,
        {},
        "1 of 6 images have no object and are not trained on",
    ),
    "a class without objects": (
        each("annotations", category_id=lambda a: min(a["category_id"], 2)),
        {},
        "1 of 3 classes have no object; they cannot be learned",
    ),
    "a file twice": (
        one("images", file_name="train_1.png"),
        {},
        "1 of 6 images share their file with another",
    ),
    "out of the folder": (leave_folder, {}, "2 of 6 image names lead out of the image directory"),
    "other order in val": (same_names_other_ids, {}, "another order of ids.*; matched by name"),
    "root": (add_root, {}, r"category 'things' \(id 0\) has no object and is the supercategory"),
    "root of a class's name": (
        lambda parts: add_root(parts, "bolt"),
        {},
        r"category 'bolt' \(id 0\) has no object",
    ),
    "names are numbers": (number_names, {}, "category names are not text; taken as text"),
    "short polygons": (
        one("annotations", segmentation=[[1, 2, 30, 40]]),
        MASKS,
        "1 of 18 masks have no polygon of three points; Detectron2 drops these objects",
    ),
    "a short polygon more": (
        lambda parts: parts.train["annotations"][2]["segmentation"].append([1, 2, 3]),
        MASKS,
        "1 of 18 masks have polygons of fewer than three points among others",
    ),
    "mask outside": (
        one("annotations", segmentation=[[900, 5, 910, 5, 910, 10]]),
        MASKS,
        "1 of 18 masks lie outside of their image",
    ),
    "RLE": (
        one("annotations", segmentation=RLE),
        MASKS,
        "1 object with RLE masks; INPUT.MASK_FORMAT set to bitmask",
    ),
    "empty RLE": (
        one("annotations", segmentation={"size": [96, 128], "counts": [96 * 128]}),
        MASKS,
        "1 of 18 RLE masks have no pixel",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_repaired_dropped_or_clipped_is_said(name, parts):
    """With a count, and what happens to it; the dataset is accepted and loads."""
    change, values, message = SAID[name]
    change(parts)
    assert re.search(message, spoken(parts, **values))
    assert len(DatasetCatalog.get("t")) == 6


def test_masks_that_are_not_used_may_be_anything(parts):
    """Without MODEL.MASK_ON nothing is said of masks, and nothing fails."""
    for value, entry in zip(
        ([[]], [1, 2], "m.png", {"counts": 3}, [["a"]], RLE),
        parts.train["annotations"],
        strict=False,
    ):
        entry["segmentation"] = value
    assert spoken(parts) == ""
    assert sum(len(record["annotations"]) for record in DatasetCatalog.get("t")) == 18


def test_names_out_of_the_folder_are_refused_where_asked(parts, capsys):
    """DATASETS.STRICT_PATHS: a file that one does not trust cannot name any image of the disk."""
    leave_folder(parts)
    line, _ = refusal(parts, capsys, **{"DATASETS.STRICT_PATHS": True})
    assert "2 of 6 image names lead out of the image directory" in line and "STRICT_PATHS" in line


def test_names_that_come_back_into_the_folder_stay_in_it(parts):
    """ ".." alone is no mistake."""
    parts.train["images"][0]["file_name"] = "../images/train_1.png"
    assert spoken(parts, **{"DATASETS.STRICT_PATHS": True}) == ""


def test_images_that_are_trained_on_and_evaluated(parts):
    """A test set that shares images with the training set is named."""
    parts.val = copy.deepcopy(parts.train)
    assert "6 images are also trained on in 't'" in spoken(parts)


def test_a_root_that_the_model_counts_is_a_class(parts):
    """Detectron2 numbers the root, too: a model of that many classes keeps it."""
    add_root(parts)
    text = spoken(parts, **{"MODEL.ROI_HEADS.NUM_CLASSES": 4})
    assert "has no object and is the supercategory" not in text
    assert MetadataCatalog.get("t").thing_classes == ["things", *CLASSES]
    assert "things" not in CLASSES


def test_notes_are_logged_once(parts, caplog):
    """They are kept until there is a log file to write them to."""
    parts.val["annotations"][0].pop("area")
    spoken(parts)
    logger = logging.getLogger("d2kd.test")
    with caplog.at_level(logging.INFO, "d2kd.test"):
        log_reports(logger)
        log_reports(logger)
    assert caplog.text.count("1 of 12 annotations have no 'area'") == 1


def test_the_log_of_a_training_says_them(parts):
    """The case data_08: areas are computed, training ends with its AP."""
    for content in (parts.train, parts.val):
        for entry in content["annotations"]:
            del entry["area"], entry["iscrowd"]
    parts.write()
    cfg = parts.config(**{"SOLVER.MAX_ITER": 1})
    train_net.main(["--config-file", write_config(cfg, parts.folder / "config.yaml")])
    out = parts.folder / "out"
    assert "12 of 12 annotations have no 'area'" in (out / "log.txt").read_text()
    assert "AP" in json.loads((out / "results.json").read_text())["results"]["bbox"]
    assert (out / "student_final.pth").is_file()


# --- reading once -------------------------------------------------------------------------------


def test_a_file_is_read_once(parts, monkeypatch):
    """Checking twice and loading reads each file once; a file that changed is read again."""
    parts.write()
    read, reads = loading.read_json, []
    monkeypatch.setattr(loading, "read_json", lambda path: reads.append(path) or read(path))
    cfg = parts.config()
    check_datasets(cfg)
    check_datasets(cfg)
    for name in ("t", "v"):
        DatasetCatalog.get(name)
    assert sorted(reads) == sorted(str(parts.folder / f"{n}.json") for n in ("train", "val"))
    assert len(DatasetCatalog.get("t")) == 6  # what was handed over is gone
    assert len(reads) == 3
    parts.train["images"].pop()
    parts.train["annotations"] = [a for a in parts.train["annotations"] if a["image_id"] < 6]
    parts.write()
    assert len(DatasetCatalog.get("t")) == 5
    parts.train["annotations"][0]["bbox"] = []
    parts.write()
    with pytest.raises(ConfigError, match="1 of 15 boxes are not four numbers"):
        DatasetCatalog.get("t")


def test_records_that_no_loader_takes_can_be_freed(parts):
    """For the process that only starts the others."""
    parts.write()
    check_datasets(parts.config())
    assert loading._answers["t"][2].records is not None
    loading.release()
    assert loading._answers["t"][2].records is None
    assert len(DatasetCatalog.get("t")) == 6


def test_a_dataset_is_loaded_without_a_check(parts):
    """As with Detectron2's own registration, from Python."""
    from d2kd.data.custom import register_coco_format_datasets

    parts.write()
    register_coco_format_datasets(parts.config())
    assert len(DatasetCatalog.get("t")) == 6
    assert MetadataCatalog.get("t").thing_classes == list(CLASSES)


# --- datasets of others -------------------------------------------------------------------------


def test_a_dataset_that_detectron2_registered_is_checked(parts, capsys):
    """register_coco_instances in a user's module: the same check, the same loader."""
    mixed_boxes(parts)
    parts.write()
    register_coco_instances(
        "mine", {}, str(parts.folder / "train.json"), str(parts.folder / "images")
    )
    cfg = parts.config()
    cfg.DATASETS.TRAIN = ("mine",)
    with pytest.raises(ConfigError, match="dataset 'mine'.*negative width"):
        check_datasets(cfg)


def test_stated_classes_must_be_those_of_the_file(parts):
    """A dataset that is registered with other names: Detectron2 ends in an AssertionError."""
    parts.write()
    paths = str(parts.folder / "train.json"), str(parts.folder / "images")
    register_coco_instances("mine", {"thing_classes": ["a", "b", "c"]}, *paths)
    cfg = parts.config()
    cfg.DATASETS.TRAIN = ("mine",)
    with pytest.raises(ConfigError, match="not those of what 'mine' is registered with: only here"):
        check_datasets(cfg)


def test_a_loader_of_the_users_own_is_left_alone(parts):
    """In training: it may convert what it reads. In evaluation pycocotools reads the file."""
    each("annotations", bbox=relative)(parts)
    parts.write()
    DatasetCatalog.register("mine", lambda: [{"file_name": "x", "annotations": []}])
    MetadataCatalog.get("mine").set(
        json_file=str(parts.folder / "train.json"),
        image_root=str(parts.folder / "nowhere"),
        evaluator_type="coco",
        thing_classes=list(CLASSES),
    )
    (parts.folder / "nowhere").mkdir()
    cfg = parts.config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
    check_datasets(cfg)
    assert DatasetCatalog.get("mine")[0]["file_name"] == "x"
    cfg.DATASETS.TEST = ("mine",)
    with pytest.raises(ConfigError, match="18 of 18 boxes look relative"):
        check_datasets(cfg)


def test_other_classes_of_a_dataset_without_file(parts):
    """Known names in another order are refused, for its loader numbers them itself."""
    parts.write()
    DatasetCatalog.register("mine", list)
    cfg = parts.config()
    cfg.DATASETS.TEST = ("mine",)
    MetadataCatalog.get("mine").set(thing_classes=["bolt", "nut", "ring"])
    with pytest.raises(ConfigError, match="another order.*its own loader must number them nut, bo"):
        check_datasets(cfg)


def test_several_training_sets_share_their_classes(parts):
    """The second is matched to the first by name: equal labels mean equal names."""
    same_names_other_ids(parts)
    parts.write()
    cfg = parts.config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("t", "v"), ()
    check_datasets(cfg)
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    assert len(records) == 10
    labels = [a["category_id"] for r in records[6:] for a in r["annotations"]]
    assert labels == [a["category_id"] - 1 for a in parts.truth["annotations"]]
    rename_val(parts)
    parts.write()
    with pytest.raises(ConfigError, match="dataset 'v'.*its classes are not those of the training"):
        check_datasets(cfg)


# --- classes in evaluation ----------------------------------------------------------------------


def test_evaluation_alone_takes_the_order_of_the_training_set(parts):
    """--eval-only reads no training set, but its categories."""
    same_names_other_ids(parts)
    parts.write()
    check_datasets(parts.config(), train=False)
    assert MetadataCatalog.get("v").thing_classes == list(CLASSES)
    assert MetadataCatalog.get("v").thing_dataset_id_to_contiguous_id == {2: 0, 3: 1, 1: 2}


def test_evaluation_alone_needs_no_training_set(parts):
    """On another machine the training set is not there: ids of the test set give the order."""
    parts.write()
    os.remove(parts.folder / "train.json")
    check_datasets(parts.config(), train=False)
    assert MetadataCatalog.get("v").thing_classes == list(CLASSES)


def test_classes_of_a_config(parts):
    """From the file, where it is there and has as many as the model."""
    parts.write()
    cfg = parts.config()
    assert trained_classes(cfg) == CLASSES
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert trained_classes(cfg) is None
    cfg.MODEL.META_ARCHITECTURE = "Unknown"
    for category in parts.train["categories"][1:]:
        category["supercategory"] = CLASSES[0]  # a root, but for its objects
    parts.write()
    assert trained_classes(cfg) == CLASSES
    cfg = parts.config()
    os.remove(parts.folder / "train.json")
    assert trained_classes(cfg) is None
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert trained_classes(cfg)[:2] == ("person", "bicycle")


def test_the_word_categories_elsewhere_in_the_file(parts):
    """It is looked for in the text: where it occurs twice, the whole file is read."""
    parts.train = {"info": {"categories": [{"id": 1, "name": "no class"}]}, **parts.train}
    parts.write()
    assert trained_classes(parts.config()) == CLASSES
