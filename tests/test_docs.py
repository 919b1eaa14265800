"""The code and commands in README and docs work as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from d2kd.config import add_distillation_config
from d2kd.config_files import load_config
from d2kd.engine import train as train_net

from .detectors import detector_config, distiller_config, write_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "datasets/README.md"]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_head_of_the_docs_trains(tmp_path, digits_root):
    """The head of docs/extending.md, as printed there, is imported, built and trained."""
    (snippet,) = code_blocks(ROOT / "docs" / "extending.md", "python")
    head = tmp_path / "documented_head.py"
    head.write_text(snippet)
    teacher = write_config(detector_config(width=24, num_classes=10), tmp_path / "teacher.yaml")
    student = detector_config(num_classes=10)
    student.DATASETS.TRAIN = ("digits_tiny_train",)
    student.DATASETS.TEST = ()
    student.OUTPUT_DIR = str(tmp_path / "out")
    student.SOLVER.MAX_ITER = 2
    config = write_config(distiller_config(student, [], teacher), tmp_path / "student.yaml")
    opts = ["DISTILL.HEADS", "['AttentionTransfer']", "DISTILL.ATTENTION_TRANSFER.WEIGHT", "10.0"]
    train_net.main(["--config-file", config, "--import", str(head), *opts])
    assert "loss_kd_attention_transfer" in (tmp_path / "out" / "metrics.json").read_text()


def shell_commands() -> list[str]:
    commands = []
    for page in PAGES:
        for block in code_blocks(page, "bash"):
            joined = block.replace("\\\n", " ")
            commands += [line.strip() for line in joined.splitlines() if line.strip()]
    return commands


@pytest.mark.parametrize("command", [c for c in shell_commands() if c.startswith("python ")])
def test_commands_name_what_exists(command):
    """A documented command names a script, a config and keys that exist."""
    words = [word.strip("'\"") for word in command.split()]
    assert (ROOT / words[1]).is_file(), words[1]
    cfg = get_cfg()
    add_distillation_config(cfg)
    for word in words[2:]:
        if word.startswith("configs/suites/"):
            assert (ROOT / word).is_file(), word
        elif re.fullmatch(r"configs/.*\.yaml", word) and "..." not in word:
            load_config(cfg, str(ROOT / word))
        if re.fullmatch(r"[A-Z][A-Z0-9_]+(\.[A-Z0-9_]+)+", word) and "ATTENTION" not in word:
            node = cfg
            for key in word.split("."):
                assert key in node, word
                node = node[key]


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


def test_measured_tables_are_what_the_files_say():
    """README and docs hold no figure that differs from the JSON it was made from."""
    command = [sys.executable, "tools/update_docs.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
