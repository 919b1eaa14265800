"""What only a GPU shows; skipped elsewhere. On one: python -m pytest tests/cuda"""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Parts of names of functions that may wait: non-maximum suppression decides how many boxes are
# left.
MAY_WAIT = ("nms",)
