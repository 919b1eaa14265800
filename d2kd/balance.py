"""Balancing heads: each head's weight is such that it makes a given share of the gradient.

A loss says nothing of how strongly it pulls at the student; its gradient does. So every ``PERIOD``
iterations the gradients of the student's own losses and of each term of each head are computed at
the maps of the student's pyramid, where all of them meet, by passes back through the detector's
heads and the distillation heads only. With the norms D of the detector's gradient and n_h of a
head's without its weight, the weight

    w_h = s_h / (1 - S) * D / n_h,    S the sum of s_h over the heads that run,

gives each head the share s_h = w_h n_h / (D + sum_k w_k n_k). No step of a search is in it, so it
does not matter which weight the head began with. D / n_h is averaged, in logarithms, over
measurements, of which one that is far off counts as ten times off.

A head without a gradient at the pyramid, because it reads what is below, is measured at the weights
of the student's backbone.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .keys import BELOW_ONE, COUNT, ITERATION_OR_NEVER, Options, Rule, key
from .registry import node_name

logger = logging.getLogger(__name__)

# So long must distillation pull more strongly than the detector's losses to be warned of.
LONG = 500
# What gradients in float16 are multiplied with, as GradScaler begins; divided at an overflow.
_HALF_SCALE, _OVERFLOW_DIVISOR = 2.0**16, 16.0
_FARTHEST = math.log(10)
# A weight is printed when it has changed by this factor since it was printed last.
_PRINTED_CHANGE = 1.25
DETECTOR = "detector"  # stands for the student's own losses among the heads

Terms = Mapping[str, Tensor]
# Stride -> tensors at which a gradient is measured; those of a trunk, which has no stride, at 0.
Places = Mapping[int, Sequence[Tensor]]


@dataclass(frozen=True)
class BalanceOptions(Options):
    """Keys of ``DISTILL.BALANCE``."""

    enabled: bool = key(
        False,
        comment="Measure each head's gradient and choose its weight by it: WEIGHT is then only "
        "the middle of what can be chosen, and SCHEDULE changes what is chosen.",
    )
    share: float = key(
        0.2,
        Rule(lambda value: 0 < value < 1, "it must be between 0 and 1"),
        "Part of the gradient at the student's pyramid that distillation makes: of each head this "
        "divided by the number of heads, unless the head has a SHARE.",
    )
    period: int = key(
        100,
        COUNT,
        "Iterations between two measurements; iterations 0, 1, 2, 4, 8, ... are measured too.",
    )
    smoothing: float = key(
        0.7,
        BELOW_ONE,
        "Part of the mean over measurements that a new one leaves as it was.",
    )
    bound: float = key(
        1e4,
        Rule(lambda value: 1 <= value < math.inf, "it must be at least 1"),
        "A chosen weight is at least WEIGHT / BOUND and at most WEIGHT x BOUND.",
    )
    freeze_iter: int = key(
        -1,
        ITERATION_OR_NEVER,
        "First iteration from which weights stay as they are; shares are measured and logged on. "
        "0: measure only. -1: never.",
    )


@dataclass(frozen=True)
class Lengths:
    """Norms of gradients at one set of places, over the batches of all ranks.

    Attributes:
        strides: of the places, in the order of the lists below.
        detection: norm of the gradient of the student's own losses at each place.
        heads: head -> that of the sum of its terms, without the head's weight.
        terms: head -> term -> that of one term.
        cosines: head or "detector" -> another of them -> cosine of the angle between the gradients
            of both, over all places together; one without a gradient is left out. Below 0 a step
            for one undoes a part of a step for the other.
    """

    strides: tuple[int, ...]
    detection: list[float]
    heads: dict[str, list[float]]
    terms: dict[str, dict[str, list[float]]]
    cosines: dict[str, dict[str, float]]

    def shares(self, factors: Mapping[str, float]) -> dict[str, float]:
        """Part of the gradient that each head makes, its terms being multiplied by its factor."""
        return {name: self._share(name, own, factors) for name, own in self.heads.items()}

    def details(self, name: str, factors: Mapping[str, float]) -> dict[str, float]:
        """The head's share at each stride, then that of each of its terms, of several, then the
        cosines."""
        found, own = {}, self.heads[name]
        if len(own) > 1:
            for at, stride in enumerate(self.strides):
                found[f"stride{stride}"] = self._share(name, own, factors, slice(at, at + 1))
        if len(self.terms[name]) > 1:
            for term, lengths in self.terms[name].items():
                found[term] = self._share(name, lengths, factors)
        for other, cosine in self.cosines[name].items():
            found[f"cosine_{other if other == DETECTOR else node_name(other).lower()}"] = cosine
        return found

    def _share(
        self, name: str, own: list[float], factors: Mapping[str, float], at: slice = slice(None)
    ) -> float:
        """``own``, of the head ``name``, over all that is at these places, or at some of them."""

        def norm(head: str, lengths: list[float]) -> float:
            return math.hypot(*(factors[head] * length for length in lengths[at]))

        whole = math.hypot(*self.detection[at])
        whole += sum(norm(head, lengths) for head, lengths in self.heads.items())
        return norm(name, own) / whole if whole else 0.0


def gradient_lengths(
    detection: Tensor, heads: Mapping[str, Terms], places: Places, scale: float = 1.0
) -> Lengths | None:
    """Norms of the gradients of losses at ``places`` and the angles between them, whose graph stays
    as it is; None where one is not finite. The gradients of all heads are in memory at a time.

    Args:
        detection: sum of the student's own losses.
        scale: what gradients are multiplied by on their way.
    """
    tensors = [tensor for place in places.values() for tensor in place]
    sizes = [len(place) for place in places.values()]
    zero = detection.new_zeros((), dtype=torch.float32)

    def gradients(loss: Tensor) -> list[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(tensors)
        start = torch.full_like(loss, scale)
        return list(torch.autograd.grad(loss, tensors, start, retain_graph=True, allow_unused=True))

    def squares(found: Sequence[Tensor | None]) -> Tensor:
        norms = [
            zero if x is None else torch.linalg.vector_norm(x, dtype=torch.float32) for x in found
        ]
        return _by_place(torch.stack(norms).square(), sizes)

    sums = {DETECTOR: gradients(detection)}
    rows = [squares(sums[DETECTOR])]
    for name, terms in heads.items():
        whole: list[Tensor | None] = [None] * len(tensors)
        for loss in terms.values():
            found = gradients(loss)
            rows.append(squares(found))
            whole = list(map(_sum, whole, found))
        rows.append(squares(whole))
        sums[name] = whole
    pairs = list(itertools.combinations(sums, 2))
    rows += [_by_place(_products(sums[a], sums[b], zero), sizes) for a, b in pairs]
    table = torch.stack(rows)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(table)
    table = table.cpu()  # the one wait of a measurement
    found = (table[: len(rows) - len(pairs)].sqrt() / scale).tolist()
    if not all(math.isfinite(value) for row in found for value in row):
        return None
    values = iter(found)
    first, own, single = next(values), {}, {}
    for name, terms in heads.items():
        single[name] = {term: next(values) for term in terms}
        own[name] = next(values)
    dots = (table[len(found) :].sum(dim=1).double() / scale**2).tolist()
    norms = {name: math.hypot(*lengths) for name, lengths in {DETECTOR: first, **own}.items()}
    return Lengths(tuple(places), first, own, single, _cosines(pairs, dots, norms))


def _by_place(values: Tensor, sizes: list[int]) -> Tensor:
    """Sums of the values at each place."""
    return torch.stack([part.sum() for part in values.split(sizes)])


def _products(one: list[Tensor | None], other: list[Tensor | None], zero: Tensor) -> Tensor:
    return torch.stack(
        [
            zero if x is None or y is None else (x.float() * y.float()).sum()
            for x, y in zip(one, other, strict=True)
        ]
    )


def _cosines(
    pairs: Iterable[tuple[str, str]], dots: Iterable[float], norms: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {name: {} for name in norms}
    for (a, b), dot in zip(pairs, dots, strict=True):
        if norms[a] and norms[b]:
            found[a][b] = found[b][a] = dot / (norms[a] * norms[b])
    return found


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


class Outweighed:
    """Notices when distillation pulls more strongly than the detector's losses, for long."""

    def __init__(self) -> None:
        self.long = LONG
        self._since: int | None = None

    def lasts(self, holds: bool, iteration: int) -> bool:
        """Whether this is the moment to say that it has held for ``long`` iterations; then not
        before it has held for as long once more."""
        if not holds:
            self._since = None
        elif self._since is None:
            self._since = iteration
        elif iteration - self._since >= self.long:
            self._since = iteration
            return True
        return False


@dataclass
class _Mean:
    """Mean of log(D / n_h): of all measurements, then with the last ones weighing most."""

    log_ratio: float = 0.0
    count: int = 0

    def add(self, log_ratio: float, smoothing: float) -> None:
        self.count += 1
        gap = log_ratio - self.log_ratio
        if self.count > 1:
            gap = min(max(gap, -_FARTHEST), _FARTHEST)
        self.log_ratio += max(1 / self.count, 1 - smoothing) * gap


class Balance:
    """Chooses the heads' weights; see the module.

    Args:
        shares: head -> its target.
        weights: head -> ``WEIGHT``, which its scheduled factor is a multiple of.
    """

    def __init__(
        self, options: BalanceOptions, shares: Mapping[str, float], weights: Mapping[str, float]
    ):
        self.options, self.shares, self.weights = options, shares, weights
        self._means: dict[str, _Mean] = {}
        self._frozen: dict[str, float] = {}
        self._scale = _HALF_SCALE
        self._outweighed = Outweighed()
        self._printed: dict[str, float] = {}
        self._at_bound: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on needs to choose the same weights."""
        means = {name: [mean.log_ratio, mean.count] for name, mean in self._means.items()}
        return {"means": means, "scale": self._scale, "frozen": dict(self._frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = {name: _Mean(*mean) for name, mean in state["means"].items()}
        self._scale = state["scale"]
        self._frozen = dict(state.get("frozen", {}))

    def is_due(self, iteration: int, heads: Iterable[str]) -> bool:
        """Whether to measure in this iteration, in which ``heads`` run: each ``PERIOD``, often in
        the beginning, and where a head begins."""
        is_early = iteration & (iteration - 1) == 0  # 0 or a power of 2
        is_regular = iteration % self.options.period == 0
        return is_early or is_regular or not self._means.keys() >= set(heads)

    def factors(self, iteration: int, scheduled: Mapping[str, float]) -> dict[str, float]:
        """Factor of each head's terms; ``scheduled`` is its ``WEIGHT`` times its schedule, 0 for a
        head at rest."""
        total = sum(self.shares[name] for name, factor in scheduled.items() if factor)
        chosen = {name: self._multiplier(name, total) for name, own in scheduled.items() if own}
        if 0 < self.options.freeze_iter <= iteration:
            # Another head that stops, or begins, changes them no more.
            known = {name: x for name, x in chosen.items() if self._means.get(name, _Mean()).count}
            self._frozen = known | self._frozen
            chosen |= self._frozen
        return {name: own * chosen[name] if own else own for name, own in scheduled.items()}

    def _multiplier(self, name: str, total: float) -> float:
        """The chosen weight over ``WEIGHT``."""
        mean = self._means.get(name)
        if mean is None or not mean.count:
            return 1.0
        wanted = math.log(self.shares[name] / (1 - total) / self.weights[name]) + mean.log_ratio
        bound = math.log(self.options.bound)
        if not -bound < wanted < bound and name not in self._at_bound:
            self._at_bound.add(name)
            logger.warning(
                "DISTILL.%s: a WEIGHT of %.3g would make the head's share, which DISTILL.BALANCE."
                "BOUND does not allow: change WEIGHT or BOUND",
                node_name(name),
                math.exp(wanted) * self.weights[name],
            )
        return math.exp(min(max(wanted, -bound), bound))

    def measure(
        self,
        iteration: int,
        scheduled: Mapping[str, float],
        losses: Mapping[str, Tensor],
        heads: Mapping[str, Terms],
        pyramid: Mapping[int, Tensor],
        trunk: nn.Module,
    ) -> None:
        """Measure this step, take it into the means, and log weights and shares. All ranks do.

        Args:
            scheduled: as of :meth:`factors`.
            losses: the student's own.
            heads: those that run -> their terms, without the head's weight.
            pyramid: stride -> the student's map.
            trunk: the student's backbone, for heads without a gradient at the pyramid.
        """
        detection = torch.stack([loss.float() for loss in losses.values()]).sum()
        maps = {stride: [x] for stride, x in pyramid.items() if x.requires_grad}
        below = [p for p in trunk.parameters() if p.requires_grad]
        measured = []
        for places in (maps, {0: below}):
            if not (heads and any(places.values())):
                continue
            found = self._lengths(detection, heads, places)
            if found is None:
                break
            for name, own in found.heads.items():
                self._take(name, iteration, math.hypot(*found.detection), math.hypot(*own))
            heads = {name: heads[name] for name, own in found.heads.items() if not any(own)}
            measured.append(found)
        self._log(iteration, measured, self.factors(iteration, scheduled))

    def _lengths(
        self, detection: Tensor, heads: Mapping[str, Terms], places: Places
    ) -> Lengths | None:
        device = detection.device.type
        is_half = torch.is_autocast_enabled(device)
        is_half = is_half and torch.get_autocast_dtype(device) == torch.float16
        with torch.autocast(device, enabled=False):
            scale = self._scale if is_half else 1.0
            found = gradient_lengths(detection, heads, places, scale)
        if found is None and is_half:
            self._scale /= _OVERFLOW_DIVISOR
        return found

    def _take(self, name: str, iteration: int, detection: float, own: float) -> None:
        """Take a measurement of a head into its mean, unless weights are frozen; a head that
        begins after that still gets a weight."""
        mean, frozen_at = self._means.setdefault(name, _Mean()), self.options.freeze_iter
        is_free = frozen_at < 0 or iteration < frozen_at or (frozen_at and not mean.count)
        if is_free and own and detection:
            mean.add(math.log(detection / own), self.options.smoothing)

    def _log(self, iteration: int, measured: list[Lengths], factors: Mapping[str, float]) -> None:
        storage, total, words = get_event_storage(), 0.0, []
        for found in measured:
            shares = found.shares(factors)
            for name in (name for name, own in found.heads.items() if any(own)):
                values = {"share": shares[name], **found.details(name, factors)}
                total += shares[name]
                prefix = f"balance/{node_name(name).lower()}"
                for end, value in {"weight": factors[name], **values}.items():
                    storage.put_scalar(f"{prefix}/{end}", value, smoothing_hint=False)
                change = factors[name] / self._printed.get(name, math.inf)
                if not 1 / _PRINTED_CHANGE < change < _PRINTED_CHANGE:
                    self._printed[name] = factors[name]
                    parts = ", ".join(f"{end} {value:.3f}" for end, value in values.items())
                    words.append(f"\n  {name}: weight {factors[name]:.4g}, {parts}")
        if words:
            logger.info("Balance at iteration %d:%s", iteration, "".join(words))
        if measured:
            storage.put_scalar("balance/share", total, smoothing_hint=False)
        if self._outweighed.lasts(total > 0.5, iteration):
            logger.warning(
                "Distillation has made more than half of the gradient at the student's pyramid for "
                "%d iterations (now %.2f of it): the student mostly imitates. Lower the heads' "
                "WEIGHT, or their shares",
                self._outweighed.long,
                total,
            )
