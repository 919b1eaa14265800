"""The benchmark of the check: what it writes, that it measures, and that the check is cheap."""

from __future__ import annotations

import json
import tracemalloc

from d2kd.benchmark.datasets import (
    MOST_MEMORY,
    WAYS,
    Cost,
    main,
    measure,
    read,
    write_synthetic,
)
from d2kd.data.coco import Table, read_json
from d2kd.data.masks import POLYGONS, Masks

from ..data.parts import forget_datasets


def test_the_synthetic_file(tmp_path):
    """It is COCO's in kind: polygon masks, boxes inside their images, images that are there."""
    path = write_synthetic(tmp_path / "coco", images=50, annotations=300)
    table = Table(read_json(str(path)))
    assert len(table.images) == 50 and len(table.annotations) == 300
    masks = Masks(table)
    assert (masks.kind == POLYGONS).all() and masks.usable.all()
    assert len(list((path.parent / "images").iterdir())) == 50
    assert (table.boxes[:, 2:] > 0).all()


def test_checking_needs_little_memory(tmp_path):
    """By what Python and NumPy ask for, on a smaller file than the benchmark's."""
    path = write_synthetic(tmp_path / "coco", images=2000, annotations=14_000)
    peaks = {}
    for _ in forget_datasets():
        for way in WAYS:
            tracemalloc.start()
            read(way, path)
            peaks[way] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peaks["d2kd"] < MOST_MEMORY * peaks["detectron2"]


def test_both_ways_are_measured(tmp_path):
    """In processes of their own; time is not judged, for other tests may run at once."""
    path = write_synthetic(tmp_path / "coco", images=100, annotations=500)
    costs = measure(path, repeats=1)
    assert tuple(costs) == WAYS and all(cost.seconds > 0 for cost in costs.values())


def test_the_command_that_reads_once(tmp_path, capsys):
    """What the processes of the benchmark run."""
    path = write_synthetic(tmp_path / "coco", images=20, annotations=100)
    for _ in forget_datasets():
        for way in ("detectron2", "d2kd"):
            main(["--read", way, str(path)])
            assert len(Cost(*json.loads(capsys.readouterr().out.splitlines()[-1]))) == 2
