"""A run and its folder: nothing of one is lost to another, and no number is another's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode

from d2kd.engine import identity, output
from d2kd.engine.identity import changed_settings, differences, fingerprint
from d2kd.engine.teacher_check import read_teacher_results, write_teacher_results
from d2kd.errors import ConfigError
from d2kd.files import write_json

from ..detectors import build, detector_config
from ..golden.training import training_config
from .children import OUTPUT, content, train, unchanged, write_job

LONGER = ("SOLVER.MAX_ITER", "8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A training that came to its end, with a checked teacher."""
    folder = write_job(tmp_path_factory.mktemp("run"))
    outcome = train(folder, "DISTILL.TEACHER.CHECK", "True")
    assert outcome.code == 0, outcome.text[-2000:]
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of ``finished`` that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def record(run: Path) -> dict:
    return json.loads((run / OUTPUT / "run.json").read_text())


def test_what_a_run_leaves(run):
    """run.json says what it was, all of it valid JSON."""
    found = record(run)
    assert found["finished"] and found["heads"] == ["SSIM", "FeatureMimic"]
    assert found["settings"]["SOLVER.BASE_LR"] == 0.01 and found["changes"] == []
    assert len(found["teacher"]["sha256"]) == len(found["config"]) == 64
    data = found["data"]["golden_train"]
    assert data["file"].endswith("annotations.json") and len(data["sha256"]) == 64
    assert {"d2kd", "detectron2", "torch", "python"} <= found["versions"].keys()
    for name in ("run.json", "results.json", "teacher_results.json", "inference/results.json"):
        path = run / OUTPUT / name
        if path.is_file():
            json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))


def test_the_receipt(run):
    """receipt.json says what the student is, by hashes of its files, and what made it; the next run
    in the folder sets it aside with them."""
    found = json.loads((run / OUTPUT / "receipt.json").read_text())
    assert found["student"]["architecture"] == "GeneralizedRCNN"
    for name in ("weights", "config"):
        file = run / OUTPUT / found["student"][name]["file"]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert found["student"][name]["sha256"] == digest
    assert found["teacher"].items() >= record(run)["teacher"].items()
    results = json.loads((run / OUTPUT / "results.json").read_text())
    assert found["student"]["results"] == results.pop("results")
    assert found["cost"].items() >= results.items() and found["compared"] is None
    assert found["heads"] == {"SSIM": 4.0, "FeatureMimic": 1.0} and found["seed"] == 3
    assert found["data"]["trained_on"] == record(run)["data"]
    assert found["command"].startswith(sys.argv[0]) and found["processes"] == 1
    assert "receipt.json" in os.listdir(output.set_aside(str(run / OUTPUT)))


# --- files of one run and another ---------------------------------------------------------------


def test_an_evaluation_leaves_the_training_alone(run):
    """--eval-only, of named weights or by --resume, writes into inference/ only."""
    before = content(run / OUTPUT)
    for argv in (("MODEL.WEIGHTS", f"{OUTPUT}/student_final.pth"), ("--resume",)):
        assert train(run, "--eval-only", *argv).code == 0
    after = content(run / OUTPUT)
    changed = {n for n in after if after[n] != before.get(n)} | before.keys() - after.keys()
    assert {name.split("/")[0] for name in changed} <= {"inference", ".lock"}
    config = (run / OUTPUT / "inference" / "config.yaml").read_text()
    assert "META_ARCHITECTURE: GeneralizedRCNN" in config
    weights = json.loads((run / OUTPUT / "inference" / "results.json").read_text())["weights"]
    assert weights.endswith("model_final.pth")


REFUSED = {
    "heads with other parameters": (["--resume", "DISTILL.HEADS", "['DRKD']"], "other parameters"),
    "other optimiser": (["--resume", "SOLVER.OPTIMIZER", "AdamW"], "training by SGD, this config"),
    "other shapes": (
        ["--resume", "MODEL.FPN.OUT_CHANNELS", "12"],
        "backbone.fpn_lateral2.weight [8",
    ),
    "weights that do not fit": (["MODEL.WEIGHTS", "other.pth"], "does not fit the model: it has x"),
    "no weights to evaluate": (["--eval-only", "MODEL.WEIGHTS", ""], "an evaluation needs weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_run_changes_nothing(case, run):
    """Whatever is wrong with it is found before a file of the run before it is touched."""
    torch.save({"model": {"x": torch.zeros(3)}}, run / "other.pth")
    argv, words = REFUSED[case]
    with unchanged(run / OUTPUT):
        outcome = train(run, *argv, *LONGER)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last.startswith("error: ") and words in outcome.last


def test_a_new_run_in_the_folder_of_a_finished_one(run):
    """The files of the finished one are set aside, whole; teacher results of the same teacher are
    kept, of another one not."""
    before = content(run / OUTPUT)
    (run / OUTPUT / "my_notes.txt").write_text("of the user")
    assert train(run, "SEED", "7", "DISTILL.TEACHER.CHECK", "True").code == 0
    aside = content(run / OUTPUT / "earlier_1")
    assert {k: v[1] for k, v in aside.items()} == {
        k: v[1] for k, v in before.items() if k != ".lock"
    }
    assert (run / OUTPUT / "my_notes.txt").exists()
    assert "Checking the teacher" not in (run / OUTPUT / "log.txt").read_text()
    assert record(run)["settings"]["SEED"] == 7
    opts = ["DISTILL.TEACHER.CHECK", "True", "DISTILL.TEACHER.WEIGHTS", "random"]
    outcome = train(run, *opts, "SOLVER.MAX_ITER", "2")
    assert outcome.code == 0 and "they are in 'output/earlier_2' now" in outcome.text
    assert "Checking the teacher" in (run / OUTPUT / "log.txt").read_text()


def test_a_training_that_can_go_on_is_not_replaced(run):
    """Without --resume a stopped training is not begun a second time in its folder."""
    found = record(run)
    write_json({**found, "finished": False}, run / OUTPUT / "run.json")
    with unchanged(run / OUTPUT):
        outcome = train(run)
    assert outcome.last == (
        "error: OUTPUT_DIR 'output' holds a training that was not finished: go on with it by "
        "--resume, or name another OUTPUT_DIR"
    )


def test_stale_results_of_a_teacher_are_not_shown(run, tmp_path):
    """What is not known to be this teacher's is neither shown nor an error."""
    for text in ('{"bbox": {"AP": 99.9, "AP50": 99.9}}', '{"bb', "[]", '{"teacher": 3}'):
        folder = tmp_path / "stale"
        folder.mkdir()
        (folder / "teacher_results.json").write_text(text)
        opts = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", "1"]
        outcome = train(run, *opts, "DISTILL.TEACHER.CHECK", "False")
        assert outcome.code == 0 and "\nteacher " not in outcome.text and "99.9" not in outcome.text
        assert (folder / "earlier_1" / "teacher_results.json").read_text() == text
        shutil.rmtree(folder)


# --- resumed otherwise than begun ---------------------------------------------------------------


def test_resuming_with_another_teacher(run):
    """It is said, the new teacher is checked, and the summary names the change."""
    before = (run / OUTPUT / "teacher_results.json").read_text()
    opts = ["--resume", *LONGER, "DISTILL.TEACHER.CHECK", "True"]
    outcome = train(run, *opts, "DISTILL.TEACHER.OPTS", "['MODEL.PIXEL_STD', [9.0, 9.0, 9.0]]")
    assert outcome.code == 0
    assert "the teacher changed (teacher.yaml)" in outcome.text
    assert "Checking the teacher" in outcome.text
    assert json.loads((run / OUTPUT / "teacher_results.json").read_text()) != json.loads(before)
    assert "resumed at iteration 6 with other settings: DISTILL.TEACHER.OPTS is" in outcome.text
    (change,) = record(run)["changes"]
    assert change["iteration"] == 6 and len(change["changed"]) == 3
    # Resumed once more, with nothing new, it still says so.
    outcome = train(run, *opts, "DISTILL.TEACHER.OPTS", "['MODEL.PIXEL_STD', [9.0, 9.0, 9.0]]")
    assert "Checking the teacher" not in outcome.text and "\nteacher " in outcome.text
    assert len(record(run)["changes"]) == 1


def test_resuming_with_another_head_or_data(run):
    """A head without parameters, and annotations that changed, are said."""
    path = run / "annotations.json"
    data = json.loads(path.read_text())
    data["annotations"].pop()
    path.write_text(json.dumps(data))
    outcome = train(run, "--resume", *LONGER, "DISTILL.SSIM.WEIGHT", "2.0")
    assert outcome.code == 0
    for words in (
        "DISTILL.SSIM.WEIGHT is 2.0 (was its default)",
        "SOLVER.MAX_ITER is 8 (was 6)",
        "the annotations of 'golden_train' changed",
    ):
        assert words in outcome.text


def test_resuming_as_it_was_begun_says_nothing(run):
    """Moved, on another number of workers, evaluated otherwise: it is the same run."""
    os.rename(run / OUTPUT, run / "moved")
    opts = ["OUTPUT_DIR", "moved", "DATALOADER.NUM_WORKERS", "1", "TEST.EVAL_PERIOD", "3"]
    outcome = train(run, "--resume", *opts, "DISTILL.TEACHER.CHECK", "True")
    assert outcome.code == 0 and "with other settings" not in outcome.text
    assert "\nteacher " in outcome.text


def test_a_training_of_version_0_1_is_taken_as_it_is(run):
    """It has no run.json: it resumes, and nothing is said of what is not known."""
    for name in ("run.json", "teacher_results.json", "student_final.pth", "results.json"):
        (run / OUTPUT / name).unlink()
    outcome = train(run, "--resume", *LONGER)
    assert outcome.code == 0 and "with other settings" not in outcome.text
    assert record(run)["finished"]
    assert train(run, "SEED", "4").code == 0  # it was finished: a new one may come


# --- checkpoints that are kept ------------------------------------------------------------------


def test_keep(run, tmp_path):
    """SOLVER.CHECKPOINT_KEEP leaves the last and the best, from which the run goes on."""
    opts = ["OUTPUT_DIR", "kept", "SOLVER.CHECKPOINT_KEEP", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
    opts += ["TEST.EVAL_PERIOD", "2"]
    assert train(run, *opts).code == 0
    best = json.loads((run / "kept" / "run.json").read_text())["best"]
    assert best["metric"] == "bbox/AP" and best["checkpoint"] in (
        "model_0000001.pth",
        "model_0000003.pth",
    )
    left = {path.name for path in (run / "kept").glob("model_*.pth")}
    assert left == {best["checkpoint"], "model_0000005.pth", "model_final.pth"}
    assert train(run, "--resume", *opts, *LONGER).code == 0
    left = {path.name for path in (run / "kept").glob("model_*.pth")}
    assert {"model_0000007.pth", "model_final.pth"} < left and len(left) == 3


# --- the folder ---------------------------------------------------------------------------------


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    """Each is refused in one line, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for path, words in {
        "": "OUTPUT_DIR is empty: name a folder",
        " ": "OUTPUT_DIR is empty",
        "https://x/y": "is a URL; it must be a local folder",
        "file": "is not a folder",
        "file/below": "file' is not a folder",
        "link/below": "link' is not a folder",
        "/proc/x/y": "cannot be written: ",
    }.items():
        with pytest.raises(ConfigError, match=words) as refused:
            output.check_output_dir(path)
        assert "\n" not in str(refused.value)
    output.check_output_dir("new/below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("path", ["", " ", "https://x/y", "config.yaml", "config.yaml/below"])
def test_a_folder_that_cannot_be_is_refused_by_its_name(run, path):
    """From the command line too, whichever way, before anything is made."""
    before = set(run.iterdir()) - set(run.glob("printed_*"))
    for argv in (
        (),
        ("--resume",),
        ("--eval-only", "MODEL.WEIGHTS", f"{OUTPUT}/student_final.pth"),
    ):
        with unchanged(run / OUTPUT):
            outcome = train(run, *argv, "OUTPUT_DIR", path)
        assert outcome.code == 1 and "Traceback" not in outcome.text
        assert outcome.last.startswith("error: OUTPUT_DIR ")
        assert set(run.iterdir()) - set(run.glob("printed_*")) == before


def test_lock_in_one_process(tmp_path):
    """The process that has a folder may take it again, a fork of it may not."""
    folder = str(tmp_path / "out")
    output.lock(folder)
    output.lock(folder)
    output.check_free(folder)
    pid = os.fork()
    if not pid:
        try:
            output.lock(folder)
        except ConfigError as error:
            os._exit(int("is in use by process" not in str(error)))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    output.unlock(folder)
    assert not [path for path, _ in output._held if path == os.path.realpath(folder)]


# --- identity -----------------------------------------------------------------------------------


def test_settings_are_those_that_differ_from_the_defaults():
    """So a version with more keys finds the same."""
    cfg = detector_config()
    settings = changed_settings(cfg)
    assert settings["MODEL.FPN.OUT_CHANNELS"] == 16 and "SOLVER.MOMENTUM" not in settings
    assert settings["INPUT.MIN_SIZE_TRAIN"] == [64]
    cfg.MODEL.FPN.OUT_CHANNELS = 256
    assert "MODEL.FPN.OUT_CHANNELS" not in changed_settings(cfg)


def test_differences_in_words():
    """What matters to learning is named; what does not, is not; unknown is not different."""

    def about(settings=None, sha="a", data="b"):
        teacher = {"sha256": sha, "config_file": "t.yaml"} if sha else None
        files = {"t": {"sha256": data}}
        return {"settings": settings or {}, "teacher": teacher, "data": files}

    assert differences(about(), about()) == []
    assert differences(about({"OUTPUT_DIR": "a"}), about({"MODEL.DEVICE": "cpu"})) == []
    assert differences(about(), about({"SEED": 3})) == ["SEED is 3 (was its default)"]
    assert differences(about({"SEED": 3}), about()) == ["SEED is its default (was 3)"]
    assert differences(about(sha="x"), about()) == ["the teacher changed (t.yaml)"]
    assert differences(about(sha=None), about()) == differences(about(), about(sha=None)) == []
    assert differences(about(data="x"), about()) == ["the annotations of 't' changed"]
    assert differences(about(data=None), about()) == differences(about(), about(data=None)) == []
    assert differences({"settings": {}}, about()) == []


def test_fingerprint():
    """It changes with a weight, a buffer and how images are normalised."""
    cfg = detector_config()
    model = build(cfg)
    first = fingerprint(model)
    assert fingerprint(build(cfg)) == first != fingerprint(build(cfg, seed=1))
    cfg.MODEL.PIXEL_STD = [9.0, 9.0, 9.0]
    assert fingerprint(build(cfg)) != first
    with torch.no_grad():
        model.backbone.fpn_output2.norm.running_mean[3] += 1e-3
    assert fingerprint(model) != first


RESULTS = {"bbox": {"AP": 3.5, "APl": float("nan")}}


def test_results_belong_to_a_teacher(tmp_path):
    """Of another one, or of a version that did not keep how it was evaluated: none. NaN comes back
    as it was."""
    folder, cfg = str(tmp_path), training_config()
    write_teacher_results(folder, cfg, {"sha256": "a"}, RESULTS)
    found = read_teacher_results(folder, cfg, {"sha256": "a"})
    assert found["bbox"]["AP"] == 3.5 and found["bbox"]["APl"] != found["bbox"]["APl"]
    for teacher in ({"sha256": "b"}, None):
        assert read_teacher_results(folder, cfg, teacher) is None
    path = tmp_path / "teacher_results.json"
    content = json.loads(path.read_text())
    del content["evaluation"]
    path.write_text(json.dumps(content))
    assert read_teacher_results(folder, cfg, {"sha256": "a"}) is None


@pytest.mark.parametrize(
    "change",
    [
        ("DATASETS.TEST", ("other",)),
        ("DISTILL.TEACHER.OPTS", ["INPUT.FORMAT", "RGB"]),
        ("DISTILL.TEACHER.PRECISION", "bf16"),
        ("INPUT.FORMAT", "RGB"),
        ("INPUT.MIN_SIZE_TEST", 32),
        ("INPUT.MAX_SIZE_TEST", 99),
        "annotations",
        "LazyConfig",
    ],
    ids=lambda change: change[0] if isinstance(change, tuple) else change,
)
def test_results_belong_to_an_evaluation(change, tmp_path, monkeypatch):
    """The same weights read in another way, or on other images, have no results yet."""
    folder, cfg = str(tmp_path), training_config()
    cfg.DATASETS.TEST = ("golden",)
    annotations = tmp_path / "annotations.json"
    annotations.write_text("{}")
    metadata = SimpleNamespace(get={"json_file": str(annotations)}.get)
    monkeypatch.setattr(identity.MetadataCatalog, "get", lambda name: metadata)
    cfg.LAZY = CfgNode({"model": {"teacher": {"opts": [1]}}, "dataloader": {}})
    write_teacher_results(folder, cfg, {"sha256": "a"}, RESULTS)
    assert read_teacher_results(folder, cfg.clone(), {"sha256": "a"})
    if change == "annotations":
        annotations.write_text("[]")
    elif change == "LazyConfig":
        cfg.LAZY.model.teacher.opts = [2]
    else:
        cfg.merge_from_list(change)
    assert read_teacher_results(folder, cfg, {"sha256": "a"}) is None
