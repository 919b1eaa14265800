"""Reading checkpoints that others made: tensors and arrays come in, code does not run.

A pickle can call any function while it is read. PyTorch's files are read with ``weights_only``;
the ``.pkl`` files of the model zoo and of Caffe2 by an unpickler that knows NumPy arrays and
plain containers only.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor

from .errors import ConfigError, first_line
from .files import shown

# What files of arrays consist of; NumPy 1 and 2 call its home differently.
_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("collections", "OrderedDict"),
    # Bytes in pickles of Python 2.
    ("_codecs", "encode"),
}

# What published files wrap a state dict in.
_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses everything that is neither an array nor a container."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAYS:
            if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
                module = module.replace("numpy.core", "numpy._core")
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")


def read_pickle(path: str) -> Any:
    """The arrays of a ``.pkl`` file; a ConfigError if it is damaged or holds something else, which
    is not run."""
    try:
        with PathManager.open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # what unpickling foreign bytes may raise has no end
        reason = first_line(error)
        if not isinstance(error, pickle.UnpicklingError) or not reason.startswith("it holds"):
            reason = f"it is damaged, or no pickle of arrays ({type(error).__name__})"
        raise ConfigError(f"'{shown(path)}' is not read: {reason}") from error


def read_tensors(path: str) -> Any:
    """The tensors and plain values of a file of ``torch.save``; a ConfigError if it is damaged or
    holds something else, which is not run."""
    try:
        with PathManager.open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"(?i)unsupported (?:global|class|type)\S* (?:global )?(\S+)", str(error))
        reason = f"it is damaged, or no file of torch.save ({type(error).__name__})"
        if found:
            reason = f"it holds {found[1]}, not only tensors and plain values"
        raise ConfigError(f"'{shown(path)}' is not read: {reason}") from error


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The weights by name of a file of ``torch.save``, bare or wrapped, or of safetensors.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        read = _read_safetensors if path.endswith(".safetensors") else read_tensors
        found: Any = read(path)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"'{shown(path)}' cannot be read, or is damaged: {why}") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    is_state = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not is_state or not found:
        raise ConfigError(f"'{shown(path)}' holds no weights by name, but a {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:
        raise ConfigError(f"'{shown(path)}' is not read: {first_line(error)}") from error


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which runs no code of a file."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return _zoo_checkpoint(read_pickle(filename), filename)
        if filename.endswith(".pyth"):  # pycls
            state = read_tensors(filename)["model_state"]
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return read_tensors(f)


def _zoo_checkpoint(data: Any, filename: str) -> dict[str, Any]:
    """The content of a ``.pkl`` file in Detectron2's or Caffe2's format."""
    if not isinstance(data, dict):
        raise ConfigError(f"'{filename}' holds a {type(data).__name__}, no checkpoint")
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)  # Caffe2: detection models have "blobs", ImageNet models none
    weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
