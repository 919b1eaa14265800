"""Datasets: digits (content, determinism, files), BCCD, and datasets named in a config."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from pycocotools.coco import COCO

from d2kd import ConfigError, add_distillation_config
from d2kd.data import bccd, builtin, digits
from d2kd.data.custom import check_datasets, register_coco_format_datasets
from d2kd.data.digits_render import TRAIN_COLUMNS, VAL_COLUMNS, Look, Material
from d2kd.data.files import build_directory, dataset_root
from d2kd.data.polygons import mask_to_polygons

from .parts import forget_datasets

REPOSITORY = Path(__file__).parents[2]
SPEC = digits.DigitsSpec(size=128, train=8, val=4, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small digits dataset."""
    directory = tmp_path_factory.mktemp("made") / "digits"
    digits.make_digits(directory, SPEC)
    return directory


@pytest.fixture
def builtin_root(tmp_path):
    """The built-in datasets, registered below a folder of the test's own."""
    builtin.register_builtin_datasets(tmp_path)
    yield tmp_path
    builtin.register_builtin_datasets(dataset_root())


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("digits_tiny_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 10
    return cfg


def content_of(directory: Path, split: str) -> dict:
    return json.loads(digits.json_path(directory, split).read_text())


def digest(directory: Path) -> dict[str, str]:
    """Relative path -> hash, of all files below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# --- polygons -----------------------------------------------------------------------------------


def test_polygons_rasterise_back_to_the_mask():
    """Random masks with holes, corners that touch and lone pixels survive the round trip."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = rng.integers(1, 24, 2)
        mask = rng.random(shape) < rng.uniform(0.05, 0.95)
        polygons = mask_to_polygons(mask)
        if not mask.any():
            assert polygons == []
            continue
        decoded = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *shape)))
        np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_polygons_of_a_ring():
    """A ring, which one polygon cannot describe, becomes two halves cut at the hole's middle."""
    ring = np.ones((4, 4), bool)
    ring[1:3, 1:3] = False
    areas = [mask_util.area(mask_util.frPyObjects([p], 4, 4))[0] for p in mask_to_polygons(ring)]
    assert areas == [6, 6]


# --- digits: content ----------------------------------------------------------------------------


def test_same_seed_same_bytes(made, tmp_path):
    """Images, annotations and meta data repeat byte for byte; another seed changes each image."""
    digits.make_digits(tmp_path / "again", SPEC)
    digits.make_digits(tmp_path / "other", replace(SPEC, seed=4))
    assert digest(tmp_path / "again") == digest(made)
    other, first = digest(tmp_path / "other"), digest(made)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_a_bigger_dataset_begins_with_the_smaller_one(made, tmp_path):
    """The number of images changes no image."""
    digits.make_digits(tmp_path / "bigger", replace(SPEC, train=10, val=6))
    bigger, smaller = digest(tmp_path / "bigger"), digest(made)
    images = [name for name in smaller if name.endswith(".jpg")]
    assert len(images) == 12
    assert all(bigger[name] == smaller[name] for name in images)


def test_train_and_val_share_no_scan_and_no_photograph_pixel():
    """The two splits together use each scan once, and disjoint columns of each photograph."""
    train, val = (Material.load(split, Look()) for split in ("train", "val"))
    assert len(train.scans) + len(val.scans) == 1797
    assert not {s.tobytes() for s in train.scans} & {s.tobytes() for s in val.scans}
    for name, columns in TRAIN_COLUMNS.items():
        assert not set(range(640)[columns]) & set(range(640)[VAL_COLUMNS[name]])
    for material in (train, val):
        assert sorted(set(material.classes)) == list(range(10))


@pytest.mark.parametrize("split", digits.SPLITS)
def test_annotations_agree_with_the_visible_masks(made, split):
    """Boxes are tight, areas count the mask's pixels, and no two digits own one pixel."""
    coco = COCO(str(digits.json_path(made, split)))
    assert len(coco.getAnnIds()) > 10
    for image_id in coco.getImgIds():
        owners = np.zeros((SPEC.size, SPEC.size), int)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            tight = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["bbox"] == tight
            assert annotation["area"] == mask.sum()
            owners += mask
        assert owners.max() <= 1


def test_objects_are_varied_and_many_are_small(tmp_path):
    """At 160 px: all classes, 2 to 8 digits per image, sides from about 16 to about 80 px."""
    digits.make_digits(tmp_path / "d", digits.DigitsSpec(train=60, val=1))
    content = content_of(tmp_path / "d", "train")
    boxes = np.array([annotation["bbox"] for annotation in content["annotations"]])
    sides = boxes[:, 2:].max(axis=1)
    assert 8 <= sides.min() <= 18 and 55 <= sides.max() <= 105
    assert 0.2 < (sides < 32).mean() < 0.7 and 0.2 < (sides > 40).mean() < 0.7
    assert {annotation["category_id"] for annotation in content["annotations"]} == set(range(1, 11))
    counts = np.bincount([a["image_id"] - 1 for a in content["annotations"]], minlength=60)
    assert np.flatnonzero(counts == 0).tolist() == [49]  # each 50th image holds clutter only
    assert counts.max() <= 10


def test_plain_digits_are_large_and_few(tmp_path):
    """A plain set has larger digits, fewer in an image, and says so in its meta.json; a set from
    before there were plain ones is none."""
    spec = replace(SPEC, train=20, plain=True)
    digits.make_digits(tmp_path / "d", spec)
    assert digits.read_meta(tmp_path / "d") == (digits.VERSION, spec)
    annotations = content_of(tmp_path / "d", "train")["annotations"]
    sides = np.array([annotation["bbox"] for annotation in annotations])[:, 2:].max(axis=1)
    assert 16 <= sides.min() and 35 < np.median(sides)
    counts = np.bincount([annotation["image_id"] for annotation in annotations])[1:]
    assert 1 <= counts.min() and counts.max() <= 5
    path = tmp_path / "d" / "meta.json"
    path.write_text(path.read_text().replace(', "plain": true', ""))
    assert digits.read_meta(tmp_path / "d")[1] == replace(spec, plain=False)


def test_the_smallest_and_biggest_images_can_be_made(tmp_path):
    """Sizes other than the default work; sizes that make no sense are refused in one line."""
    for size in (48, 320):
        digits.make_digits(tmp_path / str(size), replace(SPEC, size=size, train=1, val=1))
        with Image.open(tmp_path / str(size) / "train" / "000000.jpg") as image:
            assert image.size == (size, size)
    for wrong in ({"size": 8}, {"train": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="digits: .* at least"):
            replace(SPEC, **wrong)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_detectron2_trains_on_it_with_either_mask_format(made, cfg, mask_format):
    """Detectron2's loader and mapper give one box, one mask and one class below 10 a digit."""
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.MODEL.MASK_ON = True
    records = load_coco_json(str(digits.json_path(made, "train")), str(made / "train"), "made")
    assert [len(record["annotations"]) > 0 for record in records] == [True] * 8
    sample = DatasetMapper(cfg, is_train=True)(records[0])
    assert len(sample["instances"].gt_masks) == len(records[0]["annotations"])
    assert sample["instances"].gt_classes.max() < 10


def test_contact_sheet(made):
    """Two rows a split: the plain images, and the same with annotations drawn."""
    sheet = digits.contact_sheet(made, columns=3, tile=64)
    assert sheet.size == (3 * 64, 4 * (18 + 64))
    plain, drawn = (np.asarray(sheet, int)[top : top + 64, :64] for top in (18, 100))
    images = [Image.open(path).resize((64, 64)) for path in (made / "train").iterdir()]
    assert any(np.array_equal(plain, image) for image in images)
    assert 0.02 < (np.abs(drawn - plain).max(axis=-1) > 50).mean() < 0.9


# --- digits: files ------------------------------------------------------------------------------


def test_an_up_to_date_copy_is_not_touched(made):
    """Neither making nor ensuring it again writes anything."""
    before = (made / "meta.json").stat().st_mtime_ns
    assert digits.make_digits(made, SPEC) is False
    digits.ensure_digits(made, SPEC)
    assert (made / "meta.json").stat().st_mtime_ns == before


def test_a_copy_of_the_users_own_make_is_kept(made):
    """First use takes what prepare_digits.py made with other sizes instead of replacing it."""
    before = digest(made)
    digits.ensure_digits(made, digits.SPECS["digits"])
    assert digest(made) == before


def test_a_copy_of_another_version_is_made_again(tmp_path):
    """A stale copy is replaced by the present version of the same size, counts and seed."""
    spec = replace(SPEC, train=2, val=1)
    digits.make_digits(tmp_path / "digits", spec)
    fresh = digest(tmp_path / "digits")
    meta = json.loads((tmp_path / "digits/meta.json").read_text())
    (tmp_path / "digits/meta.json").write_text(json.dumps(meta | {"version": 0}))
    (tmp_path / "digits/train/000000.jpg").write_bytes(b"old")
    digits.ensure_digits(tmp_path / "digits", digits.SPECS["digits"])
    assert digest(tmp_path / "digits") == fresh


@pytest.mark.parametrize("meta", [None, "{", "[]", '{"version": 2}', '{"version": 2, "x": 1}'])
def test_a_foreign_directory_is_never_replaced(tmp_path, meta):
    """What is no digits dataset stays as it is, and one line says so."""
    if meta is None or meta == '{"version": 2}':
        (tmp_path / "thesis.txt").write_text("mine")
    if meta is not None:
        (tmp_path / "meta.json").write_text(meta)
    before = digest(tmp_path)
    with pytest.raises(ConfigError, match="is no digits dataset") as error:
        digits.ensure_digits(tmp_path, SPEC)
    assert "\n" not in str(error.value)
    assert digest(tmp_path) == before


def test_a_file_in_the_way_is_not_replaced(tmp_path):
    """A file where the directory should be is somebody's, and one line says so."""
    (tmp_path / "digits").write_text("mine")
    with pytest.raises(ConfigError, match="is no digits dataset"):
        digits.make_digits(tmp_path / "digits", SPEC)
    assert (tmp_path / "digits").read_text() == "mine"


def test_a_killed_build_leaves_no_dataset(tmp_path):
    """SIGKILL in the middle: the target does not exist; the next build works and tidies up."""
    target = tmp_path / "digits"

    def die(fresh: Path) -> None:
        (fresh / "meta.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=build_directory, args=(target, die, lambda: False)
    )
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert not target.exists()
    assert digits.make_digits(target, replace(SPEC, train=1, val=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits.lock", "digits"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    """The old copy, moved aside and killed there, is back before anything is built."""
    target, replace_file = tmp_path / "data", os.replace
    target.mkdir()
    (target / "mine").touch()
    calls = []

    def die_at_the_second(*args) -> None:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(*args)

    monkeypatch.setattr(os, "replace", die_at_the_second)
    child = multiprocessing.get_context("fork").Process(
        target=build_directory, args=(target, lambda fresh: None, lambda: False)
    )
    child.start()
    child.join(30)
    monkeypatch.undo()
    assert child.exitcode == -signal.SIGKILL and not target.exists()
    assert not build_directory(target, lambda fresh: None, lambda: (target / "mine").exists())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_a_failed_rebuild_keeps_the_old_copy(tmp_path):
    """An error while filling leaves the target as it was and nothing beside it."""
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()

    def fail(fresh: Path) -> None:
        (fresh / "new").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_directory(target, fail, lambda: False)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_of_concurrent_processes_one_builds(tmp_path):
    """Four processes at once: one builds, the others wait and use its copy."""
    target = tmp_path / "data"

    def fill(fresh: Path) -> None:
        time.sleep(0.2)
        (fresh / str(os.getpid())).touch()

    context = multiprocessing.get_context("fork")
    args = (target, fill, target.exists)
    children = [context.Process(target=build_directory, args=args) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert len(list(target.iterdir())) == 1


def test_two_concurrent_first_uses_of_digits(made, tmp_path):
    """Both callers return with the complete dataset in place."""
    with ThreadPoolExecutor(2) as pool:
        uses = [pool.submit(digits.ensure_digits, tmp_path / "digits", SPEC) for _ in range(2)]
        for use in uses:
            use.result()
    assert digest(tmp_path / "digits") == digest(made)


# --- registration -------------------------------------------------------------------------------


def test_registration_makes_nothing_and_first_use_makes_all(builtin_root):
    """The catalog call makes the files; the evaluator then finds its annotation file."""
    assert not any(builtin_root.iterdir())
    records = DatasetCatalog.get("digits_tiny_val")
    assert len(records) == 8 and all(Path(record["file_name"]).is_file() for record in records)
    metadata = MetadataCatalog.get("digits_tiny_val")
    assert metadata.thing_classes == [str(digit) for digit in range(10)]
    assert metadata.evaluator_type == "coco"
    assert Path(metadata.image_root) == builtin_root / "digits_tiny" / "val"
    COCOEvaluator("digits_tiny_val", output_dir=None)
    assert len(DatasetCatalog.get("digits_tiny_train")) == 16
    assert not (builtin_root / "digits").exists()


def test_importing_twice_does_not_fail():
    """The datasets are still registered after a reload of the module that registers them."""
    importlib.reload(builtin)
    for name in ("digits_train", "digits_val", "digits_tiny_train", "bccd_train", "bccd_test"):
        assert name in DatasetCatalog


# --- datasets from config -----------------------------------------------------------------------


def test_a_users_dataset_is_registered_from_config(made, cfg):
    """Three strings make a dataset with class names, once or twice."""
    forget = forget_datasets()
    next(forget)
    entry = ["mine", str(digits.json_path(made, "val")), str(made / "val")]
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", str([entry]), "DATASETS.TRAIN", "('mine',)"])
    check_datasets(cfg)
    check_datasets(cfg)
    assert len(DatasetCatalog.get("mine")) == 4
    assert MetadataCatalog.get("mine").thing_classes == digits.CLASSES
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    cfg.DATASETS.COCO_FORMAT = [["mine", entry[1], str(made)]]
    with pytest.raises(ConfigError, match="the name 'mine' is taken"):
        register_coco_format_datasets(cfg)
    next(forget, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry[:2], "is not a list"),
        (lambda entry: "abc", "'abc' is not a list"),
        (lambda entry: [entry[0], 5, entry[2]], "is not a list"),
        (lambda entry: [*entry, {}, {}], "is not a list"),
        (lambda entry: ["", *entry[1:]], "is not a list"),
        (lambda entry: [entry[0], "no/such.json", entry[2]], "no/such.json not found"),
        (lambda entry: [entry[0], entry[1], "no/such/dir"], "no/such/dir not found"),
        (lambda entry: [entry[0], entry[1], str(Path(entry[2]).parent)], "images are not there"),
        (lambda entry: [entry[0], entry[2] + "/000000.jpg", entry[2]], "is not in COCO format"),
        (lambda entry: [entry[0], entry[1] + ".list", entry[2]], "is not in COCO format"),
        (lambda entry: [entry[0], entry[1] + ".empty", entry[2]], "has no categories"),
        (lambda entry: ["coco_2017_train", *entry[1:]], "'coco_2017_train' is taken"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(made, cfg, tmp_path, change, message):
    """Malformed entries, missing or broken files and taken names are told before training."""
    json_file = tmp_path / "a.json"
    json_file.write_text(digits.json_path(made, "val").read_text())
    Path(f"{json_file}.list").write_text("[1, 2]")
    Path(f"{json_file}.empty").write_text('{"images": [], "categories": []}')
    cfg.DATASETS.COCO_FORMAT = [change(["broken", str(json_file), str(made / "val")])]
    cfg.DATASETS.TRAIN = ("broken",)
    for _ in forget_datasets():
        with pytest.raises(ConfigError) as error:
            check_datasets(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_list_of_entries(cfg):
    """A value that is no list of lists is told, too."""
    for value in ("abc", 5, None):
        cfg.DATASETS.COCO_FORMAT = value
        with pytest.raises(ConfigError, match="DATASETS.COCO_FORMAT is .*; it must be a list"):
            register_coco_format_datasets(cfg)


def test_datasets_that_are_not_used_are_not_looked_for(made, cfg):
    """A config may name datasets that are on another machine."""
    cfg.DATASETS.COCO_FORMAT = [["elsewhere", "no/such.json", "no/such/dir"]]
    for _ in forget_datasets():
        check_datasets(cfg)


def test_an_unknown_dataset_is_refused_with_the_closest_names(cfg):
    """A slip in a name is told with what exists; evaluation does not ask for training data."""
    cfg.DATASETS.TRAIN = ("digit_train",)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN: .*'digit_train'.* digits_train"):
        check_datasets(cfg)
    check_datasets(cfg, train=False)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("zzz",)
    with pytest.raises(ConfigError, match="DATASETS.TEST: .*'zzz'; register your own"):
        check_datasets(cfg)


def test_missing_files_of_a_known_dataset_are_named(cfg, builtin_root, monkeypatch):
    """Datasets in COCO or VOC format that are not on disk are told before training, BCCD with the
    command that makes it; digits make themselves."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    for name, key in (("a_coco", "json_file"), ("b_coco", "image_root"), ("a_voc", "dirname")):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**{key: f"no/such/{name}"})
        cfg.DATASETS.TRAIN = (name,)
        with pytest.raises(ConfigError, match=f"'{name}': no/such/{name} not found; datasets lie"):
            check_datasets(cfg)
    cfg.DATASETS.TRAIN = ("bccd_train",)
    with pytest.raises(ConfigError, match="json not found; run 'python datasets/prepare_bccd.py"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN = ("digits_train",)
    check_datasets(cfg)
    assert not (builtin_root / "digits").exists()


def test_another_number_of_classes_is_refused(cfg):
    """Both detector families, also inside a Distiller. A class that the dataset does not have
    would end the evaluation as soon as it is predicted."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 9
    with pytest.raises(ConfigError, match="ROI_HEADS.NUM_CLASSES is 9.* has 10 classes"):
        check_datasets(cfg)
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    cfg.DISTILL.STUDENT_META_ARCH = "RetinaNet"
    check_datasets(cfg)
    for count in (3, 80):
        cfg.MODEL.RETINANET.NUM_CLASSES = count
        with pytest.raises(ConfigError, match=f"RETINANET.NUM_CLASSES is {count}"):
            check_datasets(cfg)


# --- BCCD ---------------------------------------------------------------------------------------

# Class and corners of the boxes of the fake clone's images, all 40 x 30 px.
FAKE_BOXES = {
    "good": [("RBC", (1, 1, 40, 30)), ("WBC", (11, 6, 20, 15))],
    "bad": [
        ("RBC", (9, 9, 9, 9)),  # no extent
        ("RBC", (20, 20, 10, 25)),  # right of left
        ("Platelets", (-5, 3, 10, 99)),  # partly outside
        ("RBC", (50, 3, 60, 9)),  # all outside
        ("Virus", (1, 1, 5, 5)),
        ("WBC", ("x", 1, 5, 5)),
        ("WBC", (2, 3, 4, 5)),
    ],
    "none": [],
}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone of BCCD in miniature, one image a split."""
    source = tmp_path / "BCCD_Dataset" / "BCCD"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (source / part).mkdir(parents=True)
    for split, (name, boxes) in zip(bccd.SPLITS, FAKE_BOXES.items(), strict=True):
        (source / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{name}\n")
        Image.new("RGB", (40, 30)).save(source / "JPEGImages" / f"{name}.jpg")
        objects = ""
        for label, corners in boxes:
            tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
            box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
            objects += f"<object><name>{label}</name><bndbox>{box}</bndbox></object>"
        path = source / "Annotations" / f"{name}.xml"
        path.write_text(f"<annotation>{objects}</annotation>")
    return tmp_path / "BCCD_Dataset"


def test_bccd_conversion(clone, builtin_root):
    """One-based corners become boxes; each dropped or clipped box is reported."""
    counts, changes = bccd.convert_bccd(clone, builtin_root / "bccd")
    assert counts["train"] == {"images": 1, "RBC": 1, "WBC": 1, "Platelets": 0}
    assert [record["annotations"] for record in DatasetCatalog.get("bccd_test")] == [[]]

    (good,) = DatasetCatalog.get("bccd_train")
    assert [a["bbox"] for a in good["annotations"]] == [[0, 0, 40, 30], [10, 5, 10, 10]]
    assert [a["category_id"] for a in good["annotations"]] == [0, 1]
    assert (good["width"], good["height"]) == (40, 30) and Path(good["file_name"]).is_file()

    (bad,) = DatasetCatalog.get("bccd_val")
    assert [a["bbox"] for a in bad["annotations"]] == [[0, 2, 10, 28], [1, 2, 3, 3]]
    words = ["no extent", "no extent", "clipped", "no extent", "'Virus'", "no extent"]
    assert len(changes) == len(words)
    assert all(word in change for word, change in zip(words, changes, strict=True))
    assert MetadataCatalog.get("bccd_val").thing_classes == ["RBC", "WBC", "Platelets"]


def test_bccd_conversion_again_replaces_its_own_output_only(clone, tmp_path):
    """A second conversion works; a directory that it did not make is left alone."""
    for _ in range(2):
        bccd.convert_bccd(clone, tmp_path / "bccd")
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "a.jpg").touch()
    with pytest.raises(ConfigError, match="was not made by this script"):
        bccd.convert_bccd(clone, foreign)
    assert [path.name for path in foreign.iterdir()] == ["a.jpg"]


def name_in_val(source: Path, name: str) -> None:
    """Lists one image in the clone's val.txt, which is there under that name."""
    (source / "ImageSets/Main/val.txt").write_text(f"{name}\n")
    for folder, ending in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        target = source / folder / f"{name}{ending}"
        if name.startswith("../"):
            shutil.copy(source / folder / f"bad{ending}", target)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: (source / "JPEGImages" / "bad.jpg").unlink(), "image bad.jpg is missing"),
        (lambda source: (source / "Annotations" / "bad.xml").unlink(), "cannot read .*bad.xml"),
        (lambda source: (source / "Annotations" / "bad.xml").write_text("<a"), "no valid XML"),
        (lambda source: (source / "ImageSets/Main/val.txt").unlink(), "cannot read .*val.txt"),
        (lambda source: source.rename(source.with_name("other")), "no clone of BCCD"),
        (lambda source: name_in_val(source, "../../outside"), "'../../outside', which is not the"),
        (lambda source: name_in_val(source, "/etc/hosts"), "'/etc/hosts', which is not the plain"),
        (lambda source: name_in_val(source, ".."), "'..', which is not the plain name"),
        (lambda source: name_in_val(source, ""), "val.txt names no image"),
    ],
)
def test_a_damaged_clone_is_refused(clone, tmp_path, damage, message):
    """One line names what is missing or broken, and no output is left."""
    damage(clone / "BCCD")
    with pytest.raises(ConfigError, match=message) as error:
        bccd.convert_bccd(clone, tmp_path / "bccd")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bccd").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"BCCD_Dataset", ".bccd.lock"}


def test_bccd_that_is_not_prepared_names_the_command(builtin_root):
    """Loading it says what to run."""
    with pytest.raises(ConfigError, match="bccd_val is not prepared .* run 'python datasets/"):
        DatasetCatalog.get("bccd_val")


# --- scripts ------------------------------------------------------------------------------------


def run_script(monkeypatch, name: str, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(REPOSITORY / "datasets" / name), run_name="__main__")


def test_prepare_digits_script(monkeypatch, capsys, tmp_path):
    """Size, counts and seed reach the dataset; a rerun makes nothing; errors are one line."""
    args = ["--output", tmp_path / "d", "--size", 96, "--train", 2, "--val", 1, "--seed", 5]
    run_script(monkeypatch, "prepare_digits.py", *args, "--contact-sheet", tmp_path / "s.png")
    assert digits.read_meta(tmp_path / "d") == (digits.VERSION, digits.DigitsSpec(96, 2, 1, 5))
    assert (tmp_path / "s.png").is_file()
    run_script(monkeypatch, "prepare_digits.py", *args)
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: digits: size is 4"):
        run_script(monkeypatch, "prepare_digits.py", "--size", 4)


def test_prepare_bccd_script(monkeypatch, capsys, clone, tmp_path):
    """It prints what it dropped and what it wrote; errors are one line."""
    run_script(monkeypatch, "prepare_bccd.py", clone, "--output", tmp_path / "bccd")
    out = capsys.readouterr().out
    assert "dropped box 1 (RBC)" in out and "train: 1 images, 1 RBC, 1 WBC, 0 Platelets" in out
    with pytest.raises(SystemExit, match="^error: .* no clone of BCCD"):
        run_script(monkeypatch, "prepare_bccd.py", tmp_path / "nowhere")
