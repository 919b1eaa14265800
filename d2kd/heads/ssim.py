"""SSIM: local patches of the pyramids are compared by mean, contrast and structure.

De Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..adapters import Adapters
from ..bundle import Batch, DetectorSpec, FeatureBundle
from ..config import NOT_NEGATIVE, POSITIVE, Rule, check_values, one_of
from ..losses.ssim import RESCALE_SCOPES, median_patch_std, pyramid_ssim_loss
from .base import DISTILL_HEAD_REGISTRY, DistillHead
from .pyramid import PYRAMID_RULES, adapted_levels, build_pyramid_adapters

# Keys of DISTILL.SSIM and what their values must be.
RULES = {
    **PYRAMID_RULES,
    "RESCALE": one_of(RESCALE_SCOPES),
    "EXPONENTS": Rule(
        lambda value: len(value) == 3 and set(value) <= {0, 1} and any(value),
        "it must be three of 0 or 1, not all 0",
    ),
    "WINDOW_SIZE": Rule(lambda value: value > 0 and value % 2 == 1, "it must be odd and positive"),
    "SIGMA": POSITIVE,
    "K1": POSITIVE,
    "K2": POSITIVE,
    "STATS_PERIOD": NOT_NEGATIVE,
}


@DISTILL_HEAD_REGISTRY.register()
class SSIM(DistillHead):
    """Structural distillation of the pyramid, on all positions, without boxes or masks.

    Args:
        strides: pyramid levels to compare.
        adapters: from the student's channels to the teacher's, by stride.
        rescale: scope of the min-max rescaling of each map, see
            :func:`~d2kd.losses.ssim.min_max_rescale`.
        detach_range: no gradient through the student's minimum and maximum.
        exponents: (alpha, beta, gamma) of luminance, contrast and structure, each 0 or 1.
        window_size, sigma: of the Gaussian patch.
        k1, k2: stabilisers of luminance and of contrast and structure.
        stats_period: iterations between notes of how much contrast the teacher's rescaled patches
            have, as ``ssim/teacher_std_<stride>``; 0 for none.
    """

    reads = ("pyramid",)

    @configurable
    def __init__(
        self,
        *,
        strides: Sequence[int],
        adapters: Adapters,
        rescale: str = "image",
        detach_range: bool = False,
        exponents: tuple[int, int, int] = (1, 1, 1),
        window_size: int = 11,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        stats_period: int = 0,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.adapters = adapters
        self.rescale = rescale
        self.window = {"window_size": window_size, "sigma": sigma}
        self.options = {"detach_range": detach_range, "exponents": exponents, "k1": k1, "k2": k2}
        self.stats_period = stats_period

    @classmethod
    def from_config(cls, cfg, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> dict:
        node = cfg.DISTILL.SSIM
        check_values("DISTILL.SSIM", node, RULES)
        strides, adapters = build_pyramid_adapters(node, student_spec, teacher_spec)
        return {
            "strides": strides,
            "adapters": adapters,
            "rescale": node.RESCALE,
            "detach_range": node.DETACH_RANGE,
            "exponents": tuple(node.EXPONENTS),
            "window_size": node.WINDOW_SIZE,
            "sigma": node.SIGMA,
            "k1": node.K1,
            "k2": node.K2,
            "stats_period": node.STATS_PERIOD,
        }

    def forward(
        self, student: FeatureBundle, teacher: FeatureBundle, batch: Batch
    ) -> dict[str, Tensor]:
        students, teachers = adapted_levels(student, teacher, self.strides, self.adapters)
        # The iterations after which Detectron2 writes its metrics.
        if self.stats_period and (batch.iteration + 1) % self.stats_period == 0:
            self._log_contrast(teachers)
        loss = pyramid_ssim_loss(
            students, teachers, rescale=self.rescale, **self.window, **self.options
        )
        return {"": loss}

    def _log_contrast(self, teachers: list[Tensor]) -> None:
        """Note the median local standard deviation of each rescaled level of the teacher."""
        stds = [median_patch_std(t, self.rescale, **self.window) for t in teachers]
        storage = get_event_storage()
        # Waits for the device, once in STATS_PERIOD iterations: metrics are numbers.
        for stride, std in zip(self.strides, torch.stack(stds).tolist(), strict=True):
            storage.put_scalar(f"ssim/teacher_std_{stride}", std, smoothing_hint=False)
