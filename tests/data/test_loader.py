"""The training loader: a batch is a function of seed, iteration and rank alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BitMasks
from PIL import Image

from d2kd import ConfigError
from d2kd.commands.pretrain import read_dataset
from d2kd.commands.prototypes import crop
from d2kd.compare.pictures import save_picture
from d2kd.data.custom import check_datasets
from d2kd.data.loader import (
    BatchSampler,
    ImageError,
    NamingMapper,
    build_train_loader,
)
from d2kd.data.sheet import draw_record
from d2kd.engine import train as train_net
from d2kd.engine.trainer import DistillTrainer
from d2kd.prototypes.collect import build_candidate_loader, find_candidates
from d2kd.prototypes.store import Instance

from ..detectors import detector_config, write_config
from .parts import Parts, forget_datasets


def take(sampler, count: int) -> list:
    return list(itertools.islice(iter(sampler), count))


ASPECT = np.array([True, False, True, True, False, False, True, False, True, False])


def test_every_image_comes_once_an_epoch():
    """Two epochs of one-image batches hold every image twice, in different orders."""
    batches = [i for ((i, _),) in take(BatchSampler(ASPECT, 1, seed=3), 20)]
    assert sorted(batches[:10]) == sorted(batches[10:]) == list(range(10))
    assert batches[:10] != batches[10:]


def test_a_late_start_continues_the_stream():
    """Starting at batch 7 gives what the stream from 0 gives there, seeds included."""
    full = take(BatchSampler(ASPECT, 3, seed=3), 12)
    assert take(BatchSampler(ASPECT, 3, seed=3, start=7), 5) == full[7:]
    assert take(BatchSampler(ASPECT, 3, seed=4), 12) != full


def test_batches_hold_one_aspect():
    """With grouping no batch mixes wide and tall images."""
    for batch in take(BatchSampler(ASPECT, 3, seed=0), 30):
        assert len({bool(ASPECT[i]) for i, _ in batch}) == 1


def test_ranks_share_a_batch(monkeypatch):
    """Two ranks together see what one process sees."""
    whole = take(BatchSampler(ASPECT, 4, seed=0), 6)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        shares.append(take(BatchSampler(ASPECT, 4, seed=0), 6))
    for batch, a, b in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(a + b)


def test_repeat_factors():
    """An image with factor 3 comes three times an epoch."""
    repeats = np.ones(10)
    repeats[4] = 3
    sampler = BatchSampler(ASPECT, 1, seed=0, group=False, repeats=repeats)
    batches = [i for ((i, _),) in take(sampler, 12)]
    assert batches.count(4) == 3


@pytest.fixture
def digits_config(digits_root):
    cfg = detector_config()
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)
    return cfg


def test_augmentation_does_not_depend_on_workers_or_history(digits_config):
    """With 0 and with 2 workers, from the start or resumed, batch 3 has the same pixels."""
    digits_config.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(1)
    expected = take(build_train_loader(digits_config, seed=5), 4)[3]
    digits_config.DATALOADER.NUM_WORKERS = 2
    torch.manual_seed(2)
    found = take(build_train_loader(digits_config, seed=5, start=3), 1)[0]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(expected, found, strict=True))
    batches = take(build_train_loader(digits_config, seed=5), 8)
    sizes = {item["image"].shape for batch in batches for item in batch}
    assert len(sizes) > 1  # there was augmentation to reproduce


def test_mapping_leaves_the_global_random_numbers_alone(digits_config):
    """Loading in the main process does not shift the model's random numbers."""
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    loader = build_train_loader(digits_config, seed=5)
    loader.dataset[0, 17]
    assert torch.equal(torch.rand(1), expected)


def test_unsupported_sampler(digits_config):
    """An unknown sampler is one line that names the known ones."""
    digits_config.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ConfigError, match="valid: .*RepeatFactorTrainingSampler"):
        build_train_loader(digits_config, seed=0)


# --- images that cannot be read -----------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    yield from forgetting(Parts(tmp_path))


def forgetting(parts: Parts):
    forget = forget_datasets()
    next(forget)
    yield parts
    next(forget, None)


def truncate(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def make_deep(path) -> None:
    Image.fromarray(np.full((96, 128), 40_000, np.uint16)).save(path)


DAMAGES = {
    "truncated": (truncate, r"image .*train_3.png cannot be read \("),
    "empty": (lambda path: path.write_bytes(b""), r"image .*train_3.png cannot be read \("),
    "gone": (lambda path: path.unlink(), r"image .*train_3.png cannot be read \(.*No such file"),
    "deep": (make_deep, "train_3.png has more than 8 bits per channel.*convert it to 8 bits"),
    "other size": (
        lambda path: Image.new("RGB", (96, 128)).save(path),
        "train_3.png is 96 x 128, its annotation file says 128 x 96",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_image_is_named_in_one_line(name, workers, parts):
    """When it is met in training, in this process or in a worker: the case data_18."""
    damage, message = DAMAGES[name]
    parts.write()
    cfg = parts.config(**{"DATALOADER.NUM_WORKERS": workers})
    check_datasets(cfg)
    damage(parts.folder / "images/train_3.png")
    loader = build_train_loader(cfg, seed=0)
    with pytest.raises(ConfigError, match=message) as error:
        take(loader, 3)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300
    assert isinstance(error.value, ImageError)


def test_a_broken_image_is_named_in_evaluation(parts):
    """By the loader of evaluation, too."""
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    truncate(parts.folder / "images/val_2.png")
    loader = DistillTrainer.build_test_loader(cfg, "v")
    with pytest.raises(ConfigError, match="val_2.png cannot be read"):
        list(loader)


READERS = {
    "sheet": lambda record, cfg: draw_record(record, (), 32),
    "prototypes": lambda record, cfg: crop(Instance(1, record["file_name"], (0, 0, 9, 9), 0)),
    "candidates": lambda record, cfg: list(
        build_candidate_loader(cfg, find_candidates([record], 3, 1.0), 1)
    ),
    "pretrain": lambda record, cfg: read_dataset("t"),
    "pictures": lambda record, cfg: save_picture({"a": (cfg, Path())}, Path(), records=[record]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_broken_image_is_named_elsewhere(name, parts):
    """Where images are drawn or cut, and where candidates for prototypes are read; also an AVIF,
    for which Pillow has an error of its own."""
    parts.write()
    cfg = parts.config()
    check_datasets(cfg)
    record = DatasetCatalog.get("t")[0]
    Image.init()
    kind = "AVIF" if "AVIF" in Image.SAVE else "PNG"  # older versions lack it
    Image.open(record["file_name"]).save(record["file_name"], kind)
    truncate(Path(record["file_name"]))
    with pytest.raises(ConfigError, match="train_1.png cannot be read"):
        READERS[name](record, cfg)


def test_training_ends_in_that_line(parts):
    """No traceback reaches the user of train_net.py."""
    parts.write()
    cfg = parts.config(**{"SOLVER.MAX_ITER": 3})
    file = write_config(cfg, parts.folder / "config.yaml")
    truncate(parts.folder / "images/train_3.png")
    with pytest.raises(SystemExit, match="^error: image .*train_3.png cannot be read") as stop:
        train_net.main(["--config-file", file])
    assert "\n" not in str(stop.value)


def test_processes_end_in_that_line(parts, free_port):
    """One of two processes meets the image; both end, with one line."""
    parts.write()
    cfg = parts.config(**{"SOLVER.MAX_ITER": 3, "SOLVER.IMS_PER_BATCH": 4})
    file = write_config(cfg, parts.folder / "config.yaml")
    truncate(parts.folder / "images/train_3.png")
    args = ["--num-gpus", "2", "--dist-url", f"tcp://127.0.0.1:{free_port}"]
    with pytest.raises(SystemExit, match="^error: image .*train_3.png cannot be read") as stop:
        train_net.main(["--config-file", file, "--import", "tests.toy_head", *args])
    assert "\n" not in str(stop.value)


def test_an_error_of_another_kind_stays_what_it_is(parts):
    """Only images that cannot be used are put into one line."""

    def fail(record):
        raise KeyError("a bug")

    parts.write()
    check_datasets(parts.config())
    record = DatasetCatalog.get("t")[0]
    with pytest.raises(KeyError, match="a bug"):
        NamingMapper(fail)(record)


# --- the keys that Detectron2's loader reads ----------------------------------------------------


def with_keypoints(parts: Parts) -> None:
    """The case data_07: keypoints are visible in three of six images."""
    for entry in parts.train["annotations"]:
        (x, y, w, h), v = entry["bbox"], 2 if entry["image_id"] > 3 else 0
        entry.update(keypoints=[x + 2, y + 2, v, x + w - 2, y + h - 2, v], num_keypoints=v)


KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
    "DATASETS.TEST": (),
}


def test_images_without_visible_keypoints_are_filtered(parts):
    """As in Detectron2, with the names stated in the config."""
    with_keypoints(parts)
    parts.write()
    cfg = parts.config(**KEYPOINTS)
    cfg.DATASETS.COCO_FORMAT[0].append({"keypoint_names": ["left ear", "right ear"]})
    check_datasets(cfg)
    assert MetadataCatalog.get("t").keypoint_names == ["left ear", "right ear"]
    assert MetadataCatalog.get("t").keypoint_flip_map == [("left ear", "right ear")]
    loader = build_train_loader(cfg, seed=0)
    assert len(loader.dataset) == 3
    keypoints = take(loader, 1)[0][0]["instances"].gt_keypoints
    assert keypoints.tensor.shape[1:] == (2, 3)
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    assert len(build_train_loader(cfg, seed=0).dataset) == 6


@pytest.mark.parametrize(
    ("fourth", "message"),
    [
        ("a", "must have keypoint_names or keypoint_flip_map"),
        ({"names": ["a", "b"]}, "must have keypoint_names or keypoint_flip_map"),
        ({"keypoint_names": "ab"}, "keypoint_names must be a list of names"),
        ({"keypoint_names": [1, 2]}, "keypoint_names must be a list of names"),
        ({"keypoint_names": ["a", "b"], "keypoint_flip_map": [["a"]]}, "must be a list of pairs"),
        ({"keypoint_names": ["a", "b"], "keypoint_flip_map": [["a", "c"]]}, "flip_map names 'c'"),
        ({"keypoint_names": ["a", "b", "c"]}, "NUM_KEYPOINTS is 2, but .* there are 3: a, b, c"),
        ({}, "of keypoint names there are none"),
    ],
)
def test_keypoints_that_are_not_stated_correctly(parts, fourth, message):
    """One line that says what is valid."""
    with_keypoints(parts)
    parts.write()
    cfg = parts.config(**KEYPOINTS)
    cfg.DATASETS.COCO_FORMAT[0].append(fourth)
    with pytest.raises(ConfigError, match=message):
        check_datasets(cfg)


def test_keypoints_of_a_dataset_that_is_registered_elsewhere(parts):
    """The case data_07 again: names in the metadata, images filtered."""
    with_keypoints(parts)
    parts.write()
    register_coco_instances(
        "k",
        {"keypoint_names": ["a", "b"], "keypoint_flip_map": [("a", "b")]},
        str(parts.folder / "train.json"),
        str(parts.folder / "images"),
    )
    cfg = parts.config(**{**KEYPOINTS, "DATASETS.TRAIN": ("k",)})
    check_datasets(cfg)
    assert len(build_train_loader(cfg, seed=0).dataset) == 3
    assert MetadataCatalog.get("k").keypoint_flip_map == [("a", "b")]


def test_keypoints_named_in_the_file(parts):
    """COCO's own files name them with the category; the sigmas of evaluation must be given."""
    with_keypoints(parts)
    for category in parts.train["categories"]:
        category["keypoints"] = ["a", "b"]
    parts.write()
    cfg = parts.config(**{**KEYPOINTS, "DATASETS.TEST": ("v",)})
    with pytest.raises(ConfigError, match="dataset 'v'.*KEYPOINT_OKS_SIGMAS has 17 values for 2"):
        check_datasets(cfg)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    check_datasets(cfg)
    assert MetadataCatalog.get("t").keypoint_names == ["a", "b"]
    assert len(build_train_loader(cfg, seed=0).dataset) == 3


def test_training_with_keypoints(parts):
    """To its end, with AP of keypoints."""
    for content in (parts.train, parts.val):
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry.update(keypoints=[x + 2, y + 2, 2, x + w - 2, y + h - 2, 2])
        for category in content["categories"]:
            category["keypoints"] = ["a", "b"]
    parts.write()
    values = {**KEYPOINTS, "DATASETS.TEST": ("v",), "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1]}
    values |= {"SOLVER.MAX_ITER": 1, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8]}
    file = write_config(parts.config(**values), parts.folder / "config.yaml")
    train_net.main(["--config-file", file])
    results = json.loads((parts.folder / "out/results.json").read_text())["results"]
    assert {"bbox", "keypoints"} <= results.keys()


def test_rle_masks_are_trained_on(parts):
    """The case data_17: the mask format that takes them is chosen."""
    for place, entry in enumerate(parts.train["annotations"]):
        if place % 2:
            entry["segmentation"] = {"size": [96, 128], "counts": [100, 500, 96 * 128 - 600]}
    parts.write()
    cfg = parts.config("mask")
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    check_datasets(cfg)
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    for sample in take(build_train_loader(cfg, seed=0), 1)[0]:
        assert isinstance(sample["instances"].gt_masks, BitMasks)
    frozen = parts.config("mask")
    frozen.freeze()
    with pytest.raises(
        ConfigError, match="9 objects with RLE masks; set INPUT.MASK_FORMAT bitmask"
    ):
        check_datasets(frozen)


def test_boxes_with_short_polygons_are_trained_on(parts):
    """The case data_10: without masks all boxes are kept."""
    for place, entry in enumerate(parts.train["annotations"]):
        entry["segmentation"] = [[]] if place % 2 else [[1, 2, 30, 40]]
    parts.write()
    cfg = parts.config(**{"SOLVER.IMS_PER_BATCH": 6})
    check_datasets(cfg)
    (batch,) = take(build_train_loader(cfg, seed=0), 1)
    assert sum(len(sample["instances"]) for sample in batch) == 18
