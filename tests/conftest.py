"""Fixtures, and a toy head, that the tests share."""

from __future__ import annotations

import logging
import os
import socket

import pytest

# Before whatever imports distutils: setuptools, which Detectron2 imports later, would refuse.
import setuptools  # noqa: F401
import torch

from d2kd.data.builtin import register_builtin_datasets
from d2kd.data.files import dataset_root

from .detectors import ARCHS, detector_config, write_config
from .toy_head import ToyMimic  # noqa: F401  (registers)

# Many tests fork, which a process that used CUDA cannot; tests/cuda are a run of their own.
if os.environ.get("D2KD_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _quiet_logging():
    """Log handlers of Detectron2 keep streams of the test that made them, which pytest closes; a
    trainer that finds logging not set up sets it up, and then caplog sees nothing of it."""
    logging.raiseExceptions = False
    for name in ("detectron2", "d2kd"):
        logging.getLogger(name).setLevel(logging.INFO)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Small tensors are slower on more threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_files(tmp_path_factory) -> dict[str, str]:
    """arch -> YAML file of a teacher that is wider than the default student."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        arch: write_config(detector_config(arch, width=24), folder / f"{arch}.yaml")
        for arch in (*ARCHS, "cascade_mask")
    }


@pytest.fixture
def free_port(monkeypatch) -> int:
    """A TCP port that was free a moment ago, for processes on the CPU: they see no GPU, where
    Detectron2 would want one for each of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory):
    """A datasets folder of the tests' own, where digits_tiny_* are made on first use."""
    root = tmp_path_factory.mktemp("datasets")
    register_builtin_datasets(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))  # for processes that a test starts
        yield root
    register_builtin_datasets(dataset_root())
