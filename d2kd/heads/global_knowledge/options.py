"""The keys of ``DISTILL.GLOBAL_KNOWLEDGE``."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import HeadOptions
from ...keys import COUNT, NOT_NEGATIVE, POSITIVE, Options, Rule, group, key, one_of
from ...schedules import ScheduleOptions
from ..adapters import INITS, MODES


@dataclass(frozen=True)
class GlobalOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.GLOBAL``."""

    weight: float = key(
        5.0,
        NOT_NEGATIVE,
        "Weight of the global knowledge loss; 0: none. Released config 5, class default 20.",
    )
    responses: str = key(
        "cosine",
        one_of(("cosine", "projection")),
        'How a box responds to prototypes: "cosine" (released code), or "projection" on those of '
        "its class (the paper's wording; experimental).",
    )
    ridge: float = key(0.05, POSITIVE, 'mu, the ridge that keeps "projection" solvable.')
    assigned_level_only: bool = key(
        False,
        comment="Compare a box on the level of its size only, instead of on all levels.",
    )


@dataclass(frozen=True)
class LocalOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.LOCAL``."""

    foreground_weight: float = key(
        1.0,
        NOT_NEGATIVE,
        "k_fg, weight of the squared error inside of boxes; 0: none.",
    )
    background_weight: float = key(
        4.0, NOT_NEGATIVE, "k_bg, weight of the squared error outside of boxes; 0: none."
    )
    adapter: str = key(
        "always",
        one_of(MODES),
        'Convolution on the student\'s levels: "always", "auto" (only where channels differ), '
        '"never".',
    )
    adapter_kernel: int = key(3, one_of((1, 3)), "Its kernel: 3 (released code) or 1 (cheaper).")
    adapter_init: str = key(
        "default",
        one_of(INITS),
        'Its first weights: "default" (released code), "identity" or "small".',
    )


@dataclass(frozen=True)
class SoftLabelOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.SOFT_LABELS``."""

    weight: float = key(1.0, NOT_NEGATIVE, "Weight of the soft labels on positives; 0: none.")
    temperature: float = key(2.0, POSITIVE, "tau, temperature of the soft labels.")


@dataclass(frozen=True)
class PrototypeOptions(Options):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES``."""

    count: int = key(10, COUNT, "M, prototypes per class and level.")
    refresh_period: int = key(
        -1,
        Rule(lambda value: value >= -1, "it must be a number of iterations, 0 or -1"),
        "Iterations between refreshes; -1: an epoch (released code), 0: made once.",
    )
    file: str = key(
        "",
        comment="A file of d2kd prototypes make to start with, instead of making them at "
        "START_ITER.",
    )
    min_box_size: float = key(
        30.0,
        NOT_NEGATIVE,
        "Training objects wider and higher than this many pixels of the original image are "
        "candidates.",
    )
    max_images: int = key(
        800, COUNT, "Candidates come from a random choice of so many images per class."
    )
    alpha: float = key(
        10.0,
        NOT_NEGATIVE,
        "alpha, coupling of the teacher's and the student's coefficients in the matching pursuit.",
    )
    bandwidth: float = key(
        0.1,
        POSITIVE,
        "Density filter: width of the kernel.",
    )
    quantile: float = key(
        0.4,
        Rule(lambda value: 0 <= value < 1, "it must be from 0 to below 1"),
        "Density filter: quantile of the densities that must be exceeded.",
    )
    batch_size: int = key(4, COUNT, "Images that a process runs at once to read their features.")


@dataclass(frozen=True)
class GlobalKnowledgeOptions(HeadOptions):
    """Keys of ``DISTILL.GLOBAL_KNOWLEDGE``."""

    schedule: ScheduleOptions = group(
        ScheduleOptions(start_iter=0),
        "Prototypes need a student that sees something: START_ITER 0 for a trained one (MODEL."
        "WEIGHTS of a detector, as in the paper), a warm-up of plain training for one from scratch "
        "or ImageNet.",
    )
    strides: tuple[int, ...] = key(
        (),
        comment="Strides of the pyramid levels to distil; []: all that both detectors have.",
    )
    boxes: str = key(
        "positives",
        one_of(("positives", "gt")),
        'Boxes of the global and local losses: "positives" (the student\'s sampled RoIs, or the '
        'anchors that it matched) or "gt".',
    )
    max_boxes: int = key(128, COUNT, "At most so many boxes per image.")
    reliability: bool = key(
        True,
        comment="Weight each box by r, how far both detectors agree on its typicality; False: r = "
        "1.",
    )
    level_size: float = key(
        56.0,
        POSITIVE,
        "Local losses act on the level of a box's size: the finest up to twice this side "
        "in pixels, each further octave on the next.",
    )
    attenuation: str = key(
        "linear",
        one_of(("linear", "none")),
        '"linear": global and local losses decay by 1 - iteration / MAX_ITER, "none": they do not.',
    )
    global_: GlobalOptions = group(GlobalOptions())
    local: LocalOptions = group(LocalOptions())
    soft_labels: SoftLabelOptions = group(SoftLabelOptions())
    prototypes: PrototypeOptions = group(PrototypeOptions())
