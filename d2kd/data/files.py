"""Where datasets lie, and how d2kd makes one: all of it or nothing, in COCO format."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from iopath.common.file_io import file_lock

from ..arguments import CommandParser, folder_to_write
from ..errors import ConfigError


def dataset_root() -> Path:
    """`$DETECTRON2_DATASETS`, or `datasets` under the working directory, as in Detectron2."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def json_path(directory: Path, split: str) -> Path:
    """The annotation file of a dataset that d2kd makes."""
    return directory / "annotations" / f"{split}.json"


def is_empty(directory: Path) -> bool:
    """Whether it is an empty folder, or not there."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def build_directory(
    target: Path, fill: Callable[[Path], None], is_current: Callable[[], bool]
) -> bool:
    """Makes the directory `target` by `fill(empty directory)`, all of it or nothing.

    The content is written next to `target` and renamed into place, so a killed build leaves
    `target` as it was; what it did leave is removed by the next build. Of several processes one
    builds while the others wait. An older `target` is replaced.

    Args:
        is_current: whether `target` already holds what is wanted. Asked once the lock is held,
            for another process may just have finished.

    Returns:
        Whether this call built it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(target.parent / f".{target.name}")):
        for leftover in target.parent.glob(f".{target.name}.new-*"):
            if not target.exists() and (leftover / "old").exists():
                os.replace(leftover / "old", target)  # killed between the two renames below
            shutil.rmtree(leftover)
        if is_current():
            return False
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            fresh = work / "new"
            fresh.mkdir()  # unlike mkdtemp's, with the user's usual permissions
            fill(fresh)
            if target.exists():
                os.replace(target, work / "old")
            os.replace(fresh, target)
        finally:
            shutil.rmtree(work)
    return True


def coco_content(
    info: dict,
    classes: Sequence[str],
    images: Iterable[tuple[str, tuple[int, int], list[tuple[int, dict]]]],
) -> dict:
    """The content of an annotation file. Ids count from 1: pycocotools takes 0 for "none".

    Args:
        images: file name, (width, height), and of each object its class and its other values.
    """
    content: dict = {
        "info": info,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "images": [],
        "annotations": [],
    }
    for image_id, (name, (width, height), objects) in enumerate(images, start=1):
        content["images"].append(
            {"id": image_id, "file_name": name, "width": width, "height": height}
        )
        for label, values in objects:
            entry = {"id": len(content["annotations"]) + 1, "image_id": image_id, "iscrowd": 0}
            content["annotations"].append({**entry, "category_id": label + 1, **values})
    return content


# --- converting a clone --------------------------------------------------------------------------


def check_replaceable(output: Path, dataset: str) -> None:
    """Refuses an output folder that holds something else than an earlier make of the dataset."""
    if is_empty(output):
        return
    try:
        if json.loads((output / "meta.json").read_text())["dataset"] == dataset:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{output} exists and was not made by this script: move it away")


def write_dataset(
    output: Path, meta: dict, write: Callable[[Path], dict[str, dict]]
) -> dict[str, dict[str, int]]:
    """Makes `output`: images, an annotation file for each split, and `meta` as meta.json.

    Args:
        write: writes the images to a folder, and returns the COCO content of each split.

    Returns:
        Images, and objects of each class, by split.
    """
    counts = {}

    def fill(fresh: Path) -> None:
        (fresh / "images").mkdir()
        (fresh / "annotations").mkdir()
        for split, content in write(fresh / "images").items():
            json_path(fresh, split).write_text(json.dumps(content))
            objects = Counter(item["category_id"] for item in content["annotations"])
            counts[split] = {"images": len(content["images"])} | {
                category["name"]: objects[category["id"]] for category in content["categories"]
            }
        (fresh / "meta.json").write_text(json.dumps(meta) + "\n")

    build_directory(output, fill, is_current=lambda: False)
    return counts


def run_conversion(
    dataset: str,
    convert: Callable[[Path, Path], tuple[dict[str, dict[str, int]], list[str]]],
    description: str,
) -> None:
    """The command that makes a dataset of the clone that the command line names.

    Args:
        convert: (clone, output) -> counts of each split, and a line for each thing left out.
    """
    parser = CommandParser(description=description)
    parser.add_argument("clone", type=Path, help="folder of the clone")
    parser.add_argument(
        "--output",
        type=folder_to_write,
        default=dataset_root() / dataset,
        help=f"directory to make (default: %(default)s, where {dataset}_* are looked for)",
    )
    args = parser.parse_args()
    counts, notes = convert(args.clone, args.output)
    for line in notes:
        print(line)
    for split, count in counts.items():
        print(f"{split}: " + ", ".join(f"{number} {name}" for name, number in count.items()))
    print(f"Wrote {args.output}; {len(notes)} images or objects left out or clipped.")
