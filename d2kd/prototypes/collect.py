"""Candidates for prototypes: which training objects they are, and their features.

One pass over the union of the selected images serves all classes and both detectors: the input is
that of testing, and each object's crop averages are taken on all levels at once. With several
processes each passes over its share of the images.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn

from ..data.loader import NamingMapper
from ..detectors.spec import feature_strides
from ..detectors.teacher import Teacher
from ..geometry.boxes import BoxCells, crop_means
from ..numerics import Ragged
from .store import Instance

logger = logging.getLogger(__name__)

# The released code draws its images with this seed.
_IMAGE_SEED = 1


@dataclass(frozen=True)
class Candidates:
    """Training objects that may become prototypes.

    Attributes:
        images: Detectron2 dataset dicts without annotations; "candidates" holds the positions in
            ``instances`` of the image's candidates.
        instances: the candidates, image after image.
        num_classes: K.
    """

    images: list[dict]
    instances: list[Instance]
    num_classes: int


def find_candidates(
    records: Sequence[dict], num_classes: int, min_size: float = 30.0, max_images: int = 800
) -> Candidates:
    """Choose the training objects that prototypes are drawn from.

    An object counts if it is no crowd and wider and higher than ``min_size``. A class that has
    such objects in more than ``max_images`` images keeps those of a random choice of as many,
    the same at each call.

    Args:
        records: Detectron2 dataset dicts with annotations.
        num_classes: K.
        min_size: pixels of the original image.
        max_images: images per class.
    """
    objects_of = [_large_objects(record, min_size) for record in records]
    images_of: dict[int, list[int]] = defaultdict(list)
    for image, objects in enumerate(objects_of):
        for category in {o.category for o in objects}:
            images_of[category].append(image)
    chosen: set[tuple[int, int]] = set()  # (image, class)
    for category, images in images_of.items():
        if len(images) > max_images:
            generator = np.random.default_rng((_IMAGE_SEED, category))
            images = generator.choice(images, max_images, replace=False).tolist()
        chosen.update((image, category) for image in images)
    images, instances = [], []
    # Images of a like shape stand together: batches of them need little padding.
    order = sorted(range(len(records)), key=lambda i: records[i]["width"] / records[i]["height"])
    for i in order:
        kept = [o for o in objects_of[i] if (i, o.category) in chosen]
        if kept:
            positions = range(len(instances), len(instances) + len(kept))
            slim = {key: records[i][key] for key in ("file_name", "width", "height")}
            images.append({**slim, "candidates": list(positions)})
            instances += kept
    return Candidates(images, instances, num_classes)


def _large_objects(record: dict, min_size: float) -> list[Instance]:
    objects = []
    for annotation in record.get("annotations", ()):
        mode = annotation["bbox_mode"]
        x1, y1, x2, y2 = BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS)
        if not annotation.get("iscrowd", 0) and min(x2 - x1, y2 - y1) > min_size:
            objects.append(
                Instance(
                    image_id=record["image_id"],
                    file_name=record["file_name"],
                    box=(float(x1), float(y1), float(x2), float(y2)),
                    category=annotation["category_id"],
                )
            )
    return objects


@dataclass
class FeatureTable:
    """Features of some candidates: of this process, or of one class.

    Attributes:
        index: (n,) long, positions in ``Candidates.instances``.
        features: stride -> (n, C).
    """

    index: Tensor
    features: dict[int, Tensor]

    def rows(self, wanted: Tensor) -> FeatureTable:
        """The rows that ``wanted`` (n,) bool marks."""
        return FeatureTable(self.index[wanted], {s: f[wanted] for s, f in self.features.items()})

    @classmethod
    def join(cls, parts: Sequence[FeatureTable]) -> FeatureTable:
        """All rows of ``parts``, in the order of ``index``."""
        index, order = torch.cat([part.index for part in parts]).sort()
        strides = parts[0].features
        features = {s: torch.cat([part.features[s] for part in parts])[order] for s in strides}
        return cls(index, features)


def build_candidate_loader(cfg: CfgNode, candidates: Candidates, batch_size: int) -> Iterable:
    """This process's share of the candidates' images with Detectron2's test-time input."""
    return build_detection_test_loader(
        candidates.images,
        mapper=NamingMapper(DatasetMapper(cfg, is_train=False)),
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


@dataclass(frozen=True)
class Reader:
    """How the maps of one detector are got.

    Attributes:
        pyramid: ``batched_inputs`` -> stride -> (B, C, H, W).
        channels: stride -> C, of the levels to take.
    """

    pyramid: Callable[[list[dict]], dict[int, Tensor]]
    channels: Mapping[int, int]


@torch.no_grad()
def extract_features(
    loader: Iterable, candidates: Candidates, readers: Mapping[str, Reader]
) -> dict[str, FeatureTable]:
    """Crop averages, by each reader's name, for the candidates in the loader's ``batched_inputs``.

    Every candidate is averaged on each level, whatever its size; float32 on the CPU.
    """
    index = [torch.zeros(0, dtype=torch.long)]
    found = {
        name: {s: [torch.zeros(0, c)] for s, c in reader.channels.items()}
        for name, reader in readers.items()
    }
    for number, inputs in enumerate(loader):
        parts = [_input_boxes(item, candidates) for item in inputs]
        layout = Ragged.of(parts)
        boxes = layout.pad(torch.cat(parts))
        index += [torch.tensor(item["candidates"]) for item in inputs]
        for name, reader in readers.items():
            maps = reader.pyramid(inputs)
            for stride, means in found[name].items():
                level = maps[stride]
                cells = BoxCells(boxes.to(level.device), [tuple(level.shape[-2:])], [stride])
                means.append(layout.unpad(crop_means([[level]], cells)[0, 0].float().cpu()))
        progress = f"prototypes: {number + 1} of {len(loader)} batches of images"
        log_every_n_seconds(logging.INFO, progress, n=30, name=__name__)
    return {
        name: FeatureTable(torch.cat(index), {s: torch.cat(parts) for s, parts in levels.items()})
        for name, levels in found.items()
    }


def _input_boxes(item: dict, candidates: Candidates) -> Tensor:
    """(n, 4) boxes of an input's candidates in pixels of its resized image."""
    boxes = torch.tensor([candidates.instances[i].box for i in item["candidates"]])
    height, width = item["image"].shape[-2:]
    scale_x, scale_y = width / item["width"], height / item["height"]
    return boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y])


def student_pyramid(student: nn.Module, inputs: list[dict]) -> dict[int, Tensor]:
    """The student's maps for images loaded for it."""
    return _by_stride(student, student.preprocess_image(inputs).tensor)


def teacher_pyramid(teacher: Teacher, inputs: list[dict]) -> dict[int, Tensor]:
    """The teacher's maps for images loaded for the student."""
    with teacher.context():
        return _by_stride(teacher.model, teacher.preprocess(inputs, padded_size=(1, 1)))


def _by_stride(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    maps = model.backbone(images)
    return {stride: maps[name] for name, stride in feature_strides(model).items()}
