"""Where a detector and the annotations of a dataset agree, and where one of them is wrong.

Boxes are (n, 4) xyxy in pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

# Overlap at which a box is that of an object, as in COCO's AP50.
MATCH = 0.5
# A detection and an annotation of one class are one object where centres and sides differ by less
# than this part of the box; boxes that differ by more than the next, and by far more than boxes
# usually do here, are displaced.
_SAME_OBJECT, _DISPLACED, _FAR_MORE = 1.0, 0.2, 2.5
_BINS = 10


class Boxes(NamedTuple):
    """Of one image: (n, 4) boxes, (n,) classes, (n,) scores; annotations have scores of 1."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, boxes, classes, scores=None) -> Boxes:
        places = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        scores = np.ones(len(places)) if scores is None else np.asarray(scores, dtype=np.float64)
        return cls(places, np.asarray(classes, dtype=int).reshape(-1), scores)

    def pick(self, which: np.ndarray) -> Boxes:
        return Boxes(self.boxes[which], self.classes[which], self.scores[which])


@dataclass
class Disagreement:
    """What is wrong in one image, either in the detections or in the annotations.

    Attributes:
        image: its place in the dataset.
        other_class: (annotation, detection) of one place and different classes.
        displaced: (annotation, detection) of one class with boxes that differ by much.
        extra: detections where nothing is annotated.
        missed: annotations that nothing was detected of.
        weight: by how much they disagree.
    """

    image: int
    other_class: list[tuple[int, int]]
    displaced: list[tuple[int, int]]
    extra: list[int]
    missed: list[int]
    weight: float

    def words(self) -> str:
        """E.g. "2 of another class, 1 displaced"."""
        counts = {
            "of another class": self.other_class,
            "displaced": self.displaced,
            "not annotated": self.extra,
            "not found": self.missed,
        }
        return ", ".join(f"{len(of)} {what}" for what, of in counts.items() if of)


class Agreement:
    """Compares detections with annotations, image after image.

    Args:
        num_classes: K.
        confident: score from which a detection contradicts an annotation.

    Attributes:
        confusion: (K, K + 1) annotations of a class, by the class of the best detection at their
            place; the last column counts those without any.
        paired, displaced: annotations that a confident detection of their class is of, and those of
            them whose box differs by much.
    """

    def __init__(self, num_classes: int, confident: float = 0.5):
        self.confident = confident
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=int)
        self._images: list[tuple[Boxes, Boxes]] = []
        self._pairs: list[list[tuple[int, int, float]]] = []
        self._hits: list[np.ndarray] = []

    def add(self, truth: Boxes, found: Boxes) -> None:
        """Take in one image; ``found`` with all scores, in any order."""
        found = found.pick(np.argsort(-found.scores, kind="stable"))
        overlap = _overlaps(truth.boxes, found.boxes)
        for at, own in zip(truth.classes, overlap >= MATCH, strict=True):
            best = found.classes[own][:1]
            self.confusion[at, best[0] if len(best) else -1] += 1
        self._hits.append(_hits(truth, found, overlap))
        self._images.append((truth, found))
        self._pairs.append(list(self._pair(truth, found)))

    def _pair(self, truth: Boxes, found: Boxes) -> Iterator[tuple[int, int, float]]:
        """(annotation, confident detection of its class, how far their boxes differ), the nearest
        first, each once."""
        sure = found.scores >= self.confident
        gaps = _gaps(truth.boxes, found.boxes)
        gaps[(truth.classes[:, None] != found.classes[None]) | ~sure[None]] = np.inf
        while gaps.size and (gap := gaps.min()) < _SAME_OBJECT:
            one, other = np.unravel_index(gaps.argmin(), gaps.shape)
            gaps[one], gaps[:, other] = np.inf, np.inf
            yield int(one), int(other), float(gap)

    @property
    def paired(self) -> int:
        return sum(map(len, self._pairs))

    @property
    def limit(self) -> float:
        """How far the boxes of one object may differ: far more than they usually do here."""
        gaps = [gap for pairs in self._pairs for _, _, gap in pairs]
        return max(_DISPLACED, _FAR_MORE * float(np.median(gaps))) if gaps else _DISPLACED

    @property
    def displaced(self) -> int:
        limit = self.limit
        return sum(gap > limit for pairs in self._pairs for _, _, gap in pairs)

    def calibration(self) -> tuple[float, float]:
        """Expected calibration error over ten bins of the score, and mean score less precision."""
        scores = np.concatenate([found.scores for _, found in self._images])
        hits = np.concatenate(self._hits)
        if not len(scores):
            return 0.0, 0.0
        bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
        sums = np.bincount(bins, scores - hits, _BINS)
        return float(np.abs(sums).sum() / len(scores)), float(sums.sum() / len(scores))

    def disagreements(self) -> list[Disagreement]:
        """Of all images in which there is one, the strongest first."""
        limit = self.limit
        found = [self._disagreement(image, limit) for image in range(len(self._images))]
        return sorted((one for one in found if one.weight), key=lambda one: -one.weight)

    def _disagreement(self, image: int, limit: float) -> Disagreement:
        truth, found = self._images[image]
        overlap = _overlaps(truth.boxes, found.boxes) >= MATCH
        sure = found.scores >= self.confident
        agreed, used = ({pair[side] for pair in self._pairs[image]} for side in (0, 1))
        displaced = [(a, b) for a, b, gap in self._pairs[image] if gap > limit]
        other_class, missed = [], []
        for at in set(range(len(truth.classes))) - agreed:
            there = np.flatnonzero(overlap[at])
            if not len(there):
                missed.append(at)
            elif sure[there[0]] and found.classes[there[0]] != truth.classes[at]:
                other_class.append((at, int(there[0])))
        extra = [int(b) for b in np.flatnonzero(sure & ~overlap.any(0)) if b not in used]
        certain = [b for _, b in (*other_class, *displaced)] + extra
        strength = float(found.scores[certain].sum()) + 0.25 * len(missed)
        weight = strength / np.sqrt(1 + len(truth.classes))
        return Disagreement(image, other_class, displaced, extra, missed, weight)

    def image(self, at: int) -> tuple[Boxes, Boxes]:
        """Annotations and detections of an image, the latter by falling score, as indexed in a
        :class:`Disagreement`."""
        return self._images[at]


def _overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return box_iou(torch.from_numpy(one), torch.from_numpy(other)).numpy()


def _gaps(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n, m), the largest of: distance of centres over the sides of the annotation, and logarithms
    of the ratios of sides, in each direction."""
    (centre, size), (other, sizes) = _centres(truth), _centres(found)
    shift = np.abs(centre[:, None] - other[None]) / size[:, None]
    scale = np.abs(np.log(size[:, None] / sizes[None]))
    return np.maximum(shift, scale).max(-1, initial=0.0)


def _centres(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)


def _hits(truth: Boxes, found: Boxes, overlap: np.ndarray) -> np.ndarray:
    """(m,) 1 where a detection, by falling score, is the first at an object of its class."""
    free, hits = np.ones(len(truth.classes), dtype=bool), np.zeros(len(found.classes))
    for at in range(len(found.classes)):
        fits = np.where(free & (truth.classes == found.classes[at]), overlap[:, at], 0.0)
        if len(fits) and fits.max() >= MATCH:
            free[fits.argmax()] = False
            hits[at] = 1.0
    return hits


@dataclass(frozen=True)
class WrongClass:
    """A class whose objects the detector mostly takes for another one."""

    name: int
    taken_for: int
    share: float  # of those that it found, in parts of one
    swapped: bool  # it takes those of the other class for this one, too


def wrong_classes(confusion: np.ndarray, at_least: int = 5) -> list[WrongClass]:
    """Classes of which more than half of the objects found, and as many as ``at_least``, are given
    to one other class."""
    found = confusion[:, :-1]
    totals, taken = found.sum(1), found.argmax(1)
    share = found.max(1) / np.maximum(totals, 1)
    wrong = (totals >= at_least) & (taken != np.arange(len(found))) & (share > 0.5)
    return [
        WrongClass(c, int(taken[c]), float(share[c]), wrong[taken[c]] and taken[taken[c]] == c)
        for c in np.flatnonzero(wrong).tolist()
    ]
