"""The Global Knowledge head on small detectors, and its prototypes during training."""

from __future__ import annotations

import json
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from d2kd.commands import prototypes as tool
from d2kd.detectors.spec import feature_strides
from d2kd.engine.trainer import DistillTrainer
from d2kd.errors import ConfigError
from d2kd.heads.global_knowledge import pick_foreground
from d2kd.losses import global_knowledge as losses
from d2kd.prototypes.collect import FeatureTable, find_candidates
from d2kd.prototypes.generate import PrototypeGenerator, choose_prototypes
from d2kd.prototypes.hook import COST_FILE, PROTOTYPES_FILE
from d2kd.prototypes.select import select_prototypes
from d2kd.prototypes.store import LevelPrototypes, Prototypes
from tests.detectors import (
    ARCHS,
    build,
    detector_config,
    distiller_config,
    make_batch,
    run_step,
    write_config,
)

CLASSES, COUNT = 3, 3
NODE = "DISTILL.GLOBAL_KNOWLEDGE"
PREFIX = "loss_kd_global_knowledge_"


def head_config(tmp_path, arch="faster", *opts, heads=("GlobalKnowledge",)):
    """A student of width 16 and a random teacher of width 24."""
    teacher = write_config(detector_config(arch, width=24), tmp_path / f"teacher_{arch}.yaml")
    opts = (f"{NODE}.PROTOTYPES.COUNT", COUNT, *opts)
    return distiller_config(detector_config(arch), list(heads), teacher, opts)


def random_prototypes(strides, absent: int = 2, seed: int = 0) -> Prototypes:
    """Three prototypes per class, none of class ``absent``."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0 if c == absent else COUNT for c in range(CLASSES)])
    total = int(counts.sum())
    offsets = F.pad(counts.cumsum(0), (1, 0))
    levels = {
        s: LevelPrototypes(
            torch.randn(total, 24, generator=generator),
            torch.randn(total, 16, generator=generator),
            offsets,
            torch.zeros(total, dtype=torch.long),
        )
        for s in strides
    }
    return Prototypes(levels, [], {})


def build_filled(cfg):
    """The model of ``cfg`` with random prototypes, and its head."""
    model = build(cfg)
    head = model.distill_heads["GlobalKnowledge"]
    if head.bank is not None:
        head.bank.fill(random_prototypes(head.bank.strides), 0)
    return model, head


def terms_of(losses: dict) -> dict:
    return {k.removeprefix(PREFIX): v for k, v in losses.items() if k.startswith(PREFIX)}


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("objects", [(2, 3), (0, 3), (0, 0)])
def test_step(tmp_path, arch, objects):
    """All terms are finite, adapters get gradients, and without objects only background is left."""
    model, head = build_filled(head_config(tmp_path, arch))
    losses = run_step(model, make_batch(objects))
    terms = terms_of(losses)
    assert set(terms) == {"global", "foreground", "background", "soft"}
    for name, value in terms.items():
        assert value.isfinite()
        assert (value > 0) == (name == "background" or sum(objects) > 0)
    sum(losses.values()).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert all(p.grad is not None for p in head.adapters.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


def read_bundles(model, batch):
    """What the head saw in a step: its arguments, and its terms."""
    head = model.distill_heads["GlobalKnowledge"]
    forward, seen = head.forward, {}

    def spy(student, teacher, batch):
        # Lazy fields are computed here, while the step is alive.
        seen.update(
            student={s: m.detach() for s, m in student.pyramid.items()},
            teacher={s: m.detach() for s, m in teacher.pyramid.items()},
            boxes=student.roi.boxes,
            labels=student.roi.labels,
            features=[b.roi.features.detach() for b in (student, teacher)],
            logits=[b.roi.logits.detach() for b in (student, teacher)],
        )
        seen["terms"] = forward(student, teacher, batch)
        return seen["terms"]

    head.forward = spy
    run_step(model, batch, iteration=4)
    return seen


def loop_response(feature, bank):
    return F.cosine_similarity(feature[None, None], bank, dim=-1)


def loop_reliability(features, banks, label):
    student, teacher, present = banks
    if not present[label].any():
        return 1.0
    peaks = [
        loop_response(f, bank)[label][present[label]].max()
        for f, bank in zip(features, (student, teacher), strict=True)
    ]
    return (1 - (peaks[0] - peaks[1]).abs()).clamp(0, 1).item()


def test_terms_match_loops(tmp_path):
    """Each term of a two-stage step equals loops over positive RoIs, levels and cells."""
    cfg = head_config(tmp_path, "faster", f"{NODE}.LEVEL_SIZE", 10.0)
    model, head = build_filled(cfg)
    seen = read_bundles(model, make_batch((3, 4)))
    labels, boxes = seen["labels"], torch.cat(seen["boxes"])
    image = [i for i, b in enumerate(seen["boxes"]) for _ in range(len(b))]
    positives = [i for i in range(len(labels)) if labels[i] < CLASSES]
    assert len(positives) > 1
    strides = head.bank.strides
    level_of = {i: size_level(boxes[i], 10, len(strides)) for i in positives}
    total = {"global": 0.0, "foreground": 0.0, "background": 0.0, "soft": 0.0}
    for number, stride in enumerate(strides):
        banks = head.bank.level(stride)
        maps = seen["student"][stride], seen["teacher"][stride]
        height, width = maps[0].shape[-2:]
        mask = torch.zeros(2, height, width)
        gaps = []
        for i in positives:
            x1, y1, x2, y2 = (boxes[i] / stride).floor().int().tolist()
            ends = slice(min(y1, height - 1), y2 + 1), slice(min(x1, width - 1), x2 + 1)
            features = [m[image[i]][:, ends[0], ends[1]].mean((1, 2)) for m in maps]
            r = loop_reliability(features, banks, labels[i])
            responses = [
                loop_response(f, bank) for f, bank in zip(features, banks[:2], strict=True)
            ]
            gaps.append(r * (responses[0] - responses[1])[banks[2]])
            if level_of[i] == number:
                area = mask[image[i], y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
                area.clamp_(min=r)
        gaps = torch.stack(gaps)
        total["global"] += F.smooth_l1_loss(gaps, torch.zeros_like(gaps)).item()
        adapted = head.adapters(stride, maps[0]).detach()
        error = (adapted - maps[1]).square().sum(1)
        for name, weights in (("foreground", mask), ("background", (mask == 0).float())):
            loss = (weights * error).sum() / max(1, 2 * 24 * weights.sum())
            total[name] += loss.item() / len(strides)
    for i in positives:
        stride = student_roi_stride(boxes[i])
        pooled = [f[i].mean((1, 2)) for f in seen["features"]]
        r = loop_reliability(pooled, head.bank.level(stride), labels[i])
        student, teacher = (z[i] / 2 for z in seen["logits"])
        kl = (teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))).sum()
        total["soft"] += r * 4 * kl.item() / (CLASSES + 1) / len(positives)
    decay = 1 - 4 / 10
    factors = {"global": 5 * decay, "foreground": decay, "background": 4 * decay, "soft": 1.0}
    for name, value in seen["terms"].items():
        assert value.item() == pytest.approx(factors[name] * total[name], rel=1e-4), name


def test_dense_soft_labels_match_a_loop(tmp_path):
    """One-stage: each positive anchor's class scores, weighted by its own reliability."""
    cfg = head_config(tmp_path, "retinanet", f"{NODE}.LEVEL_SIZE", 10.0)
    model, head = build_filled(cfg)
    forward, found = head.forward, {}

    def spy(student, teacher, batch):
        found["terms"] = forward(student, teacher, batch)
        labels, anchors = student.dense.labels, torch.cat(list(student.dense.anchors.values()))
        logits = [torch.cat(list(x.dense.logits.values()), 1) for x in (student, teacher)]
        values = []
        for image, n in (labels < CLASSES).logical_and(labels >= 0).nonzero().tolist():
            box = anchors[n].abs()  # as the released code, which mirrors what is out of the image
            stride = head.bank.strides[size_level(anchors[n], 10, len(head.bank.strides))]
            height, width = student.pyramid[stride].shape[-2:]
            x1, y1, x2, y2 = (box / stride).floor().int().tolist()
            ends = slice(min(y1, height - 1), y2 + 1), slice(min(x1, width - 1), x2 + 1)
            features = [
                x.pyramid[stride][image][:, ends[0], ends[1]].mean((1, 2)).detach()
                for x in (student, teacher)
            ]
            r = loop_reliability(features, head.bank.level(stride), labels[image, n])
            mine, its = (z[image, n].detach() / 2 for z in logits)
            kl = (its.softmax(0) * (its.log_softmax(0) - mine.log_softmax(0))).sum()
            values.append(r * 4 * kl.item() / CLASSES)
        found["expected"] = sum(values) / len(values)
        return found["terms"]

    head.forward = spy
    run_step(model, make_batch((2, 3)), iteration=4)
    assert found["terms"]["soft"].item() == pytest.approx(found["expected"], rel=1e-4)


def size_level(box, base: float, levels: int) -> int:
    width, height = (box[2:] - box[:2] + 1).tolist()
    return min(max(math.floor(math.log2(math.sqrt(width * height) / base)), 0), levels - 1)


def student_roi_stride(box) -> int:
    """FPN's level rule on strides 4 to 32."""
    side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt().item()
    return 4 * 2 ** min(max(math.floor(4 + math.log2(side / 224)) - 2, 0), 3)


OPTIONS = {
    "gt": (f"{NODE}.BOXES", "gt"),
    "projection": (f"{NODE}.GLOBAL.RESPONSES", "projection"),
    "assigned level": (f"{NODE}.GLOBAL.ASSIGNED_LEVEL_ONLY", True),
    "no reliability": (f"{NODE}.RELIABILITY", False),
    "no attenuation": (f"{NODE}.ATTENUATION", "none"),
    "1x1": (f"{NODE}.LOCAL.ADAPTER_KERNEL", 1),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_options(tmp_path, arch, option):
    """Each option runs, and changes terms that it is about and no other."""
    batch = make_batch((2, 3))
    size = (f"{NODE}.LEVEL_SIZE", 8.0)
    plain = terms_of(run_step(build_filled(head_config(tmp_path, arch, *size))[0], batch, 5))
    model, _ = build_filled(head_config(tmp_path, arch, *size, *OPTIONS[option]))
    terms = terms_of(run_step(model, batch, 5))
    assert all(v.isfinite() for v in terms.values())
    changed = {k for k in terms if not torch.allclose(terms[k], plain[k], rtol=1e-5)}
    expected = {
        "gt": {"global", "foreground", "background"},
        "projection": {"global", "foreground", "soft"},
        "assigned level": {"global"},
        "no reliability": {"global", "foreground", "soft"},
        "no attenuation": {"global", "foreground", "background"},
        "1x1": {"foreground", "background"},
    }[option]
    if (arch, option) == ("faster", "gt"):
        assert changed and changed <= expected  # the positives may be the ground truth
    else:
        assert changed == expected


def test_terms_can_be_switched_off(tmp_path):
    """A weight of zero drops the term, its adapters and what it would have read."""
    off = [f"{NODE}.{key}" for key in ("LOCAL.FOREGROUND_WEIGHT", "LOCAL.BACKGROUND_WEIGHT")]
    opts = (off[0], 0.0, off[1], 0.0, f"{NODE}.SOFT_LABELS.WEIGHT", 0.0)
    model, head = build_filled(head_config(tmp_path, "faster", *opts))
    assert set(terms_of(run_step(model, make_batch()))) == {"global"}
    assert not list(head.parameters())
    assert "roi.logits" not in head.reads


def test_one_class_and_one_local_loss(tmp_path, caplog):
    """A softmax over one sigmoid is constant: no soft labels. No local loss of weight 0."""
    student = detector_config("retinanet", num_classes=1)
    teacher = write_config(student, tmp_path / "teacher.yaml")
    opts = (f"{NODE}.LOCAL.FOREGROUND_WEIGHT", 0.0)
    caplog.set_level("INFO", "d2kd")
    model = build(distiller_config(student, ["GlobalKnowledge"], teacher, opts))
    assert "GlobalKnowledge's term 'soft' is off" in caplog.text
    terms = terms_of(run_step(model, make_batch(num_classes=1)))
    assert set(terms) == {"global", "background"}


def test_local_distillation_needs_no_prototypes(tmp_path):
    """Without global loss and reliability there is neither bank nor refresh."""
    opts = (f"{NODE}.GLOBAL.WEIGHT", 0.0, f"{NODE}.RELIABILITY", False)
    cfg = head_config(tmp_path, "faster", *opts)
    model, head = build_filled(cfg)
    assert head.bank is None and head.build_hooks(cfg) == []
    assert set(terms_of(run_step(model, make_batch()))) == {"foreground", "background", "soft"}


def test_before_any_prototypes(tmp_path):
    """An empty bank: no global loss, and every box counts fully."""
    weighted = build(head_config(tmp_path))
    plain = build(head_config(tmp_path, "faster", f"{NODE}.RELIABILITY", False))
    terms, plain_terms = (terms_of(run_step(m, make_batch())) for m in (weighted, plain))
    assert terms["global"].item() == 0
    for name, value in terms.items():
        torch.testing.assert_close(value, plain_terms[name])


def test_combines_with_another_head(tmp_path):
    """Beside another head the terms stay what they were, and nothing is shared."""
    alone = terms_of(run_step(build_filled(head_config(tmp_path))[0], make_batch()))
    model, head = build_filled(head_config(tmp_path, heads=["GlobalKnowledge", "MAR"]))
    losses = run_step(model, make_batch())
    for name, value in terms_of(losses).items():
        torch.testing.assert_close(value, alone[name])
    assert any(name.startswith("loss_kd_mar") for name in losses)
    mine = {p.data_ptr() for p in head.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in model.distill_heads["MAR"].parameters())


@pytest.mark.parametrize(
    "opts, message",
    [
        ((f"{NODE}.BOXES", "all"), "BOXES is 'all'; valid: .*'gt'"),
        ((f"{NODE}.GLOBAL.RESPONSES", "x"), "RESPONSES is 'x'; valid"),
        ((f"{NODE}.ATTENUATION", "x"), "ATTENUATION is 'x'; valid"),
        ((f"{NODE}.PROTOTYPES.MAX_IMAGES", 0), "MAX_IMAGES is 0; it must be at least 1"),
        ((f"{NODE}.STRIDES", [4, 5]), r"no level of stride \[5\]"),
        ((f"{NODE}.PROTOTYPES.FILE", "nowhere.pth"), "FILE: no file 'nowhere.pth'"),
    ],
)
def test_config_errors(tmp_path, opts, message):
    """A wrong value is refused when the model is built, in a line that names it."""
    with pytest.raises(ConfigError, match=message):
        build(head_config(tmp_path, "faster", *opts))


def test_other_classes_are_refused(tmp_path):
    """Soft labels need equal classes; without them the pair works."""
    teacher = detector_config(width=24, num_classes=5)
    file = write_config(teacher, tmp_path / "teacher.yaml")
    cfg = distiller_config(detector_config(), ["GlobalKnowledge"], file)
    with pytest.raises(ConfigError, match=r"classes \(student: 3, teacher: 5\)"):
        build(cfg)
    cfg.merge_from_list([f"{NODE}.SOFT_LABELS.WEIGHT", 0.0])
    terms = terms_of(run_step(build(cfg), make_batch()))
    assert set(terms) == {"global", "foreground", "background"}


def test_sigmoid_box_heads_are_refused(tmp_path):
    """Soft labels are softmax; a box head that is trained with sigmoids has none."""
    cfg = head_config(tmp_path)
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    with pytest.raises(ConfigError, match="the student's box head is trained with sigmoids"):
        build(cfg)
    cfg.merge_from_list([f"{NODE}.SOFT_LABELS.WEIGHT", 0.0])
    build(cfg)


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_without_the_global_loss(tmp_path, arch, monkeypatch):
    """GLOBAL.WEIGHT 0 computes no global loss; the other terms, weighted by reliability, stay."""
    model, _ = build_filled(head_config(tmp_path, arch))
    full = terms_of(run_step(model, make_batch()))

    def fail(*_, **__):
        raise AssertionError("the global loss was computed")

    monkeypatch.setattr(losses, "cosine_global_loss", fail)
    model, _ = build_filled(head_config(tmp_path, arch, f"{NODE}.GLOBAL.WEIGHT", 0.0))
    terms = terms_of(run_step(model, make_batch()))
    assert full.keys() - terms.keys() == {"global"}
    for name, value in terms.items():
        torch.testing.assert_close(value, full[name])
    sum(terms.values()).backward()


def test_other_anchors_are_refused(tmp_path):
    """Soft labels of dense detectors need equal anchors on equal levels; without them all works."""
    teacher = detector_config("retinanet", width=24)
    sizes = teacher.MODEL.ANCHOR_GENERATOR.SIZES
    for levels, first, message in (
        (["p3", "p4", "p5", "p6", "p7"], [[9, 10, 11]], "different at stride 8"),
        (["p4", "p5", "p6", "p7"], [], r"same strides \(student: \(8, .*teacher: \(16,"),
    ):
        teacher.MODEL.RETINANET.IN_FEATURES = levels
        teacher.MODEL.ANCHOR_GENERATOR.SIZES = [*first, *sizes[1:]]
        file = write_config(teacher, tmp_path / "teacher.yaml")
        cfg = distiller_config(detector_config("retinanet"), ["GlobalKnowledge"], file)
        with pytest.raises(ConfigError, match=message):
            build(cfg)
        cfg.merge_from_list([f"{NODE}.SOFT_LABELS.WEIGHT", 0.0])
        assert len(terms_of(run_step(build(cfg), make_batch()))) == 3


def test_anchor_free_students_use_matched_boxes(tmp_path):
    """With one anchor a location the boxes are those that the locations were matched with."""
    anchors = ("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]])
    ratios = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    student, teacher = (detector_config("retinanet", width=width) for width in (16, 24))
    for cfg in (student, teacher):
        cfg.merge_from_list([*anchors, *ratios])
    file = write_config(teacher, tmp_path / "teacher.yaml")
    model = build(distiller_config(student, ["GlobalKnowledge"], file))
    head, batch = model.distill_heads["GlobalKnowledge"], make_batch((2, 3))
    picks, pick = [], head.pick_boxes
    head.pick_boxes = lambda *args: picks.append(pick(*args)) or picks[0]
    assert all(v.isfinite() for v in terms_of(run_step(model, batch)).values())
    for image, item in enumerate(batch):
        mine = picks[0].boxes[image][picks[0].valid[image]]
        gt = item["instances"].gt_boxes.tensor
        assert len(mine) and (mine[:, None] == gt).all(-1).any(1).all()


def test_prototypes_from_a_file(tmp_path):
    """A file fills the bank when the model is built; one of another model is refused."""
    path = str(tmp_path / "prototypes.pth")
    opts = (f"{NODE}.PROTOTYPES.FILE", path, f"{NODE}.SCHEDULE.START_ITER", 3)
    random_prototypes((4, 8, 16, 32, 64)).save(path)
    bank = build(head_config(tmp_path, "faster", *opts)).distill_heads["GlobalKnowledge"].bank
    assert bank.iteration.item() == 3 and bank.level(4)[2].sum().item() == 2 * COUNT
    random_prototypes((8, 16)).save(path)
    with pytest.raises(ConfigError, match="prototypes of strides"):
        build(head_config(tmp_path, "faster", *opts))
    write_dataset(tmp_path, "gk_toy", images=0)
    prototypes = random_prototypes((4, 8, 16, 32, 64))
    prototypes.meta["classes"] = ["a", "c", "b"]
    prototypes.save(path)
    with pytest.raises(ConfigError, match="FILE: its class 1 is 'c', the student's is 'b'"):
        build(head_config(tmp_path, "faster", *opts, "DATASETS.TRAIN", ("gk_toy",)))
    (tmp_path / "prototypes.pth").write_text("something else")
    with pytest.raises(ConfigError, match="is no file of prototypes"):
        build(head_config(tmp_path, "faster", *opts))


# --- picking -------------------------------------------------------------------------------------


def test_pick_foreground():
    """All foreground where there is room, else an even spread of it."""
    labels = torch.tensor([[3, 0, -1, 2, 3], [1, 1, 1, 0, 2], [3, 3, 3, -1, 3]])
    index, valid = pick_foreground(labels, 3, 3)
    assert [i[v].tolist() for i, v in zip(index, valid, strict=True)] == [[1, 3], [0, 1, 3], []]
    assert [t.shape for t in pick_foreground(labels, 3, 99)] == [(3, 5)] * 2
    assert [t.shape for t in pick_foreground(labels[::2], 3, 99)] == [(2, 2)] * 2
    assert [t.shape for t in pick_foreground(labels[2:], 3, 99)] == [(1, 0)] * 2
    assert [t.shape for t in pick_foreground(labels[:, :0], 3, 4)] == [(3, 0)] * 2
    without_data = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert [t.shape for t in pick_foreground(without_data, 3, 4)] == [(2, 4)] * 2
    index, valid = pick_foreground(torch.zeros(1, 1000).long(), 3, 7)
    assert valid.all() and index.unique().numel() == 7
    assert index.diff().float().std() < 1 and index.max() > 850


# --- prototypes in training ----------------------------------------------------------------------


def write_dataset(folder, name: str, images: int = 6) -> None:
    """Register ``name``: random 64 px images with two objects each, of the classes 0 and 1."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(images):
        file = str(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        annotations = [
            {
                "bbox": [int(x), int(y), 24, 20],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": c,
                "iscrowd": 0,
            }
            for c, (x, y) in enumerate(rng.integers(0, 40, (2, 2)))
        ]
        records.append(
            {
                "file_name": file,
                "image_id": i,
                "width": 64,
                "height": 64,
                "annotations": annotations,
            }
        )
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"], evaluator_type="coco")


def training_config(tmp_path, *opts, arch="faster"):
    """Four iterations on six images, a checkpoint after each second one."""
    write_dataset(tmp_path, "gk_toy")
    opts = (
        *("DATASETS.TRAIN", ("gk_toy",), "DATASETS.TEST", (), "SOLVER.MAX_ITER", 4),
        *("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 1e-4, "SOLVER.WARMUP_ITERS", 0),
        *("OUTPUT_DIR", str(tmp_path / "out"), "SEED", 1),
        *(f"{NODE}.WEIGHT", 1e-4, f"{NODE}.PROTOTYPES.MIN_BOX_SIZE", 16.0),
        *opts,
    )
    os.makedirs(tmp_path / "out", exist_ok=True)
    return head_config(tmp_path, arch, *opts)


def make_trainer(cfg, resume=False) -> DistillTrainer:
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def bank_of(trainer):
    return trainer.model.distill_heads["GlobalKnowledge"].bank


@pytest.fixture
def refreshes(monkeypatch):
    """Iterations of the refreshes of a test, through all of its trainers."""
    from d2kd.prototypes.hook import PrototypeHook

    made, refresh = [], PrototypeHook.refresh

    def recorded(self, iteration):
        refresh(self, iteration)
        made.append(iteration)

    monkeypatch.setattr(PrototypeHook, "refresh", recorded)
    return made


@pytest.mark.parametrize(
    "period, start, expected",
    [(2, 0, [0, 2, 4]), (0, 0, [0]), (-1, 0, [0, 3]), (2, 3, [3, 5])],
    ids=["two iterations", "once", "epoch", "after a warm-up"],
)
def test_refresh_times(tmp_path, refreshes, period, start, expected):
    """Prototypes are made before the head starts, then every period; files and buffers agree."""
    opts = (f"{NODE}.PROTOTYPES.REFRESH_PERIOD", period, f"{NODE}.SCHEDULE.START_ITER", start)
    cfg = training_config(tmp_path, *opts, "SOLVER.MAX_ITER", 6)
    model = build(cfg)
    head = model.distill_heads["GlobalKnowledge"]
    (hook,) = head.build_hooks(cfg)
    hook.trainer = SimpleNamespace(model=model, iter=0, start_iter=0)
    hook.before_train()
    for hook.trainer.iter in range(6):
        hook.before_step()
    assert refreshes == expected
    assert head.bank.iteration.item() == expected[-1]
    student, _, present = head.bank.level(8)
    assert present[0].any() and present[1].any() and not present[2].any()
    assert all(module.training for module in model.student.modules())
    saved = Prototypes.load(str(tmp_path / "out" / PROTOTYPES_FILE))
    assert saved.meta["iteration"] == expected[-1]
    assert torch.equal(saved.levels[8].student, student[present])
    assert {o.category for o in saved.instances} == {0, 1}
    cost = json.loads((tmp_path / "out" / COST_FILE).read_text())
    assert cost["period"] == hook.period
    assert [made["iteration"] for made in cost["refreshes"]] == expected
    assert all(0 < made["feature_seconds"] <= made["seconds"] for made in cost["refreshes"])


def test_resume_equals_one_run(tmp_path, refreshes):
    """A resumed run reuses the prototypes of the checkpoint and ends with the same weights."""
    cfg = training_config(tmp_path, f"{NODE}.PROTOTYPES.REFRESH_PERIOD", 3)
    whole = make_trainer(cfg)
    whole.train()
    assert refreshes == [0, 3]
    cfg.OUTPUT_DIR = str(tmp_path / "second")
    os.makedirs(cfg.OUTPUT_DIR)
    first = make_trainer(cfg)
    first.max_iter = 2
    first.train()
    second = make_trainer(cfg, resume=True)
    assert second.start_iter == 2 and bank_of(second).iteration.item() == 0
    second.train()
    assert refreshes == [0, 3, 0, 3]
    wanted = whole.model.state_dict()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_death_in_a_refresh(tmp_path, monkeypatch, refreshes):
    """A run that dies while prototypes are made resumes with the old ones and makes them again."""
    cfg = training_config(tmp_path, f"{NODE}.PROTOTYPES.REFRESH_PERIOD", 3)
    trainer = make_trainer(cfg)
    generate = PrototypeGenerator.__call__
    dies_at = iter([False, True, False])

    def fragile(self, *args):
        prototypes = generate(self, *args)
        if next(dies_at):
            raise RuntimeError("killed")
        return prototypes

    monkeypatch.setattr(PrototypeGenerator, "__call__", fragile)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    assert refreshes == [0] and bank_of(trainer).iteration.item() == 0
    resumed = make_trainer(cfg, resume=True)
    assert resumed.start_iter == 2
    for stride in bank_of(resumed).strides:
        for mine, old in zip(
            bank_of(resumed).level(stride), bank_of(trainer).level(stride), strict=True
        ):
            assert torch.equal(mine, old)
    resumed.train()
    assert refreshes == [0, 3]


@pytest.mark.parametrize(
    "filled_at, start_iter, expected",
    [(90, 0, [0]), (0, 0, [0]), (0, 1, []), (None, 1, [1])],
    ids=["of a later iteration", "of the first", "of this run", "none in the checkpoint"],
)
def test_whose_prototypes_are_used(tmp_path, refreshes, filled_at, start_iter, expected):
    """A run goes on with its own; what came with the weights that it starts from is replaced."""
    cfg = training_config(tmp_path, f"{NODE}.PROTOTYPES.REFRESH_PERIOD", 0)
    model = build(cfg)
    head = model.distill_heads["GlobalKnowledge"]
    head.bank.iteration.fill_(0)
    if filled_at is not None:
        head.bank.fill(random_prototypes(head.bank.strides), filled_at)
    (hook,) = head.build_hooks(cfg)
    hook.trainer = SimpleNamespace(model=model, iter=start_iter, start_iter=start_iter)
    hook.before_train()
    hook.before_step()
    assert refreshes == expected


def test_a_file_of_prototypes_is_not_lost_to_a_checkpoint(tmp_path, refreshes):
    """PROTOTYPES.FILE is what a new run uses, whatever bank came with its weights."""
    path = str(tmp_path / "prototypes.pth")
    cfg = training_config(tmp_path, f"{NODE}.PROTOTYPES.REFRESH_PERIOD", 0)
    model, head = build_filled(cfg)
    wanted = random_prototypes(head.bank.strides)
    wanted.save(path)
    cfg.DISTILL.GLOBAL_KNOWLEDGE.PROTOTYPES.FILE = path
    for stride in head.bank.strides:
        head.bank.level(stride)[0].zero_()
    (hook,) = head.build_hooks(cfg)
    hook.trainer = SimpleNamespace(model=model, iter=0, start_iter=0)
    hook.before_train()
    hook.before_step()
    assert refreshes == []
    for stride, level in wanted.levels.items():
        student, _, present = head.bank.level(stride)
        torch.testing.assert_close(student[present], level.student)


def test_a_training_set_without_candidates_is_refused(tmp_path, caplog):
    """Before the folder is taken; classes of which no object is large enough are named."""
    key = f"{NODE}.PROTOTYPES.MIN_BOX_SIZE"
    message = f"wider and higher than {key} 20 pixels, the largest has 20: lower the key"
    with pytest.raises(ConfigError, match=message):
        DistillTrainer(training_config(tmp_path, key, 20.0))
    DistillTrainer(training_config(tmp_path))
    assert (
        f"classes without prototypes, as none of their objects is wider and higher than {key}"
        in caplog.text
    )
    assert caplog.text.rstrip().endswith("16 pixels: c")


@pytest.mark.parametrize("size", [64, 96])
def test_generation_matches_direct_features(tmp_path, size):
    """Prototypes are rows of the eval-mode features of images of the test size, as selected by
    the pursuit."""
    cfg = training_config(tmp_path, "INPUT.MIN_SIZE_TEST", size, arch="retinanet")
    model, head = build_filled(cfg)
    generator = PrototypeGenerator(cfg, head.bank)
    prototypes = generator(model.student, model.teacher)
    assert model.student.training and not model.teacher.model.training
    again = generator(model.student, model.teacher)
    model.eval()
    name_of = {stride: name for name, stride in feature_strides(model.student).items()}
    for stride, level in prototypes.levels.items():
        assert torch.equal(level.student, again.levels[stride].student)
        for row in range(len(level.instances)):
            instance = prototypes.instances[level.instances[row]]
            image = Image.open(instance.file_name).resize((size, size), Image.BILINEAR)
            image = torch.as_tensor(np.asarray(image)[:, :, ::-1].copy())
            inputs = [{"image": image.permute(2, 0, 1), "height": 64, "width": 64}]
            x1, y1, x2, y2 = (int(v * size / 64 // stride) for v in instance.box)
            for detector, rows in (
                (model.student, level.student),
                (model.teacher.model, level.teacher),
            ):
                with torch.no_grad():
                    features = detector.backbone(detector.preprocess_image(inputs).tensor)
                mean = features[name_of[stride]][0][:, y1 : y2 + 1, x1 : x2 + 1].mean((1, 2))
                torch.testing.assert_close(rows[row], mean, rtol=1e-3, atol=1e-4)


def test_tool_makes_and_shows_prototypes(tmp_path, capsys, monkeypatch):
    """d2kd prototypes writes a file that fits the head, and a picture a class."""
    monkeypatch.setattr(tool, "setup_logger", lambda **_: None)  # it would outlive the test
    cfg = training_config(tmp_path, arch="retinanet")
    file, pictures = str(tmp_path / "prototypes.pth"), tmp_path / "pictures"
    config_file = write_config(cfg, tmp_path / "config.yaml")
    tool.main(["make", "--config-file", config_file, "--output", file])
    tool.main(["show", file, "--pictures", str(pictures)])
    assert sorted(path.name for path in pictures.iterdir()) == ["000_a.png", "001_b.png"]
    printed = capsys.readouterr().out
    assert "c: 0 at stride 8" in printed
    assert re.search(r"stride 8: student 0\.\d\d, 0\.\d\d; teacher 0\.\d\d, 0\.\d\d", printed)
    cfg.merge_from_list([f"{NODE}.PROTOTYPES.FILE", file])
    assert build(cfg).distill_heads["GlobalKnowledge"].bank.iteration.item() == 0
    with pytest.raises(ConfigError, match="is no file of prototypes"):
        tool.main(["show", config_file, "--pictures", str(pictures)])


def toy_records():
    def record(i, *objects):
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, "iscrowd": crowd}
            for box, c, crowd in objects
        ]
        return {"file_name": f"{i}.jpg", "image_id": i, "width": 100, "height": 50 + i,
                "annotations": annotations}  # fmt: skip

    large, thin, other = [0, 0, 40, 31], [0, 0, 90, 30], [10, 10, 60, 45]
    return [
        record(0, (large, 0, 0), (thin, 0, 0), (other, 1, 0)),
        record(1, (large, 0, 0), (other, 0, 0)),
        record(2, (large, 0, 1), (other, 2, 0)),
        record(3),
        record(4, (other, 0, 0)),
    ]


def test_candidates():
    """Both sides must exceed the limit, crowds are out, and images of a class are limited."""
    found = find_candidates(toy_records(), 4)
    assert [o.category for o in found.instances].count(0) == 4
    assert len(found.instances) == 6 and len(found.images) == 4
    for image in found.images:
        names = {found.instances[i].file_name for i in image["candidates"]}
        assert names == {image["file_name"]}
    limited = find_candidates(toy_records(), 4, max_images=1)
    assert limited == find_candidates(toy_records(), 4, max_images=1)
    files = {o.file_name for o in limited.instances if o.category == 0}
    assert len(files) == 1
    kept = [o for o in limited.instances if o.category == 0]
    assert len(kept) == sum(o.file_name in files and o.category == 0 for o in found.instances)
    assert {o.category for o in limited.instances} == {0, 1, 2}


def test_no_candidates_at_all():
    """A data set without usable objects gives empty prototypes."""
    candidates = find_candidates([], CLASSES)
    empty = FeatureTable(torch.zeros(0, dtype=torch.long), {4: torch.zeros(0, 5)})
    prototypes = choose_prototypes(candidates, empty, empty, COUNT)
    assert prototypes.counts.tolist() == [[0] * CLASSES] and prototypes.instances == []


def test_classes_are_chosen_separately():
    """Each class and level gets what the selection on its own rows gives."""
    candidates = find_candidates(toy_records() * 4, 3)
    n = len(candidates.instances)
    tables = [
        FeatureTable(torch.arange(n), {4: torch.randn(n, c), 8: torch.randn(n, c)}) for c in (5, 6)
    ]
    prototypes = choose_prototypes(candidates, *tables, COUNT, alpha=3.0)
    for stride, level in prototypes.levels.items():
        for category in range(3):
            rows = torch.tensor(
                [i for i, o in enumerate(candidates.instances) if o.category == category]
            )
            student, teacher = (table.features[stride][rows] for table in tables)
            picks = select_prototypes(teacher, student, COUNT, alpha=3.0)
            mine = slice(level.offsets[category], level.offsets[category + 1])
            assert torch.equal(level.teacher[mine], teacher[picks])
            assert torch.equal(level.student[mine], student[picks])
            chosen = [prototypes.instances[i] for i in level.instances[mine]]
            assert chosen == [candidates.instances[rows[i]] for i in picks]


def share_work(rank: int, cfg, path: str) -> None:
    """One of two processes of a refresh."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}.store", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    model = build(cfg)
    bank = model.distill_heads["GlobalKnowledge"].bank
    PrototypeGenerator(cfg, bank)(model.student, model.teacher).save(f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_processes_share_the_work(tmp_path):
    """Two processes get the prototypes that one gets, and both the same."""
    # One image a batch: its features do not depend on what it was batched with.
    cfg = training_config(tmp_path, f"{NODE}.PROTOTYPES.BATCH_SIZE", 1, arch="retinanet")
    path = str(tmp_path / "prototypes")
    # Forked, for the tests' speed: they have imported everything.
    torch.multiprocessing.start_processes(
        share_work, args=(cfg, path), nprocs=2, start_method="fork"
    )
    model = build(cfg)
    bank = model.distill_heads["GlobalKnowledge"].bank
    alone = PrototypeGenerator(cfg, bank)(model.student, model.teacher)
    for rank in range(2):
        shared = Prototypes.load(f"{path}.{rank}")
        assert shared.instances == alone.instances
        for stride, level in alone.levels.items():
            for name in ("student", "teacher", "offsets", "instances"):
                assert torch.equal(getattr(shared.levels[stride], name), getattr(level, name))
