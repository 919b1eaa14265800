"""d2kd install-detectron2, run in bare virtual environments on small wheels made here."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from d2kd.commands import install_detectron2 as tool

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "d2kd/commands/install_detectron2.py"

# A Detectron2 that needs nothing else, with each way in which the copy names itself.
FAKE_LABGYM = {
    "LabGym/__init__.py": "raise ImportError('LabGym itself is not needed')\n",
    "LabGym/detectron2/__init__.py": '__version__ = "0.6"\n',
    "LabGym/detectron2/engine/__init__.py": (
        "import LabGym.detectron2.model_zoo as zoo\n"
        "from LabGym.detectron2 import model_zoo\n"
        "from ..model_zoo import NAME\n"
    ),
    "LabGym/detectron2/model_zoo/__init__.py": 'NAME = "LabGym.detectron2.model_zoo"\n',
    "LabGym/detectron2/model_zoo/configs/base.yaml": "_target_: LabGym.detectron2.engine\n",
    "labgym-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n",
    "labgym-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    "labgym-3.1.2.dist-info/RECORD": "",
}


class Environment:
    """A bare virtual environment (no pip, nothing installed) to run the tool in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = (folder / "lib").glob("python*/site-packages")

    def run(self, *command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.python, *command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": "", **(env or {})},
        )

    def run_tool(self, wheel: Path | None, setup: str = "") -> subprocess.CompletedProcess:
        """Run the tool, which takes ``wheel`` for the genuine one, after the code in ``setup``."""
        known = wheel is not None and wheel.is_file()
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if known else "0" * 64
        code = (
            "import importlib.util, os, signal, sys\n"
            f"spec = importlib.util.spec_from_file_location('tool', {str(TOOL)!r})\n"
            "tool = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(tool)\n"
            f"tool.WHEEL_SHA256 = {digest!r}\n{setup}\n"
            f"sys.exit(tool.main({['--wheel', str(wheel)] if wheel else []}))\n"
        )
        return self.run("-c", code)

    def imports_detectron2(self) -> bool:
        return self.run("-c", "import detectron2.engine").returncode == 0

    def contents(self) -> list[str]:
        return sorted(path.name for path in self.site_packages.iterdir())

    def missing_files(self) -> list[str]:
        """The files that the distribution declares and that are not there."""
        with (self.site_packages / "detectron2-0.6.dist-info" / "RECORD").open() as record:
            names = [row[0] for row in csv.reader(record)]
        return [name for name in names if not (self.site_packages / name).is_file()]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FAKE_LABGYM.items():
            archive.writestr(name, text)
    return path


def assert_one_error_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """The run failed with a single line on stderr that contains ``words``."""
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_installs_the_copy_under_its_own_name(environment: Environment, wheel: Path):
    """The package imports as detectron2, complete, and only it and its dist-info are there."""
    done = environment.run_tool(wheel)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("Detectron2 0.6 ") and str(environment.site_packages) in line
    assert environment.imports_detectron2()
    assert environment.contents() == ["detectron2", "detectron2-0.6.dist-info"]
    assert environment.missing_files() == []
    info = environment.site_packages / "detectron2-0.6.dist-info"
    assert "Apache License" in (info / "LICENSE").read_text()
    assert "Facebook" in (info / "NOTICE").read_text()


def test_turns_every_reference_back(environment: Environment, wheel: Path):
    """Imports, strings and YAML targets say detectron2 again; nothing says LabGym."""
    environment.run_tool(wheel)
    package = environment.site_packages / "detectron2"
    sources = {
        path.relative_to(package).as_posix(): path.read_text()
        for path in package.rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert not any("LabGym" in text for text in sources.values())
    assert "import detectron2.model_zoo as zoo" in sources["engine/__init__.py"]
    assert "from detectron2 import model_zoo" in sources["engine/__init__.py"]
    assert sources["model_zoo/__init__.py"] == 'NAME = "detectron2.model_zoo"\n'
    assert sources["model_zoo/configs/base.yaml"] == "_target_: detectron2.engine\n"


def test_second_run_changes_nothing(environment: Environment, wheel: Path):
    """The tool is idempotent: a second run needs no wheel and writes no file."""
    environment.run_tool(wheel)
    before = {p: p.stat().st_mtime_ns for p in environment.site_packages.rglob("*") if p.is_file()}
    done = environment.run_tool(wheel=None)
    assert done.returncode == 0, done.stderr
    assert "left as it is" in done.stdout and "0.6" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in environment.site_packages.rglob("*") if p.is_file()}
    assert {p: t for p, t in after.items() if p.suffix != ".pyc"} == before


def test_leaves_an_existing_detectron2_alone(environment: Environment, wheel: Path):
    """A Detectron2 of other origin that imports is used as it is, and reported."""
    package = environment.site_packages / "detectron2"
    for name, text in {"": '__version__ = "0.7"\n', "engine": "", "model_zoo": ""}.items():
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").write_text(text)
    done = environment.run_tool(wheel)
    assert done.returncode == 0, done.stderr
    assert "0.7" in done.stdout and "left as it is" in done.stdout
    assert environment.contents() == ["detectron2"]
    assert (package / "__init__.py").read_text() == '__version__ = "0.7"\n'


@pytest.mark.parametrize(
    "init, reason", [("import no_such_module\n", "no_such_module"), (None, "__init__.py")]
)
def test_reports_a_foreign_detectron2_that_does_not_import(
    environment: Environment, wheel: Path, init: str | None, reason: str
):
    """What the tool did not install it does not replace: one line says where it is and why."""
    package = environment.site_packages / "detectron2"
    package.mkdir()
    if init is not None:
        (package / "__init__.py").write_text(init)
    assert_one_error_line(environment.run_tool(wheel), str(package), reason)
    assert environment.contents() == ["detectron2"]


def test_wrong_hash_leaves_nothing(environment: Environment, wheel: Path):
    """A wheel with another hash is refused, both hashes are named, nothing stays behind."""
    done = environment.run_tool(wheel, setup="tool.WHEEL_SHA256 = 'f' * 64")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert_one_error_line(done, "sha256", found, "f" * 64)
    assert environment.contents() == []


def test_failed_download_leaves_nothing(environment: Environment):
    """When pip cannot download (here: no pip at all) the error says so and what else to do."""
    done = environment.run_tool(wheel=None)
    assert_one_error_line(done, "could not download labgym==3.1.2", "pip", "--wheel")
    assert environment.contents() == []


def test_missing_wheel_file(environment: Environment, tmp_path: Path):
    """A --wheel that does not exist is named in the error."""
    done = environment.run_tool(tmp_path / "absent.whl")
    assert_one_error_line(done, "absent.whl")
    assert environment.contents() == []


def test_a_copy_that_does_not_import_is_not_installed(environment: Environment, tmp_path: Path):
    """Missing dependencies are found before anything is put in place."""
    path = tmp_path / "needs_torch.whl"
    with zipfile.ZipFile(path, "w") as archive:
        files = {**FAKE_LABGYM, "LabGym/detectron2/engine/__init__.py": "import torch\n"}
        for name, text in files.items():
            archive.writestr(name, text)
    assert_one_error_line(environment.run_tool(path), "torch", "pip install")
    assert environment.contents() == []


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
INTERRUPTIONS = {
    "while unpacking": f"tool.write_dist_info = lambda package: {KILL}",
    "before the first rename": f"tool.os.replace = lambda *_: {KILL}",
    "between the renames": (
        "rename = os.replace\n"
        "def replace(source, target):\n"
        f"    {KILL} if tool.Path(source).name == 'detectron2' else rename(source, target)\n"
        "tool.os.replace = replace"
    ),
}


@pytest.mark.parametrize("setup", INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())
def test_killed_run_is_made_good_by_the_next(environment: Environment, wheel: Path, setup: str):
    """Killed at any point, the tool leaves no half Detectron2, and its next run succeeds."""
    done = environment.run_tool(wheel, setup)
    assert done.returncode == -signal.SIGKILL
    assert "detectron2" not in environment.contents()
    done = environment.run_tool(wheel)
    assert done.returncode == 0, done.stderr
    assert environment.imports_detectron2()
    assert environment.contents() == ["detectron2", "detectron2-0.6.dist-info"]
    assert environment.missing_files() == []


def test_terminated_run_leaves_nothing(environment: Environment, wheel: Path):
    """SIGTERM takes the temporary folder with it."""
    done = environment.run_tool(
        wheel, setup="tool.check_hash = lambda _: os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert done.returncode == 1 and "terminated" in done.stderr
    assert environment.contents() == []


def test_repairs_its_own_incomplete_copy(environment: Environment, wheel: Path):
    """A file that went missing from the tool's own copy comes back with the next run."""
    environment.run_tool(wheel)
    (environment.site_packages / "detectron2" / "engine" / "__init__.py").unlink()
    done = environment.run_tool(wheel)
    assert done.returncode == 0, done.stderr
    assert "repaired" in done.stdout
    assert environment.imports_detectron2()
    assert environment.missing_files() == []


def run_pip(environment: Environment, *arguments: str) -> str:
    """Run this interpreter's pip on the bare environment and return what it prints."""
    pytest.importorskip("pip", reason="this environment was made without pip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command += ["--python", str(environment.python)]
    own = {**os.environ, "PYTHONPATH": ""}  # packages there are not the environment's
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pip_lists_and_uninstalls_it(environment: Environment, wheel: Path):
    """pip knows the distribution, and pip uninstall takes every file of it away."""
    environment.run_tool(wheel)
    assert environment.imports_detectron2()  # leaves bytecode, which must go, too
    assert "detectron2==0.6" in run_pip(environment, "list", "--format=freeze").split()
    run_pip(environment, "uninstall", "--yes", "detectron2")
    assert environment.contents() == []


def test_pip_downloads_the_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The download takes the named version from where pip is told to look, and nothing else."""
    pytest.importorskip("pip", reason="this environment was made without pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder = tmp_path / "download"
    folder.mkdir()
    assert tool.download_wheel(folder).read_bytes() == wheel.read_bytes()
    assert len(list(folder.iterdir())) == 1

    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "nowhere"))
    (folder / wheel.name).unlink()
    with pytest.raises(tool.InstallError, match="No matching distribution found for labgym==3.1.2"):
        tool.download_wheel(folder)
