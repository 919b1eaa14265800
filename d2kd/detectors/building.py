"""Errors of Detectron2's constructors, which come from values of the config, in one line."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator

import detectron2
import fvcore
import torch

from ..errors import ConfigError, first_line

# Whose constructors build what a config says: in an error there a config is wrong, not code.
_PACKAGES = tuple(
    os.path.dirname(os.path.dirname(os.path.abspath(str(package.__file__))))
    + f"{os.sep}{package.__name__}{os.sep}"
    for package in (detectron2, fvcore, torch)
)
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Building a model from a config.

    Args:
        what: is built, in words, e.g. "the student".

    Raises:
        ConfigError: Detectron2 could not; names its function. (An error of another's code keeps its
            traceback.)
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        if not frames or not all(frame.filename.startswith((*_PACKAGES, _OWN)) for frame in frames):
            raise
        last = frames[-1]
        if not last.filename.startswith(_PACKAGES):
            raise
        file = os.path.join(*last.filename.split(os.sep)[-3:])
        raise ConfigError(
            f"{what} cannot be built: {type(error).__name__}: {first_line(error)}, in "
            f"{last.name}() of {file}; a key of MODEL has a value that it does not take"
        ) from error
