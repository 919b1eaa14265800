"""How a box responds to prototypes: the two strategies of ``GLOBAL.RESPONSES``.

Shape legend: L levels, N boxes, K classes, M prototypes per class, C channels. Everything is
computed for all levels together.
"""

from __future__ import annotations

from torch import Tensor

from ...losses import global_knowledge as losses


class CosineResponses:
    """Cosines to the prototypes of all classes (released code)."""

    def respond(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Features (..., L or 1, N, C) to prototypes (..., L, K, M, C): (..., L, N, K, M)."""
        return losses.cosine_responses(features, prototypes)

    def reliability(
        self, student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor
    ) -> Tensor:
        """r (L, N) of boxes of the classes ``labels`` (N,), from responses (L, N, K, M)."""
        return losses.cosine_reliability(student, teacher, labels, present)

    def loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        reliability: Tensor,
        valid: Tensor,
        present: Tensor,
    ) -> Tensor:
        """The global loss per level, (L,)."""
        return losses.cosine_global_loss(student, teacher, reliability, valid, present)


class ProjectionResponses:
    """Coefficients of a projection on the prototypes of the own class (the paper's wording).

    Args:
        ridge: mu, the regulariser.
    """

    def __init__(self, ridge: float):
        self.ridge = ridge

    def respond(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return losses.projection_responses(features, prototypes, self.ridge)

    def reliability(
        self, student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor
    ) -> Tensor:
        return losses.projection_reliability(student, teacher, labels)

    def loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        reliability: Tensor,
        valid: Tensor,
        present: Tensor,
    ) -> Tensor:
        return losses.projection_global_loss(student, teacher, labels, reliability, valid)
