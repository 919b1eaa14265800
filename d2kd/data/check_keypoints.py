"""The check of keypoints, where they are used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .check import Use
from .coco import Table, marked, numbers
from .report import Finding, findings, plural, shown


def check_keypoints(table: Table, use: Use) -> Iterator[Finding]:
    """Lists of keypoints. Only called where they are used."""
    values = table.column(table.annotations, "keypoints")
    linked = table.image_of >= 0
    missing = marked(values, lambda value: not value)
    wrong = np.array(
        [
            bool(v) and (type(v) is not list or len(v) != 3 * use.keypoints or numbers(v) is None)
            for v in values
        ],
        bool,
    )
    remedy = (
        f"each needs x, y, visibility of {use.keypoints} keypoints "
        "(MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS), 0 for those that are not there"
    )
    text = f"annotations have keypoints that are not {3 * use.keypoints} numbers"
    yield from table.findings(linked & wrong, text, remedy)
    if wrong.any():
        return
    unsaid, text = linked & missing & ~table.crowd, "annotations have no keypoints"
    yield from table.findings(unsaid, text, "taken as not visible", fatal=False)
    if use.train and use.min_keypoints:
        yield from _check_visible(table, values, use)


def _check_visible(table: Table, values: list, use: Use) -> Iterator[Finding]:
    """Images that Detectron2 filters out, as too few of their keypoints are visible."""
    visible = np.array([sum(np.array(v[2::3]) > 0) if v else 0 for v in values], int)
    linked = table.image_of >= 0
    count = np.bincount(table.image_of[linked], visible[linked], len(table.images))
    few = count < use.min_keypoints
    least = plural(use.min_keypoints, "visible keypoint")
    key = "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
    if few.all():
        yield Finding(f"no image has {least}, which {key} asks for", fatal=True)
        return
    yield from findings(
        few,
        f"images have fewer than {least} and are not trained on",
        f"as in Detectron2, see {key}",
        lambda place: shown(table.names[place]),
        fatal=False,
    )
