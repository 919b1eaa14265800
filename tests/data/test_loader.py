"""The training loader: a batch is a function of seed, iteration and rank alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from d2kd import ConfigError
from d2kd.data.loader import BatchSampler, build_train_loader

from ..detectors import detector_config


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
