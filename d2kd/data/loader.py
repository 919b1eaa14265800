"""A training loader whose every batch is a function of (seed, iteration, rank) only.

So a run that is stopped and resumed sees the images and augmentations that it would have seen
without the stop, and two runs with one seed (a baseline and a distilled student) see the same,
whatever the number of workers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.utils.data as torchdata
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

from ..config_rules import SAMPLERS
from ..errors import ConfigError
from .image_files import explain_unreadable


def seed_of(*numbers: int) -> int:
    """A well-mixed 63-bit seed from a few numbers (seed, iteration, rank, ...)."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


class ImageError(ConfigError):
    """An image that cannot be trained on or evaluated; the message names its file.

    PyTorch carries an exception out of a worker process as a text with the traceback, and makes a
    new one of it: the message is its last line.
    """

    def __init__(self, message: str):
        super().__init__(str(message).strip().splitlines()[-1].rpartition(f"{_WORKER_PREFIX}: ")[2])


_WORKER_PREFIX = f"{ImageError.__module__}.{ImageError.__qualname__}"


class NamingMapper:
    """A mapper whose error of a broken image is one line that names the file."""

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """The sample of ``record``, or an ImageError: the image cannot be read, has more than 8
        bits per channel, or is of another size than the record says."""
        self._refuse(record, deep_only=True)
        try:
            return self.mapper(record)
        except Exception:
            self._refuse(record)
            raise

    @staticmethod
    def _refuse(record: dict, deep_only: bool = False) -> None:
        problem = explain_unreadable(record, deep_only)
        if problem:
            raise ImageError(f"{problem}; 'd2kd check' finds all such images")


class _SeededMap(torchdata.Dataset):
    """Maps (index, seed) to a sample; the mapper's random augmentation is drawn from the seed."""

    def __init__(self, records: torchdata.Dataset, mapper: Callable):
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            return self.mapper(self.records[index])
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class BatchSampler(torchdata.Sampler):
    """An endless stream of batches of (index, seed), from any iteration on.

    Args:
        aspect: (n,) bool, whether an image is wide; with ``group`` a batch holds one kind only.
        batch_size: images per batch, over all ranks.
        repeats: (n,) how often an image comes in an epoch; fractions are drawn. None: once.
        start: the first batch to yield.

    Each rank takes its share of every batch.
    """

    def __init__(
        self,
        aspect: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        group: bool = True,
        repeats: np.ndarray | None = None,
        start: int = 0,
    ):
        self.aspect, self.batch_size, self.seed = aspect, batch_size, seed
        self.group, self.repeats, self.start = group, repeats, start
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(seed_of(self.seed, epoch))
        indices = np.arange(len(self.aspect))
        if self.repeats is not None:
            whole = np.floor(self.repeats)
            extra = generator.random(len(indices)) < self.repeats - whole
            indices = np.repeat(indices, (whole + extra).astype(int))
        return generator.permutation(indices)

    def _batches(self) -> Iterator[list[int]]:
        buckets: dict[bool, list[int]] = {False: [], True: []}
        for epoch in itertools.count():
            for index in self._epoch(epoch):
                bucket = buckets[bool(self.aspect[index]) and self.group]
                bucket.append(int(index))
                if len(bucket) == self.batch_size:
                    yield bucket[:]
                    bucket.clear()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self._batches()):
            if number >= self.start:
                keys = [(i, seed_of(self.seed, number, slot)) for slot, i in enumerate(batch)]
                yield keys[self.rank :: self.world_size]


def validate_loader_config(cfg: CfgNode, world_size: int) -> None:
    """Check what the loader needs of ``cfg``, for ``world_size`` processes.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the sampler is not supported.
    """
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by the "
            f"{world_size} processes"
        )
    if cfg.DATALOADER.SAMPLER_TRAIN not in SAMPLERS:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is '{cfg.DATALOADER.SAMPLER_TRAIN}'; valid: {list(SAMPLERS)}"
        )


def build_train_loader(cfg: CfgNode, seed: int, start: int = 0) -> torchdata.DataLoader:
    """Detectron2's training loader for ``cfg``, as a function of ``seed``, from batch ``start`` on.

    Raises:
        ConfigError: see :func:`validate_loader_config`.
    """
    validate_loader_config(cfg, comm.get_world_size())
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
    )
    repeats = None
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeats = _repeat_factors(cfg, records)
    sampler = BatchSampler(
        np.array([record["width"] > record["height"] for record in records]),
        cfg.SOLVER.IMS_PER_BATCH,
        seed,
        group=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        repeats=repeats,
        start=start,
    )
    return torchdata.DataLoader(
        _SeededMap(DatasetFromList(records, copy=False), NamingMapper(DatasetMapper(cfg, True))),
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
    )


def _repeat_factors(cfg: CfgNode, records: list[dict]) -> np.ndarray:
    """(n,) how often each image comes in an epoch, by the rarest of its classes."""
    options = {}
    if "REPEAT_SQRT" in cfg.DATALOADER:  # of a Detectron2 after 0.6
        options["sqrt"] = cfg.DATALOADER.REPEAT_SQRT
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, cfg.DATALOADER.REPEAT_THRESHOLD, **options
    ).numpy()


def build_test_loader(cfg: CfgNode, dataset_name: str) -> torchdata.DataLoader:
    """Detectron2's loader for evaluation; a broken image is named in one line."""
    return build_detection_test_loader(
        cfg, dataset_name, mapper=NamingMapper(DatasetMapper(cfg, False))
    )
