"""The check of a dataset's content: what is wrong in it, and what Detectron2 drops or misreads.

Each function looks at the columns of one annotation file (:class:`~d2kd.data.coco.Table`) and
yields :class:`~d2kd.data.report.Finding`. What makes training or evaluation fail or go wrong
unnoticed is fatal; what is repaired, dropped or clipped is said. M annotations, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import first_line
from .coco import Table, hashable, is_number, numbers, types_of
from .image_files import (
    UNREADABLE,
    Header,
    image_path,
    leaves_folder,
    missing_files,
    read_header,
    where_it_may_be,
)
from .masks import BROKEN, NO_MASK, PACKED_RLE, POLYGONS, RLE, Masks
from .report import Finding, plural, shown, some

# Boxes may leave the image by this many pixels without a word: annotation tools round.
_ROUNDING = 1.0
# Boxes of another kind are refused from this share of all boxes on: a single one is a slip.
_SHARE = 0.01
# A box read as x, y, width, height that reaches this share of the image beyond its border.
_FAR_OUT = 0.1


@dataclass(frozen=True)
class Use:
    """What a config does with a dataset.

    Attributes:
        train, test: it is trained on, evaluated on.
        masks: instance masks are used (MODEL.MASK_ON).
        keypoints: their number (0: not used), and how many must be visible in an image that is
            trained on.
        keep_empty: images without objects are trained on.
        strict_paths: DATASETS.STRICT_PATHS.
        files: its images are looked for, and some opened (``headers``).
    """

    train: bool = True
    test: bool = False
    masks: bool = True
    keypoints: int = 0
    min_keypoints: int = 0
    keep_empty: bool = False
    strict_paths: bool = False
    files: bool = True
    headers: int = 32


def _findings(
    bad: np.ndarray, text: str, remedy: str, example: Callable[[int], str], fatal: bool = True
) -> Iterator[Finding]:
    """One finding for all places where ``bad`` is true; none where there are none.

    Args:
        bad: (n,) bool.
        text: goes on after "3 of 18 ".
        example: place -> words for it.
    """
    places = np.flatnonzero(bad)
    if len(places):
        head = f"{len(places):,} of {len(bad):,} {text}"
        yield Finding(head, remedy, some(example(int(place)) for place in places), fatal)


def check_structure(table: Table, strict_ids: bool = True) -> Iterator[Finding]:
    """Required keys, their types, and ids: what everything else relies on.

    Args:
        strict_ids: refuse annotation ids that occur twice. COCO's own minival files have some, and
            Detectron2 lets them pass.
    """
    yield from _check_images(table)
    yield from _check_annotation_keys(table)
    if strict_ids:
        yield from _check_annotation_ids(table)
    yield from _check_flags(table)


def _check_images(table: Table) -> Iterator[Finding]:
    count = len(table.images)
    if not count:
        yield Finding("it has no images", "'images' is an empty list", fatal=True)
        return

    def example(place: int) -> str:
        return f"images[{place}] {shown(table.images[place], 60)}"

    ids = table.image_ids
    types = types_of(ids)
    missing = np.fromiter((value is None for value in ids), bool, count)
    yield from _findings(missing, "images have no 'id'", "give each its own", example)
    if not missing.any() and types not in ({int}, {str}):
        common = str if sum(type(v) is str for v in ids) * 2 > count else int
        bad = np.fromiter((type(value) is not common for value in ids), bool, count)
        remedy = "use whole numbers, or text, for all, and the same in 'image_id'"
        yield from _findings(bad, "image ids are of another type than the rest", remedy, example)
    elif not missing.any():
        repeated = _repeated(ids)
        yield from _findings(
            repeated,
            "image ids occurred before in the file",
            "if two files were joined, give the images of the second other ids, and its 'image_id'",
            lambda place: f"id {ids[place]} of {shown(table.names[place])}",
        )
    no_name = np.fromiter((type(v) is not str or not v for v in table.names), bool, count)
    remedy = "it must be the path of the image below the image directory"
    yield from _findings(no_name, "images have no usable 'file_name'", remedy, example)
    yield from _findings(
        np.isnan(table.sizes).any(axis=1),
        "images have no usable 'width' and 'height'",
        "they must be positive whole numbers of pixels",
        lambda place: (
            f"{shown(table.names[place])} "
            + " x ".join(shown(table.images[place].get(key)) for key in ("width", "height"))
        ),
    )


def _repeated(values: list) -> np.ndarray:
    """(n,) bool, whether a value occurred before; all must be hashable."""
    if len(set(values)) == len(values):
        return np.zeros(len(values), bool)
    seen: set = set()
    return np.fromiter(
        ((value in seen) or bool(seen.add(value)) for value in values), bool, len(values)
    )


def _check_annotation_keys(table: Table) -> Iterator[Finding]:
    count = len(table.annotations)

    def example(place: int) -> str:
        entry = {k: v for k, v in table.annotations[place].items() if k != "segmentation"}
        return f"annotations[{place}] {shown(entry, 60)}"

    for key, words in (
        ("id", "give each its own whole number"),
        ("image_id", "it must be the 'id' of an image"),
        ("category_id", "it must be the 'id' of a category"),
        ("bbox", "each needs its box [x, y, width, height] in pixels"),
    ):
        values = table.column(table.annotations, key)
        if key != "bbox":
            values = hashable(values)  # a list is no id
        missing = np.fromiter((value is None for value in values), bool, count)
        yield from _findings(missing, f"annotations have no usable '{key}'", words, example)


def _check_annotation_ids(table: Table) -> Iterator[Finding]:
    ids = hashable(table.column(table.annotations, "id"))
    if None not in ids:
        yield from _findings(
            _repeated(ids),
            "annotation ids occurred before in the file",
            "if two files were joined, give the annotations of the second other ids; else one "
            "object is listed twice",
            lambda place: f"id {ids[place]} of {shown(table.image_name(place))}",
        )


def _check_flags(table: Table) -> Iterator[Finding]:
    count, example = len(table.annotations), _named(table)
    ignore = table.column(table.annotations, "ignore")
    if not types_of(ignore) <= {type(None)}:
        yield from _findings(
            np.fromiter((bool(value) for value in ignore), bool, count),
            "annotations have 'ignore' set, which Detectron2 does not know",
            "use 'iscrowd': 1 for regions that are neither object nor background, or remove them",
            example,
        )
    crowd = table.column(table.annotations, "iscrowd")
    known = (0, 1, None)
    if not types_of(crowd) <= {int, type(None)} or not set(crowd) <= set(known):
        bad = np.fromiter(
            (type(v) in (str, list, dict) or v not in known for v in crowd), bool, count
        )
        remedy = "use 1 for regions of many objects, else 0"
        yield from _findings(
            bad, "annotations have an 'iscrowd' that is not 0 or 1", remedy, example
        )


def check_links(table: Table, use: Use) -> Iterator[Finding]:
    """Annotations and the images they belong to."""
    count = len(table.annotations)
    orphan = table.image_of < 0
    if count:
        total = bool(orphan.all())
        ids = table.column(table.annotations, "image_id")
        remedy = "Detectron2 ignores them"
        if total:
            kinds = [sorted({t.__name__ for t in types_of(v)}) for v in (ids, table.image_ids)]
            remedy = "'image_id' must be the 'id' of an image"
            if kinds[0] != kinds[1]:
                remedy += f"; there it is {' and '.join(kinds[0])}, here {' and '.join(kinds[1])}"
        yield from _findings(
            orphan,
            "annotations belong to no image",
            remedy,
            lambda place: f"annotation {_id(table, place)} of image {shown(ids[place])}",
            fatal=total,
        )
    if use.train:
        yield from _check_trained_images(table, use)
    elif table.has_annotations:  # else it is a test set whose annotations are not public
        if not ((table.image_of >= 0) & ~table.crowd & ~boxes_without_area(table)).any():
            yield Finding(
                "no image has an object to evaluate",
                "take it out of DATASETS.TEST, or give it annotations",
                fatal=True,
            )


def _check_trained_images(table: Table, use: Use) -> Iterator[Finding]:
    """How many images have something to train on."""
    count = len(table.images)
    if not table.has_annotations:
        yield Finding("it has no 'annotations'", "a dataset of TRAIN needs them", fatal=True)
        return
    usable = (table.image_of >= 0) & ~table.crowd
    with_objects = np.bincount(table.image_of[usable], minlength=count) > 0
    if not with_objects.any():
        crowds = int(table.crowd.sum())
        why = f"all {crowds:,} annotations have 'iscrowd' 1" if crowds else "there are none"
        yield Finding(f"no image has an object to train on: {why}", fatal=True)
    elif not use.keep_empty:
        yield from _findings(
            ~with_objects,
            "images have no object and are not trained on",
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them as background",
            lambda place: shown(table.names[place]),
            fatal=False,
        )


def check_repairs(table: Table, use: Use) -> Iterator[Finding]:
    """What evaluation needs and d2kd computes, and what is read otherwise than it may look."""
    count = len(table.annotations)
    crowd = table.column(table.annotations, "iscrowd")
    if None in crowd:
        missing = np.fromiter((value is None for value in crowd), bool, count)
        text = "annotations have no 'iscrowd'"
        yield from _findings(missing, text, "taken as 0", _named(table), fatal=False)
    if not use.test:
        return
    missing = ~known_area(table)
    remedy = "computed from the mask, or from the box where there is none"
    yield from _findings(missing, "annotations have no 'area'", remedy, _named(table), fatal=False)
    yield from _findings(
        ~usable_ids(table),
        "annotation ids are not positive whole numbers",
        "numbered from 1 for evaluation: pycocotools takes id 0 for 'not found'",
        _named(table),
        fatal=False,
    )


def known_area(table: Table) -> np.ndarray:
    """(M,) bool, whether the annotation says its area."""
    areas = table.column(table.annotations, "area")
    found = numbers(areas)
    if found is None:
        found = np.array([v if is_number(v) and abs(v) < 1e18 else np.nan for v in areas], float)
    with np.errstate(invalid="ignore"):
        return (found >= 0) & (found < np.inf)


def usable_ids(table: Table) -> np.ndarray:
    """(M,) bool, annotation ids that pycocotools reads correctly: positive whole numbers."""
    ids = table.column(table.annotations, "id")
    if types_of(ids) <= {int} and (not ids or min(ids) > 0):
        return np.ones(len(ids), bool)
    return np.fromiter((type(v) is int and v > 0 for v in ids), bool, len(ids))


def _id(table: Table, place: int) -> str:
    return shown(table.annotations[place].get("id"))


def _named(table: Table) -> Callable[[int], str]:
    return lambda place: f"annotation {_id(table, place)} of {shown(table.image_name(place))}"


# --- boxes --------------------------------------------------------------------------------------


def check_boxes(table: Table, masks: Masks | None) -> Iterator[Finding]:
    """Boxes that are none, that are of another format, or that leave their image.

    Args:
        masks: where they are known, they tell x1, y1, x2, y2 from x, y, width, height.
    """
    values = table.column(table.annotations, "bbox")

    def example(place: int) -> str:
        name, size = shown(table.image_name(place)), table.annotation_sizes[place]
        box = shown(values[place], 44)
        if table.box_is_list[place]:
            box = f"[{', '.join(f'{value:.4g}' for value in table.boxes[place])}]"
        of = f"{box} of annotation {_id(table, place)} in {name}"
        return of if np.isnan(size).any() else f"{of} ({size[0]:.0f} x {size[1]:.0f})"

    is_missing = np.fromiter((value is None for value in values), bool, len(values))
    remedy = "each must be [x, y, width, height] in pixels"
    bad = ~table.box_is_list & ~is_missing
    yield from _findings(bad, "boxes are not four numbers", remedy, example)
    x, y, width, height = table.boxes.T
    not_finite = table.box_is_list & ~np.isfinite(table.boxes).all(axis=1)
    yield from _findings(not_finite, "boxes hold NaN or infinity", remedy, example)
    with np.errstate(invalid="ignore"):
        negative = (width < 0) | (height < 0)
    remedy = "boxes are [x, y, width, height], of which width and height are positive"
    yield from _findings(negative, "boxes have a negative width or height", remedy, example)
    look = _looks_like(table, masks)
    refused = look["relative"] | look["corners"] | negative
    for kind, text in _LOOK_ALIKES.items():
        yield from _findings(look[kind], text, _REMEDY_OF[kind], example)
    outside, beyond = _beyond(table)
    yield from _findings(
        outside & ~refused,
        "boxes have no area inside their image",
        "Detectron2 drops them from training, d2kd from evaluation",
        example,
        fatal=False,
    )
    yield from _findings(
        beyond & ~refused,
        "boxes reach beyond their image",
        "Detectron2 clips them in training, evaluation does not",
        example,
        fatal=False,
    )


_LOOK_ALIKES = {
    "relative": "boxes look relative to the image's size (all values from 0 to 1)",
    "corners": "boxes look like corners x1, y1, x2, y2",
}
_REMEDY_OF = {
    "relative": "multiply x and width by the image's width, y and height by its height",
    "corners": "COCO format wants [x, y, width, height]: width is x2 - x1, height is y2 - y1",
}


def _looks_like(table: Table, masks: Masks | None) -> dict[str, np.ndarray]:
    """Kind -> (M,) bool, boxes that look like another format; all false for rare slips."""
    sizes = table.annotation_sizes
    x, y, width, height = table.boxes.T
    far = sizes * (1 + _FAR_OUT)
    with np.errstate(invalid="ignore"):
        positive = (width > 0) & (height > 0) & (x >= 0) & (y >= 0)
        # No box of pixels fits into the image's first pixel.
        relative = positive & (table.boxes <= 1).all(axis=1) & (sizes > 2).all(axis=1)
        inside = (width <= sizes[:, 0] + _ROUNDING) & (height <= sizes[:, 1] + _ROUNDING)
        leaves = (x + width > far[:, 0]) | (y + height > far[:, 1])
        could_be_corners = positive & (width > x) & (height > y) & ~relative
        corners = could_be_corners & inside & leaves
        if masks is not None:
            corners |= could_be_corners & _mask_says_corners(table.boxes, masks.extent)
    found = {"relative": relative, "corners": corners}
    for kind, places in found.items():
        if places.sum() < _SHARE * len(places):
            found[kind] = np.zeros_like(places)
    return found


def _mask_says_corners(boxes: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(M,) bool, boxes that fit their mask as corners and not as x, y, width, height."""
    as_corners = np.abs(boxes - extent).max(axis=1) <= 2
    end = boxes[:, :2] + boxes[:, 2:]
    return as_corners & (np.abs(end - extent[:, 2:]).max(axis=1) > 4)


def _beyond(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(M,) bool each: boxes without area in their image; others that reach beyond it."""
    sizes = table.annotation_sizes
    start, extent = table.boxes[:, :2], table.boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        visible = np.minimum(start + extent, sizes) - np.maximum(start, 0)
        # 1e-5 is Detectron2's own threshold for boxes that are empty.
        outside = (visible <= 1e-5).any(axis=1) & (extent >= 0).all(axis=1)
        over = np.maximum(-start, start + extent - sizes).max(axis=1)
        return outside, ~outside & (over > _ROUNDING)


def boxes_without_area(table: Table) -> np.ndarray:
    """(M,) bool, boxes without area inside their image, which Detectron2 drops."""
    return _beyond(table)[0]


# --- masks --------------------------------------------------------------------------------------


def check_masks(table: Table, masks: Masks, use: Use) -> Iterator[Finding]:
    """Masks that are missing or that the config cannot use. Only called where masks are used."""
    example = _named(table)
    linked = table.image_of >= 0
    # A region that is not trained on needs a mask in evaluation only.
    needed = linked & (~table.crowd | use.test)
    remedy = "mend or remove these annotations, or train boxes only: MODEL.MASK_ON False"
    yield from _findings(
        needed & (masks.kind == NO_MASK), "instances have no mask", remedy, example
    )
    flat = linked & masks.flat
    yield from _findings(
        flat,
        "masks lack the outer list of polygons",
        "write [[x, y, ...]], not [x, y, ...]",
        example,
    )
    broken = linked & (masks.kind == BROKEN) & ~masks.flat
    text = "masks are neither polygons nor RLE with 'size' and 'counts'"
    yield from _findings(broken, text, remedy, example)
    yield from _check_polygons(table, masks, use, example)
    yield from _check_rle(table, masks, use, example)


def _check_polygons(
    table: Table, masks: Masks, use: Use, example: Callable[[int], str]
) -> Iterator[Finding]:
    is_polygon = (masks.kind == POLYGONS) & (table.image_of >= 0)
    short = is_polygon & ~masks.usable
    if use.train and not use.test:
        remedy = "Detectron2 drops these objects from training; MODEL.MASK_ON False keeps the boxes"
        yield from _findings(
            short, "masks have no polygon of three points", remedy, example, fatal=False
        )
    else:
        remedy = "they cannot be evaluated: mend or remove them, or set MODEL.MASK_ON False"
        yield from _findings(short, "masks have no polygon of three points", remedy, example)
    yield from _findings(
        is_polygon & masks.some_short,
        "masks have polygons of fewer than three points among others",
        "these polygons are dropped",
        example,
        fatal=False,
    )
    usable = is_polygon & masks.usable
    yield from _findings(
        usable & ~np.isfinite(masks.extent).all(axis=1),
        "masks have points that are NaN or infinite",
        "mend or remove these annotations",
        example,
    )
    with np.errstate(invalid="ignore"):
        small = (masks.extent >= 0).all(axis=1) & (masks.extent <= 1).all(axis=1)
        relative = usable & small & (table.boxes[:, 2:] > 2).all(axis=1)
        sizes = table.annotation_sizes
        lost = (
            usable
            & ~relative
            & ((masks.extent[:, :2] >= sizes).any(axis=1) | (masks.extent[:, 2:] <= 0).any(axis=1))
        )
    if relative.sum() >= max(1, _SHARE * usable.sum()):
        remedy = "multiply x by the image's width and y by its height"
        yield from _findings(relative, "masks look relative to the image's size", remedy, example)
    text = "masks lie outside of their image"
    yield from _findings(lost, text, "they are empty in training", example, fatal=False)


def _check_rle(
    table: Table, masks: Masks, use: Use, example: Callable[[int], str]
) -> Iterator[Finding]:
    linked = table.image_of >= 0

    def sized(place: int) -> str:
        size = table.annotation_sizes[place]
        value = masks.values[place]["size"]
        return f"{example(place)}: {shown(value)}, image [{size[1]:.0f}, {size[0]:.0f}]"

    remedy = "'size' is [height, width] of the image"
    yield from _findings(
        linked & masks.wrong_size, "RLE masks are not of their image's size", remedy, sized
    )
    yield from _findings(
        linked & masks.wrong_sum & ~masks.wrong_size,
        "RLE masks have counts that do not add up to their size",
        "mend or remove these annotations",
        example,
    )
    if use.train:
        yield from _findings(
            linked & masks.empty & ~table.crowd,
            "RLE masks have no pixel",
            "Detectron2 drops these objects from training",
            example,
            fatal=False,
        )


def needs_bitmask(table: Table, masks: Masks) -> int:
    """How many objects that are trained on have RLE masks, which INPUT.MASK_FORMAT "polygon" cannot
    take."""
    is_rle = (masks.kind == RLE) | (masks.kind == PACKED_RLE)
    return int((is_rle & ~table.crowd & (table.image_of >= 0)).sum())


# --- keypoints ----------------------------------------------------------------------------------


def check_keypoints(table: Table, use: Use) -> Iterator[Finding]:
    """Lists of keypoints. Only called where they are used."""
    values = table.column(table.annotations, "keypoints")
    example = _named(table)
    linked = table.image_of >= 0
    missing = np.fromiter((not value for value in values), bool, len(values))
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
    yield from _findings(linked & wrong, text, remedy, example)
    if wrong.any():
        return
    text, remedy = "annotations have no keypoints", "taken as not visible"
    yield from _findings(linked & missing & ~table.crowd, text, remedy, example, fatal=False)
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
    yield from _findings(
        few,
        f"images have fewer than {least} and are not trained on",
        f"as in Detectron2, see {key}",
        lambda place: shown(table.names[place]),
        fatal=False,
    )


# --- files --------------------------------------------------------------------------------------


def check_files(table: Table, root: str, use: Use) -> Iterator[Finding]:
    """Image files: there, inside their folder, and of the size and kind that the JSON says."""
    names = [name if type(name) is str else "" for name in table.names]

    def example(place: int) -> str:
        return shown(names[place], 60)

    leaving = np.fromiter((leaves_folder(root, name) for name in names), bool, len(names))
    yield from _findings(
        leaving,
        f"image names lead out of the image directory {shown(root, 60)}",
        "refused by DATASETS.STRICT_PATHS"
        if use.strict_paths
        else "they are read all the same; DATASETS.STRICT_PATHS True refuses them",
        example,
        fatal=use.strict_paths,
    )
    missing = missing_files(root, names)
    if missing.any():
        first = names[int(np.flatnonzero(missing)[0])]
        hint = where_it_may_be(root, first)
        remedy = f"of the first, {hint}" if hint else "add them, or remove them from the JSON"
        text = f"images are not there, in {shown(root, 60)}"
        yield from _findings(missing, text, remedy, example)
    yield from _findings(
        _repeated(names),
        "images have a file that another image has",
        "the objects of one are background in the other",
        example,
        fatal=False,
    )
    if use.headers:  # evenly spread: whole folders may be of another kind
        present = np.flatnonzero(~missing)
        step = max(1, len(present) // use.headers)
        yield from check_headers(table, root, present[::step][: use.headers])


def check_headers(table: Table, root: str, places: np.ndarray) -> Iterator[Finding]:
    """Opens some images, without decoding them.

    Args:
        places: (n,) positions in ``table.images``.
    """
    headers: dict[int, Header | str] = {}
    for place in places.tolist():
        try:
            headers[place] = read_header(image_path(root, table.names[place]))
        except UNREADABLE as error:
            headers[place] = first_line(error)
    yield from judge_headers(table, headers)


def judge_headers(table: Table, headers: Mapping[int, Header | str]) -> Iterator[Finding]:
    """Images that cannot be read, are too deep, or are of another size than the JSON says.

    Args:
        headers: position in ``table.images`` -> its header, or why it cannot be read.
    """
    unreadable, deep, other_size = [], [], []
    for place, header in headers.items():
        name = shown(table.names[place])
        if isinstance(header, str):
            unreadable.append(f"{name} ({header})")
            continue
        if header.deep:
            deep.append(f"{name} (mode {header.mode})")
        stated, seen = table.sizes[place], header.seen_size
        if not np.isnan(stated).any() and tuple(stated) != seen:
            turned = ", turned by its EXIF orientation" if header.turned else ""
            stated = f"{stated[0]:.0f} x {stated[1]:.0f}"
            other_size.append(f"{name} is {seen[0]} x {seen[1]}{turned}, not {stated}")
    for bad, text, remedy in (
        (unreadable, "cannot be read", "repair or remove them"),
        (
            deep,
            "have more than 8 bits per channel, of which Detectron2 would make white images",
            "convert them to 8 bits",
        ),
        (other_size, "have another size than the JSON says", "mend 'width' and 'height' there"),
    ):
        if bad:
            head = f"{len(bad):,} of {len(headers):,} images that were opened {text}"
            yield Finding(head, remedy, some(bad), fatal=True)
