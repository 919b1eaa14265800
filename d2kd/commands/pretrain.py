"""Pre-train the backbone of a digits config by classifying crops, as ImageNet does for COCO.

    d2kd pretrain --config-file digits/faster_rcnn_R18.yaml

The crops are the objects of digits_train, with jitter, and as many backgrounds; the file that it
writes (MODEL.WEIGHTS of the config, unless --output is given) holds the backbone's weights under
the detector's own names. ``--grow CONFIG FILE`` also writes them for a deeper ResNet, whose
additional blocks start as the identity, so that it starts with what the smaller one has learned.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, roi_align

from ..arguments import CommandParser, natural, positive
from ..data.custom import check_datasets
from ..data.image_files import load_image
from ..engine.setup import merged_config
from ..errors import ConfigError
from ..files import check_folder, write_tensors
from ..models.timm_fpn import build_timm_backbone


def read_dataset(name: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All images (n, 3, H, W) uint8 BGR, and per image boxes (k, 4) and labels (k,)."""
    images, boxes, labels = [], [], []
    for record in DatasetCatalog.get(name):
        images.append(torch.from_numpy(load_image(record["file_name"], "BGR").copy()))
        xywh = torch.tensor([a["bbox"] for a in record["annotations"]]).float().reshape(-1, 4)
        boxes.append(box_convert(xywh, "xywh", "xyxy"))
        labels.append(torch.tensor([a["category_id"] for a in record["annotations"]]).long())
    return torch.stack(images).permute(0, 3, 1, 2), boxes, labels


def sample_crops(
    images: Tensor, boxes: list[Tensor], labels: list[Tensor], count: int, classes: int
) -> tuple[Tensor, Tensor]:
    """RoIs (2 count, 5) of random images and their labels: jittered objects, then backgrounds."""
    rois, targets, backgrounds = [], [], []
    while len(rois) < count:
        index = int(torch.randint(len(images), ()))
        if not len(boxes[index]):
            continue
        choice = int(torch.randint(len(boxes[index]), ()))
        x0, y0, x1, y1 = boxes[index][choice].tolist()
        side = max(x1 - x0, y1 - y0) * float(torch.empty(()).uniform_(1.0, 1.5))
        center = torch.tensor([x0 + x1, y0 + y1]) / 2 + torch.randn(2) * 0.05 * side
        half = torch.full((2,), side / 2)
        rois.append(torch.cat([torch.tensor([float(index)]), center - half, center + half]))
        targets.append(int(labels[index][choice]))
        shift = torch.rand(2) * torch.tensor(images.shape[:1:-1])
        backgrounds.append(torch.cat([rois[-1][:1], shift - half, shift + half]))
    noise = torch.stack(backgrounds)
    overlap = torch.stack([box_iou(roi[None, 1:], boxes[int(roi[0])]).amax() for roi in noise])
    negatives = torch.where(overlap < 0.1, classes, -100)  # -100: ignored by cross_entropy
    return torch.cat([torch.stack(rois), noise]), torch.cat([torch.tensor(targets), negatives])


def pretrain(cfg: CfgNode, steps: int, batch: int, crop: int, seed: int) -> dict[str, Tensor]:
    """Train the bottom-up backbone of ``cfg`` on crops; returns weights by the detector's names."""
    torch.manual_seed(seed)
    images, boxes, labels = read_dataset(cfg.DATASETS.TRAIN[0])
    classes = 1 + max(int(x.max()) for x in labels if len(x))
    build = build_timm_backbone if "timm" in cfg.MODEL.BACKBONE.NAME else build_resnet_backbone
    backbone = build(cfg, ShapeSpec(channels=3)).to(cfg.MODEL.DEVICE).train()
    top = list(backbone.output_shape())[-1]
    classifier = nn.Linear(backbone.output_shape()[top].channels, classes + 1)
    classifier.to(cfg.MODEL.DEVICE)
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    # A fifth of the steps, but not none: the schedule divides by how many they are.
    rise = min(max(0.2, 2 / steps), 0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=rise
    )
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(1, 3, 1, 1)
    start = time.perf_counter()
    for step in range(steps):
        rois, targets = sample_crops(images, boxes, labels, batch // 2, classes)
        used, rois[:, 0] = rois[:, 0].long().unique(return_inverse=True)
        pixels = roi_align((images[used].float() - mean) / std, rois, crop, sampling_ratio=2)
        logits = classifier(backbone(pixels.to(cfg.MODEL.DEVICE))[top].mean(dim=(2, 3)))
        targets = targets.to(cfg.MODEL.DEVICE)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19 or step == steps - 1:
            right = (logits.argmax(dim=1) == targets)[: batch // 2].float().mean()
            seconds = time.perf_counter() - start
            print(
                f"pre-training {step + 1}/{steps}: loss {loss:.3f}, digits right "
                f"{100 * right:.0f} %, {seconds:.0f} s",
                flush=True,
            )
    return {f"backbone.bottom_up.{k}": v.cpu() for k, v in backbone.state_dict().items()}


def grow(weights: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Weights of the deeper backbone of ``cfg`` that computes what ``weights`` compute.

    A block that the smaller network lacks gets a last normalisation of factor 0: what is left of it
    is the shortcut (Net2Net, Chen et al., ICLR 2016).

    Raises:
        ConfigError: the two are not ResNets of the same blocks.
    """
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    grown = {f"backbone.bottom_up.{k}": v for k, v in backbone.state_dict().items()}
    misfits = [k for k in weights if k not in grown or grown[k].shape != weights[k].shape]
    if misfits:
        raise ConfigError(f"a ResNet-{cfg.MODEL.RESNETS.DEPTH} cannot take {misfits[0]}")
    for name in grown:
        if name in weights:
            grown[name] = weights[name]
        elif name.endswith("conv2.norm.weight"):
            grown[name] = torch.zeros_like(grown[name])
    return grown


def save(weights: dict[str, Tensor], path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_tensors({"model": weights}, path)
    print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train, and write one file or two."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", help="a .pth file; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--batch", type=positive, default=256, help="crops per step, half digits")
    parser.add_argument("--crop", type=positive, default=32, help="side of a crop in pixels")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument(
        "--grow", nargs=2, metavar=("CONFIG", "FILE"), help="also for the deeper ResNet of CONFIG"
    )
    args = parser.parse_command(argv)
    cfg = merged_config(args.config_file, args.opts)
    deeper = merged_config(args.grow[0], []) if args.grow else None
    output = args.output or cfg.MODEL.WEIGHTS
    if not output.endswith(".pth"):
        raise ConfigError(f"--output: a .pth file, not '{output}'")
    if args.batch < 2:
        raise ConfigError("--batch: at least 2 crops per step, a digit and a background")
    for path in (output, *(args.grow or ())[1:]):
        check_folder(os.path.dirname(path) or ".")
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name a dataset to take crops from")
    check_datasets(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    weights = pretrain(cfg, args.steps, args.batch, args.crop, args.seed)
    if deeper is not None:
        save(grow(weights, deeper), args.grow[1])
    save(weights, output)
