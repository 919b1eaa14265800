"""Making prototypes: features of all candidates, then the selection for each class and level.

The processes of a job share both parts, and each gets the result of all, the same everywhere.
"""

from __future__ import annotations

import logging
import resource
import time

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn

from ..config import PRECISIONS
from ..detectors.teacher import Teacher
from ..errors import ConfigError, one_line
from .collect import (
    Candidates,
    FeatureTable,
    Reader,
    build_candidate_loader,
    extract_features,
    find_candidates,
    student_pyramid,
    teacher_pyramid,
)
from .select import select_prototypes
from .store import LevelPrototypes, PrototypeBank, Prototypes

logger = logging.getLogger(__name__)

_SIZE_KEY = "DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.MIN_BOX_SIZE"


class PrototypeGenerator:
    """Makes the prototypes of a training set for a student as it is now.

    The candidates and the teacher's features, which do not change, are found once and kept.
    ``cost`` says what the last call took: seconds, and numbers of objects, images and prototypes.

    Args:
        cfg: the student's config, for the training set, the test-time input and the keys in
            ``DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES``.
        bank: that they are to fit into.

    Raises:
        ConfigError: no object is large enough; names the key.
    """

    def __init__(self, cfg: CfgNode, bank: PrototypeBank):
        self.cfg, self.bank = cfg, bank
        self.options = cfg.DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        self.num_images = len(records)
        self.candidates = find_candidates(
            records, bank.num_classes, self.options.MIN_BOX_SIZE, self.options.MAX_IMAGES
        )
        self._check_candidates(records)
        self._teacher: FeatureTable | None = None
        self.cost: dict[str, float] = {}

    def _check_candidates(self, records: list[dict]) -> None:
        """Refuse a training set without candidates; say which classes have none."""
        least = f"{_SIZE_KEY} {self.options.MIN_BOX_SIZE:g} pixels"
        found = {candidate.category for candidate in self.candidates.instances}
        if not found:
            boxes = (o.box for o in find_candidates(records, 1, 0.0, len(records)).instances)
            largest = max((min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes), default=0.0)
            raise ConfigError(
                f"no object of DATASETS.TRAIN is wider and higher than {least}, the largest has "
                f"{largest:.0f}: lower the key, or leave GlobalKnowledge out of DISTILL.HEADS"
            )
        names = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
        without = [name for category, name in enumerate(names) if category not in found]
        if without:
            logger.warning(
                "classes without prototypes, as none of their objects is wider and higher than "
                "%s: %s",
                least,
                one_line(", ".join(map(str, without))),
            )

    def __call__(self, student: nn.Module, teacher: Teacher) -> Prototypes:
        """Prototypes for ``student``, which is in eval mode meanwhile."""
        start = time.perf_counter()
        student_table, teacher_table = self._extract(student, teacher)
        extracted = time.perf_counter()
        options = self.options
        prototypes = choose_prototypes(
            self.candidates,
            student_table,
            teacher_table,
            options.COUNT,
            device=student.device,
            alpha=options.ALPHA,
            bandwidth=options.BANDWIDTH,
            quantile=options.QUANTILE,
        )
        names = MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
        prototypes.meta = {"datasets": list(self.cfg.DATASETS.TRAIN), "classes": list(names)}
        held = sum(f.nbytes for t in (student_table, teacher_table) for f in t.features.values())
        self.cost = {
            "feature_seconds": extracted - start,
            "selection_seconds": time.perf_counter() - extracted,
            "objects": len(self.candidates.instances),
            "images": len(self.candidates.images),
            "prototypes": int(prototypes.counts.sum()),
            "features_mib": held / 2**20,
        }
        self._report(prototypes.counts)
        return prototypes

    def _extract(self, student: nn.Module, teacher: Teacher) -> tuple[FeatureTable, FeatureTable]:
        bank = self.bank
        readers = {"student": Reader(lambda x: student_pyramid(student, x), bank.student_channels)}
        if self._teacher is None:
            readers["teacher"] = Reader(
                lambda x: teacher_pyramid(teacher, x), bank.teacher_channels
            )
        loader = build_candidate_loader(self.cfg, self.candidates, self.options.BATCH_SIZE)
        amp = self.cfg.SOLVER.AMP
        dtype = PRECISIONS[amp.PRECISION] if amp.ENABLED else None
        autocast = torch.autocast(student.device.type, dtype, enabled=amp.ENABLED)
        with inference_context(student), autocast:
            tables = extract_features(loader, self.candidates, readers)
        self._teacher = tables.get("teacher", self._teacher)
        return tables["student"], self._teacher

    def _report(self, counts: Tensor) -> None:
        """Log what the last call made, (L, K) prototypes per level and class, and what it took."""
        cost = self.cost
        logger.info(
            "%d prototypes on %d levels for %d of %d classes, from %d objects in %d images: "
            "features %.1f s, selection %.1f s; features held by this process %.0f MiB, "
            "its peak memory %.0f MiB",
            *(counts.sum(), len(counts), (counts.sum(0) > 0).sum(), counts.shape[1]),
            *(cost["objects"], cost["images"], cost["feature_seconds"], cost["selection_seconds"]),
            *(cost["features_mib"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        )


def choose_prototypes(
    candidates: Candidates,
    student: FeatureTable,
    teacher: FeatureTable,
    count: int,
    *,
    device: torch.device | str = "cpu",
    **options,
) -> Prototypes:
    """Select the prototypes of all classes and levels from the features of all processes.

    Classes are dealt out to the processes; each gets the result of all. ``student`` and ``teacher``
    are this process's features, with the same ``index``; ``options`` are those of
    :func:`~d2kd.prototypes.select.select_prototypes`.
    """
    world_size, rank = comm.get_world_size(), comm.get_rank()
    categories = torch.tensor([o.category for o in candidates.instances], dtype=torch.long)
    chosen: dict[int, dict[int, tuple]] = {}
    for category in range(candidates.num_classes):
        wanted = categories[student.index] == category
        mine = (student.rows(wanted), teacher.rows(wanted))
        parts = comm.gather(mine, dst=category % world_size)
        if category % world_size == rank:
            tables = [FeatureTable.join(side) for side in zip(*parts, strict=True)]
            chosen[category] = _choose_class(*tables, count, device, options)
        progress = f"prototypes: {category + 1} of {candidates.num_classes} classes"
        log_every_n_seconds(logging.INFO, progress, n=30, name=__name__)
    everywhere = {c: found for part in comm.all_gather(chosen) for c, found in part.items()}
    return _assemble(everywhere, candidates)


def _choose_class(
    student: FeatureTable, teacher: FeatureTable, count: int, device, options: dict
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Stride -> teacher rows, student rows and instances of one class's prototypes."""
    result = {}
    for stride, rows in student.features.items():
        rows_t = teacher.features[stride]
        picks = select_prototypes(rows_t.to(device), rows.to(device), count, **options)
        result[stride] = (rows_t[picks], rows[picks], student.index[picks])
    return result


def _assemble(chosen: dict[int, dict[int, tuple]], candidates: Candidates) -> Prototypes:
    """Stack the classes of each level, and keep only the instances that became prototypes."""
    classes = [chosen[c] for c in range(candidates.num_classes)]
    used = sorted({i for found in classes for *_, index in found.values() for i in index.tolist()})
    renumber = torch.full((len(candidates.instances) + 1,), -1)
    renumber[used] = torch.arange(len(used))
    levels = {}
    for stride in classes[0]:
        teacher, student, index = zip(*(found[stride] for found in classes), strict=True)
        counts = torch.tensor([0, *map(len, index)])
        levels[stride] = LevelPrototypes(
            teacher=torch.cat(teacher),
            student=torch.cat(student),
            offsets=counts.cumsum(0),
            instances=renumber[torch.cat(index)],
        )
    return Prototypes(levels, [candidates.instances[i] for i in used])
