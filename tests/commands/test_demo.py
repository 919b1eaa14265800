"""d2kd demo: the order of its trainings, what it keeps, and what it says in the end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from d2kd import ConfigError
from d2kd.commands import demo, distill
from d2kd.compare import comparison as comparisons
from d2kd.compare.tables import by_arm, paired_gains, prepared, read_lines
from d2kd.engine.setup import merged_config

AP = {"baseline": 16.0, "baseline x2": 30.0, "DSIG": 28.5, "teacher": 40.0}
COST = {
    "step_seconds": 0.1,
    "hook_seconds": 0.0,
    "train_seconds": 60.0,
    "student_parameters": 4_000_000,
    "distillation_parameters": 0,
    "peak_memory_mib": 1000.0,
    "memory_of": "process",
}


def results(label: str, seed: int, iterations: int) -> dict:
    box = {"AP": AP[label] + seed, "AP50": 50.0, "AP75": 10.0, "APs": 1.0, "APm": 1.0, "APl": 1.0}
    step = 0.13 if label == "DSIG" else 0.1
    cost = {**COST, "step_seconds": step, "iterations": iterations}
    return {"results": {"bbox": box}, **cost}


@pytest.fixture
def stages(monkeypatch, digits_root, tmp_path) -> list[str]:
    """The demo's trainings in the order of starting; each only writes what it would end with."""
    started = []

    def stage(self, name, command, folder, threads):
        if (folder / "results.json").is_file():
            return
        started.append(name)
        opts = command[command.index("--config-file") + 2 :]
        cfg = merged_config(command[command.index("--config-file") + 1], opts)
        if name.startswith("DSIG"):  # its teacher is there
            assert Path(cfg.DISTILL.TEACHER.WEIGHTS).is_file()
        label, _, seed = name.rpartition(" ") if name != "teacher" else (name, "", "0")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": {}}, folder / "student_final.pth")
        text = json.dumps(results(label, int(seed), cfg.SOLVER.MAX_ITER))
        (folder / "results.json").write_text(text)

    def save_picture(runs, path, *, records):
        assert len(records) == demo.IMAGES
        assert all(weights.is_file() for _, weights in runs.values())
        path.write_text(", ".join(runs))

    monkeypatch.setattr(comparisons.Comparison, "check", lambda self, runs: None)
    monkeypatch.setattr(comparisons.Comparison, "stage", stage)
    monkeypatch.setattr(demo, "save_picture", save_picture)
    monkeypatch.chdir(tmp_path)
    return started


DATA = ["DATASETS.TEST", "('digits_tiny_val',)"]


def test_what_it_trains_and_says(stages, capsys, tmp_path):
    """Teacher and baseline first; the table has the baseline at twice the budget; three lines close
    it; a second call trains nothing."""
    for _ in range(2):
        demo.main(["--output", "out", "--seeds", "1", *DATA])
        assert sorted(stages[:2]) == ["baseline 1", "teacher"]
        assert sorted(stages[2:]) == ["DSIG 1", "baseline x2 1"]
    out = capsys.readouterr().out.splitlines()
    iterations = merged_config("demo/digits.yaml", []).SOLVER.MAX_ITER
    row = f"| student x2     | 1       | {2 * iterations}          | 31.0 | 50.0   | 10.0   |"
    assert row in out
    assert "This is a short budget" in "\n".join(out)
    gained, cost, after = out[-3:]
    gain = "+12.5 AP by DSIG in the same iterations; +14.0 AP by twice the iterations without it."
    assert gained.startswith(f"gained: {gain}")
    assert cost.startswith("cost:   1.30 times the baseline's time per step, and a teacher")
    verb, *arguments = shlex.split(demo.NEXT)[1:]
    assert demo.NEXT in after and verb == "distill"
    assert distill.build_parser().parse_command(arguments).heads == "DSIG"
    pictures = (tmp_path / "out/detections.jpg").read_text()
    assert pictures == "student, student + DSIG, teacher"


def test_several_seeds(stages, capsys):
    """With several seeds, any ones, the range of the gains and of the baseline is told."""
    demo.main(["--output", "out", "--seeds", "1", "7", *DATA])
    text = "(2 seeds: +12.5 to +12.5; without it 17.0 to 23.0 AP, with it 29.5 to 35.5)"
    assert text in capsys.readouterr().out.splitlines()[-3]


def test_a_folder_of_other_settings_is_refused(stages):
    """Finished trainings are kept, so those of other settings must not be taken for them."""
    demo.main(["--output", "out", *DATA])
    with pytest.raises(ConfigError, match="other settings: SOLVER.BASE_LR was 0.001 and is 0.1"):
        demo.main(["--output", "out", *DATA, "SOLVER.BASE_LR", "0.1"])


def test_photographs(stages, tmp_path):
    """--photos wants a clone of the repository, and says where to get it."""
    with pytest.raises(ConfigError, match="no clone of animals: .*git clone https://"):
        demo.main(["--photos", str(tmp_path)])
    assert not stages


@pytest.mark.skipif(not demo.COMMITTED.is_file(), reason="needs the clone's docs/results")
def test_the_committed_demo_keeps_its_promise():
    """At least 15 AP without distillation, a gain larger than the spread of the seeds, and the
    worst distilled student better than the best one without."""
    lines = read_lines(demo.COMMITTED)
    arms = by_arm(lines)
    alone, distilled = (
        [run["results"]["bbox"]["AP"] for run in arms[label].values()]
        for label in ("baseline", demo.DISTILLED)
    )
    assert len(alone) >= 3 and min(alone) >= 15 and min(distilled) > max(alone)
    assert paired_gains(arms[demo.DISTILLED], arms["baseline"]).mean() > max(alone) - min(alone)
    assert prepared(lines)[0]["results"]["bbox"]["AP"] > max(distilled)
