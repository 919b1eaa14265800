"""What ends a training from outside or inside: one line, nothing half-written, and it goes on."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import Tensor

from d2kd import files
from d2kd.engine import checkpoint, launch, trainer
from d2kd.engine.faults import TrainingError, explain
from d2kd.engine.loss_log import LossLog
from d2kd.engine.step import StepTrainer
from d2kd.errors import ConfigError

from .children import OUTPUT, start, train, unchanged, wait_for, write_job

FINAL = f"{OUTPUT}/model_final.pth"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that nothing stopped."""
    folder = write_job(tmp_path_factory.mktemp("whole"), "DISTILL.TEACHER.CHECK", True)
    outcome = train(folder)
    assert outcome.code == 0, outcome.text[-2000:]
    return folder


@pytest.fixture
def job(whole, tmp_path) -> Path:
    """A folder like that of ``whole`` before its training."""
    shutil.copytree(whole, tmp_path / "job", ignore=shutil.ignore_patterns(OUTPUT, "printed_*"))
    return tmp_path / "job"


def tensors(path: Path) -> dict[str, Tensor]:
    """Weights and momenta of a checkpoint by name."""
    content = torch.load(path, map_location="cpu")
    momenta = content["trainer"]["_trainer"]["optimizer"]["state"]
    return content["model"] | {str(k): v["momentum_buffer"] for k, v in momenta.items()}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Both ended with the same weights and momenta, to the last bit."""
    expected, found = tensors(one / FINAL), tensors(other / FINAL)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def assert_goes_on(job: Path, whole: Path) -> None:
    """The training resumes, and nothing of its end shows that it was stopped."""
    assert train(job, "--resume").code == 0
    assert_equal_runs(whole, job)
    assert not list(job.rglob("*.tmp"))
    assert (job / OUTPUT / "results.json").read_text().count("AP")


def at(iteration: int, act) -> None:
    """In this process, ``act()`` comes before the step ``iteration``."""
    run_step = StepTrainer.run_step

    def with_fault(self):
        if self.iter == iteration:
            act()
        run_step(self)

    StepTrainer.run_step = with_fault


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


# --- kill -9 ------------------------------------------------------------------------------------


def in_a_step():
    at(3, kill)


def in_the_first_step():
    at(0, kill)


def in_a_checkpoint():
    """After half of the bytes of the second one."""
    save = torch.save

    def save_half(data, file):
        if "model_0000003" in file.name:
            file.write(b"PK half of a checkpoint")
            file.flush()
            kill()
        save(data, file)

    files.torch.save = save_half


def before_it_is_the_last():
    """The second checkpoint is written, the name of the last one not yet."""
    tag = checkpoint.AtomicCheckpointer.tag_last_checkpoint

    def stop(self, name):
        if "model_0000003" in name:
            kill()
        tag(self, name)

    checkpoint.AtomicCheckpointer.tag_last_checkpoint = stop


def in_the_last_evaluation():
    COCOEvaluator.evaluate = lambda self: kill()


def in_the_check_of_the_teacher():
    trainer.check_teacher = lambda *_: kill()


MOMENTS = (
    in_the_check_of_the_teacher,
    in_the_first_step,
    in_a_step,
    in_a_checkpoint,
    before_it_is_the_last,
    in_the_last_evaluation,
)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_kill(moment, job, whole):
    """kill -9: the lock is free at once, and the training goes on as if nothing had happened."""
    opts = ["DISTILL.TEACHER.CHECK", str(moment is in_the_check_of_the_teacher)]
    assert train(job, *opts, prepare=moment).code == -signal.SIGKILL
    assert_goes_on(job, whole)


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_signal(number, job, whole):
    """Ctrl-C and SIGTERM: one line that says how to go on, and the exit code of the signal."""
    outcome = train(job, prepare=lambda: at(3, lambda: kill(number)))
    assert outcome.code == 128 + number
    assert outcome.last == (
        f"error: stopped by {number.name} at iteration 3; --resume goes on from model_0000001.pth"
    )
    assert "Traceback" not in outcome.text
    assert_goes_on(job, whole)


def test_signal_in_a_checkpoint(job, whole):
    """The half-written file is removed, the last one stays."""

    def prepare():
        save = torch.save

        def interrupted(data, file):
            if "model_0000003" in file.name:
                file.write(b"PK half of a checkpoint")
                kill(signal.SIGTERM)
            save(data, file)

        files.torch.save = interrupted

    outcome = train(job, prepare=prepare)
    assert outcome.code == 128 + signal.SIGTERM and "Traceback" not in outcome.text
    assert not list((job / OUTPUT).glob("*.tmp"))
    assert (job / OUTPUT / "last_checkpoint").read_text() == "model_0000001.pth"
    assert_goes_on(job, whole)


def test_signal_with_workers(job):
    """Processes that load data print nothing either."""
    opts = ["DATALOADER.NUM_WORKERS", "2"]
    outcome = train(job, *opts, prepare=lambda: at(3, lambda: os.killpg(0, signal.SIGINT)))
    assert outcome.code == 128 + signal.SIGINT and "Traceback" not in outcome.text


# --- faults -------------------------------------------------------------------------------------


def test_killed_worker(job, whole):
    """A killed worker is said to be one, with what to do."""

    def prepare():
        load, calls = DatasetMapper.__call__, []

        def mapper(self, record):
            calls.append(1)
            if len(calls) > 8:
                kill()
            return load(self, record)

        DatasetMapper.__call__ = mapper

    outcome = train(job, "DATALOADER.NUM_WORKERS", "1", prepare=prepare)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    said = r"error: a data loading worker (was killed by signal Killed|ended unexpectedly)"
    assert re.match(said, outcome.last)
    assert "lower DATALOADER.NUM_WORKERS" in outcome.last
    assert_goes_on(job, whole)


def test_killed_rank(job, tmp_path):
    """Of two processes one is killed: the launcher ends the other and says so; both go on."""

    def in_two(fault=lambda: None):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        launch.START_METHOD = "fork"
        at(3, fault)

    shutil.copytree(job, tmp_path / "other")
    two = ["--num-gpus", "2"]
    assert train(tmp_path / "other", *two, prepare=in_two).code == 0
    outcome = train(job, *two, prepare=lambda: in_two(lambda: comm.get_rank() and kill()))
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last.startswith("error: process 1 of 2 was killed by SIGKILL, often by the sys")
    assert train(job, "--resume", *two, prepare=in_two).code == 0
    assert_equal_runs(tmp_path / "other", job)


def test_nan_loss(job, whole):
    """It stops the run with step, term and what to try; the checkpoint after it is not written."""

    def prepare():
        add = LossLog.add

        def with_nan(self, iteration, losses, *rest):
            if iteration >= 2:
                losses = {**losses, "loss_kd_ssim": losses["loss_kd_ssim"] * torch.nan}
            add(self, iteration, losses, *rest)

        LossLog.add = with_nan

    outcome = train(job, prepare=prepare)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last.startswith("error: loss_kd_ssim is nan at iteration 2, the first that")
    assert "lower the head's WEIGHT or SOLVER.BASE_LR, raise" in outcome.last
    assert outcome.last.endswith("; --resume goes on from model_0000001.pth")
    assert len(outcome.last) <= 300
    assert not (job / OUTPUT / "model_0000003.pth").exists()
    assert_goes_on(job, whole)


def test_nan_explains_what_follows_from_it(job):
    """A step that fails because of a loss that was not read yet is explained by that loss."""

    def prepare():
        add = LossLog.add

        def with_inf(self, iteration, losses, *rest):
            add(self, iteration, {**losses, "loss_cls": losses["loss_cls"] / 0.0}, *rest)

        LossLog.add = with_inf
        at(1, lambda: (_ for _ in ()).throw(FloatingPointError("Predicted boxes contain NaN")))

    outcome = train(job, prepare=prepare)
    assert outcome.last.startswith("error: loss_cls is inf at iteration 0, the first that is not")


def test_full_disk(job, whole):
    """A disk that is full in the middle of a checkpoint: the last one stays whole."""

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    outcome = train(job, prepare=lambda: at(3, limit_files))
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last.startswith(f"error: '{OUTPUT}/model_0000003.pth' cannot be written: File")
    assert outcome.last.endswith("MiB free; --resume goes on from model_0000001.pth")
    assert not list((job / OUTPUT).glob("*.tmp"))
    assert_goes_on(job, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_file_system(job, whole, small_disk):
    """The same on a real one; before the training starts it is refused, and nothing is made."""
    filler, output = small_disk / "filler", str(small_disk / "output")
    for free, words in (
        (0, "No space left on device"),
        (2**16, "0.1 MiB are free, and a checkpoint"),
    ):
        filler.write_bytes(bytes(2**22 - free))
        outcome = train(job, "OUTPUT_DIR", output)
        assert outcome.last.startswith(f"error: OUTPUT_DIR '{output}'") and words in outcome.last
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.write_bytes(bytes(2**20))

    def fill():
        with open(filler, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    outcome = train(job, "OUTPUT_DIR", output, prepare=lambda: at(3, fill))
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert "model_0000003.pth' cannot be written: No space left on device" in outcome.last
    filler.unlink()
    assert train(job, "--resume", "OUTPUT_DIR", output).code == 0
    shutil.copytree(output, job / OUTPUT)
    assert_equal_runs(whole, job)


def test_read_only_file_system(job, small_disk):
    """It is refused before anything else, however the folder is used."""
    shutil.copytree(job, small_disk / "job")
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    for argv in ((), ("--resume",), ("--eval-only", "MODEL.WEIGHTS", "start.pth")):
        with unchanged(small_disk):
            outcome = train(job, *argv, "OUTPUT_DIR", str(small_disk / "output"))
        assert outcome.code == 1 and "Traceback" not in outcome.text
        assert outcome.last == (
            f"error: OUTPUT_DIR '{small_disk / 'output'}': cannot be written: Read-only file "
            "system; name another OUTPUT_DIR"
        )


def test_out_of_memory(job, whole):
    """The message has the size of the batch and of its images."""

    def prepare():
        def fail():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        StepTrainer.run_step, step = (
            lambda self: (step(self), self.iter == 3 and fail()),
            (StepTrainer.run_step),
        )

    outcome = train(job, prepare=prepare)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last.startswith(
        "error: out of memory with 2 images of up to 96 x 128 pixels in a process: lower "
        "SOLVER.IMS_PER_BATCH"
    )
    assert outcome.last.endswith("; --resume goes on from model_0000001.pth")
    assert_goes_on(job, whole)


def test_an_evaluation_that_fails(job, whole):
    """The student's files are there before; the line says why, and --resume evaluates again."""

    def prepare():
        def fail(self):
            raise KeyError("area")

        COCOEvaluator.evaluate = fail

    outcome = train(job, "DISTILL.TEACHER.CHECK", "False", prepare=prepare)
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert outcome.last == (
        "error: the evaluation of 'golden_train' failed: KeyError: 'area'; "
        "'output/student_final.pth' is kept; --resume evaluates it again"
    )
    assert "Traceback" in (job / OUTPUT / "log.txt").read_text()
    assert (job / OUTPUT / "student_config.yaml").is_file()
    assert not (job / OUTPUT / "results.json").exists()
    assert_goes_on(job, whole)


def test_a_defect_keeps_its_traceback(job):
    """What is no known fault is not hidden."""
    outcome = train(job, prepare=lambda: at(3, lambda: {}["key of a defect"]))
    assert outcome.code == 1
    assert "Traceback" in outcome.text and outcome.last == "KeyError: 'key of a defect'"


# --- two runs, other users ----------------------------------------------------------------------


def test_two_runs_in_one_folder(job, whole):
    """The second is refused and changes nothing; the first is not disturbed."""
    go = job / "go"
    first = start(job, prepare=lambda: at(3, lambda: wait_for(go.exists)))
    wait_for((job / OUTPUT / "last_checkpoint").exists)
    for argv in ((), ("--resume",), ("--eval-only", "MODEL.WEIGHTS", "start.pth")):
        with unchanged(job / OUTPUT):
            second = train(job, *argv)
        assert second.code == 1 and "Traceback" not in second.text
        assert second.last.startswith(
            f"error: OUTPUT_DIR 'output' is in use by process {first.process.pid}"
        )
    go.touch()
    assert first.wait().code == 0
    assert_equal_runs(whole, job)


def test_two_runs_at_the_same_time(job, whole):
    """Of two that start together one trains and the other is refused."""
    children = [start(job), start(job)]
    outcomes = [child.wait() for child in children]
    assert sorted(outcome.code for outcome in outcomes) == [0, 1]
    refused = next(outcome for outcome in outcomes if outcome.code)
    assert "is in use by process" in refused.last or "was not finished" in refused.last
    assert_equal_runs(whole, job)


def test_folder_of_another_user(whole):
    """A folder that this user may not write is refused in one line."""
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        job = Path(place) / "job"
        shutil.copytree(whole, job)
        (job / "mine").mkdir()
        for path in job.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.chmod(job, 0o755)

        def become_nobody():
            os.setgid(65534)
            os.setuid(65534)

        for folder in (OUTPUT, "new"):
            for argv in ((), ("--resume",)):
                with unchanged(job / OUTPUT):
                    outcome = train(job, *argv, "OUTPUT_DIR", folder, prepare=become_nobody)
                assert outcome.code == 1
                assert outcome.last == (
                    f"error: OUTPUT_DIR '{folder}': cannot be written: Permission denied; name "
                    "another OUTPUT_DIR"
                )


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), "ended unexpectedly"),
        (MemoryError(), "out of memory"),
        (FloatingPointError("Training has diverged."), "has diverged: lower SOLVER.BASE_LR"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.distributed.DistNetworkError("reset by peer"), "lost contact with another process"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.jpg"), "'a.jpg': No such file"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_words_of_a_fault(error, words):
    """Known faults become one line, with how to go on behind it."""
    fault = explain(error, resume="--resume goes on")
    assert isinstance(fault, TrainingError)
    assert words in str(fault) and str(fault).endswith("; --resume goes on")


def test_long_words_are_cut_before_the_way_on():
    """However long the reason is, how to go on is seen."""
    error = OSError(errno.ENOSPC, "No space left on device", "folder/" * 100)
    text = f"error: {explain(error, resume='--resume goes on from model_0000001.pth')}"
    assert len(text) <= 300 and text.endswith("; --resume goes on from model_0000001.pth")


def test_the_message_of_a_worker():
    """PyTorch's traceback of a worker is taken from a mistake that the worker found."""
    error = ConfigError(
        "Caught ConfigError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n  File ...\nd2kd.errors.ConfigError: 'a.jpg': it is cut off\n"
    )
    assert str(explain(error)) == "'a.jpg': it is cut off"
    defect = ValueError("a defect")
    assert explain(defect) is defect
