"""What only a GPU shows; skipped elsewhere. On one: D2KD_TEST_GPU=1 python -m pytest tests/cuda"""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU and D2KD_TEST_GPU=1")

# Words of names of functions that may wait: non-maximum suppression decides how many boxes are
# left.
MAY_WAIT = ("nms",)
