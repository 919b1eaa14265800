"""Install the pure-Python part of Detectron2 0.6 into the running interpreter's site-packages.

Detectron2 is in no package index under its own name. The LabGym project publishes an unmodified
copy of it as the sub-package ``LabGym.detectron2``; this tool downloads that one wheel, checks its
hash, and installs the copy as the distribution ``detectron2``. A Detectron2 that already imports,
of whatever origin, is left as it is. LabGym itself is neither needed nor touched.

The new package is prepared in a temporary folder next to its destination, tried there, and renamed
into place last of all. So whatever goes wrong, a Detectron2 in site-packages is a complete one.

    d2kd install-detectron2 [--wheel FILE]

This file imports nothing but the standard library: `tools/install_detectron2.py` runs it where d2kd
is not installed yet.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "labgym==3.1.2"
WHEEL_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
TREE_IN_WHEEL = "LabGym/detectron2/"
# How the copy names itself in imports, loggers and `_target_` strings, and what it is again here.
RENAME = (b"LabGym.detectron2", b"detectron2")

INSTALLER = "d2kd"  # marks the dist-info of our own copy
STAGING_PREFIX = ".detectron2-install-"

METADATA = """\
Metadata-Version: 2.1
Name: detectron2
Version: {version}
Summary: Detectron2, its pure-Python part (no compiled operators)
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
License-File: LICENSE
License-File: NOTICE
"""
# No Requires-Dist above: Detectron2's own pins are from 2021; d2kd's pyproject.toml has the
# dependencies and versions that work today.

NOTICE = """\
Detectron2
Copyright (c) Facebook, Inc. and its affiliates.
Licensed under the Apache License, Version 2.0 (see LICENSE).

This is the copy of Detectron2's Python sources that the LabGym project publishes as
LabGym.detectron2 ({requirement}). The installer of d2kd made one change: it turned the name
LabGym.detectron2 back into detectron2.
"""

# Run in a fresh interpreter: an import that fails or crashes must not take this process with it.
# detectron2.engine imports nearly all of Detectron2, a plain `import detectron2` hardly anything.
PROBE = """
import importlib.util, json
spec = importlib.util.find_spec("detectron2")
answer = {"state": "absent"}
if spec is not None:
    answer["path"] = list(spec.submodule_search_locations or [spec.origin])[0]
    try:
        if spec.origin is None:
            raise ImportError("a folder without __init__.py")
        import detectron2.engine, detectron2.model_zoo
        answer.update(state="works", version=detectron2.__version__)
    except Exception as error:
        answer.update(state="broken", error=f"{type(error).__name__}: {error}")
print(json.dumps(answer))
"""


class InstallError(Exception):
    """What went wrong and what to do about it, in one line."""


def probe_detectron2(extra_path: Path | None = None) -> dict[str, str]:
    """Import Detectron2 in a fresh interpreter, from ``extra_path`` before all other folders.

    Returns:
        ``state`` ("absent", "works" or "broken") and, as far as known, ``path``, ``version``,
        ``error``.
    """
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if extra_path is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(extra_path), env.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as neutral_folder:  # the current one may hold a "detectron2"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE],
            cwd=neutral_folder,
            env=env,
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"state": "broken", "error": f"python exited with {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def own_dist_infos(site_packages: Path) -> list[Path]:
    """The dist-info folders that this tool wrote: one, or none."""
    return [
        info
        for info in site_packages.glob("detectron2-*.dist-info")
        if (info / "INSTALLER").is_file() and (info / "INSTALLER").read_text().strip() == INSTALLER
    ]


def is_damaged(dist_info: Path) -> bool:
    """Whether a file of our own copy is missing, as after an interrupted removal."""
    record = dist_info / "RECORD"
    if not record.is_file():
        return True
    with record.open(newline="") as rows:
        return not all((dist_info.parent / row[0]).is_file() for row in csv.reader(rows))


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip, whatever Python versions it declares; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--ignore-requires-python", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in said if line.startswith("ERROR")] or said or ["no message"]
        raise InstallError(
            f"could not download {REQUIREMENT} (pip says: {said[-1].removeprefix('ERROR: ')}); "
            "check the network, or get that wheel elsewhere and pass it with --wheel FILE"
        )
    return wheels[0]


def check_hash(wheel: Path) -> None:
    """Raise InstallError unless the wheel is the one known to hold the unmodified copy."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise InstallError(
            f"{wheel.name} has sha256 {found} instead of {WHEEL_SHA256}; nothing was installed"
        )


def extract_package(wheel: Path, destination: Path) -> None:
    """Unpack the wheel's Detectron2 into ``destination``, under its own name again."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(TREE_IN_WHEEL) or name.endswith("/"):
                continue
            path = destination / name.removeprefix(TREE_IN_WHEEL)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name).replace(*RENAME))
    if not (destination / "__init__.py").is_file():
        raise InstallError(f"{wheel.name} holds no package {TREE_IN_WHEEL}")


def package_version(package: Path) -> str:
    """The version that the package's ``__init__.py`` states."""
    found = re.search(r'^__version__ = "([^"]+)"', (package / "__init__.py").read_text(), re.M)
    if found is None:
        raise InstallError(f"{package / '__init__.py'} states no version")
    return found[1]


def apache_license() -> str:
    """Detectron2's own licence, which is d2kd's too: of the clone, or of the installed d2kd."""
    in_clone = Path(__file__).resolve().parents[2] / "LICENSE"
    if in_clone.is_file():
        return in_clone.read_text()
    try:
        text = importlib.metadata.distribution("d2kd").read_text("licenses/LICENSE")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if not text:
        raise InstallError("the file LICENSE of d2kd is missing; install d2kd again")
    return text


def write_dist_info(package: Path) -> Path:
    """Write the dist-info next to ``package`` that lets pip list, check and uninstall it."""
    version = package_version(package)
    root = package.parent
    info = root / f"detectron2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA.format(version=version))
    (info / "INSTALLER").write_text(f"{INSTALLER}\n")
    (info / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nGenerator: {INSTALLER}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    (info / "NOTICE").write_text(NOTICE.format(requirement=REQUIREMENT))
    (info / "LICENSE").write_text(apache_license())

    record = info / "RECORD"
    files = [path for folder in (package, info) for path in folder.rglob("*") if path.is_file()]
    rows = [record_row(path, root) for path in sorted(files) if path.parent.name != "__pycache__"]
    with record.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(
            [*rows, (record.relative_to(root).as_posix(), "", "")]
        )
    return info


def record_row(path: Path, root: Path) -> tuple[str, str, str]:
    """One row of a RECORD file: path, hash and size."""
    content = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return path.relative_to(root).as_posix(), f"sha256={digest}", str(len(content))


def install_copy(site_packages: Path, wheel: Path | None, replaced: list[Path]) -> str:
    """Install the wheel's Detectron2, which is downloaded if there is none, in place of what is
    ``replaced`` of an earlier copy, and return its version. An error leaves all as it was."""
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=site_packages) as folder:
        staging, old = Path(folder) / "new", Path(folder) / "old"
        staging.mkdir()
        old.mkdir()
        wheel = wheel or download_wheel(Path(folder))
        check_hash(wheel)
        package = staging / "detectron2"
        extract_package(wheel, package)
        dist_info = write_dist_info(package)

        found = probe_detectron2(extra_path=staging)
        if found["state"] != "works":
            raise InstallError(
                f"Detectron2 does not import here ({found.get('error')}); nothing was installed. "
                "Install d2kd's dependencies first: pip install -e ."
            )
        for path in replaced:
            os.replace(path, old / path.name)
        # The package comes last: once it is there, the installation is complete.
        os.replace(dist_info, site_packages / dist_info.name)
        os.replace(package, site_packages / package.name)
    return found["version"]


def ensure_detectron2(site_packages: Path, wheel: Path | None = None) -> str:
    """Make sure that a Detectron2 imports, and return one line that says what was done.

    Raises:
        InstallError: no Detectron2 could be installed, or one is there that does not import.
    """
    for leftover in site_packages.glob(f"{STAGING_PREFIX}*"):  # of a run that was killed
        shutil.rmtree(leftover)

    package = site_packages / "detectron2"
    damaged = [info for info in own_dist_infos(site_packages) if is_damaged(info)]
    if damaged:
        replaced = [*damaged, *([package] if package.exists() else [])]
        version = install_copy(site_packages, wheel, replaced)
        return f"Detectron2 {version} repaired in {package}: its installation was incomplete"

    found = probe_detectron2()
    if found["state"] == "works":
        return f"Detectron2 {found['version']} already in {found['path']}: left as it is"
    if found["state"] == "broken":
        raise InstallError(
            f"the Detectron2 in {found.get('path', 'this environment')} does not import "
            f"({found['error']}); repair or remove it, then run this again"
        )
    version = install_copy(site_packages, wheel, replaced=[])
    return f"Detectron2 {version} (pure Python, from {REQUIREMENT}) installed in {package}"


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 if a Detectron2 can be imported afterwards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheel", type=Path, help=f"a downloaded {REQUIREMENT} wheel, for machines off the network"
    )
    # One line, as all of d2kd ends; argparse would print the usage before it.
    parser.error = lambda message: sys.exit(f"error: {message}; see --help")  # type: ignore
    args = parser.parse_args(argv)
    # Leave by an exception, so that the temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
    try:
        print(ensure_detectron2(Path(sysconfig.get_path("purelib")), args.wheel))
    except (InstallError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
