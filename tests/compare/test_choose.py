"""d2kd choose: candidates, rungs, what a stop leaves, and an honest verdict."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2kd import ConfigError, cli
from d2kd.compare import candidates as candidates_
from d2kd.compare import choice as choices
from d2kd.compare import choose, processes
from d2kd.compare import comparison as comparisons
from d2kd.compare import report as reports
from d2kd.compare.candidates import Pair
from d2kd.compare.choice import BASELINE, CONTROL, Choice, Limits
from d2kd.compare.processes import StageFailed, lock_file
from d2kd.engine.identity import changed_settings
from d2kd.engine.setup import merged_config
from d2kd.files import write_json

from ..detectors import detector_config

HEADS = ["SSIM", "Logits", "FeatureMimic", "PKD", "CWD"]
TEACHER_AP, BASE_AP = 60.0, 30.0


@pytest.fixture
def pair(tmp_path, digits_root, monkeypatch) -> Pair:
    """A plain student and a teacher on tiny digits, named as a user names them."""
    monkeypatch.chdir(tmp_path)
    write_small_config(digits_config(width=24), tmp_path / "teacher.yaml")
    write_small_config(digits_config(), tmp_path / "student.yaml")
    opts = {"DISTILL.TEACHER.CONFIG_FILE": "teacher.yaml", "DISTILL.TEACHER.WEIGHTS": "random"}
    return Pair.of("student.yaml", opts)


def digits_config(**kwargs) -> CfgNode:
    config = detector_config("retinanet", num_classes=10, **kwargs)
    config.DATASETS.TRAIN, config.DATASETS.TEST = ("digits_tiny_train",), ("digits_tiny_val",)
    config.SOLVER.MAX_ITER, config.SOLVER.BASE_LR = 1000, 0.001
    del config.DISTILL["TOY_MIMIC"]  # the trainings do not know it
    return config


def write_small_config(cfg: CfgNode, path: Path) -> None:
    """Write the keys that differ from their defaults: YAML is read slowly, and often here."""
    tree: dict = {}
    for key, value in changed_settings(cfg).items():
        *nodes, last = key.split(".")
        node = tree
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    path.write_text(yaml.safe_dump({"VERSION": 2, **tree}))


class World:
    """Trainings without training: AP by head and weight, with noise, and a clock that they move.

    Attributes:
        gain: label -> gain over the baseline at full length; "time" what twice the time brings.
        stop_before: raise KeyboardInterrupt in place of the run of this number.
        fails: labels whose runs fail.
    """

    STEP, OVERHEAD = 0.5, 20.0

    def __init__(
        self, monkeypatch, teacher_ap: float = TEACHER_AP, checks: bool = False, **gain: float
    ):
        self.gain, self.noise, self.time_gain = gain, 0.3, 0.5
        self.now, self.started, self.stop_before = 0.0, [], math.inf
        self.fails: set[str] = set()
        self.teacher_ap = teacher_ap
        monkeypatch.setattr(choices.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(processes.LocalProcesses, "run_stage", self.run_stage)
        monkeypatch.setattr(reports, "draw_pictures", lambda *_: {})
        monkeypatch.setattr(candidates_, "check_teacher", self.check_teacher)
        if not checks:  # which take most of the time
            monkeypatch.setattr(comparisons.Comparison, "check", lambda *_: None)

    def check_teacher(self, *_) -> dict:
        return {"bbox": {"AP": self.teacher_ap}}

    def run_stage(self, name, command, done, *_, **__) -> None:
        if done.exists():
            return
        if len(self.started) >= self.stop_before:
            self.stop_before = math.inf
            self.now += 7.0  # what a stop costs
            raise KeyboardInterrupt
        label, seed = name.rsplit(" ", 1)
        self.started.append((done.parent.parent.name, label, int(seed)))
        if label in self.fails:
            raise ConfigError(f"{name} failed (no memory)")
        start = command.index("--config-file")
        cfg = merged_config(command[start + 1], command[start + 2 :])
        ratio = 1.0 if label in (BASELINE, CONTROL) else 1.6
        iterations = cfg.SOLVER.MAX_ITER
        seconds = iterations * self.STEP * ratio
        self.now += seconds + self.OVERHEAD
        write_json(self.results(label, cfg, seconds), done)  # other threads read it

    def results(self, label: str, cfg: CfgNode, seconds: float) -> dict:
        noise = random.Random(f"{label} {cfg.SEED}").gauss(0, self.noise)
        of_seed = random.Random(cfg.SEED).gauss(0, 3.0)  # what pairs of one seed share
        gain = self.time_gain if label == CONTROL else self.gain.get(label, 0.0)
        ap = BASE_AP + of_seed + noise + gain
        return {
            "results": {"bbox": {"AP": ap}},
            "iterations": cfg.SOLVER.MAX_ITER,
            "step_seconds": seconds / cfg.SOLVER.MAX_ITER,
            "hook_seconds": 0.0,
            "train_seconds": seconds,
            "peak_memory_mib": 1.0,
            "memory_of": "process",
            "student_parameters": 1,
            "distillation_parameters": 0,
        }


def choice(pair: Pair, minutes: float = 120.0, weights=("1", "3"), heads=HEADS, **kwargs) -> Choice:
    limits = Limits(minutes=minutes, **kwargs)
    return Choice(pair, list(heads), list(weights), Path("out").resolve(), limits)


# --- candidates -----------------------------------------------------------------------------------


def test_candidates(pair):
    """Each head at each weight, as a factor of the config's own; heads together share it."""
    cfg = pair.cfg({"DISTILL.SSIM.WEIGHT": 2.0})
    found = candidates_.candidates(cfg, ["SSIM", "Logits+PKD"], ["0.5", "1"])
    assert found == {
        "SSIM x0.5": {"DISTILL.HEADS": ["SSIM"], "DISTILL.SSIM.WEIGHT": 1.0},
        "SSIM": {"DISTILL.HEADS": ["SSIM"], "DISTILL.SSIM.WEIGHT": 2.0},
        "Logits+PKD x0.5": {
            "DISTILL.HEADS": ["Logits", "PKD"],
            "DISTILL.LOGITS.WEIGHT": 0.5 * cfg.DISTILL.LOGITS.WEIGHT,
            "DISTILL.PKD.WEIGHT": 0.5 * cfg.DISTILL.PKD.WEIGHT,
        },
        "Logits+PKD": {
            "DISTILL.HEADS": ["Logits", "PKD"],
            "DISTILL.LOGITS.WEIGHT": cfg.DISTILL.LOGITS.WEIGHT,
            "DISTILL.PKD.WEIGHT": cfg.DISTILL.PKD.WEIGHT,
        },
    }
    for weight in ("0", "nan", "-1", "much", "inf"):
        with pytest.raises(ConfigError, match=f"--weights: '{weight}' must be a positive number"):
            candidates_.candidates(cfg, ["SSIM"], [weight])


def test_balanced_candidates(pair):
    """Weights by the heads' gradients are one more candidate."""
    assert candidates_.candidates(pair.cfg(), ["SSIM"], ["balanced"]) == {
        "SSIM balanced": {"DISTILL.HEADS": ["SSIM"], "DISTILL.BALANCE.ENABLED": True}
    }
    balanced = pair.cfg({"DISTILL.BALANCE.ENABLED": True})
    found = candidates_.candidates(balanced, ["SSIM"], ["1", "balanced"])
    assert found["SSIM"]["DISTILL.BALANCE.ENABLED"] is False
    assert found["SSIM balanced"] == {"DISTILL.HEADS": ["SSIM"]}


def test_what_a_pair_can_serve(pair, tmp_path):
    """Heads that the pair cannot serve are named with the reason; the teacher is evaluated."""
    heads = ["SSIM", "MaskMimic", "SSIM+MaskMimic", "CrossKD"]
    refused, teacher = candidates_.examine(pair, heads, tmp_path / "out")
    assert refused.keys() == {"MaskMimic", "SSIM+MaskMimic"}
    assert "MaskMimic" in refused["MaskMimic"]
    assert "bbox" in teacher
    with pytest.raises(ConfigError, match="no head fits the pair: .*MaskMimic"):
        candidates_.examine(pair, ["MaskMimic"], tmp_path / "out")


def test_mistakes(pair, tmp_path):
    """Each is one line, before anything is written."""
    write_small_config(digits_config(), tmp_path / "alone.yaml")
    teacher = ["--teacher", "teacher.yaml", "--teacher-weights", "random"]
    for arguments, message in (
        (["--config-file", "gone.yaml"], "'gone.yaml' is neither a file"),
        (["--config-file", "alone.yaml"], "there is no teacher: give --teacher"),
        (["--config-file", "alone.yaml", "--teacher", "gone.yaml"], "gone.yaml"),
        (["--config-file", "alone.yaml", *teacher, "--heads", "SIM"], "no head 'SIM'; close: SSIM"),
        (["--config-file", "alone.yaml", *teacher, "--weights", "0"], "'0' must be a positive"),
        (["--config-file", "alone.yaml", *teacher, "--minutes", "nan"], "'nan' must be a positive"),
        (["--config-file", "alone.yaml", *teacher, "--seeds", "1"], "an interval needs at least 2"),
        (["--config-file", "alone.yaml", *teacher, "DATASETS.TEST", "()"], "name one dataset"),
        (["--config-file", "alone.yaml", *teacher, "SOLVER.BASE_LR", "x"], "SOLVER.BASE_LR is 'x'"),
        (["--config-file", "alone.yaml", *teacher, "--task", "segm"], "the student has no masks"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["choose", *arguments, "--output", "out"])
        assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not Path("out").exists()


# --- rungs ----------------------------------------------------------------------------------------


GAINS = {"PKD x3": 2.5, "PKD": 2.0, "SSIM": 1.0, "SSIM x3": -3.0, "Logits": 0.5, "CWD x3": -1.0}


def test_a_winner(pair, monkeypatch):
    """Ten candidates in four rungs: half go on, each rung has its own seed, later ones are longer;
    the winner is confirmed with fresh seeds, beside a control of its wall time."""
    world = World(monkeypatch, checks=True, **GAINS)
    work = choice(pair)
    verdict = work.run()
    assert verdict.beats and verdict.winner == "PKD x3"
    ap = {
        name: [
            json.loads(Path(f"out/confirmation/{name}_{seed}/results.json").read_text())
            for seed in (5, 6, 7)
        ]
        for name in ("PKD_x3", "baseline_equal_time")
    }
    gains = [
        a["results"]["bbox"]["AP"] - b["results"]["bbox"]["AP"]
        for a, b in zip(*ap.values(), strict=True)
    ]
    half = 4.302653 * statistics.stdev(gains) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert verdict.text == (
        f"PKD x3 BEATS the baseline by {statistics.mean(gains):.1f} ± {half:.1f} AP in equal time"
    )
    stages = work.state["stages"]
    rungs = [stages[f"rung {n}"] for n in (1, 2, 3, 4)]
    assert [len(rung["arms"]) for rung in rungs] == [11, 6, 4, 3]
    assert [rung["seeds"] for rung in rungs] == [[1], [2], [3], [4]]
    lengths = [rung["iterations"] for rung in rungs]
    assert lengths[1] < lengths[2] < lengths[3] and lengths[0] == pytest.approx(lengths[1], rel=0.1)
    for before, after in itertools.pairwise(rungs):
        assert set(after["arms"]) < set(before["arms"]) and BASELINE in after["arms"]
    assert stages["confirmation"]["arms"] == [BASELINE, "PKD x3", CONTROL]
    assert stages["confirmation"]["seeds"] == [5, 6, 7]
    for winner, control in zip(*ap.values(), strict=True):
        assert control["train_seconds"] == pytest.approx(winner["train_seconds"], rel=0.01)
    # The time is used and not exceeded: by its own clock, and as the state has it.
    assert world.now == pytest.approx(work.state["seconds"])
    assert 0.85 * 7200 < world.now < 7200 * 1.02


def test_what_is_written(pair, monkeypatch):
    """The report has the verdict and each candidate; winner.yaml trains what won."""
    World(monkeypatch, **GAINS)
    choice(pair).run()
    page = Path("out/choose.md").read_text()
    assert "**PKD x3 BEATS the baseline by" in page and "The teacher has 60.0 AP" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    candidates = [row.split("|")[1].strip() for row in rows if "iterations" not in row]
    assert candidates[-10:][0] == "PKD x3" and len(set(candidates[-10:])) == 10
    text = Path("out/winner.yaml").read_text()
    assert text.startswith("# PKD x3 BEATS the baseline by")
    cfg, student = merged_config("out/winner.yaml", []), merged_config("student.yaml", [])
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller" and cfg.DISTILL.HEADS == ["PKD"]
    assert cfg.DISTILL.STUDENT_META_ARCH == "RetinaNet"
    assert cfg.DISTILL.PKD.WEIGHT == 3 * student.DISTILL.PKD.WEIGHT
    assert cfg.SOLVER == student.SOLVER and cfg.TEST == student.TEST
    assert cfg.DISTILL.TEACHER.CONFIG_FILE == str(Path("teacher.yaml").resolve())
    assert "confirmation/report.html" in page and Path("out/confirmation/report.html").exists()
    assert yaml.safe_load(text)["_BASE_"] == str(Path("student.yaml").resolve())


def test_a_baseline_that_has_not_learnt(pair, monkeypatch, capsys):
    """It is said as soon as a rung shows it, and in the report."""
    World(monkeypatch, **GAINS)
    choice(pair).run()
    text = Path("out/choose.md").read_text()
    assert "| (baseline: AP) " in text and "mostly noise" not in text + capsys.readouterr().out
    shutil.rmtree("out")
    monkeypatch.setattr(choices, "MIN_AP", 50.0)
    choice(pair).run()
    words = re.escape("AP gains are mostly noise: start from a trained student (MODEL.WEIGHTS)")
    assert len(re.findall(rf"With a baseline of \d\d\.\d {words}", capsys.readouterr().out)) > 1
    assert len(re.findall(words, Path("out/choose.md").read_text())) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_candidates(pair, monkeypatch, count):
    """One candidate needs no rung, two need one; each choice ends with a confirmed verdict."""
    World(monkeypatch, **dict.fromkeys(HEADS, 3.0))
    work = choice(pair, weights=["1"], heads=HEADS[:count])
    assert work.run().beats
    rungs = [name for name in work.state["stages"] if name.startswith("rung")]
    assert len(rungs) == math.ceil(math.log2(count))
    assert ("candidates" in Path("out/choose.md").read_text()) == (count > 1)


def test_a_wrong_early_rung_is_outvoted(pair, monkeypatch):
    """A candidate's rungs count as much as they are long."""
    work = choice(pair)
    work.state["stages"] = {
        "rung 1": {"arms": ["a", "b", "c"], "iterations": 100, "gains": {"a": [3.0], "b": [0.0]}},
        "rung 2": {"arms": ["a", "b"], "iterations": 400, "gains": {"a": [0.5], "b": [2.0]}},
    }
    assert work.score("a") == pytest.approx(1.0) and work.score("b") == pytest.approx(1.6)
    assert work.ranked(["c", "a", "b"]) == ["b", "a", "c"]


def test_a_candidate_that_fails_is_left_out(pair, monkeypatch):
    """It is said in the report, and the others go on; a failing baseline ends the choice."""
    world = World(monkeypatch, **GAINS)
    world.fails = {"PKD x3"}
    assert choice(pair).run().winner == "PKD"
    (row,) = [line for line in Path("out/choose.md").read_text().splitlines() if "PKD x3" in line]
    assert "failed" in row
    world.fails = {BASELINE}
    with pytest.raises(ConfigError, match=r"baseline 1 failed \(no memory\)"):
        Choice(pair, HEADS, ["1"], Path("other").resolve(), Limits()).run()


def test_too_little_time(pair, monkeypatch):
    """Before the first rung the command says how long it would take; with that it runs."""
    world = World(monkeypatch, **GAINS)
    with pytest.raises(ConfigError, match="--minutes 5 are too few for 10 candidates") as error:
        choice(pair, minutes=5).run()
    assert {folder for folder, *_ in world.started} == {"pace"}
    needed = int(str(error.value).split("about ")[1].split()[0])
    assert choice(pair, minutes=needed).run().winner


def test_other_candidates_after_the_pace(pair, monkeypatch):
    """Whoever follows the advice to name fewer heads need not name another folder."""
    World(monkeypatch, **GAINS)
    with pytest.raises(ConfigError, match="too few"):
        choice(pair, minutes=5).run()
    assert choice(pair, minutes=30, heads=["SSIM", "PKD"]).run().winner == "PKD x3"
    with pytest.raises(ConfigError, match="a choice made with other settings: --heads, --weig"):
        choice(pair, minutes=30, heads=["SSIM", "CWD"])


def test_never_longer_than_the_users_training(pair, monkeypatch):
    """More time than that needs does not stretch SOLVER.MAX_ITER."""
    World(monkeypatch, **GAINS)
    work = choice(pair, minutes=10_000)
    work.run()
    assert work.state["stages"]["confirmation"]["iterations"] == 1000


# --- stopping -------------------------------------------------------------------------------------


def test_a_stop_at_any_run(pair, monkeypatch):
    """Stopped before any of its runs and called again, it does the same runs, none of them twice,
    and comes to the same verdict."""
    heads, limits = ["SSIM", "PKD", "CWD"], Limits(minutes=60.0, seeds=2)
    whole = World(monkeypatch, **GAINS)
    expected = Choice(pair, heads, ["1"], Path("out").resolve(), limits).run()
    assert len(whole.started) == 1 + 4 + 3 + 6
    for number in (0, 1, 3, 4, 6, 7, 10, 13):
        world = World(monkeypatch, **GAINS)
        world.stop_before = number
        output = Path(f"stopped_{number}").resolve()
        with pytest.raises(KeyboardInterrupt):
            Choice(pair, heads, ["1"], output, limits).run()
        work = Choice(pair, heads, ["1"], output, limits)
        assert work.run().winner == expected.winner
        assert [run[1:] for run in world.started] == [run[1:] for run in whole.started]
        assert work.state["seconds"] == pytest.approx(world.now)
        # Called once more, it trains nothing.
        assert Choice(pair, heads, ["1"], output, limits).run().winner == expected.winner
        assert len(world.started) == len(whole.started)


def test_a_broken_state_is_named(pair, monkeypatch):
    """A damaged choose.json is named, not trusted."""
    World(monkeypatch, **GAINS)
    choice(pair, heads=HEADS[:1], weights=["1"]).run()
    for content in ("{", "{}", "[]"):
        Path("out/choose.json").write_text(content)
        with pytest.raises(ConfigError, match=r"out/choose.json .*; remove it"):
            choice(pair, heads=HEADS[:1], weights=["1"])


def test_one_choice_has_a_folder(pair, monkeypatch):
    """Two at once would write over each other's choose.json."""
    World(monkeypatch, **GAINS)
    work = choice(pair)
    Path("out").mkdir()
    with lock_file(Path("out/.choose.lock"), "another"):
        with pytest.raises(ConfigError, match="out: another process works on it"):
            work.run()


# --- honesty --------------------------------------------------------------------------------------


def test_no_gain_from_a_sabotaged_teacher(pair, monkeypatch):
    """A teacher whose AP is not above the baseline's ends the choice, at any stage."""
    for teacher_ap in (0.0, BASE_AP - 10):
        world = World(monkeypatch, teacher_ap=teacher_ap, **GAINS)
        output = Path(f"teacher_{teacher_ap}").resolve()
        verdict = Choice(pair, HEADS, ["1"], output, Limits(minutes=120)).run()
        assert not verdict.beats and "NO GAIN: the teacher has" in verdict.text
        assert {folder for folder, *_ in world.started} == {"pace"}
        assert not (output / "winner.yaml").exists() and (output / "choose.md").exists()
        again = Choice(pair, HEADS, ["1"], output, Limits(minutes=120, any_teacher=True))
        assert again.run().winner


def test_no_false_gain(pair, monkeypatch):
    """Where nothing gains, a confirmation says so no more often than its level; a gain it finds."""
    World(monkeypatch)
    work, noise, shift = choice(pair), random.Random(0), 0.0

    def lines() -> list[dict]:
        return [
            {
                "role": "student",
                "arm": label,
                "seed": seed,
                "results": {"bbox": {"AP": noise.gauss(shift * (label == "PKD"), 1.0)}},
            }
            for seed in range(3)
            for label in (BASELINE, "PKD", CONTROL)
        ]

    beats = sum(work.judge(lines(), "PKD").beats for _ in range(2000))
    # One side of 95 % is 2.5 %, and the better of two baselines is harder to beat than one.
    assert 0 < beats < 0.025 * 2000
    shift = 6.0
    found = sum(work.judge(lines(), "PKD").beats for _ in range(200))
    assert found > 0.7 * 200


def test_no_predictions_are_no_ap(pair, monkeypatch):
    """Where a short training detects nothing, Detectron2 has no AP: it is 0, and gains count."""
    world = World(monkeypatch, PKD=2.0)
    original = world.results

    def results(label, cfg, seconds):
        made = original(label, cfg, seconds)
        if label != "PKD":
            made["results"]["bbox"]["AP"] = None
        return made

    world.results = results
    work = choice(pair, weights=["1"])
    assert work.run().winner == "PKD"
    assert work.state["stages"]["rung 1"]["gains"]["PKD"][0] > 20
    assert work.state["stages"]["rung 1"]["gains"]["SSIM"] == [0.0]


def test_a_baseline_that_is_better_in_less_time(pair, monkeypatch):
    """Where the baseline loses by training longer, the one of equal iterations is to be beaten; a
    control that the winner is not surely above is no less so for being the lower one."""
    World(monkeypatch)

    def verdict(*control: float) -> str:
        ap = {BASELINE: (10.0, 20.0), "PKD": (12.0, 22.2), CONTROL: control}
        lines = [
            {"role": "student", "arm": arm, "seed": seed, "results": {"bbox": {"AP": values[seed]}}}
            for arm, values in ap.items()
            for seed in range(len(values))
        ]
        return choice(pair).judge(lines, "PKD").text

    assert verdict(4.0, 14.3).startswith("PKD BEATS the baseline by 2.1 ± 1.3")
    assert verdict(4.0, 18.0).startswith("NO GAIN: PKD, the best of 10, has +6.1 ± 24.1 AP")
    assert verdict(4.0).endswith("; one seed shows none")


def test_equal_time_counts(pair, monkeypatch):
    """A head that gains as much as the baseline does in the same time is NO GAIN."""
    world = World(monkeypatch, PKD=2.0)
    world.time_gain = 2.0
    verdict = choice(pair, weights=["1"]).run()
    assert verdict.winner == "PKD" and not verdict.beats
    assert verdict.text.startswith("NO GAIN: PKD, the best of 5, has ")
    assert "3 seeds would detect" in verdict.text
    assert Path("out/winner.yaml").read_text().startswith("# NO GAIN: PKD")


def test_the_choosing_seeds_do_not_confirm(pair, monkeypatch):
    """A candidate that was lucky in all rungs and gains nothing is not confirmed."""
    world = World(monkeypatch)
    world.time_gain = 0.0
    original = world.results

    def results(label, cfg, seconds):
        made = original(label, cfg, seconds)
        if label == "CWD" and cfg.SEED <= 3:  # the rungs' seeds
            made["results"]["bbox"]["AP"] += 5.0
        return made

    world.results = results
    verdict = choice(pair, weights=["1"]).run()
    assert verdict.winner == "CWD" and not verdict.beats


# --- as a user runs it ----------------------------------------------------------------------------


def in_a_fork(_, name, command, done, logs, threads) -> None:
    """A training as :class:`d2kd.compare.processes.LocalProcesses` starts it, in a process that
    has PyTorch loaded."""
    if done.exists():
        return

    def work() -> None:
        with (done.parent / "printed.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        assert command[:2] == ["-m", "d2kd"]
        cli.main(command[2:])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    if not done.exists():
        raise StageFailed(f"{name} failed: {(done.parent / 'printed.txt').read_text()[-2000:]}")


def test_a_real_choice(pair, monkeypatch, capsys):
    """On digits, with real trainings of minimal size: a teacher of random weights ends the choice
    with NO GAIN, and also where the user insists on it."""
    monkeypatch.setattr(choices, "MIN_ITERATIONS", 2)
    monkeypatch.setattr(choices, "PROBE_ITERATIONS", 2)
    monkeypatch.setattr(processes.LocalProcesses, "run_stage", in_a_fork)
    arguments = ["--config-file", "student.yaml", "--teacher", "teacher.yaml", "--heads", "SSIM"]
    arguments += ["--teacher-weights", "random", "--weights", "1", "3", "--seeds", "2"]
    arguments += ["--jobs", "2", "--minutes", "0.01", "--output", "out", "SOLVER.MAX_ITER", "4"]
    cli.main(["choose", *arguments])
    assert capsys.readouterr().out.splitlines()[-1].startswith("NO GAIN: the teacher has 0.0 AP")
    with pytest.raises(SystemExit, match="--minutes 0.01 are too few for 2 candidates"):
        cli.main(["choose", *arguments, "--any-teacher"])
    arguments[arguments.index("0.01")] = "60"
    cli.main(["choose", *arguments, "--any-teacher"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("NO GAIN: SSIM")
    state = json.loads(Path("out/choose.json").read_text())
    assert list(state["stages"]) == ["pace", "rung 1", "confirmation"]
    assert not list(Path("out/rung_1").glob("*/*.pth"))
    run = Path("out/confirmation") / f"{state['verdict']['winner'].replace(' ', '_')}_2"
    assert "loss_kd_ssim" in (run / "metrics.json").read_text()
    alone = Path("out/confirmation/baseline_2/metrics.json").read_text()
    assert "total_loss" in alone and "loss_kd" not in alone
    assert "| baseline " in Path("out/choose.md").read_text()
    assert Path("out/confirmation/detections.jpg").exists()


def test_the_documented_command(pair, monkeypatch):
    """The block of docs/choose.md runs as it stands, with files of these names and less time."""
    page = Path(__file__).parents[2] / "docs" / "choose.md"
    block = re.search(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)[1]
    (command,) = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    World(monkeypatch, **GAINS)
    Path("my_student.yaml").write_text(Path("student.yaml").read_text())
    Path("my_teacher.yaml").write_text(Path("teacher.yaml").read_text())
    teacher = build_model(merged_config("teacher.yaml", []))
    torch.save({"model": teacher.state_dict()}, "teacher.pth")
    monkeypatch.setattr(choose, "named_heads", lambda names: ["SSIM", "PKD"])  # all take a minute
    program, *words = shlex.split(command)
    assert program == "d2kd"
    cli.main(words)
    assert Path("output/choose/my_student/winner.yaml").exists()
