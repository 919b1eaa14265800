"""A training that version 0.1 began, and how it goes on.

``run_0_1`` is what version 0.1 left after 3 of 6 iterations of a distillation with the heads SSIM
and FeatureMimic: ``config.yaml`` and the checkpoint, as they were written. Images, annotations and
the teacher are made on the fly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..detectors import distiller_config, write_config
from .detectors import IMAGE_SIZE, NUM_CLASSES, fill, generator, golden_config

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).parent / "run_0_1"
CONTINUATION = RUN / "continuation.json"
CHECKPOINT, FINAL = "model_0000002.pth", "model_final.pth"
# Files below the folder in which the training starts, all of which its config names.
IMAGES, ANNOTATIONS, OUTPUT = "images", "annotations.json", "output"
TEACHER, START = "teacher", "start"


def training_config() -> CfgNode:
    """The config of the training, from which ``run_0_1/config.yaml`` was made. Its files are
    named relative to the folder of :func:`write_inputs`."""
    student = _detector(8)
    student.DATASETS.COCO_FORMAT = [["golden_train", ANNOTATIONS, IMAGES]]
    student.DATASETS.TRAIN = ("golden_train",)
    student.DATASETS.TEST = ()
    student.INPUT.RANDOM_FLIP = "none"
    student.MODEL.WEIGHTS = f"{START}.pth"
    student.SOLVER.BASE_LR = 0.01
    student.SOLVER.WARMUP_ITERS = 2
    student.SOLVER.MAX_ITER = 6
    student.SOLVER.CHECKPOINT_PERIOD = 3
    student.SEED = 3
    student.OUTPUT_DIR = OUTPUT
    opts = ("DISTILL.TEACHER.WEIGHTS", f"{TEACHER}.pth", "DISTILL.TEACHER.CHECK", False)
    return distiller_config(student, ["SSIM", "FeatureMimic"], f"{TEACHER}.yaml", opts)


def write_inputs(folder: Path) -> None:
    """Write the data, the teacher, and the weights that the student starts from."""
    _write_data(folder)
    for role, width in ((TEACHER, 12), (START, 8)):
        cfg = _detector(width)
        write_config(cfg, folder / f"{role}.yaml")
        model = build_model(cfg)
        fill(model, role)
        torch.save({"model": model.state_dict()}, folder / f"{role}.pth")


def train(folder: Path, config_file: Path, *arguments: str) -> None:
    """Run ``train_net.py`` in ``folder`` on the CPU with one thread."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config_file)]
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def outcome(output: Path) -> dict:
    """What iterations 3 to 5 did, from the output folder of the whole or the resumed training.

    Returns:
        ``losses``: the median of each loss over the iterations, each of which was logged by a
        process of its own (what is logged is a mean since the process began);
        ``change``: summed absolute change of the weights since the checkpoint, and ``momentum``:
        summed absolute momenta, both by part of the model.
    """
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    names = [name for name in lines[-1] if name.startswith("loss_") or name == "total_loss"]
    losses = {name: median(line[name] for line in lines[-3:]) for name in names}
    paths = RUN / CHECKPOINT, output / FINAL
    before, after = (torch.load(path, map_location="cpu") for path in paths)
    assert before["model"].keys() == after["model"].keys()
    change: dict[str, float] = {}
    for name, value in after["model"].items():
        part = _part(name)
        moved = (value.double() - before["model"][name].double()).abs().sum().item()
        change[part] = change.get(part, 0.0) + moved
    states = after["trainer"]["_trainer"]["optimizer"]["state"].values()
    momentum = sum(state["momentum_buffer"].double().abs().sum().item() for state in states)
    return {"losses": losses, "change": change, "momentum": momentum}


def _part(name: str) -> str:
    """The part of the model that a weight belongs to, e.g. "backbone.bottom_up"."""
    return ".".join(name.split(".")[:2])


def _detector(width: int) -> CfgNode:
    """The smallest Faster R-CNN that still has every part."""
    cfg = golden_config("faster", width=width, stem=2)
    # A checkpoint of below 300 kB, of which half is the bookkeeping of its 430 tensors.
    cfg.MODEL.RESNETS.NUM_GROUPS = 2
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 1
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    return cfg


def _write_data(folder: Path) -> None:
    """Six PNG images with up to four rectangles, in COCO format."""
    (folder / IMAGES).mkdir()
    height, width = IMAGE_SIZE
    images, annotations = [], []
    for number in range(6):
        random = generator("training", str(number))
        pixels = random.uniform(80, 150, (height, width, 3))
        for category in range(number % 4 + 1):
            side = random.integers(14, 60, 2)
            x, y = random.integers(0, [width, height] - side).tolist()
            w, h = side.tolist()
            pixels[y : y + h, x : x + w] += random.uniform(-80, 105, 3)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category % NUM_CLASSES + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"{number}.png"
        cv2.imwrite(str(folder / IMAGES / name), pixels.clip(0, 255).astype(np.uint8))
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": n + 1, "name": f"class {n}"} for n in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATIONS).write_text(json.dumps(content))
