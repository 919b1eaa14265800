"""Checkpoints of others: arrays come in, code does not run."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2kd import ConfigError
from d2kd.checkpoint_files import SafeCheckpointer, read_pickle, read_tensors


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_nothing(tmp_path, protocol):
    """A file that would run a command is refused in one line, and nothing is run."""
    file, mark = tmp_path / "evil.pkl", tmp_path / "PWNED"
    content = {"model": {"x": Evil(mark)}, "__author__": "me"}
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ConfigError, match="not only arrays"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(file))
    assert not mark.exists()


def test_torch_files_run_nothing(tmp_path):
    """So is a .pth file."""
    file, mark = tmp_path / "evil.pth", tmp_path / "PWNED"
    torch.save({"model": {"x": Evil(mark)}}, file)
    with pytest.raises(ConfigError, match="it holds posix.system, not only tensors"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(file))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_still_load(tmp_path, protocol):
    """Detectron2's zoo format, with arrays and scalars, in every protocol."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {
        "model": OrderedDict({"weight": weight, "bias": np.zeros(2, np.float32)}),
        "__author__": "zoo",
        "step": np.float32(3),
    }
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    assert np.array_equal(read_pickle(str(file))["model"]["weight"], weight)
    model = nn.Linear(3, 2)
    SafeCheckpointer(model).load(str(file))
    assert np.array_equal(model.weight.detach().numpy(), weight)


def test_numpy_1_pickles(tmp_path):
    """Files of NumPy 1 name numpy.core, which NumPy 2 has renamed."""
    data = pickle.dumps({"blobs": {"w": np.ones(3, np.float32)}}, protocol=2)
    file = tmp_path / "old.pkl"
    file.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_pickle(str(file))["blobs"]["w"].tolist() == [1, 1, 1]


def test_caffe2_files(tmp_path):
    """Blobs of Caffe2 are matched by Detectron2's heuristics; momenta are left out."""
    file = tmp_path / "c2.pkl"
    blobs = {"conv1_w": np.ones((4, 3, 7, 7), np.float32), "conv1_w_momentum": np.ones(1)}
    file.write_bytes(pickle.dumps({"blobs": blobs}))
    checkpointer = SafeCheckpointer(FrozenBatchNorm2d(1))
    checkpoint = checkpointer._load_file(str(file))
    assert list(checkpoint["model"]) == ["conv1_w"] and checkpoint["matching_heuristics"]


@pytest.mark.parametrize("name", ["a.pkl", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x05."])
def test_damaged_files(tmp_path, name, content):
    """Truncated and foreign bytes end in one line that names the file."""
    file = tmp_path / name
    file.write_bytes(content)
    read = read_pickle if name.endswith("pkl") else read_tensors
    with pytest.raises(ConfigError, match=f"{name}' is not read"):
        read(str(file))
