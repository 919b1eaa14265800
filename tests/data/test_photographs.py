"""Photographs: from a clone, drawn here in the layout of the repositories, to COCO format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO

from d2kd import ConfigError
from d2kd.data import builtin, photographs
from d2kd.data.files import dataset_root, json_path
from d2kd.data.photographs import ANIMALS, FACADES, convert, place

from ..test_docs import ROOT


def write_folder(folder: Path, classes, images: dict[str, tuple], deeper: tuple = ()) -> None:
    """A folder of a clone: ``images`` holds file name -> (size, objects as (class, polygon)); those
    of ``deeper`` lie in ``images/``. The root category 0 has no objects, as in the repositories."""
    (folder / "images").mkdir(parents=True)
    content = {"categories": [{"id": 0, "name": "facade"}], "images": [], "annotations": []}
    content["categories"] += [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    for index, (name, (size, objects)) in enumerate(images.items()):
        pixels = np.random.default_rng(zlib.crc32(f"{folder.name}{name}".encode())).integers(
            0, 255, (*size[::-1], 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / ("images" if name in deeper else ".") / name)
        content["images"].append(
            {"id": index, "file_name": name, "width": size[0], "height": size[1]}
        )
        for label, polygon in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": index,
                    "category_id": classes.index(label) + 1,
                    "bbox": [0, 0, 1, 1],
                    "area": 1,
                    "segmentation": [polygon],
                    "iscrowd": 0,
                }
            )
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


@pytest.fixture
def animals(tmp_path) -> Path:
    clone, shape = tmp_path / "clone", (64, 48)
    write_folder(
        clone / "dataset" / "train",
        ANIMALS.classes,
        {
            f"{i}_jpg.rf.{i}.jpg": (shape, [("tiger", square(4, 4, 20)), ("bear", square(1, 1, 9))])
            for i in range(40)
        },
    )
    write_folder(
        clone / "dataset" / "valid",
        ANIMALS.classes,
        {
            "large_jpg.rf.a.jpg": ((768, 512), [("otter", square(100, 50, 200))]),
            "3_jpg.rf.other.jpg": (shape, [("tiger", square(4, 4, 20))]),  # as train's 3_jpg
            "copy_jpg.rf.b.jpg": (shape, []),
            "edge_jpg.rf.c.jpg": (
                shape,
                [
                    ("deer", square(50, 20, 40)),
                    ("deer", [1, 1, 2, 2]),
                    ("deer", [70, 1, 80, 1, 80, 9]),
                ],
            ),
        },
    )
    shutil.copyfile(
        clone / "dataset/train/5_jpg.rf.5.jpg", clone / "dataset/valid/copy_jpg.rf.b.jpg"
    )
    write_folder(
        clone / "dataset" / "test", ANIMALS.classes, {"t.jpg": (shape, [("bear", square(0, 0, 8))])}
    )
    return clone


@pytest.fixture
def facades(tmp_path) -> Path:
    """Three crops of each photograph, one in each folder of the repository."""
    clone = tmp_path / "clone"
    for folder, crop in (("train", 0), ("valid", 1), ("test", 2)):
        names = [f"IMG_{i}_scaled_{crop}_png_jpg.rf.{i}.jpg" for i in range(60)]
        objects = ((32, 32), [("window", square(2, 2, 9)), ("facade", square(0, 0, 30))])
        deeper = tuple(names[:5]) if folder == "valid" else ()
        write_folder(clone / folder, FACADES.classes, dict.fromkeys(names, objects), deeper)
    return clone


def read(directory: Path, split: str) -> dict:
    return json.loads(json_path(directory, split).read_text())


def names(directory: Path, split: str) -> set[str]:
    return {image["file_name"] for image in read(directory, split)["images"]}


def test_copies_of_a_photograph_are_dropped(animals, tmp_path):
    """Equal names before the exporter's hash, and equal bytes: the later folder loses the image."""
    counts, notes = convert(ANIMALS, animals, tmp_path / "animals")
    assert names(tmp_path / "animals", "val") == {"large_jpg.rf.a.jpg", "edge_jpg.rf.c.jpg"}
    assert [line.split(":")[0] for line in notes if "copy" in line] == [
        "valid/3_jpg.rf.other.jpg",
        "valid/copy_jpg.rf.b.jpg",
    ]
    assert counts["train"]["images"] + counts["tune"]["images"] == 40 > counts["train"]["images"]
    assert counts["test"]["images"] == 1


def test_splits_share_no_photograph(facades, tmp_path):
    """All crops of a photograph are on one side, wherever they were; part is a part of train."""
    output = tmp_path / "facades"
    convert(FACADES, facades, output)
    of = {s: {n.split("_scaled_")[0] for n in names(output, s)} for s in photographs.SPLITS}
    disjoint = [of[s] for s in ("train", "tune", "val", "test")]
    assert sum(map(len, disjoint)) == len(set.union(*disjoint)) == 60
    assert all(disjoint) and of["part"] < of["train"]
    assert sum(len(names(output, s)) for s in ("train", "tune", "val", "test")) == 180
    assert 0.3 < len(of["part"]) / len(of["train"]) < 0.7


def test_a_place_depends_on_the_name_alone():
    """So a split stays what it is when photographs are added; places are spread evenly."""
    places = [place(f"photograph {i}") for i in range(2000)]
    assert np.histogram(places, bins=4, range=(0, 1))[0] == pytest.approx(500, abs=80)
    assert min(places) >= 0 and place("IMG_0718") == pytest.approx(0.0210513)


def test_images_are_reduced_and_annotations_with_them(animals, tmp_path):
    """The longer side becomes 384 px; what is small is copied byte by byte."""
    output = tmp_path / "animals"
    convert(ANIMALS, animals, output)
    with Image.open(output / "images" / "large_jpg.rf.a.jpg") as image:
        assert image.size == (384, 256)
    small = output / "images" / "7_jpg.rf.7.jpg"
    assert small.read_bytes() == (animals / "dataset/train" / small.name).read_bytes()
    coco = COCO(str(json_path(output, "val")))
    (large,) = [image for image in coco.dataset["images"] if image["width"] == 384]
    (otter,) = coco.loadAnns(coco.getAnnIds(large["id"]))
    assert otter["bbox"] == [50, 25, 100, 100] and otter["area"] == 100 * 100
    assert coco.annToMask(otter).sum() == 100 * 100
    assert coco.loadCats(otter["category_id"])[0]["name"] == "otter"


def test_objects_are_cut_at_the_border_and_those_without_extent_dropped(animals, tmp_path):
    """And ids start at 1: pycocotools takes 0 for no match."""
    output = tmp_path / "animals"
    _, notes = convert(ANIMALS, animals, output)
    content = read(output, "val")
    assert [a["id"] for a in content["annotations"]] == [1, 2]
    assert content["annotations"][1]["bbox"] == [50, 20, 14, 28]  # of an image of 64 x 48
    assert [line for line in notes if "no extent" in line] == [
        "edge_jpg.rf.c.jpg: dropped object 2 (deer), no extent",
        "edge_jpg.rf.c.jpg: dropped object 3 (deer), no extent",
    ]
    assert [c["name"] for c in content["categories"]] == list(ANIMALS.classes)


def test_root_category_is_no_class(facades, tmp_path):
    """Category 0 has the name of a class and no objects; objects of the class keep it."""
    counts, _ = convert(FACADES, facades, tmp_path / "facades")
    assert list(counts["val"])[1:] == list(FACADES.classes)
    assert counts["val"]["facade"] == counts["val"]["window"] == counts["val"]["images"] > 0


def test_prepared_photographs_are_builtin_datasets(facades, tmp_path):
    """Before they are prepared they name the command; then they load as Detectron2's do."""
    builtin.register_builtin_datasets(tmp_path)
    try:
        with pytest.raises(ConfigError, match="run 'python datasets/prepare_facades.py CLONE'"):
            DatasetCatalog.get("facades_part")
        convert(FACADES, facades, tmp_path / "facades")
        records = DatasetCatalog.get("facades_part")
        assert MetadataCatalog.get("facades_part").thing_classes == list(FACADES.classes)
        assert {a["category_id"] for r in records for a in r["annotations"]} == {2, 9}
        assert all(Path(record["file_name"]).is_file() for record in records)
    finally:
        builtin.register_builtin_datasets(dataset_root())


def break_json(clone: Path) -> None:
    (clone / "valid" / "_annotations.coco.json").write_text("{}")


def remove_image(clone: Path) -> None:
    next((clone / "train").glob("*.jpg")).unlink()


def truncate_image(clone: Path) -> None:
    next((clone / "train").glob("*.jpg")).write_bytes(b"no image")


def other_class(clone: Path) -> None:
    path = clone / "test" / "_annotations.coco.json"
    path.write_text(path.read_text().replace('"window"', '"door"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda clone: shutil.rmtree(clone / "test"), "is no clone of facades.*git clone https"),
        (break_json, "is not the annotation file of facades .KeyError"),
        (remove_image, "not complete: .*jpg is missing"),
        (truncate_image, "is missing or no image"),
        (other_class, "facades has no class door"),
    ],
)
def test_a_broken_clone_is_one_line_and_writes_nothing(facades, tmp_path, damage, message):
    damage(facades)
    with pytest.raises(ConfigError, match=message) as caught:
        convert(FACADES, facades, tmp_path / "facades")
    assert "\n" not in str(caught.value) and len(str(caught.value).replace(str(tmp_path), "")) < 300
    assert not (tmp_path / "facades").exists()


def test_only_its_own_output_is_replaced(facades, tmp_path):
    convert(FACADES, facades, tmp_path / "facades")
    convert(FACADES, facades, tmp_path / "facades")
    with pytest.raises(ConfigError, match="was not made by this script"):
        convert(ANIMALS, facades, tmp_path / "facades")


def test_script(animals, tmp_path):
    """The command prints what it left out and what it wrote."""
    script = [sys.executable, str(ROOT / "datasets" / "prepare_animals.py")]
    done = subprocess.run(
        [*script, str(animals), "--output", str(tmp_path / "animals")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "val: 2 images, 0 bear, 1 deer" in done.stdout and "4 images or objects" in done.stdout
    done = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
