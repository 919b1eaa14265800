"""A teacher's weights, which load completely or not at all."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..checkpoint_files import SafeCheckpointer
from ..errors import ConfigError, first_line
from ..files import shown
from .foreign import own_module

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"


class _StrictCheckpointer(SafeCheckpointer):
    """Loads weights, and raises where Detectron2 would only warn."""

    _path = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        misfits = {key for key, *_ in incompatible.incorrect_shapes}
        missing = set(incompatible.missing_keys) - misfits
        wrong = [f"{key} (not in the file)" for key in missing]
        wrong += [
            f"{key} ({tuple(found)} in the file, {tuple(wanted)} in the model)"
            for key, found, wanted in incompatible.incorrect_shapes
        ]
        if wrong:
            raise ConfigError(
                f"{len(wrong)} of the teacher's weights did not load from '{shown(self._path)}': "
                + ", ".join(sorted(wrong))
            )
        ignored = [k for k in incompatible.unexpected_keys if not k.startswith("distill_heads.")]
        if ignored:
            logger.info("The teacher's file has keys that its model lacks: %s", ", ".join(ignored))


def load_teacher_weights(model: nn.Module, weights: str) -> None:
    """Load ``weights`` into ``model``, completely; a module inside a detector gets its own keys.

    Raises:
        ConfigError: the file cannot be read, or a weight of the model did not load (all are named).
    """
    if weights == RANDOM_WEIGHTS:
        logger.warning("The teacher has random weights: good for a test, not for distillation.")
        return
    try:
        _StrictCheckpointer(own_module(model)).load(weights)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the teacher's weights '{weights}' cannot be read: {first_line(error)}"
        ) from error
