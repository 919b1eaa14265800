"""``d2kd distill`` and ``d2kd.distill``: teacher, student and data, in one call that goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

import d2kd
from d2kd import cli
from d2kd.commands import distill as module
from d2kd.compare.comparison import Comparison
from d2kd.compare.suite import read_suite
from d2kd.data.model_classes import trained_classes
from d2kd.engine import train
from d2kd.engine.setup import merged_config

from ..detectors import build, detector_config, write_config

DIGITS = tuple("0123456789")


def config(width: int) -> CfgNode:
    """A RetinaNet of COCO's 80 classes, as a config of a user's that knows nothing of the data."""
    cfg = detector_config("retinanet", width=width, num_classes=80)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 1000, 1e-3
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # what is not trained finds something, too
    return cfg


@pytest.fixture(scope="module")
def data(digits_root) -> list[str]:
    """Annotation files and image folders of digits_tiny."""
    paths = []
    for name in ("digits_tiny_train", "digits_tiny_val"):
        DatasetCatalog.get(name)  # makes it
        metadata = MetadataCatalog.get(name)
        paths += [str(metadata.json_file), str(metadata.image_root)]
    return paths


@pytest.fixture(scope="module")
def job(tmp_path_factory, data) -> tuple[Path, list[str]]:
    """A finished command: its folder, and its words."""
    folder = tmp_path_factory.mktemp("job")
    for name, width in (("student", 16), ("teacher", 24)):
        write_config(config(width), folder / f"my_{name}.yaml")
    words = ["distill", "--data", *data, "--heads", "SSIM,Logits", "--iterations", "4"]
    words += ["--student", str(folder / "my_student.yaml"), "--out", str(folder / "out")]
    words += ["--teacher", str(folder / "my_teacher.yaml")]
    cli.main(words)
    return folder, words


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_one_command(job):
    """Both trainings came to their end, on the classes of the data; the student is a plain one."""
    folder, _ = job
    out = folder / "out"
    for name in ("teacher", "student"):
        cfg = merged_config(str(out / f"{name}.yaml"), [])
        assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
        assert trained_classes(cfg) == DIGITS and cfg.SOLVER.MAX_ITER == 4
        assert "AP" in json.loads((out / name / "results.json").read_text())["results"]["bbox"]
    assert cfg.DATASETS.TRAIN[0].startswith("annotations_train_")
    assert cfg.DISTILL.HEADS == ["SSIM", "Logits"] and cfg.DISTILL.TEACHER.OPTS == []
    plain = get_cfg()
    plain.merge_from_file(str(out / "student" / "student_config.yaml"))
    build(plain).load_state_dict(weights(out / "student/student_final.pth"))
    metrics = (out / "student/metrics.json").read_text()
    assert "loss_kd_ssim" in metrics and "loss_kd_logits_cls" in metrics
    receipt = json.loads((out / "student/receipt.json").read_text())
    assert receipt["teacher"]["weights"] == str(out / "teacher/student_final.pth")
    assert "AP" in receipt["teacher"]["results"]["bbox"] and receipt["seed"] == 1


def test_the_report(job):
    """It has AP of both, by class too, and commands that go on: each names what exists."""
    folder, _ = job
    text = (folder / "out/report.md").read_text()
    assert "| student" in text and "| teacher" in text and "| 7 |" in text
    assert "it has no weights" in text and "4 iterations of 2 images" in text
    suite = read_suite(folder / "out/gain.yaml")
    assert f"d2kd compare --suite {folder}/out/gain.yaml" in text
    assert f"d2kd train --config-file {folder}/out/student.yaml" in text
    comparison = Comparison(suite, folder / "gain", jobs=1, threads=1)
    comparison.check(comparison.runs(["baseline", "distilled", "baseline, same time"]))


def test_the_same_command_keeps_what_is_finished(job, capsys):
    """Nothing is trained twice."""
    folder, words = job
    files = [folder / "out" / name / "student_final.pth" for name in ("teacher", "student")]
    before = [file.stat().st_mtime_ns for file in files]
    cli.main(words)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert capsys.readouterr().out.count("done before") == 2


def test_other_arguments_are_refused(job):
    """A folder holds one distillation; the message names the key."""
    _, words = job
    message = "holds a distillation with other settings: SOLVER.MAX_ITER of teacher.yaml was 4"
    with pytest.raises(SystemExit, match=f"^error: .*{message} and is 5; name another --out"):
        cli.main([*words[:-7], "5", *words[-6:]])
    with pytest.raises(SystemExit, match="DISTILL.SSIM.WEIGHT of student.yaml was its default"):
        cli.main([*words, "DISTILL.SSIM.WEIGHT", "2.0"])


def test_the_yaml_repeats_it(job, tmp_path):
    """d2kd train on the file that was saved gives the same student, to the last bit."""
    folder, _ = job
    train.main(["--config-file", str(folder / "out/student.yaml"), "OUTPUT_DIR", str(tmp_path)])
    expected = weights(folder / "out/student/student_final.pth")
    found = weights(tmp_path / "student_final.pth")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_from_python(job, data, tmp_path):
    """Configs from memory, and a teacher that has weights for the classes: it is not trained."""
    folder, _ = job
    teacher = config(24)
    teacher.MODEL.WEIGHTS = str(folder / "out/teacher/student_final.pth")
    student = config(16)
    student.SOLVER.MAX_ITER = 2
    student.DISTILL.TEACHER.WEIGHTS = "of_another_teacher.pth"
    out = tmp_path / "out"
    result = d2kd.distill(student, teacher, data, heads=["Logits"], out=str(out), batch=1)
    assert isinstance(result, d2kd.DistillResult) and not (out / "teacher").exists()
    assert result.teacher_weights == teacher.MODEL.WEIGHTS
    assert "AP" in result.results["bbox"] and "AP" in result.teacher_results["bbox"]
    assert os.path.isfile(result.weights) and os.path.isfile(result.config)
    assert result.receipt["heads"] == {"Logits": 1.0}
    cfg = merged_config(str(out / "student.yaml"), [])
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (1, 5e-4)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 1 and cfg.SOLVER.CHECKPOINT_KEEP == 1
    assert student.MODEL.META_ARCHITECTURE == "RetinaNet"  # the caller's configs are as they were


def test_it_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch):
    """A teacher that was finished when the student failed is not trained again."""
    names, run = ["digits_tiny_train", "digits_tiny_val"], module.run_training

    def fail(file: str, *args) -> None:
        if file.endswith("student.yaml"):
            raise RuntimeError("the machine failed")
        run(file, *args)

    call = {"data": names, "out": str(tmp_path / "out"), "iterations": 1}
    monkeypatch.setattr(module, "run_training", fail)
    with pytest.raises(RuntimeError):
        d2kd.distill(config(16), config(24), **call)
    made = tmp_path / "out/teacher/student_final.pth"
    before = made.stat().st_mtime_ns
    monkeypatch.setattr(module, "run_training", run)
    result = d2kd.distill(config(16), config(24), **call)
    assert made.stat().st_mtime_ns == before and result.receipt["heads"] == {"SSIM": 4.0}


def test_a_teacher_of_another_library(tmp_path, data, free_port):
    """It is used as it is; two processes train the student."""
    pytest.importorskip("timm")
    opts = ["DISTILL.TEACHER.WEIGHTS", "random"]
    out = str(tmp_path / "out")
    call = {"heads": ["FeatureMimic"], "out": out, "iterations": 1, "num_gpus": 2, "opts": opts}
    result = d2kd.distill(config(16), "timm:resnet18", data, **call)
    assert result.receipt["processes"] == 2 and "AP" in result.results["bbox"]
    assert result.receipt["teacher"]["config_file"] == "timm:resnet18"
    assert not (tmp_path / "out/teacher.yaml").exists()
    assert "teacher: timm:resnet18, as it is" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["a.json", "b", "c.json"]}, "--data has 3 items; it must be: train.json images"),
        ({"data": ["a.json", "b", "c.json", "d"]}, "a.json not found"),
        ({"data": ["digits_tiny_train", "digits_tiny_vall"]}, "digits_tiny_vall.*digits_tiny_val"),
        ({"heads": ["SIMM"]}, "unknown head 'SIMM'; valid: .*SSIM"),
        ({"heads": ["DSIG", "MaskMimic"]}, "MaskMimic"),
        ({"opts": ["SOLVER.BASE_LR", 0.0]}, "SOLVER.BASE_LR is 0.0; it must be positive"),
        ({"opts": ["MODEL.WEIGHTS", "gone.pth"]}, "MODEL.WEIGHTS: no file 'gone.pth'"),
        ({"opts": ["DISTILL.TEACHER.WEIGHTS", "gone.pth"]}, "no file 'gone.pth'|gone.pth"),
        (
            {"opts": ["DISTILL.TEACHER.OPTS", ["SOLVER.MAX_ITER", 0]]},
            "SOLVER.MAX_ITER is 0; it must be at least 1",
        ),
        ({"student": "digits/retinanet_R19.yaml"}, "neither a file nor a model-zoo name; close"),
        ({"student": "my_student.py"}, "is a LazyConfig, which d2kd train reads"),
        ({"teacher": get_cfg()}, "the config has no DISTILL"),
        ({"num_gpus": 3, "batch": 4}, "IMS_PER_BATCH 4 is not divisible by the 3 processes"),
    ],
)
def test_mistakes_come_before_anything_is_written(changes, message, data, tmp_path):
    """Those of the pair and of the teacher's training, too: all is built before the first step."""
    call = {"student": config(16), "teacher": config(24), "data": data, "out": str(tmp_path / "o")}
    with pytest.raises(d2kd.ConfigError, match=message) as error:
        d2kd.distill(**{**call, **changes})
    assert "\n" not in str(error.value) and not (tmp_path / "o").exists()


def test_not_under_torchrun(monkeypatch):
    """It starts processes itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(d2kd.ConfigError, match="use --num-gpus, not torchrun"):
        d2kd.distill(config(16), config(24))


def test_whose_weights_a_teacher_has(job, tmp_path):
    """Those of the zoo are for COCO; a file is for what it fits; a file that is not there is none's
    mistake but the user's."""
    folder, _ = job
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    zoo = merged_config(name, [])
    url = module.teacher_weights(name, zoo, "")
    assert url.startswith("https://") and url.endswith(".pkl")
    coco = trained_classes(zoo)
    assert module.why_train(zoo, url, coco, coco) == ""
    assert module.why_train(zoo, url, coco, DIGITS).startswith("its weights are for 80 classes")
    own = merged_config(str(folder / "out/teacher.yaml"), [])
    path = str(folder / "out/teacher/student_final.pth")
    assert module.why_train(own, path, None, DIGITS) == ""
    assert module.why_train(own, path, DIGITS[::-1], DIGITS).startswith("its weights are for 10")
    own.MODEL.RETINANET.NUM_CLASSES = 3
    assert "these classes (2 of the teacher's weights" in module.why_train(own, path, None, "abc")
    assert module.why_train(own, "", None, DIGITS) == "it has no weights of a detector"
    assert module.why_train(own, "random", None, DIGITS) == ""
    with pytest.raises(d2kd.ConfigError, match="gone.pth"):
        module.why_train(own, "gone.pth", None, DIGITS)
