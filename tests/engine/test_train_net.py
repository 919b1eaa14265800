"""train_net.py as a user runs it: training, resuming, evaluating, and mistakes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY, ConfigError, Teacher
from d2kd.engine import train as train_net
from d2kd.engine.loss_log import LossLog
from d2kd.engine.setup import build_parser, import_user_module, read_config
from d2kd.engine.step import check_parameters

from ..detectors import detector_config, distiller_config, write_config


@pytest.fixture(scope="module")
def job(tmp_path_factory, digits_root):
    """A four-iteration distillation on digits_tiny that was trained once: (folder, config file)."""
    folder = tmp_path_factory.mktemp("job")
    teacher = detector_config(width=24, num_classes=10)
    teacher_file = write_config(teacher, folder / "teacher.yaml")
    student = detector_config(num_classes=10)
    student.DATASETS.TRAIN = ("digits_tiny_train",)
    student.DATASETS.TEST = ("digits_tiny_val",)
    student.SOLVER.MAX_ITER = 4
    student.SOLVER.CHECKPOINT_PERIOD = 2
    student.SOLVER.BASE_LR = 1e-3
    student.SEED = 3
    student.OUTPUT_DIR = str(folder / "out")
    cfg = distiller_config(student, ["FeatureMimic", "Logits"], teacher_file)
    config_file = write_config(cfg, folder / "student.yaml")
    train_net.main(["--config-file", config_file])
    return folder, config_file


def load(path) -> dict:
    return torch.load(path, map_location="cpu")


def test_the_end_of_training(job, capsys):
    """The final files are there; student_final.pth is the plain student and nothing else."""
    folder, _ = job
    out = folder / "out"
    state = load(out / "student_final.pth")["model"]
    plain = build_model(detector_config(num_classes=10))
    assert plain.load_state_dict(state).missing_keys == []
    final = load(out / "model_final.pth")["model"]
    assert all(torch.equal(final[name], value) for name, value in state.items())
    assert any(name.startswith("distill_heads.") for name in final)
    results = json.loads((out / "results.json").read_text())
    assert "AP" in results["results"]["bbox"] and results["step_seconds"] > 0
    teacher = json.loads((out / "teacher_results.json").read_text())
    assert "AP" in teacher["results"]["bbox"] and teacher["datasets"] == ["digits_tiny_val"]
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    logged = set().union(*metrics)
    assert {"loss_kd_feature_mimic", "loss_kd_logits_cls"} <= logged
    assert {"total_kd_loss/logits", "kd_loss_factor/feature_mimic"} <= logged
    log = (out / "log.txt").read_text()
    of_heads = r"total_kd_loss: \S+  (total_kd_loss/\w+: \S+  ){2}loss_"
    assert re.search(rf"total_loss: \S+  total_detection_loss: \S+  {of_heads}", log)
    if not torch.cuda.is_available():
        assert log.count("Running on the CPU: no CUDA GPU is available") == 1
    assert "distilled: FeatureMimic x 1, Logits x 1" in log


def log_losses(losses: dict[str, torch.Tensor], iteration: int) -> None:
    """Note the losses of one step, and log them at once."""
    log = LossLog()
    log.add(iteration, losses, 0.1)
    log.flush()


def test_the_log_compares_distillation_with_detection():
    """Both sums are logged beside the total, which they add up to; without heads there is none."""
    terms = {"loss_cls": 1.0, "loss_box_reg": 0.5, "loss_kd_ssim": 0.25, "loss_kd_dsig_edge": 2.0}
    with EventStorage() as storage:
        log_losses({name: torch.tensor(value) for name, value in terms.items()}, 0)
        latest = {name: history.latest() for name, history in storage.histories().items()}
    expected = {"total_loss": 3.75, "total_detection_loss": 1.5, "total_kd_loss": 2.25}
    assert latest == {"data_time": 0.1, **expected, **terms}
    assert list(latest)[1:4] == list(expected)  # neighbours on the console
    with EventStorage() as storage:
        log_losses({"loss_cls": torch.tensor(1.0)}, 0)
        assert set(storage.histories()) == {"data_time", "total_loss", "loss_cls"}


def test_a_head_that_stopped_is_logged_as_zero():
    """After STOP_ITER neither its terms nor the sums keep the values of its last step."""
    with EventStorage() as storage:
        for names in (("loss_cls", "loss_kd_ssim"), ("loss_cls",)):
            log_losses({name: torch.tensor(1.0) for name in names}, storage.iter)
            storage.step()
        latest = {name: history.latest() for name, history in storage.histories().items()}
    assert latest["loss_kd_ssim"] == latest["total_kd_loss"] == 0
    assert latest["total_loss"] == latest["total_detection_loss"] == 1


def test_resume_equals_no_stop(job, tmp_path):
    """Stopped after iteration 2 and resumed: every weight and momentum is that of no stop."""
    folder, config_file = job
    shutil.copy(folder / "out" / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    train_net.main(["--config-file", config_file, "--resume", "OUTPUT_DIR", str(tmp_path)])
    expected, found = (load(d / "model_final.pth") for d in (folder / "out", tmp_path))
    assert expected["model"].keys() == found["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, found["model"][name]), name
    momenta = [
        [s["momentum_buffer"] for s in run["trainer"]["_trainer"]["optimizer"]["state"].values()]
        for run in (expected, found)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.parametrize(
    "saved, message",
    [
        ([("a", (2, 3)), ("b", (4,))], None),
        (None, None),  # of a version that did not keep them
        ([("a", (2, 5)), ("b", (4,))], r"it has a \[2, 5\] where this config has a \[2, 3\]"),
        ([("b", (4,)), ("a", (2, 3))], r"it has b \[4\] where this config has a"),
        ([("a", (2, 3))], r"it has nothing where this config has b"),
    ],
    ids=["same", "unknown", "other shape", "other order", "one less"],
)
def test_the_optimisers_state_is_for_the_same_parameters(saved, message):
    """It knows parameters by position only: others are refused, not mixed up."""
    own = [("a", (2, 3)), ("b", (4,))]
    if message is None:
        check_parameters(saved, own)
    else:
        with pytest.raises(ConfigError, match=message):
            check_parameters(saved, own)


def test_resuming_with_another_head(job, tmp_path):
    """A checkpoint of other heads is refused in one line."""
    folder, config_file = job
    shutil.copy(folder / "out" / "model_0000001.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    opts = ["DISTILL.HEADS", "['SSIM', 'DSIG']", "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(SystemExit, match="error: the checkpoint is of a model with other param"):
        train_net.main(["--config-file", config_file, "--resume", *opts])


def test_evaluation_builds_no_teacher(job, tmp_path, monkeypatch, capsys):
    """--eval-only needs neither the teacher's config nor its weights."""
    folder, config_file = job
    monkeypatch.setattr(Teacher, "from_config", lambda *_: pytest.fail("a teacher was built"))
    weights = str(folder / "out" / "student_final.pth")
    opts = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path)]
    opts += ["DISTILL.TEACHER.CONFIG_FILE", "gone.yaml"]
    args = build_parser().parse_args(["--config-file", config_file, "--eval-only", *opts])
    results = train_net.process(args)
    expected = json.loads((folder / "out" / "results.json").read_text())["results"]["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(expected["AP"])


def test_plain_training_in_bf16(job, tmp_path):
    """A student alone, under bf16 autocast on the CPU."""
    _, config_file = job
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "DISTILL.HEADS", "[]"]
    opts += ["SOLVER.MAX_ITER", "2"]
    opts += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bf16", "DATASETS.TEST", "()"]
    train_net.main(["--config-file", config_file, *opts, "OUTPUT_DIR", str(tmp_path)])
    assert (tmp_path / "student_final.pth").is_file()
    log = (tmp_path / "log.txt").read_text()
    assert "distilled: nothing" in log


def test_two_processes(job, tmp_path, free_port):
    """--num-gpus 2 without a GPU: two gloo processes train and evaluate together."""
    _, config_file = job
    url = [
        "--import",
        "tests.toy_head",
        "--num-gpus",
        "2",
        "--dist-url",
        f"tcp://127.0.0.1:{free_port}",
    ]
    opts = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path), "DISTILL.TEACHER.CHECK", "False"]
    train_net.main(["--config-file", config_file, *url, *opts])
    assert "AP" in json.loads((tmp_path / "results.json").read_text())["results"]["bbox"]


USER_HEAD = """
from d2kd import DISTILL_HEAD_REGISTRY
from tests.toy_head import ToyMimic

@DISTILL_HEAD_REGISTRY.register()
class MyHead(ToyMimic):
    @classmethod
    def add_config(cls, node):
        node.EXTRA = 5
"""


@pytest.fixture
def forget_head():
    """Heads that a test registers are gone after it."""
    known = dict(DISTILL_HEAD_REGISTRY)
    yield
    for name in dict(DISTILL_HEAD_REGISTRY).keys() - known.keys():
        del DISTILL_HEAD_REGISTRY._obj_map[name]


def test_a_users_head(job, tmp_path, forget_head):
    """--import brings a head, its keys and its losses."""
    _, config_file = job
    (tmp_path / "my_heads.py").write_text(USER_HEAD)
    out = tmp_path / "out"
    opts = ["DISTILL.HEADS", "['MyHead']", "DISTILL.MY_HEAD.EXTRA", "6", "SOLVER.MAX_ITER", "1"]
    opts += ["DATASETS.TEST", "()", "OUTPUT_DIR", str(out)]
    train_net.main(["--config-file", config_file, "--import", str(tmp_path / "my_heads.py"), *opts])
    assert "loss_kd_my_head" in (out / "metrics.json").read_text()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DISTILL.HEADS", "['DSGI']"], "unknown head 'DSGI'; valid: .*DSIG"),
        (["DISTILL.SIMM.WEIGHT", "1"], "no config key 'DISTILL.SIMM.*close: .*DISTILL.SSIM"),
        (["DISTILL.SSIM.WEIGHT"], "is not a list of pairs"),
        (["DATASETS.TRAIN", "('digits_tiny_trian',)"], "digits_tiny_trian.*digits_tiny_train"),
        (["DISTILL.TEACHER.CONFIG_FILE", "no.yaml"], "'no.yaml' is neither a file nor"),
        (["DISTILL.TEACHER.WEIGHTS", "no.pth"], "no file 'no.pth'"),
        (["DISTILL.INHERIT", "['neck']"], "no part 'neck'; valid: fpn, rpn, box_head"),
        (["DATASETS.TEST", "('digits_without_evaluator',)"], "evaluator_type 'None'; valid.*coco"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRNN"], "GeneralizedRNN.*close: GeneralizedRCNN"),
        (["DISTILL.STUDENT_META_ARCH", "Retinanet"], "Retinanet.*close: RetinaNet"),
        (["SOLVER.AMP.ENABLED", "True"], "fp16 needs a GPU"),
        (["SOLVER.AMP.PRECISION", "fp8"], "AMP.PRECISION is 'fp8'; valid: .*bf16"),
        (
            ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "SOLVER.OPTIMIZER", "Adam"],
            "SOLVER.OPTIMIZER is 'Adam'; valid: .*AdamW",  # of a plain student too
        ),
        (["DATALOADER.SAMPLER_TRAIN", "Sampler"], "SAMPLER_TRAIN is 'Sampler'; valid: "),
        (
            ["DISTILL.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 7]"],
            "Logits.* 7 .*10|Logits.*10.* 7",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(opts, message, job, tmp_path):
    """A mistake ends in one line that names what is valid, before anything is written."""
    _, config_file = job
    if "digits_without_evaluator" not in DatasetCatalog:
        DatasetCatalog.register("digits_without_evaluator", list)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stop:
        train_net.main(["--config-file", config_file, "OUTPUT_DIR", str(out), *opts])
    assert "\n" not in str(stop.value) and not out.exists()


def test_a_mistake_that_processes_find_is_one_line(job, tmp_path, free_port):
    """So does one that only shows when the model is built, in several processes."""
    _, config_file = job
    out = tmp_path / "out"
    opts = ["DISTILL.TEACHER.OPTS", "['MODEL.ROI_HEADS.NUM_CLASSES', 7]", "OUTPUT_DIR", str(out)]
    processes = ["--import", "tests.toy_head", "--num-gpus", "2"]
    processes += ["--dist-url", f"tcp://127.0.0.1:{free_port}"]
    with pytest.raises(SystemExit, match="^error: .*Logits") as stop:
        train_net.main(["--config-file", config_file, *processes, *opts])
    assert "\n" not in str(stop.value) and not out.exists()
    with pytest.raises(SystemExit, match="IMS_PER_BATCH 2 is not divisible by the 4 processes"):
        processes[3] = "4"
        train_net.main(["--config-file", config_file, *processes, "OUTPUT_DIR", str(out)])


def test_resume_needs_no_initial_weights(job):
    """The file of MODEL.WEIGHTS may be gone once there is a checkpoint to resume from."""
    _, config_file = job
    argv = ["--config-file", config_file, "--resume", "MODEL.WEIGHTS", "gone.pth"]
    assert read_config(build_parser().parse_args(argv)).MODEL.WEIGHTS == "gone.pth"
    argv.remove("--resume")
    with pytest.raises(ConfigError, match="no file 'gone.pth'"):
        read_config(build_parser().parse_args(argv))


def test_imports_do_not_hide_each_other(tmp_path):
    """A file with the name of a module that is imported already is refused, not passed over."""
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="another module is called 'json'"):
        import_user_module(str(tmp_path / "json.py"))


def test_a_missing_config_file(tmp_path, monkeypatch):
    """So does a config file that is not there; close names are told."""
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit, match="neither a file nor a model-zoo name; close: .*R18.yaml"):
        train_net.main(["--config-file", "configs/digits/faster_rcnn_R19.yaml"])


def test_a_unsafe_config_file(tmp_path):
    """A user's YAML cannot run code."""
    path = tmp_path / "evil.yaml"
    path.write_text("MODEL:\n  WEIGHTS: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(SystemExit, match="the tag .* could run code"):
        train_net.main(["--config-file", str(path)])
