"""Detections of several detectors side by side, on the same images as the ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances, pairwise_iou

from ..config import student_config
from ..data.image_files import load_image
from ..files import write_atomically

FONT, TEXT = cv2.FONT_HERSHEY_SIMPLEX, 0.55
WHITE, GREEN, RED = (255, 255, 255), (80, 220, 80), (110, 110, 255)  # BGR, as OpenCV's


def predictor(cfg: CfgNode, weights: Path) -> DefaultPredictor:
    """The trained detector of a config, from a BGR image to instances on it, on the CPU."""
    cfg = student_config(cfg)
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = str(weights), "cpu"
    return DefaultPredictor(cfg)


def pick_records(dataset: str, count: int) -> list[dict]:
    """The first images of a dataset with as many objects as its median image, as far as it goes."""
    records = [r for r in DatasetCatalog.get(dataset) if r["annotations"]]
    sizes = np.array([len(r["annotations"]) for r in records])
    order = np.argsort(np.abs(sizes - np.median(sizes)), kind="stable")
    return [records[i] for i in order[:count]]


def ground_truth(record: dict, masks: bool) -> Instances:
    """Boxes, classes and, if asked for and there, masks of a dataset's record."""
    annotations = [a for a in record["annotations"] if not a.get("iscrowd")]
    keys = ["bbox", "bbox_mode", "category_id"]
    if masks and all(a.get("segmentation") for a in annotations):
        keys.append("segmentation")
    size = record["height"], record["width"]
    drawn = [{key: a[key] for key in keys} for a in annotations]
    found = annotations_to_instances(drawn, size, mask_format="bitmask")
    truth = Instances(size, pred_boxes=found.gt_boxes, pred_classes=found.gt_classes)
    if found.has("gt_masks"):
        truth.pred_masks = found.gt_masks.tensor
    return truth


def draw(
    image: np.ndarray, found: Instances, names: list[str], colours: Iterable, zoom: float
) -> np.ndarray:
    """``image`` resized by ``zoom``, with boxes, classes and, where there are any, scores and
    masks."""
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    size = image.shape[1::-1]
    for i, colour in enumerate(colours):
        if found.has("pred_masks"):
            mask = found.pred_masks[i].numpy().astype(np.uint8)
            inside = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) > 0
            image[inside] = (0.6 * image[inside] + 0.4 * np.array(colour)).astype(np.uint8)
        x0, y0, x1, y1 = (int(round(v * zoom)) for v in found.pred_boxes.tensor[i].tolist())
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2, cv2.LINE_AA)
        label = names[found.pred_classes[i]]
        if found.has("scores"):
            label += f" {100 * found.scores[i]:.0f}%"
        write_label(image, label, (x0, y0), colour)
    return image


def write(image: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(image, text, place, FONT, TEXT, (0, 0, 0), 1, cv2.LINE_AA)


def write_label(image: np.ndarray, text: str, corner: tuple[int, int], colour) -> None:
    """Black text on the colour of a box, on its upper left corner and inside the image."""
    (width, height), below = cv2.getTextSize(text, FONT, TEXT, 1)
    x = max(min(corner[0], image.shape[1] - width - 4), 0)
    y = max(corner[1], height + below + 2)
    cv2.rectangle(image, (x, y - height - below - 2), (x + width + 4, y), colour, -1)
    write(image, text, (x + 2, y - below))


def draw_detections(
    detect, image: np.ndarray, truth: Instances, names: list[str], zoom: float
) -> tuple[np.ndarray, int]:
    """The most confident detections, as many as there are objects; green where box (IoU 0.5) and
    class are right, red elsewhere.

    Returns:
        the picture, and the number of objects that were found.
    """
    found = detect(image)["instances"][: len(truth)]
    overlap = pairwise_iou(found.pred_boxes, truth.pred_boxes)
    right = (overlap >= 0.5) & (found.pred_classes[:, None] == truth.pred_classes[None])
    colours = [GREEN if hit else RED for hit in right.any(dim=1).tolist()]
    return draw(image, found, names, colours, zoom), int(right.any(dim=0).sum())


def sheet(panels: dict[str, list[np.ndarray]], columns: int) -> np.ndarray:
    """One column per title, one row per image; after ``columns`` titles a new block begins. All
    titles have as many lines."""
    height = max(panel.shape[0] for group in panels.values() for panel in group)
    width = max(panel.shape[1] for group in panels.values() for panel in group)

    def column(title: str) -> np.ndarray:
        lines = title.split("\n")
        header = np.full((6 + 22 * len(lines), width, 3), 255, np.uint8)
        for number, line in enumerate(lines, start=1):
            write(header, line, (8, 22 * number - 3))
        cells = [np.full((height, width, 3), 255, np.uint8) for _ in panels[title]]
        for cell, panel in zip(cells, panels[title], strict=True):
            cell[: panel.shape[0], : panel.shape[1]] = panel
        return np.vstack([header, *cells])

    blank = np.full_like(column(next(iter(panels))), 255)
    titles, blocks = list(panels), []
    for start in range(0, len(titles), columns):
        block = [column(title) for title in titles[start : start + columns]]
        block += [blank] * (columns - len(block) if start else 0)
        blocks.append(np.hstack(block))
    return np.vstack(blocks)


def save_picture(
    runs: dict[str, tuple[CfgNode, Path]],
    path: Path,
    *,
    records: list[dict],
    width: int = 320,
    columns: int = 4,
) -> None:
    """Draw ground truth and each run's detections as a JPEG, which has no more than 300 kB if its
    quality allows.

    Args:
        runs: title -> config and weights.
        records: images of ``DATASETS.TEST`` of the first run.
        width: of the widest image, in pixels.
    """
    metadata = MetadataCatalog.get(next(iter(runs.values()))[0].DATASETS.TEST[0])
    names = list(metadata.thing_classes)
    images = [load_image(record["file_name"], "BGR") for record in records]
    masks = any(cfg.MODEL.MASK_ON for cfg, _ in runs.values())
    truths = [ground_truth(record, masks) for record in records]
    zoom = width / max(image.shape[1] for image in images)
    pairs = list(zip(images, truths, strict=True))
    objects = sum(map(len, truths))
    white = [draw(image, truth, names, [WHITE] * len(truth), zoom) for image, truth in pairs]
    panels = {f"ground truth\n{objects} objects": white}
    for title, (cfg, weights) in runs.items():
        detect = predictor(cfg, weights)
        drawn = [draw_detections(detect, *pair, names, zoom) for pair in pairs]
        title += f"\n{sum(hits for _, hits in drawn)} of {objects} found"
        panels[title] = [panel for panel, _ in drawn]
    picture = sheet(panels, columns)
    for quality in (80, 70, 60, 50, 40, 30):
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= 300_000:
            break
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))
