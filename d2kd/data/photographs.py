"""Photographs that a user clones, `animals` and `facades`, turned into COCO format.

<name>/meta.json, <name>/annotations/<split>.json, <name>/images/*.jpg

Both repositories hold exports of one tool: COCO JSON with areas of boxes instead of masks, a root
category without objects, and copies of one photograph, or crops of it, in several splits. Here
`train`, `tune`, `val` and `test` share no photograph; `part` is a part of `train`. Teachers learn
from `train` and students from `part`; weights of losses are chosen on `tune`; tables show `val`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_tools

from ..errors import ConfigError
from .files import check_replaceable, coco_content, write_dataset

SPLITS = ("train", "part", "tune", "val", "test")
ANNOTATIONS = "_annotations.coco.json"
JPEG_QUALITY = 82


@dataclass(frozen=True)
class Photographs:
    """One public repository, and what is made of it."""

    name: str  # of the dataset, and of its folder
    repository: str  # address that a user clones
    licence: str
    classes: tuple[str, ...]  # in the order of their ids from 1
    folders: Mapping[str, str]  # folder of the clone -> split that its photographs belong to
    max_side: int  # pixels of the longer side; larger images are reduced
    photograph_ends_at: str  # in the name of a file; files of one photograph stay together
    shares: Mapping[str, float]  # of the split "train" that go to another split instead

    @property
    def command(self) -> str:
        """The command that makes the dataset."""
        return f"python datasets/prepare_{self.name}.py CLONE"


ANIMALS = Photographs(
    name="animals",
    repository="https://github.com/KomaHomu/Applying-Mask-RCNN-in-endangered-animals-detection",
    licence="annotations CC BY 4.0, repository MIT",
    classes=("bear", "deer", "elephant", "otter", "rhesus monkey", "tiger", "turtle"),
    folders={"dataset/train": "train", "dataset/valid": "val", "dataset/test": "test"},
    max_side=384,
    photograph_ends_at="_jpg.rf.",
    shares={"tune": 0.15},
)
FACADES = Photographs(
    name="facades",
    repository="https://github.com/a-hwang/building-facade-segmentation",
    licence="annotations CC BY 4.0",
    classes=(
        "balcony-fence",
        "car",
        "facade",
        "fence",
        "non-building-infrastructure",
        "shop",
        "street",
        "traffic-infrastructure",
        "vegetation",
        "window",
    ),
    # Crops of one photograph stand in all three folders, so the splits are made again.
    folders={"train": "train", "valid": "train", "test": "train"},
    max_side=448,
    photograph_ends_at="_scaled_",
    shares={"test": 0.1, "val": 0.25, "tune": 0.1},
)
FAMILIES = {family.name: family for family in (ANIMALS, FACADES)}


def convert(family: Photographs, clone: Path, output: Path) -> tuple[dict[str, dict], list[str]]:
    """Write the splits of a clone to `output`, all of them or nothing.

    Returns:
        Images, and objects of each class, by split; and one line for each image or object that was
        left out.

    Raises:
        ConfigError: `clone` is not the repository or incomplete, or `output` holds something else.
    """
    check_replaceable(output, family.name)
    notes: list[str] = []
    files = _drop_copies(_read_clone(family, clone), notes)

    def write(images: Path) -> dict[str, dict]:
        for file in files:
            file.size = _write_image(file.path, images / file.path.name, family.max_side)
        return {
            split: _coco_content(family, split, members, notes)
            for split, members in _split(family, files).items()
        }

    meta = {"dataset": family.name, "source": family.repository, "licence": family.licence}
    counts = write_dataset(output, meta, write)
    return counts, list(dict.fromkeys(notes))


# --- reading a clone -----------------------------------------------------------------------------


@dataclass
class PhotographFile:
    """One image of a clone. Sizes are (width, height)."""

    path: Path
    photograph: str  # name of the photograph that it is, or is a crop of
    split: str
    annotated_size: tuple[int, int]  # in the annotation file, whose pixels ``objects`` are in
    objects: list[tuple[str, list[list[float]]]]  # class name and polygons of each
    size: tuple[int, int] = (0, 0)  # of the image that was written


def _read_clone(family: Photographs, clone: Path) -> list[PhotographFile]:
    sources = [f"{folder}/{ANNOTATIONS}" for folder in family.folders]
    if not all((clone / source).is_file() for source in sources):
        raise ConfigError(
            f"{clone} is no clone of {family.name}: it has not all of {', '.join(sources)}; get "
            f"one with 'git clone {family.repository}'"
        )
    files = []
    for folder, split in family.folders.items():
        files += _read_folder(family, clone / folder, split)
    return files


def _read_folder(family: Photographs, folder: Path, split: str) -> list[PhotographFile]:
    source = folder / ANNOTATIONS
    try:
        content = json.loads(source.read_text())
        names = {item["id"]: item["name"] for item in content["categories"]}
        files = {}
        for image in content["images"]:
            name = image["file_name"]
            files[image["id"]] = PhotographFile(
                _find_image(folder, name),
                name.split(family.photograph_ends_at)[0],
                split,
                (int(image["width"]), int(image["height"])),
                [],
            )
        for item in content["annotations"]:
            found = (names[item["category_id"]], item["segmentation"])
            files[item["image_id"]].objects.append(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{source} is not the annotation file of {family.name} "
            f"({type(error).__name__}: {error})"
        ) from error
    used = {name for file in files.values() for name, _ in file.objects}
    if unknown := sorted(used - set(family.classes)):
        raise ConfigError(f"{source}: {family.name} has no class {', '.join(unknown)}")
    return list(files.values())


def _find_image(folder: Path, name: str) -> Path:
    """The image in the folder, or one folder deeper, as some of `facades` are."""
    for path in (folder / name, folder / "images" / name):
        if path.is_file():
            return path
    raise ConfigError(f"the clone is not complete: {folder / name} is missing")


def _drop_copies(files: list[PhotographFile], notes: list[str]) -> list[PhotographFile]:
    """Without images of a later folder that an earlier one has: equal bytes, or an equal name
    before ``_jpg.rf.``, where the exporter put its hash."""
    kept, seen = [], {}
    for file in files:
        digest = hashlib.sha256(file.path.read_bytes()).digest()
        keys = (file.path.name.split("_jpg.rf.")[0], digest)
        folder = file.path.parent
        first = next((seen[key] for key in keys if key in seen), None)
        if first is not None and first.path.parent != folder:
            notes.append(
                f"{folder.name}/{file.path.name}: dropped, a copy of "
                f"{first.path.parent.name}/{first.path.name}"
            )
            continue
        kept.append(file)
        for key in keys:
            seen.setdefault(key, file)
    return kept


# --- splits --------------------------------------------------------------------------------------


def place(photograph: str) -> float:
    """A number in [0, 1) that only the name of a photograph decides, evenly spread."""
    return int(hashlib.sha256(photograph.encode()).hexdigest()[:12], 16) / 16**12


def _split(family: Photographs, files: list[PhotographFile]) -> dict[str, list[PhotographFile]]:
    contents: dict[str, list[PhotographFile]] = {split: [] for split in SPLITS}
    for file in files:
        contents[_split_of(family, file)].append(file)
    # Half of train. The names' places there are those that `shares` left.
    first = sum(family.shares.values())
    middle = first + (1 - first) / 2
    contents["part"] = [f for f in contents["train"] if place(f.photograph) < middle]
    return contents


def _split_of(family: Photographs, file: PhotographFile) -> str:
    if file.split != "train":
        return file.split
    where = place(file.photograph)
    for split, share in family.shares.items():
        if where < share:
            return split
        where -= share
    return "train"


# --- writing -------------------------------------------------------------------------------------


def _write_image(source: Path, target: Path, max_side: int) -> tuple[int, int]:
    """Copy an image, reduced where its longer side exceeds `max_side`; its size (width, height)."""
    try:
        with Image.open(source) as image:
            size = image.size
            if max(size) <= max_side:
                shutil.copyfile(source, target)
                return size
            scale = max_side / max(size)
            size = (round(size[0] * scale), round(size[1] * scale))
            image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            image.save(target, quality=JPEG_QUALITY)
            return size
    except OSError as error:
        raise ConfigError(f"{source} is missing or no image ({error})") from error


def _coco_content(
    family: Photographs, split: str, files: list[PhotographFile], notes: list[str]
) -> dict:
    images = []
    for file in files:
        objects = []
        for index, (name, polygons) in enumerate(file.objects, start=1):
            found = _describe(polygons, file.annotated_size, file.size)
            if found is None:
                notes.append(f"{file.path.name}: dropped object {index} ({name}), no extent")
            else:
                objects.append((family.classes.index(name), found))
        images.append((file.path.name, file.size, objects))
    info = {"description": f"{family.name}, {split}", "url": family.repository}
    content = coco_content(info, family.classes, images)
    return {**content, "licenses": [{"id": 1, "name": family.licence}]}


def _describe(
    polygons: list[list[float]], old_size: tuple[int, int], size: tuple[int, int]
) -> dict | None:
    """Polygons, box and area (of the mask) of an object in an image of another size, cut at its
    border; None for one without extent."""
    limit = np.array(size, dtype=float)
    scaled = [np.reshape(p, (-1, 2)) * limit / old_size for p in polygons if len(p) >= 6]
    scaled = [np.clip(points, 0, limit).round(2) for points in scaled]
    if not scaled:
        return None
    corners = np.concatenate(scaled)
    low, high = corners.min(0), corners.max(0)
    segmentation = [points.ravel().tolist() for points in scaled]
    area = mask_tools.area(mask_tools.merge(mask_tools.frPyObjects(segmentation, size[1], size[0])))
    if (high <= low).any() or area == 0:
        return None
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    return {"bbox": box, "area": float(area), "segmentation": segmentation}
