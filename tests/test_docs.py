"""The code and commands in README and docs work as they stand."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg

import d2kd
from d2kd import cli
from d2kd.arguments import split_overrides
from d2kd.cli import VERBS
from d2kd.compare import choosing
from d2kd.config import add_distillation_config
from d2kd.config_files import load_config, resolve_config_file
from d2kd.config_paths import SHIPPED
from d2kd.engine import train as train_net
from d2kd.keys import node_at
from d2kd.registry import node_name
from tools import reference, site, update_docs

from .detectors import detector_config, distiller_config, write_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / folder / "README.md" for folder in ("", "datasets", "tools")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHIPPED_FOLDERS = [path.name for path in SHIPPED.iterdir() if path.is_dir()]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", ["AttentionTransfer", "MaskedGeneration"])
def test_the_heads_of_the_docs_train(name, tmp_path, digits_root):
    """A head of docs/extending.md, as printed there, is imported, built and trained."""
    blocks = code_blocks(ROOT / "docs" / "extending.md", "python")
    (snippet,) = [block for block in blocks if f"class {name}(DistillHead)" in block]
    head = tmp_path / f"documented_{name.lower()}.py"
    head.write_text(snippet)
    teacher = write_config(detector_config(width=24, num_classes=10), tmp_path / "teacher.yaml")
    student = detector_config(num_classes=10)
    student.DATASETS.TRAIN = ("digits_tiny_train",)
    student.DATASETS.TEST = ()
    student.OUTPUT_DIR = str(tmp_path / "out")
    student.SOLVER.MAX_ITER = 2
    config = write_config(distiller_config(student, [], teacher), tmp_path / "student.yaml")
    opts = ["DISTILL.HEADS", f"['{name}']", f"DISTILL.{node_name(name)}.WEIGHT", "10.0"]
    train_net.main(["--config-file", config, "--import", str(head), *opts])
    assert f"loss_kd_{node_name(name).lower()}" in (tmp_path / "out" / "metrics.json").read_text()
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    trained = [key for key in state if key.startswith(f"distill_heads.{name}.")]
    assert bool(trained) == (name == "MaskedGeneration")


@pytest.fixture
def mask_student(tmp_path, digits_root) -> Path:
    """A config of a small Mask R-CNN that distils for two iterations, without a teacher."""
    student = detector_config("mask", num_classes=10)
    student.DATASETS.TRAIN = ("digits_tiny_train",)
    student.DATASETS.TEST = ("digits_tiny_val",)  # where the teacher is checked, if it can be
    student.OUTPUT_DIR = str(tmp_path / "out")
    student.SOLVER.MAX_ITER = 2
    write_config(distiller_config(student, [], ""), tmp_path / "student.yaml")
    return tmp_path / "student.yaml"


TEACHERS = code_blocks(ROOT / "docs" / "teachers.md", "yaml")


@pytest.mark.parametrize("block", TEACHERS, ids=range(len(TEACHERS)))
def test_the_teachers_of_the_docs_teach(block, mask_student):
    """Each block of docs/teachers.md trains a student, with random weights of the teacher."""
    config = mask_student.with_name("distil.yaml")
    config.write_text(f"_BASE_: {mask_student}\n{block}")
    opts = ["DISTILL.TEACHER.WEIGHTS", "random"]
    if ".py" in block:  # of 80 classes
        opts += ["DISTILL.TEACHER.OPTS", "['model.roi_heads.num_classes=10']"]
    train_net.main(["--config-file", str(config), *opts])
    metrics = (mask_student.parent / "out" / "metrics.json").read_text()
    cfg = load_plain(config)
    assert len(cfg.DISTILL.HEADS) >= 1
    assert all(f"loss_kd_{node_name(head).lower()}" in metrics for head in cfg.DISTILL.HEADS)


def load_plain(path: Path):
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(path))
    return cfg


def test_the_module_of_the_docs_teaches(mask_student, monkeypatch):
    """teacher.py of docs/teachers.md, as printed there, with the overrides of its command."""
    (module,) = code_blocks(ROOT / "docs" / "teachers.md", "python")
    (command,) = code_blocks(ROOT / "docs" / "teachers.md", "bash")
    mask_student.with_name("teacher.py").write_text(module)
    monkeypatch.chdir(mask_student.parent)
    _, opts = split_overrides(shlex.split(command.replace("\\\n", " "))[2:])
    train_net.main(["--config-file", str(mask_student), *opts])
    assert "loss_kd_ssim" in (mask_student.parent / "out" / "metrics.json").read_text()


# Appended to a documented command, so that it is done in seconds.
SMALL = [
    *("MODEL.WEIGHTS", "", "DISTILL.TEACHER.WEIGHTS", "random", "DISTILL.TEACHER.CHECK", "False"),
    *("DATASETS.TRAIN", "('digits_tiny_train',)", "DATASETS.TEST", "('digits_tiny_val',)"),
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
]


def documented(page: str, word: str) -> list[str]:
    """The words of the first command of a page that has ``word``, without the program's name."""
    commands = (
        c for block in code_blocks(ROOT / "docs" / page, "bash") for c in block.splitlines()
    )
    return shlex.split(next(command for command in commands if word in command))[1:]


def test_the_balanced_training_of_the_docs(tmp_path, digits_root):
    """It runs as printed, and its log has weights and shares."""
    argv = documented("training.md", "DISTILL.BALANCE.ENABLED")[1:]
    train_net.main([*argv, *SMALL, "OUTPUT_DIR", str(tmp_path / "out")])
    assert "balance/ssim/share" in (tmp_path / "out" / "metrics.json").read_text()
    assert "Balance at iteration 0:\n  SSIM: weight" in (tmp_path / "out" / "log.txt").read_text()


def test_the_check_of_a_teacher_of_the_docs(tmp_path, digits_root, monkeypatch, capsys):
    """It runs as printed, and what the page names is there."""
    monkeypatch.chdir(tmp_path)
    student = tmp_path / "output/mine/student.yaml"  # of the quickstart
    student.parent.mkdir(parents=True)
    student.write_text(f"_BASE_: {ROOT}/configs/digits/faster_rcnn_R18_distill.yaml\n")
    cli.main([*documented("check_teacher.md", "check-teacher"), *SMALL])
    assert "on 16 of 16 images of 'digits_tiny_train' (train)" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "teacher_check").iterdir()}
    assert names == {"page.md", "results.json", "disagreements.jpg"}


def shell_commands() -> list[str]:
    commands = []
    for page in PAGES:
        for block in code_blocks(page, "bash"):
            joined = block.replace("\\\n", " ")
            commands += [line.strip() for line in joined.splitlines() if line.strip()]
    return commands


@pytest.mark.parametrize(
    "command", [c for c in shell_commands() if c.split()[0] in ("python", "d2kd", "tools")]
)
def test_commands_name_what_exists(command):
    """A documented command names a script or a verb, and options, configs and keys that exist."""
    program, name, *words = shlex.split(command, comments=True)
    if program == "d2kd":
        parser = getattr(importlib.import_module(VERBS[name].module), "build_parser", None)
        if parser is not None:
            parser().parse_command(words)
    elif name == "-m":
        assert importlib.util.find_spec(words[0]), words[0]
    else:
        assert (ROOT / name).is_file(), name
    cfg = get_cfg()
    add_distillation_config(cfg)
    for word in words:
        if word.endswith(".yaml") and word.split("/")[0] in (*SHIPPED_FOLDERS, "configs"):
            path = resolve_config_file(word)
            if "suites/" not in word:
                load_config(cfg, path)
        if re.fullmatch(r"[A-Z][A-Z0-9_]+(\.[A-Z0-9_]+)+", word) and "ATTENTION" not in word:
            node_at(cfg, word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_configs(page, tmp_path):
    """A documented piece of YAML has keys that exist, with values of their type."""
    for number, block in enumerate(code_blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(textwrap.dedent(block))
        cfg = get_cfg()
        add_distillation_config(cfg)
        load_config(cfg, str(tmp_path / f"{number}.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Relative links and pictures of a page exist."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_what_is_generated_is_current():
    """Measured tables are what their files say, and the reference pages what the code says; else
    the message has the command that mends it."""
    command = [sys.executable, "-W", "ignore", "tools/update_docs.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_site_builds(tmp_path):
    """Without a warning: each link and anchor leads somewhere, each page is in the navigation."""
    pytest.importorskip("mkdocs")
    site.main([str(tmp_path)])
    assert (tmp_path / "docs/methods/ssim.html").is_file()


def test_every_name_of_the_api_has_a_section():
    """docs/api.md has each name of d2kd.__all__, once."""
    named = [name for names in reference.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(d2kd.__all__)
    assert all(f"### {name}\n" in (ROOT / "docs/api.md").read_text() for name in d2kd.__all__[:9])


def test_docstrings_become_markdown():
    """Roles lose their markup, and Args become a list with continuation lines in one."""
    text = "What :func:`~a.b` does.\n\nArgs:\n    x: ``one``\n        two.\n\nRaises:\n    E: no."
    expected = "What `a.b` does.\n\nArgs:\n\n* `x`: `one` two.\n\nRaises:\n\n* `E`: no."
    assert reference.prose(text) == expected
    assert reference.written(("a", 1.0, None)) == '["a", 1.0, None]'


def test_choice_against_a_full_comparison(tmp_path):
    """Candidates in the order of the choice: who went further, then who gained more."""
    rungs = {
        "rung 1": {"iterations": 10, "gains": {"A": [1.0], "A x3": [3.0], "B balanced": [2.0]}},
        "rung 2": {"iterations": 20, "gains": {"B balanced": [4.0]}},
        "confirmation": {"iterations": 40, "gains": {"B balanced": [9.0, 9.0]}},
    }
    verdict = {"text": "B BEATS", "beats": True, "winner": "B balanced"}
    state = {"candidates": ["A", "A x3", "B balanced"], "stages": rungs, "verdict": verdict}
    path = tmp_path / "choose.json"
    path.write_text(json.dumps({**state, "teacher": {}, "seconds": 90.0, "settings": {"K": "v"}}))
    assert "settings" not in choosing.copied(path)
    line = {"suite": "s", "baseline": "base", "role": "student", "config": "c", "opts": {}}
    line |= {"times": 1, "same_time_as": "", "threads": 1, "folder": "f", "iterations": 9}
    gains = {"base": 0.0, "A": 5.0, "B, balanced": 4.0, "C": 1.0}
    lines = [
        {**line, "step_seconds": 1.0, "arm": arm, "seed": s, "results": {"bbox": {"AP": 9 + gain}}}
        for arm, gain in gains.items()
        for s in (1, 2)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in lines))
    text = choosing.markdown(path, results)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:4]]
    assert [row[:4] for row in rows] == [["B balanced", "2", "+3.3", "2"], ["A", "1", "+1.0", "2"]]
    assert "2 minutes: `B BEATS`" in text and "comparison A is" in text and "is -1.00." in text


def test_results_are_copied(tmp_path, monkeypatch):
    """--copy brings results.jsonl without this machine's paths, and pictures that a page has."""
    for folder in ("docs/results", "docs/images", "out/suite"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(update_docs, "ROOT", tmp_path)
    out = tmp_path / "out/suite"
    with pytest.raises(SystemExit, match="holds no results.jsonl"):
        update_docs.copy_results(out)
    (out / "results.jsonl").write_text(json.dumps({"config": f"{tmp_path}/a.yaml"}) + "\n")
    (out / "detections.jpg").write_text("new")
    (out / "gains.svg").write_text("new")
    (tmp_path / "docs/images/suite.jpg").write_text("old")
    update_docs.copy_results(out)
    assert (tmp_path / "docs/results/suite.jsonl").read_text() == '{"config": "a.yaml"}\n'
    assert [path.name for path in (tmp_path / "docs/images").iterdir()] == ["suite.jpg"]
    assert (tmp_path / "docs/images/suite.jpg").read_text() == "new"
    (out / "results.jsonl").write_text(json.dumps({"config": "/elsewhere/a.yaml"}) + "\n")
    with pytest.raises(SystemExit, match="names /elsewhere/a.yaml"):
        update_docs.copy_results(out)
    (out / "choose.json").write_text(json.dumps(dict.fromkeys(choosing.KEPT, 1) | {"settings": 2}))
    update_docs.copy_results(out)
    kept = json.loads((tmp_path / "docs/results/choose_suite.json").read_text())
    assert kept == dict.fromkeys(choosing.KEPT, 1)


def test_pages_are_short():
    """Prose, without tables that a tool writes and without code blocks."""
    made = {ROOT / "docs/api.md", ROOT / "docs/config.md"}
    prose = 0
    for page in PAGES:
        text = re.sub(r"<!-- measured.*?<!-- end -->|```.*?```", "", page.read_text(), flags=re.S)
        prose += sum(bool(line.strip()) for line in text.splitlines() if page not in made)
    assert prose <= 2200
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
