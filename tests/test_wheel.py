"""The wheel, built without a network and installed outside of the clone, is a working d2kd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from d2kd.config_paths import shipped_names

ROOT = Path(__file__).parents[1]
SOURCES = ("d2kd", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
# A training of seconds on the tests' own digits, without weights.
TINY = ["MODEL.WEIGHTS", "", "DATASETS.TRAIN", "('digits_tiny_train',)", "DATASETS.TEST", "()"]
TINY += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
TINY += ["DISTILL.TEACHER.WEIGHTS", "random", "DISTILL.TEACHER.CHECK", "False"]

SCRIPT = """
import d2kd
cfg = d2kd.merged_config("digits/retinanet_R18_ssim.yaml", OPTS)
cfg.MODEL.DEVICE = "cpu"
cfg.OUTPUT_DIR = "called"
print(sorted(d2kd.train(cfg)))
"""


class Installed:
    """The wheel in a virtual environment that sees the packages of this one, but not the clone."""

    def __init__(self, folder: Path, data: Path):
        pytest.importorskip("pip", reason="this environment was made without pip")
        self.data = data
        sources = folder / "sources"
        sources.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, sources / name)
        command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources]
        self.pip(*command)
        (self.wheel,) = folder.glob("d2kd-*.whl")
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.bin = folder / "env/bin"
        (site,) = (folder / "env/lib").glob("python*/site-packages")
        # As paths alone: the editable installation of the clone is not followed.
        outer = [path for path in sys.path if path and Path(path).resolve() != ROOT]
        (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
        self.pip("--python", self.bin / "python", "install", "--no-deps", self.wheel)

    def pip(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
        environment = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    def run(self, program: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
        """A program of the environment, from ``cwd``."""
        environment = {**os.environ, "DETECTRON2_DATASETS": str(self.data), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [self.bin / program, *words], cwd=cwd, env=environment, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory, digits_root) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"), digits_root)


def test_it_holds_the_configs_and_all_packages(installed):
    """Each config and each module of the clone, and nothing beside d2kd."""
    names = zipfile.ZipFile(installed.wheel).namelist()
    configs = {n.removeprefix("d2kd/configs/") for n in names if n.endswith(".yaml")}
    assert configs == set(shipped_names())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "d2kd").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0].split("-")[0] for name in names} == {"d2kd"}


def test_it_trains_and_shows(installed, tmp_path):
    """``d2kd train`` on a shipped config leaves a student in output/<path of the config>, and
    ``d2kd show`` draws; both from a folder that is not the clone."""
    config = "digits/retinanet_R18_ssim.yaml"
    done = installed.run("d2kd", "train", "--config-file", config, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "output/digits/retinanet_R18_ssim"
    assert (folder / "student_final.pth").is_file()
    assert "loss_kd_ssim" in (folder / "metrics.json").read_text()
    data = ["DATASETS.TRAIN", "('digits_tiny_train',)"]
    for name in (config, "digits/retinanet_R18_mar.yaml"):
        done = installed.run("d2kd", "show", "--config-file", name, *data, cwd=tmp_path)
        assert done.stdout.endswith("wrote output/show.png\n"), done.stderr[-2000:]
        assert (tmp_path / "output/show.png").stat().st_size > 10_000
        (tmp_path / "output/show.png").unlink()


def test_it_knows_its_suites(installed, tmp_path):
    """A shipped suite has a name; a mistake in the command is one line."""
    words = ["--suite", "suites/digits_retinanet_ablations.yaml", "--arms", "none"]
    done = installed.run("d2kd", "compare", *words, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --arms: no arm 'none'; valid: 'baseline'")
    assert not list(tmp_path.iterdir())


def test_it_is_called_from_python(installed, tmp_path):
    """``d2kd.train(cfg)`` trains a config that ``d2kd.merged_config`` has read."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("OPTS", repr(TINY)))
    done = installed.run("python", "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "called/student_final.pth").is_file()
