"""Whether an exported file finds what the model finds: the same detections, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from tabulate import tabulate
from torch import Tensor

# What may differ in a detection that is called the same.
BOX_TOLERANCE = 0.1  # pixels, of each side
SCORE_TOLERANCE = 1e-3
MASK_TOLERANCE = 1e-3  # of a probability
Outputs = dict[str, Tensor]


@dataclass
class Parity:
    """How a file's detections differ from the model's, over some images.

    Attributes:
        images: how many. detections: of the model.
        box: pixels, score, mask: the largest differences of detections that are the same.
        others: detections that only one of the two has.
        at_the_cut: those of them that only the limit of detections parts: where as many are kept as
            may be, and the scores at the end of the list are equal but for rounding.
    """

    images: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    others: int = 0
    at_the_cut: int = 0

    @property
    def holds(self) -> bool:
        return self.others == self.at_the_cut

    def add(self, expected: Outputs, found: Outputs, limit: int) -> None:
        """Compare the outputs of one image.

        Args:
            limit: ``TEST.DETECTIONS_PER_IMAGE``.
        """
        a, b = ({name: value.cpu().numpy() for name, value in o.items()} for o in (expected, found))
        box = np.abs(a["boxes"][:, None] - b["boxes"][None]).max(axis=2, initial=0)
        score = np.abs(a["scores"][:, None] - b["scores"][None])
        other_class = a["classes"][:, None] != b["classes"][None]
        # In units of what is allowed, so that of equal boxes those of equal scores are paired.
        cost = box / BOX_TOLERANCE + score / SCORE_TOLERANCE
        rows, columns = linear_sum_assignment(np.where(other_class, 1e9, cost))
        mask = np.zeros(len(rows))
        if "masks" in a:
            mask = np.abs(a["masks"][rows] - b["masks"][columns]).max(axis=(1, 2), initial=0)
        box, score = box[rows, columns], score[rows, columns]
        same = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE) & (mask <= MASK_TOLERANCE)
        same &= ~other_class[rows, columns]
        rest = [np.delete(a["scores"], rows[same]), np.delete(b["scores"], columns[same])]
        self.others += sum(map(len, rest))
        if len(a["scores"]) >= limit:
            last = a["scores"].min() + SCORE_TOLERANCE
            self.at_the_cut += int((np.concatenate(rest) <= last).sum())
        self.images += 1
        self.detections += len(a["scores"])
        for name, values in (("box", box), ("score", score), ("mask", mask)):
            setattr(self, name, max(getattr(self, name), float(values[same].max(initial=0))))


def compare(pairs: Iterable[tuple[Outputs, Outputs]], limit: int) -> Parity:
    """The differences over all images; ``pairs`` are what the model and what the file found."""
    parity = Parity()
    for expected, found in pairs:
        parity.add(expected, found, limit)
    return parity


def parity_table(found: dict[str, Parity]) -> str:
    """File -> its differences, as Markdown."""
    rows = [
        [name, p.images, p.detections, f"{p.box:.1e}", f"{p.score:.1e}", f"{p.mask:.1e}"]
        + [f"{p.others} ({p.at_the_cut} at the limit)" if p.others else "0"]
        for name, p in found.items()
    ]
    headers = ["file", "images", "detections", "box, px", "score", "mask", "only in one"]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
