"""What pycocotools is given: the ground truth as predictions scores AP 100 on each variant of a
dataset that is accepted, and a dataset that needs no repair is evaluated as by Detectron2."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from d2kd.data.custom import check_datasets
from d2kd.engine.trainer import DistillTrainer

from .parts import CLASSES, Parts, add_masks, forget_datasets, perfect_results
from .test_check import add_root, number_names, same_names_other_ids


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path)


def annotations(**values):
    """A change of all annotations of the validation set: None removes a key, a function gets the
    entry."""

    def change(parts: Parts) -> None:
        for entry in parts.val["annotations"]:
            for key, value in values.items():
                if value is None:
                    entry.pop(key, None)
                else:
                    entry[key] = value(entry) if callable(value) else value

    return change


def null_iscrowd(parts: Parts) -> None:
    for entry in parts.val["annotations"]:
        entry["iscrowd"] = None


def text_image_ids(parts: Parts) -> None:
    for image in parts.val["images"]:
        image["id"] = f"image {image['id']}"
    for entry in parts.val["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}"


def huge_ids(entries: str, key: str):
    """Ids of ``entries``, which annotations name as ``key``, too large for a double."""

    def change(parts: Parts) -> None:
        for content in (parts.train, parts.val):
            for entry in content[entries]:
                entry["id"] += 2**60
            for entry in content["annotations"]:
                entry[key] += 2**60

    return change


def sparse_categories(parts: Parts) -> None:
    for content in (parts.train, parts.val):
        for category in content["categories"]:
            category["id"] = {1: 40, 2: 7, 3: 19}[category["id"]]
        for entry in content["annotations"]:
            entry["category_id"] = {1: 40, 2: 7, 3: 19}[entry["category_id"]]


def add_to_val(**values):
    """One more annotation, of which the predictions know nothing."""

    def change(parts: Parts) -> None:
        entry = copy.deepcopy(parts.val["annotations"][0])
        parts.val["annotations"].append({**entry, "id": 500, **values})

    return change


def image_without_objects(parts: Parts) -> None:
    for content in (parts.val, parts.truth):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]


def joined_ids(parts: Parts) -> None:
    """Annotation ids as floats and from far beyond what a float keeps apart."""
    for place, entry in enumerate(parts.val["annotations"]):
        entry["id"] = 2**60 + place if place % 2 else float(place)


def as_rle(entry: dict, packed: bool) -> dict:
    x, y, w, h = entry["bbox"]
    mask = np.zeros((96, 128), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    if packed:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    counts = np.diff(edges, prepend=0).tolist()
    return {"size": [96, 128], "counts": counts}


def as_floats(entry: dict, packed: bool) -> dict:
    return json.loads(json.dumps(as_rle(entry, packed)), parse_int=float)


def float_sizes(parts: Parts) -> None:
    for image in [*parts.train["images"], *parts.val["images"]]:
        image.update(width=128.0, height=96.0)


def box_beyond(parts: Parts) -> None:
    """A box that ends 40 pixels beyond its image; found so, it counts as found."""
    for content in (parts.val, parts.truth):
        entry = content["annotations"][0]
        x, y, _, h = entry["bbox"]
        entry.update(bbox=[x, y, 168 - x, h], area=(168 - x) * h)


VARIANTS = {
    "as it is": lambda parts: None,
    "ids from 0": annotations(id=lambda a: a["id"] - 1),
    "negative ids": annotations(id=lambda a: -a["id"]),
    "text ids": annotations(id=lambda a: f"a{a['id']}"),
    "odd ids": joined_ids,
    "ids from 2^63": annotations(id=lambda a: a["id"] + 2**63),
    "huge ids of images": huge_ids("images", "image_id"),
    "huge ids of categories": huge_ids("categories", "category_id"),
    "no area": annotations(area=None),
    "area is text": annotations(area="12"),
    "area NaN": annotations(area=math.nan),
    "no iscrowd": annotations(iscrowd=None),
    "null iscrowd": null_iscrowd,
    "neither area nor iscrowd nor masks": annotations(area=None, iscrowd=None, segmentation=None),
    "same names, other ids": same_names_other_ids,
    "ids of categories with gaps": sparse_categories,
    "root": add_root,
    "root of a class's name": lambda parts: add_root(parts, "bolt"),
    "numbers as names": number_names,
    "text as image ids": text_image_ids,
    "a box of no width": add_to_val(bbox=[5, 5, 0, 20]),
    "a box outside": add_to_val(bbox=[300, 5, 20, 20]),
    "a box beyond its image": box_beyond,
    "a crowd region": add_to_val(iscrowd=1, bbox=[0, 0, 128, 96], area=128 * 96),
    "an annotation of no image": add_to_val(image_id=77),
    "an image without objects": image_without_objects,
    "short polygons": annotations(segmentation=[[1, 2, 30, 40]]),
    "masks of any kind": annotations(segmentation="mask.png"),
    "RLE": annotations(segmentation=lambda a: as_rle(a, packed=False)),
    "all of it": lambda parts: [
        change(parts)
        for change in (
            same_names_other_ids,
            add_root,
            annotations(id=lambda a: a["id"] - 1, area=None, iscrowd=None),
            add_to_val(bbox=[5, 5, 0, 20]),
        )
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_perfect_boxes_score_100(name, parts):
    """For all classes and sizes, with the names of the classes where they belong."""
    VARIANTS[name](parts)
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    names = tuple(MetadataCatalog.get("v").thing_classes)
    if name == "numbers as names":
        number_names(parts)
        parts.truth["categories"] = [{**c, "name": str(c["name"])} for c in parts.val["categories"]]
    results = perfect_results(cfg, parts.truth, names)["bbox"]
    assert results["AP"] == pytest.approx(100)
    name_of = {category["id"]: category["name"] for category in parts.truth["categories"]}
    present = {name_of[a["category_id"]] for a in parts.truth["annotations"]}
    assert len(present) > 1
    assert all(results[f"AP-{n}"] == pytest.approx(100) for n in present)


MASK_VARIANTS = {
    "polygons": lambda parts: None,
    "RLE": annotations(segmentation=lambda a: as_rle(a, packed=False)),
    "packed RLE": annotations(segmentation=lambda a: as_rle(a, packed=True)),
    "no area": annotations(area=None),
    "floats as sizes": float_sizes,
    "RLE of floats": annotations(segmentation=lambda a: as_floats(a, packed=False)),
    "packed RLE of floats": annotations(segmentation=lambda a: as_floats(a, packed=True)),
    "a broken mask of no image": add_to_val(image_id=77, segmentation=[3]),
    "no area of RLE": annotations(segmentation=lambda a: as_rle(a, packed=False), area=None),
    "no area of packed RLE": annotations(segmentation=lambda a: as_rle(a, True), area=None),
    "a short polygon first": annotations(
        segmentation=lambda a: [[1, 2, 30, 40], *a["segmentation"], [1, 2, 3]]
    ),
    "ids from 0, other order": lambda parts: (
        annotations(id=lambda a: a["id"] - 1)(parts),
        same_names_other_ids(parts),
    ),
}


@pytest.mark.parametrize("name", MASK_VARIANTS)
def test_perfect_masks_score_100(name, parts):
    """Of every kind that is accepted; pycocotools would read a polygon of two points as a box."""
    MASK_VARIANTS[name](parts)
    parts.write()
    cfg = parts.config("mask")
    check_datasets(cfg)
    results = perfect_results(cfg, parts.truth, add=add_masks)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)


def with_keypoints(parts: Parts, missing: int = 0) -> None:
    """Two keypoints per box, of which the first ``missing`` objects have none."""
    for content in (parts.train, parts.val):
        for place, entry in enumerate(content["annotations"]):
            x, y, w, h = entry["bbox"]
            if place >= missing:
                entry["keypoints"] = [x + 2, y + 2, 2, x + w - 2, y + h - 2, 1]
                entry["num_keypoints"] = 2
        content["categories"] = [{**c, "keypoints": ["a", "b"]} for c in content["categories"]]
    parts.truth = copy.deepcopy(parts.val)


def add_keypoints(out: Instances, found: list[dict]) -> None:
    """Detectron2's evaluator takes off the half pixel that its loader adds."""
    points = np.array([a["keypoints"] for a in found], float).reshape(len(found), -1, 3)
    out.pred_keypoints = torch.tensor(points + [0.5, 0.5, 0])


KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1],
}


@pytest.mark.parametrize("change", ["none", "no num_keypoints", "no area", "id 0"])
def test_perfect_keypoints_score_100(change, parts):
    """With the sigmas of TEST.KEYPOINT_OKS_SIGMAS, and num_keypoints computed where missing."""
    with_keypoints(parts)
    for entry in parts.val["annotations"]:
        if change == "no num_keypoints":
            del entry["num_keypoints"]
        elif change == "no area":
            del entry["area"]
        elif change == "id 0":
            entry["id"] -= 1
    parts.write()
    cfg = parts.config(**KEYPOINTS)
    check_datasets(cfg)
    results = perfect_results(cfg, parts.truth, add=add_keypoints)
    assert results["keypoints"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)


def test_objects_without_keypoints_are_not_counted(parts):
    """pycocotools asks each annotation for its keypoints; one without is ignored, as one whose
    keypoints are all invisible."""
    with_keypoints(parts)
    del parts.val["annotations"][0]["keypoints"], parts.val["annotations"][0]["num_keypoints"]
    parts.write()
    cfg = parts.config(**KEYPOINTS)
    check_datasets(cfg)
    assert perfect_results(cfg, parts.truth, add=add_keypoints)["keypoints"]["AP"] == 100


# --- as Detectron2 ------------------------------------------------------------------------------


def noisy_results(evaluator: COCOEvaluator, records: list[dict], name: str) -> dict:
    """What an evaluator says of random predictions."""
    random = np.random.default_rng(0)
    number_of = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    assert list(number_of.values()) == [0, 1, 2]
    evaluator.reset()
    for record in records:
        out = Instances((record["height"], record["width"]))
        boxes = np.array([entry["bbox"] for entry in record["annotations"]], float)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        out.pred_boxes = Boxes(torch.tensor(boxes + random.normal(0, 2, boxes.shape)).float())
        out.scores = torch.tensor(random.uniform(0, 1, len(boxes)))
        classes = [entry["category_id"] for entry in record["annotations"]]
        out.pred_classes = (
            torch.tensor(classes) if random.uniform() < 0.8 else torch.zeros(len(boxes)).long()
        )
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": out}])
    return evaluator.evaluate()


def test_a_good_dataset_is_evaluated_as_by_detectron2(parts, tmp_path):
    """The same numbers, name by name, for predictions that are far from perfect."""
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    ours = noisy_results(DistillTrainer.build_evaluator(cfg, "v"), DatasetCatalog.get("v"), "v")
    paths = str(parts.folder / "val.json"), str(parts.folder / "images")
    register_coco_instances("stock", {}, *paths)
    records = DatasetCatalog.get("stock")
    theirs = noisy_results(COCOEvaluator("stock", output_dir=str(tmp_path)), records, "stock")
    assert 0 < theirs["bbox"]["AP"] < 100
    assert ours == theirs or str(ours) == str(theirs)  # nan is not equal to itself


def test_classes_keep_their_names_in_another_order(parts):
    """A class that is never found has AP 0 under its own name."""
    same_names_other_ids(parts)
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    parts.truth["annotations"] = [a for a in parts.truth["annotations"] if a["category_id"] != 2]
    results = perfect_results(cfg, parts.truth)["bbox"]
    assert results["AP-bolt"] == 0
    assert results["AP-nut"] == results["AP-ring"] == pytest.approx(100)


def test_predictions_are_written_with_the_files_own_ids(parts):
    """coco_instances_results.json can be scored with any tool that reads val.json."""
    same_names_other_ids(parts)
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    perfect_results(cfg, parts.truth)
    found = json.loads((parts.folder / "out/inference/coco_instances_results.json").read_text())
    assert [r["category_id"] for r in found] == [a["category_id"] for a in parts.val["annotations"]]


def test_a_test_set_without_annotations(parts):
    """COCO's test sets have none: predictions are written, nothing is scored."""
    del parts.val["annotations"]
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    assert perfect_results(cfg, parts.truth) == {}


def test_a_converted_dataset_is_not_taken_from_an_earlier_run(parts, tmp_path):
    """Detectron2 converts datasets without a file, and takes what lies in the output folder."""
    parts.write()
    check_datasets(parts.config())
    records = DatasetCatalog.get("v")
    for count in (1, 4):
        name = f"records_{count}"
        DatasetCatalog.register(name, lambda count=count: copy.deepcopy(records[:count]))
        MetadataCatalog.get(name).set(thing_classes=list(CLASSES), evaluator_type="coco")
    cfg = parts.config()
    first = DistillTrainer.build_evaluator(cfg, "records_1")
    stale = tmp_path / "out/inference/records_4_coco_format.json"
    stale.write_bytes((tmp_path / "out/inference/records_1_coco_format.json").read_bytes())
    second = DistillTrainer.build_evaluator(cfg, "records_4")
    assert len(first._coco_api.imgs) == 1 and len(second._coco_api.imgs) == 4
