"""The Makefile: it sets up once, also where the environment's path has a space."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("Makefile", "pyproject.toml", "setup.py", "constraints.txt")
INSTALLER = "d2kd/commands/install_detectron2.py"
# What make hands to the commands it runs.
MADE_BY_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
# What stands in for the set-up: an interpreter that says how it is called.
SETUP = """#!/bin/bash
set -e
mkdir -p "$1/bin"
echo "set up $1"
printf '#!/bin/sh\\necho "$0: $*"\\n' >"$1/bin/python"
chmod +x "$1/bin/python"
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """What make reads of a clone."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in (*FILES, INSTALLER):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/setup_venv.sh").write_text(SETUP)
    (tmp_path / "tools/setup_venv.sh").chmod(0o755)
    return tmp_path


def make(clone: Path, *words: str) -> str:
    # Under `make test` this make would know itself nested, and say which folders it enters.
    env = {key: value for key, value in os.environ.items() if key not in MADE_BY_MAKE}
    done = subprocess.run(["make", *words], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["env", "a b"])
def test_sets_up_once(clone, folder):
    """And again when what the set-up depends on has changed, not when it was only touched."""
    words = [f"VENV={folder}", "demo"]
    demo = f"{folder}/bin/python: -m d2kd demo\n"
    assert make(clone, *words) == f"set up {folder}\n{demo}"
    (clone / "pyproject.toml").touch()
    assert make(clone, *words) == demo
    (clone / INSTALLER).write_text("")
    assert make(clone, *words) == f"set up {folder}\n{demo}"
    assert len(list((clone / folder).glob(".set-up-*"))) == 1


def test_photographs_of_a_clone(clone):
    """PHOTOS=clone reaches the demo, also where its path has a space."""
    demo = make(clone, "demo", "PHOTOS=a b/clone").splitlines()[-1]
    assert demo == ".venv/bin/python: -m d2kd demo --photos a b/clone"


def test_an_environment_of_the_users_is_left_alone(clone):
    """PYTHON=interpreter is used as it is."""
    subprocess.run([clone / "tools/setup_venv.sh", "my env"], cwd=clone, check=True)
    assert make(clone, "PYTHON=my env/bin/python", "demo") == "my env/bin/python: -m d2kd demo\n"
    assert not list((clone / "my env").glob(".set-up-*"))
