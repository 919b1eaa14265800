"""SSIM: local patches of the pyramids are compared by mean, contrast and structure.

De Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..detectors.bundle import Batch
from ..keys import NOT_NEGATIVE, POSITIVE, Rule, key, one_of
from ..losses.ssim import RESCALE_SCOPES, median_patch_std, pyramid_ssim_loss
from ..registry import DISTILL_HEAD_REGISTRY
from .pyramid import PyramidHead, PyramidOptions


@dataclass(frozen=True)
class SSIMOptions(PyramidOptions):
    """Keys of ``DISTILL.SSIM``."""

    weight: float = key(
        4.0,
        NOT_NEGATIVE,
        "lambda. The paper found 2 and 4 best; which for which detector is not known to "
        "us. Our COCO configs take 2 for two-stage pairs; {1, 2, 4, 8} is the grid to "
        "try.",
    )
    rescale: str = key(
        "image",
        one_of(RESCALE_SCOPES),
        "psi: what shares one minimum and maximum when a map is rescaled to [0, 1]: "
        '"image" (one image of a level), "tensor" (the batch) or "channel" (one channel '
        "of an image). Not in the paper.",
    )
    detach_range: bool = key(
        False,
        comment="Treat the student's minimum and maximum as constants in the backward pass.",
    )
    exponents: tuple[int, ...] = key(
        (1, 1, 1),
        Rule(
            lambda value: len(value) == 3 and set(value) <= {0, 1} and any(value),
            "it must be three of 0 or 1, not all 0",
        ),
        "alpha, beta, gamma of luminance, contrast and structure, each 0 or 1. Others "
        "than 1, 1, 1 are for ablations: they take about ten times the memory.",
    )
    window_size: int = key(
        11,
        Rule(lambda value: value > 0 and value % 2 == 1, "it must be odd and positive"),
        "Side of the Gaussian patch, odd, in positions of the level (paper).",
    )
    sigma: float = key(
        1.5, POSITIVE, "Standard deviation of the Gaussian patch, in positions (paper)."
    )
    k1: float = key(
        0.01,
        POSITIVE,
        "Stabiliser C1 = K1^2 of luminance (paper).",
    )
    k2: float = key(
        0.03,
        POSITIVE,
        "Stabiliser C2 = K2^2 of contrast and structure (paper). Contrast below K2 counts little.",
    )
    stats_period: int = key(
        500,
        NOT_NEGATIVE,
        "Every so many iterations, log the median local standard deviation of the "
        "teacher's rescaled levels as ssim/teacher_std_<stride>: below 0.02, K2 masks the "
        'structure, and RESCALE "channel", a larger WEIGHT or a smaller K2 may help. 0: '
        "never.",
    )


@DISTILL_HEAD_REGISTRY.register()
class SSIM(PyramidHead):
    """Structural distillation of the pyramid, on all positions, without boxes or masks.

    Every ``STATS_PERIOD`` iterations it notes how much contrast the teacher's rescaled patches
    have, as ``ssim/teacher_std_<stride>``.
    """

    Options = SSIMOptions

    def compare(self, students: list[Tensor], teachers: list[Tensor], batch: Batch) -> Tensor:
        # The iterations after which Detectron2 writes its metrics.
        options = self.options
        if options.stats_period and (batch.iteration + 1) % options.stats_period == 0:
            self._log_contrast(teachers)
        return pyramid_ssim_loss(
            students,
            teachers,
            rescale=options.rescale,
            detach_range=options.detach_range,
            exponents=options.exponents,
            window_size=options.window_size,
            sigma=options.sigma,
            k1=options.k1,
            k2=options.k2,
        )

    def _log_contrast(self, teachers: list[Tensor]) -> None:
        """Note the median local standard deviation of each rescaled level of the teacher."""
        options = self.options
        patch = options.rescale, options.window_size, options.sigma
        stds = [median_patch_std(t, *patch) for t in teachers]
        storage = get_event_storage()
        # Waits for the device, once in STATS_PERIOD iterations: metrics are numbers.
        for stride, std in zip(self.strides, torch.stack(stds).tolist(), strict=True):
            storage.put_scalar(f"ssim/teacher_std_{stride}", std, smoothing_hint=False)
