"""Whatever a user does wrong ends in one line that says so, and leaves no file changed."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2kd import cli

from ..engine.children import Outcome, fork, unchanged
from .ground import CONFIG_FILE, make_ground
from .tables import CONFIG_FILES, DATASETS, TRAIN, VERBS

ROOT = Path(__file__).parents[2]
# Children share what is imported here.
for verb in cli.VERBS.values():
    importlib.import_module(verb.module)
# Of all those below, through processes of their own.
REAL = (
    "train_net.py --config-file configs/tab.yaml",
    "-m d2kd train --config-file gone.yaml",
    "-m d2kd nonsense",
    "-m d2kd check --config-file gone.yaml",
    "-m d2kd compare --suite suites/baseline.yaml",
    "-m d2kd convert gone.pth out.pkl",
    "-m d2kd demo --output file",
    "-m d2kd prototypes show gone.pth",
    "tools/install_detectron2.py --nonsense",
    "datasets/prepare_bccd.py gone",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """The folder in which all mistakes are made."""
    return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "printed.txt"


def words(line: str) -> list[str]:
    """The words of a command line of the tables."""
    coco = r"DATASETS.COCO_FORMAT [['golden_train','data/\1.json','images']]"
    distil = "distill --student config.yaml --teacher teacher.yaml"
    line = line.replace("{config}", CONFIG_FILE).replace("{distil}", distil)
    line = re.sub(r"\{coco:(\w+)\}", coco, line)
    lists = r"(?<= )([\[(][^ ]*[\])])(?= |$)"  # keep the quotes of their names
    return shlex.split(re.sub(lists, r'"\1"', line))


def program(path: Path, argv: list[str]) -> Callable[[], object]:
    """What ``python path argv`` does, in this process."""

    def run():
        sys.argv = [str(path), *argv]
        runpy.run_path(str(path), run_name="__main__")

    return run


def assert_is_one_line(outcome: Outcome, says: str) -> None:
    assert "Traceback" not in outcome.text, outcome.text[-2000:]
    assert outcome.code == 1, outcome.text[-2000:]
    assert outcome.last.startswith("error: "), outcome.text[-2000:]
    assert len(outcome.last) <= 300, outcome.last
    assert re.search(says, outcome.last), outcome.last


def check(run: Callable[[], object], says: str, ground: Path, log: Path) -> None:
    with unchanged(ground):
        outcome = fork(ground, run, log).wait()
    assert_is_one_line(outcome, says)


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_config_files(name, ground, log):
    """A config that is none, or that says what no config can: named with its line."""
    argv = ["train", *words(f"--config-file {name}")]
    check(lambda: cli.main(argv), CONFIG_FILES[name], ground, log)


@pytest.mark.parametrize("line", TRAIN)
def test_trainings(line, ground, log):
    """train_net.py: overrides, values, heads, weights, data, folders and options."""
    argv = words(f"{CONFIG_FILE} {line}")
    check(program(ROOT / "train_net.py", argv), TRAIN[line], ground, log)


@pytest.mark.parametrize("line", VERBS)
def test_verbs(line, ground, log):
    """The other verbs of d2kd."""
    argv = words(line)
    check(lambda: cli.main(argv), VERBS[line], ground, log)


@pytest.mark.parametrize("line", DATASETS)
def test_dataset_programs(line, ground, log, monkeypatch):
    """Programs that make datasets."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(ground / "datasets"))
    name, *argv = words(line)
    check(program(ROOT / "datasets" / name, argv), DATASETS[line], ground, log)


@pytest.mark.parametrize("line", REAL)
def test_real_processes(line, ground):
    """The same as processes of their own, as a shell starts them."""
    first, *argv = words(line)
    first = [first] if first == "-m" else [str(ROOT / first)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with unchanged(ground):
        done = subprocess.run(
            [sys.executable, *first, *argv],
            cwd=ground,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert "is not installed" not in done.stderr
    assert_is_one_line(Outcome(done.returncode, done.stdout + done.stderr), "")
