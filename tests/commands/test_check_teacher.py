"""``d2kd check-teacher``: faults that are planted in a teacher or in annotations are found."""

from __future__ import annotations

import copy
import json
import os
import re

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2kd import cli
from d2kd.commands import check_teacher

from ..data.parts import CLASSES, Parts, forget_datasets, make_split
from ..detectors import build, distiller_config, write_config


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    """60 images with 180 objects to train on, 20 to test on."""
    parts = Parts(tmp_path)
    parts.train = make_split(parts.folder, "train", 60, seed=0)
    parts.val = make_split(parts.folder, "val", 20, seed=5)
    return parts


class Oracle:
    """A detector as good as a trained one: nearly right boxes, some objects missed or taken for
    others, false alarms; ``swap`` exchanges two classes of its predictions."""

    swap: tuple[int, int] | None = None

    def __init__(self, parts: Parts):
        self.objects: dict[str, list[dict]] = {}
        for content in (parts.train, parts.val):
            names = {image["id"]: image["file_name"] for image in content["images"]}
            for entry in copy.deepcopy(content["annotations"]):
                self.objects.setdefault(names[entry["image_id"]], []).append(entry)
        self.noise = np.random.default_rng(0)

    def __call__(self, inputs: list[dict]) -> list[dict]:
        (item,) = inputs
        boxes, scores, classes = [], [], []
        for entry in self.objects[os.path.basename(item["file_name"])]:
            x, y, w, h = np.multiply(entry["bbox"], 1.0)
            x, y = (x, y) + self.noise.normal(0, 0.04, 2) * (w, h)
            w, h = (w, h) * np.exp(self.noise.normal(0, 0.04, 2))
            kind = entry["category_id"] - 1
            chance = self.noise.random()
            if chance < 0.05:
                continue
            boxes.append([x, y, x + w, y + h])
            scores.append(self.noise.uniform(0.4, 1.0))
            classes.append((kind + 1) % 3 if chance < 0.1 else kind)
        x, y = self.noise.uniform(0, 60, 2)
        boxes.append([x, y, x + 30, y + 30])
        scores.append(self.noise.uniform(0.05, 0.4))
        classes.append(self.noise.integers(3))
        if self.swap:
            other = dict(zip(self.swap, reversed(self.swap), strict=True))
            classes = [other.get(kind, kind) for kind in classes]
        found = Instances((item["height"], item["width"]))
        found.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
        found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
        return [{"instances": found}]


def check(parts: Parts, capsys, *options: str, detect=None, **values) -> list[str]:
    """The lines that the command prints, or the error that it ends with.

    Args:
        detect: in place of the (random) teacher.
        values: keys of the config.
    """
    parts.write()
    teacher = write_config(parts.config(), parts.folder / "teacher.yaml")
    cfg = distiller_config(parts.config(**values), ["SSIM"], teacher)
    file = write_config(cfg, parts.folder / "distill.yaml")
    output = str(parts.folder / "checked")
    with pytest.MonkeyPatch.context() as patch:
        if detect is not None:
            patch.setattr(check_teacher, "OnStudentInput", lambda teacher: detect)
        try:
            cli.main(["check-teacher", "--config-file", file, "--output", output, *options])
        except SystemExit as stop:
            return [str(stop.code)]
    return capsys.readouterr().out.splitlines()


def test_a_good_teacher(parts, capsys):
    """Nothing is said of a teacher with a trained one's faults; AP by class and size, files."""
    lines = check(parts, capsys, detect=Oracle(parts))
    assert lines[2] == "Nothing is wrong that this check can see."
    assert lines[0].endswith("on 60 of 60 images of 't' (train), 20 of 20 images of 'v' (val)")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[0] == [
        "",
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "objects",
        "score error",
        "bias",
    ]
    assert rows[2][0] == "teacher, train" and rows[2][7] == "180" and float(rows[2][2]) > 80
    assert rows[4][:7] == ["class", "objects", "AP train", "AP val", "APs", "APm", "APl"]
    assert {row[0] for row in rows[6:]} == set(CLASSES) and rows[6][6] == "-"  # none are large
    found = json.loads((parts.folder / "checked" / "results.json").read_text())
    assert found["teacher"]["val"]["classes"]["nut"]["AP50"] > 60
    assert np.sum(found["teacher"]["train"]["confusion"]) == 180
    assert Image.open(parts.folder / "checked" / "disagreements.jpg").size[0] == 4 * 320
    assert "![" in (parts.folder / "checked" / "page.md").read_text()


def test_swapped_classes_are_the_first_finding(parts, capsys):
    """With the names of both; the third class is not blamed."""
    oracle = Oracle(parts)
    oracle.swap = (0, 1)
    lines = check(parts, capsys, detect=oracle)
    assert re.fullmatch(
        r"1\. the classes 'nut' and 'bolt' are swapped in the teacher: it labels \d\d% of the "
        r"'nut' that it finds as 'bolt', and the other way round\. Is the order .*",
        lines[3],
    )
    assert not any("'ring'" in line for line in lines[3:8])


def test_shifted_annotations_are_the_first_finding(parts, capsys):
    """5 % of the boxes moved by a third to a half of their size: their number, and the images."""
    oracle, shifted = Oracle(parts), set()
    for entry in parts.train["annotations"][::20]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x + w / 2, y + h / 3, w, h]
        shifted.add(parts.train["images"][entry["image_id"] - 1]["file_name"])
    lines = check(parts, capsys, detect=oracle)
    match = re.match(r"1\. train: (\d\.\d)% of the annotations \((\d+) of (\d+) that", lines[3])
    assert match, lines[:6]
    # Of 9, some were missed by the teacher or found with a low score; others are not blamed.
    assert 5 <= int(match[2]) <= 9 and 120 <= int(match[3]) <= 180
    found = json.loads((parts.folder / "checked" / "results.json").read_text())["disagreements"]
    displaced = {os.path.basename(one["file"]) for one in found if "displaced" in one["what"]}
    assert len(displaced & shifted) >= 5 and len(displaced - shifted) <= 2


def test_a_baseline_that_is_better(parts, capsys):
    """It is named; weights of the student are those of --baseline."""
    torch.save({"model": build(parts.config()).state_dict()}, parts.folder / "student.pth")
    argv = ("--images", "12", "--baseline", str(parts.folder / "student.pth"))
    lines = check(parts, capsys, *argv, detect=Oracle(parts))
    assert "on 12 of 60 images of 't'" in lines[0]
    assert lines[2] == "Nothing is wrong that this check can see."
    assert any(line.startswith("| baseline, val") for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_teacher, "_baseline", lambda cfg, path: build(cfg).student.eval())
        oracle = Oracle(parts)
        patch.setattr(check_teacher, "OnStudentInput", lambda teacher: teacher.model)
        patch.setattr(check_teacher, "_examine_all", swapped(check_teacher._examine_all, oracle))
        lines = check(parts, capsys, *argv)
    assert "val: it is worse than the baseline on 'nut', 'bolt', 'ring'" in "\n".join(lines)
    assert re.search(r"its AP is 0\.\d, the baseline's \d\d\.\d: too weak to teach", str(lines))


def swapped(examine_all, oracle):
    """Results in which the oracle is the baseline."""

    def examined(cfg, names, args):
        results = dict(examine_all(cfg, names, args))
        limits = (args.images, args.confident)
        results["baseline"] = {
            split: check_teacher.examine(oracle, cfg, name, *limits)
            for split, name in names.items()
        }
        return results

    return examined


def test_the_teacher_itself_is_run(parts, capsys):
    """A random one: it finds next to nothing, which is said."""
    lines = check(parts, capsys, "--images", "8")
    assert any("AP 0.0 is that of a detector that has learnt little" in line for line in lines)


def test_scores_in_half_precision(parts, capsys):
    """As a dense teacher gives in ``DISTILL.TEACHER.PRECISION bf16``."""
    oracle = Oracle(parts)

    def detect(inputs: list[dict]) -> list[dict]:
        (output,) = oracle(inputs)
        output["instances"].scores = output["instances"].scores.bfloat16()
        return [output]

    assert check(parts, capsys, detect=detect)[2] == "Nothing is wrong that this check can see."


def test_what_is_refused(parts, capsys):
    """In one line, and nothing is written."""
    (parts.folder / "file").write_text("")
    for argv, values, words in (
        (("--baseline", "nowhere.pth"), {}, "--baseline: no file 'nowhere.pth'"),
        (("--confident", "2"), {}, "'2' must be a number between 0 and 1"),
        (("--output", str(parts.folder / "file")), {}, "is not a folder"),
        (("DISTILL.TEACHER.CONFIG_FILE", ""), {}, "DISTILL.TEACHER.CONFIG_FILE is empty"),
        (
            ("DISTILL.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 5]"),
            {},
            "the teacher predicts 5 classes, 't' has 3",
        ),
        (
            ("DISTILL.TEACHER.CONFIG_FILE", "torchvision:fasterrcnn_resnet50_fpn"),
            {},
            "gives maps only: there are no predictions to check",
        ),
    ):
        (line,) = check(parts, capsys, *argv, **values)
        assert line.startswith("error: ") and words in line, line
        assert not (parts.folder / "checked").exists()
