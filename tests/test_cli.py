"""The command ``d2kd``: its verbs, their help, how they end, and the old names of version 0.1."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import d2kd
from d2kd import ConfigError, cli
from d2kd.arguments import CommandParser, split_overrides
from d2kd.config_files import resolve_config_file
from d2kd.engine import train
from d2kd.engine.setup import merged_config

ROOT = Path(__file__).parents[1]
OLD_NAMES = {
    "benchmark": "benchmark",
    "compare": "compare",
    "convert_torchvision_resnet": "convert",
    "pretrain_digits": "pretrain",
    "prototypes": "prototypes",
    "show_masks": "show",
}


def run(*words: str, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    """A command as a process, d2kd from this clone."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, **kwargs
    )


# --- verbs --------------------------------------------------------------------------------------


def test_the_list_of_verbs(capsys):
    """Without a verb, and with --help, all verbs are listed."""
    for argv in ([], ["--help"]):
        cli.main(argv)
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_an_example(verb, capsys):
    """``d2kd VERB --help`` names the verb in its usage and shows a command line that starts with
    it."""
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: d2kd {verb} ")
    assert re.search(rf"^ +d2kd {verb}", printed, flags=re.M)


def test_no_warning_of_third_packages():
    """What Detectron2 and fvcore do with old functions is not printed at each start."""
    script = (
        "import d2kd, torch; from detectron2 import model_zoo;"
        "torch.meshgrid(torch.arange(2), torch.arange(2))"
    )
    done = run("-c", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_verb():
    """It is one line that names those there are, and the closest."""
    with pytest.raises(SystemExit, match="^error: no verb 'tran'; close: train; valid: train, "):
        cli.main(["tran"])


def test_a_verb_is_imported_when_it_is_called():
    """``import d2kd`` and the list of verbs load neither the trainer nor matplotlib."""
    code = (
        "import sys, d2kd.cli; d2kd.cli.main(['--help'])\n"
        "heavy = {'matplotlib', 'd2kd.engine', 'd2kd.compare', 'd2kd.benchmark'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_module_and_train_net_are_the_command():
    """``python -m d2kd train`` and ``train_net.py`` end a mistake in the same line."""
    for words in (["-m", "d2kd", "train"], [str(ROOT / "train_net.py")]):
        done = run(*words, "--config-file", "gone.yaml")
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: --config-file: 'gone.yaml' is neither a file nor")


# --- how a verb ends ----------------------------------------------------------------------------


def ends(error: BaseException | int) -> str | int:
    """Status, or message, that a verb ends with which raises, or returns, ``error``."""

    def verb():
        if isinstance(error, BaseException):
            raise error
        return error

    with pytest.raises(SystemExit) as stop:
        cli.end_in_one_line(verb)
    return stop.value.code


def test_a_full_disk_is_one_line():
    """Also where the error of a write does not know its file; another such error is a defect."""
    full = "No space left on device"
    assert ends(OSError(errno.ENOSPC, full)) == f"error: {full}"
    assert ends(OSError(errno.ENOENT, "No such file", "x")) == "error: No such file: x"
    with pytest.raises(OSError, match="Bad"):
        cli.end_in_one_line(lambda: os.close(1_000_000))


def test_a_mistake_is_one_line():
    """Of at most 300 characters, whatever the message held."""
    assert ends(ConfigError("no\n  such thing")) == "error: no such thing"
    assert len(ends(ConfigError("x" * 1000))) == 300
    assert ends(FileNotFoundError(2, "No such file or directory", "a.yaml")) == (
        "error: No such file or directory: a.yaml"
    )
    missing = ModuleNotFoundError("No module named 'detectron2'", name="detectron2")
    assert ends(missing) == "error: Detectron2 is not installed: run d2kd install-detectron2"
    assert ends(2) == 2


def test_ctrl_c_is_one_line(capsys):
    """A verb may say how to go on."""
    assert ends(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "stopped\n"
    assert ends(KeyboardInterrupt("go on")) == 130 and capsys.readouterr().err == "go on\n"


# --- overrides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options", "opts"),
    [
        (["--jobs", "2"], ["--jobs", "2"], []),
        (["--seeds", "1", "2", "SEED", "3"], ["--seeds", "1", "2"], ["SEED", "3"]),
        (["SOLVER.MAX_ITER", "3", "--jobs", "2"], ["--jobs", "2"], ["SOLVER.MAX_ITER", "3"]),
        (["--heads", "SSIM", "MAR"], ["--heads", "SSIM", "MAR"], []),
        (["--opts", "A.B", "x", "C.D", "E.F"], [], ["A.B", "x", "C.D", "E.F"]),
        (["A.B", "", "c.d"], ["c.d"], ["A.B", ""]),
    ],
)
def test_overrides_are_found(argv, options, opts):
    """KEY VALUE pairs stand anywhere among the options."""
    assert split_overrides(argv) == (options, opts)


@pytest.mark.parametrize("argv", [["SEED"], ["--x", "A.B"], ["A.B", "--x"]])
def test_a_key_without_a_value(argv):
    """It is named."""
    with pytest.raises(ConfigError, match="(SEED|A.B) has no value"):
        split_overrides(argv)


def test_parsers_complain_in_one_line():
    """What argparse complains of is a mistake as any other."""
    with pytest.raises(SystemExit, match="^error: unrecognized arguments: --x; see prog --help$"):
        CommandParser(prog="prog").parse_command(["--x"])


# --- old names and the installer ----------------------------------------------------------------


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_call_the_verbs(name, monkeypatch):
    """``python tools/compare.py ...`` of version 0.1 is ``d2kd compare ...``."""
    called = []
    monkeypatch.setattr(cli, "main", called.append)
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "--help"])
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert called == [[OLD_NAMES[name], "--help"]]


@pytest.mark.parametrize(
    "line",
    [
        "compare --suite configs/suites/digits_faster_rcnn_strong_teacher.yaml --jobs 2",
        "benchmark --profile --repeats 7 --json output/benchmark.json",
        "train --config-file configs/coco/faster_rcnn_R50_R101_ssim.yaml --num-gpus 8",
        "train --config-file configs/coco/faster_rcnn_R50_R101_ssim.yaml --eval-only "
        "MODEL.WEIGHTS output/coco/faster_rcnn_R50_R101_ssim/student_final.pth",
    ],
)
def test_old_command_lines_are_understood(line):
    """Those of README 0.1: their options are parsed, and their configs are there."""
    verb, *words = line.split()
    module = importlib.import_module(cli.VERBS[verb].module)
    if verb == "train":
        args = train.build_parser().parse_args(words)
        assert merged_config(args.config_file, args.opts).DISTILL.HEADS == ["SSIM"]
    else:
        args = module.build_parser().parse_command(words)
        assert verb != "compare" or Path(resolve_config_file(args.suite)).is_file()


def test_without_detectron2(tmp_path):
    """The package imports, says what is missing, and its command installs Detectron2."""
    block = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'detectron2':\n"
        "            raise ModuleNotFoundError(\"No module named 'detectron2'\", name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import d2kd\n"
    )
    done = run("-c", f"{block}from d2kd import Distiller")
    assert "run `d2kd install-detectron2`" in done.stderr.splitlines()[-1]
    done = run("-c", f"{block}import d2kd.cli; d2kd.cli.main(['train'])")
    assert done.stderr == "error: Detectron2 is not installed: run d2kd install-detectron2\n"
    code = f"{block}import d2kd.cli; d2kd.cli.main(['install-detectron2', '--help'])"
    assert run("-c", code).stdout.startswith("usage: d2kd install-detectron2")
    done = run(str(ROOT / "tools/install_detectron2.py"), "--help")
    assert done.returncode == 0 and "--wheel" in done.stdout


# --- the repository -----------------------------------------------------------------------------


def test_no_file_edits_the_search_path():
    """Modules are found where they are installed, or where Python's own rules look."""
    edit = re.compile(r"sys\.path\s*(\.(insert|append|extend|remove)|\[|\+?=)")
    folders = [ROOT, *(ROOT / name for name in ("d2kd", "tools", "tests", "datasets"))]
    files = {f for d in folders for f in (d.glob("*.py") if d == ROOT else d.rglob("*.py"))}
    found = [str(f) for f in sorted(files - {Path(__file__)}) if edit.search(f.read_text())]
    assert not found


def test_tools_are_few():
    """At most 1,000 lines, of what maintainers run; all of it is in tools/README.md."""
    files = [path for path in (ROOT / "tools").iterdir() if path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1000
    page = (ROOT / "tools/README.md").read_text()
    assert [path.name for path in files if f"{path.name}" not in f"{page} README.md"] == []


def test_the_public_api():
    """Each name is there, also those that are imported when they are asked for."""
    assert all(getattr(d2kd, name) is not None for name in d2kd.__all__)
    assert d2kd.DistillTrainer.__module__ == "d2kd.engine.trainer"
    assert d2kd.train.__module__ == "d2kd.engine.train"
    with pytest.raises(AttributeError, match="no attribute 'Distillery'"):
        _ = d2kd.Distillery


def test_what_detectron2_causes_in_torch_is_not_shown(caplog):
    """A deprecation that a user of d2kd can do nothing about; other warnings of torch.fx are."""
    logger = logging.getLogger("torch.fx._symbolic_trace")
    logger.warning("is_fx_tracing will return true for both")
    logger.warning(ValueError("another one"))
    assert [record.getMessage() for record in caplog.records] == ["another one"]
