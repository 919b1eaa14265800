"""d2kd compare: suites, their runs and controls, what is kept or refused, and the report."""

from __future__ import annotations

import html
import json
import math
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from scipy import stats

from d2kd import ConfigError, cli
from d2kd.compare import command, plots, processes, receipts, tables
from d2kd.compare import comparison as comparisons
from d2kd.compare import report as reports
from d2kd.compare import suite as suites
from d2kd.config import stretched
from d2kd.config_paths import SHIPPED
from d2kd.engine.setup import merged_config

from ..detectors import detector_config, write_config

SUITES = sorted((SHIPPED / "suites").glob("*.yaml"))
STUDENT = "digits/retinanet_R18.yaml"
ARMS = """
baseline: alone
seeds: [1, 2]
opts: {SOLVER.MAX_ITER: 60, SOLVER.WARMUP_ITERS: 10, SOLVER.BASE_LR: 0.001, MODEL.WEIGHTS: ""}
arms:
  alone: {config: STUDENT}
  long: {config: STUDENT, times: 1.5}
  wide: {config: STUDENT, opts: {MODEL.RETINANET.NUM_CONVS: 4}, seeds: [2]}
  as long as wide: {config: STUDENT, same_time_as: wide, seeds: [2]}
""".replace("STUDENT", STUDENT)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Nothing depends on the clone being the working directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def read(tmp_path, text: str = ARMS, **kwargs) -> suites.Suite:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    return suites.read_suite(path, **kwargs)


def comparison(tmp_path, text: str = ARMS, **kwargs) -> comparisons.Comparison:
    return comparisons.Comparison(
        read(tmp_path, text, **kwargs), tmp_path / "out", jobs=1, threads=1
    )


# --- suites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suites_of_the_repository(path):
    """Each shipped suite is read, its configs exist, and its overrides are keys that exist."""
    suite = suites.read_suite(path)
    assert suite.title and suite.seeds
    made = {arm.label: suites.weights_of(arm) for arm in suite.prepared}
    for arm in [*suite.prepared[1:], *suite.arms.values()]:
        cfg = merged_config(arm.config, suites.as_list(arm.opts))
        # Heads that are named run: they are those of a Distiller.
        assert suites.uses_teacher(cfg) == bool(cfg.DISTILL.HEADS or cfg.DISTILL.INHERIT)
        if suites.uses_teacher(cfg):  # the teacher that the suite trains is the one that is read
            assert made["teacher"] == cfg.DISTILL.TEACHER.WEIGHTS


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds: [1, 2]", "seeds: one", "seeds is 'one'"),
        ("baseline: alone", "baseline: none", "baseline 'none' is no arm; valid: 'alone', 'long'"),
        ("baseline: alone", "base: alone", "unknown key 'base'; valid: title, teacher, start,"),
        ("times: 1.5", "time: 1.5", "arm 'long': unknown key 'time'; valid: config, opts, seeds"),
        ("times: 1.5", "times: 0", "arm 'long': times is 0"),
        ("times: 1.5", "times: .nan", "arm 'long': times is nan; it must be a positive number"),
        ("times: 1.5", "times: .inf", "arm 'long': times is inf"),
        ("times: 1.5", "times: true", "arm 'long': times is True"),
        ("times: 1.5", "times: '1.5'", "arm 'long': times is 1.5"),
        ("times: 1.5", "seeds: [true]", "arm 'long': seeds is [True]"),
        ("times: 1.5", "seeds: []", "arm 'long': seeds is []"),
        ("times: 1.5", "opts: [SEED, 3]", "arm 'long': opts: must be a mapping, is ['SEED', 3]"),
        ("times: 1.5", "opts: {SEED: }", "arm 'long': opts: SEED is empty (null)"),
        ("BASE_LR: 0.001", "BASE_LR: ", "suite.yaml: opts: SOLVER.BASE_LR is empty (null)"),
        (f"  long: {{config: {STUDENT}", "  long: {config: 5", "config is 5; it must be the name"),
        ("  long:", f"  {'l' * 61}:", "a label has 1 to 60 printable characters"),
        ("  long:", '  "lo\\nng":', "a label has 1 to 60 printable characters"),
        ("same_time_as: wide", "same_time_as: wider", "same_time_as 'wider' is no arm"),
        ("same_time_as: wide", "same_time_as: wide, opts: {SEED: 3}", "needs the config and opts"),
        ("alone: {", "alone: {same_time_as: long, ", "the baseline's time is its own"),
        ("  long:", "  As long As wide:", "would share a folder"),
        (
            f"alone: {{config: {STUDENT}}}",
            "alone: {seeds: [1]}",
            "arm 'alone': 'config' is missing",
        ),
        ("arms:", "arms: [", "suite.yaml:7: not valid YAML"),
    ],
)
def test_bad_suites(tmp_path, old, new, message):
    """A mistake in a suite is one line that names what is valid."""
    assert old in ARMS
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read(tmp_path, ARMS.replace(old, new))
    assert "\n" not in str(error.value)


def test_bad_command_lines(tmp_path):
    """Unknown arms, keys and configs end in one line before anything is written."""
    path, output = tmp_path / "suite.yaml", tmp_path / "out"
    path.write_text(ARMS)
    for arguments, message in (
        (["--suite", str(path), "--arms", "wild"], "no arm 'wild'; valid: 'alone', 'long'"),
        (["--suite", str(path), "--opts", "SOLVER.MAX_ITR", "3"], "close: SOLVER.MAX_ITER"),
        (["--suite", str(path), "--opts", "SEED"], "KEY VALUE"),
        (["--configs", "gone.yaml"], "'gone.yaml' is neither a file"),
        (["--configs", STUDENT, STUDENT], "two configs share a name"),
        (["--suite", str(path), "--arms", "as long as wide"], "needs a run of 'alone'"),
        (["--suite", "gone_suite.yaml"], "gone_suite.yaml"),
        (["--suite", str(path), "--jobs", "0"], "'0' must be a whole number of at least 1"),
        (["--suite", str(path), "--seeds", "-1"], "--seeds"),
        (["--suite", str(path), "SOLVER.BASE_LR", "fast"], "wide': KEY VALUE: SOLVER.BASE_LR is"),
        (["--report-only", str(output)], "no finished run"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(["compare", *arguments, "--output", str(output)])
        assert message in str(error.value) and "\n" not in str(error.value)
        assert not list(output.glob("*_*"))


def test_seeds_and_opts(tmp_path):
    """Seeds of the command line join the suite's, and its overrides come last."""
    suite = read(tmp_path, seeds=[2, 5], opts={"SOLVER.MAX_ITER": "7"})
    assert {label: arm.seeds for label, arm in suite.arms.items()} == {
        "alone": (1, 2, 5),
        "long": (1, 2, 5),
        "wide": (2,),
        "as long as wide": (2,),
    }
    assert suite.arms["wide"].opts == {
        "SOLVER.MAX_ITER": "7",
        "SOLVER.WARMUP_ITERS": 10,
        "SOLVER.BASE_LR": 0.001,
        "MODEL.WEIGHTS": "",
        "MODEL.RETINANET.NUM_CONVS": 4,
    }


# --- runs ---------------------------------------------------------------------------------------


def finish(work: comparisons.Comparison, label: str, seed: int, **results) -> Path:
    """Make a run look finished."""
    arm = work.suite.arms[label]
    folder = work.folder(arm, seed)
    folder.mkdir(parents=True)
    settings = suites.settings_of(work.config(arm, seed)[0])
    (folder / "settings.json").write_text(json.dumps({"threads": 1, "settings": settings}))
    results = {"iterations": 60, "step_seconds": 0.5, "hook_seconds": 0.0, **results}
    (folder / "results.json").write_text(json.dumps({"results": {"bbox": {"AP": 1.0}}, **results}))
    return folder


def test_order_and_controls(tmp_path):
    """Runs come seed by seed; controls stretch the schedule, or fill the other arm's wall time."""
    work = comparison(tmp_path)
    assert [(arm.label, seed) for arm, seed in work.runs()] == [
        ("alone", 1),
        ("long", 1),
        ("alone", 2),
        ("long", 2),
        ("wide", 2),
        ("as long as wide", 2),
    ]
    cfg, _ = work.config(work.suite.arms["long"], 1)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (90, 15)
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (1, str(tmp_path / "out" / "long_1"))
    control = (work.suite.arms["as long as wide"], 2)
    assert not work.ready(control)
    finish(work, "alone", 2, step_seconds=0.5)
    assert not work.ready(control)
    finish(work, "wide", 2, step_seconds=0.75, hook_seconds=6.0)
    assert work.ready(control)
    # The trainings import what the comparison does.
    work.imports = ["--import=heads.py"]
    assert "--import=heads.py" in work.arguments(work.suite.arms["alone"], {})
    # 60 steps of 0.75 s and 6 s more are 51 s, in which the student alone makes 102 steps.
    assert work.config(*control)[0].SOLVER.MAX_ITER == 102
    # Of a head that rests for a part of the training the median step knows one part only.
    resting = {"iterations": 60, "step_seconds": 0.75, "typical_seconds": 40, "hook_seconds": 6}
    assert comparisons.same_time_iterations({"step_seconds": 0.5}, resting) == 92


def test_what_is_trained_before_the_arms(tmp_path, monkeypatch):
    """The teacher is trained, then the student that all arms start with, each once; their results
    are lines of their own, and a mistake in their configs is found before anything is trained."""
    made = tmp_path / "made"
    before = f"""
teacher: {{config: {STUDENT}, opts: {{MODEL.WEIGHTS: "", OUTPUT_DIR: {made}/teacher}}}}
start: {{config: {STUDENT}, opts: {{MODEL.WEIGHTS: "", OUTPUT_DIR: {made}/start}}}}
"""
    text = before + ARMS.replace('MODEL.WEIGHTS: ""', "SOLVER.CHECKPOINT_PERIOD: 50")
    with pytest.raises(ConfigError, match="start: unknown key 'seeds'; valid: config, opts"):
        read(tmp_path, text.replace("start: {", "start: {seeds: [1], "))
    broken = text.replace("start: {config: ", "start: {config: gone_")
    with pytest.raises(ConfigError, match="gone_digits/retinanet_R18.yaml"):
        comparison(tmp_path, broken)

    work = comparison(tmp_path, text)
    assert {arm.opts["MODEL.WEIGHTS"] for arm in work.suite.arms.values()} == {
        f"{made}/start/student_final.pth"
    }
    work.check([run for run in work.runs() if not work.needs(run[0])])
    started = []

    def stage(name, command, folder, threads):
        started.append(name)
        torch.save({"model": {}}, folder / "student_final.pth")
        (folder / "results.json").write_text(json.dumps({"results": {"bbox": {"AP": 9.0}}}))

    monkeypatch.setattr(work, "stage", stage)
    monkeypatch.setattr(comparisons, "write_markdown", lambda *_: None)
    (tmp_path / "out").mkdir()
    for _ in range(2):
        work.run([])
        assert started == ["teacher", "start"]
    lines = tables.read_lines(tmp_path / "out" / "results.jsonl")
    assert [(line["role"], line["results"]["bbox"]["AP"]) for line in lines] == [
        ("teacher", 9.0),
        ("start", 9.0),
    ]
    settings = suites.settings_of(work.config(work.suite.arms["long"], 1)[0])
    assert settings["file of MODEL.WEIGHTS"] == lines[1]["file"]

    # What was trained with other settings is no teacher of this suite, whatever its folder says.
    longer = text.replace("{MODEL.WEIGHTS", "{SOLVER.MAX_ITER: 9, MODEL.WEIGHTS", 1)
    with pytest.raises(
        ConfigError, match="teacher was made with other.*MAX_ITER.*is 9; name another"
    ):
        comparison(tmp_path, longer).run([])
    (made / "teacher" / "settings.json").unlink()
    comparison(tmp_path, longer).prepare(comparison(tmp_path, longer).suite.prepared[0], 1)


def test_stretched_schedules():
    """Steps and schedules of heads keep their share of the training; "to the end" stays that."""
    opts = ["SOLVER.STEPS", "(600, 900)", "SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "10"]
    opts += ["DISTILL.MAR.SCHEDULE.WARMUP_ITERS", "200", "DISTILL.BALANCE.FREEZE_ITER", "50"]
    cfg = merged_config("digits/retinanet_R18_mar.yaml", opts)
    assert stretched(cfg, 1500) == {
        "SOLVER.MAX_ITER": 1500,
        "SOLVER.STEPS": (900, 1350),
        "SOLVER.WARMUP_ITERS": 15,
        "DISTILL.BALANCE.FREEZE_ITER": 75,
        "DISTILL.MAR.SCHEDULE.WARMUP_ITERS": 300,
    }
    assert stretched(cfg, 3)["DISTILL.BALANCE.FREEZE_ITER"] == 1  # 0 says something else
    # Steps that coincide are one, and one at the end is none.
    cfg = merged_config("digits/retinanet_R18.yaml", opts[:4])
    assert [stretched(cfg, n)["SOLVER.STEPS"] for n in (3, 2, 1)] == [(2,), (1,), ()]


def test_settings():
    """Settings hold what a run uses: not the place it writes to, and no other head's keys."""
    config = "digits/retinanet_R18_ssim.yaml"

    def settings(*opts: str) -> dict:
        return suites.settings_of(merged_config(config, list(opts)))

    plain = settings()
    for opts in (["OUTPUT_DIR", "x"], ["DISTILL.MAR.WEIGHT", "9.0"], ["TEST.EVAL_PERIOD", "9"]):
        assert suites.first_difference(plain, settings(*opts)) == ""
    balance = "DISTILL.BALANCE."
    for opts in (["DISTILL.SSIM.WEIGHT", "9.0"], ["SEED", "9"], [f"{balance}ENABLED", "True"]):
        difference = suites.first_difference(plain, settings(*opts))
        assert difference.startswith(opts[0]) and difference.endswith(f"is {opts[1]}")
    shares = (
        settings(f"{balance}ENABLED", "True", f"{balance}SHARE", share) for share in ("0.2", "0.9")
    )
    assert suites.first_difference(*shares) == "DISTILL.BALANCE.SHARE was 0.2 and is 0.9"
    heir = ["DISTILL.HEADS", "[]", "DISTILL.INHERIT", "['fpn']"]
    assert "INHERIT" in suites.first_difference(plain, settings(*heir[2:]))
    # Without heads too, the teacher that is inherited from decides the result.
    assert "file of DISTILL.TEACHER.WEIGHTS" in settings(*heir)
    assert "DISTILL.TEACHER.CONFIG_FILE" not in settings(*heir[:2])
    new_teacher = {**plain, "file of DISTILL.TEACHER.WEIGHTS": "0123"}
    assert "DISTILL.TEACHER.WEIGHTS" in suites.first_difference(
        {**plain, "file of DISTILL.TEACHER.WEIGHTS": "4567"}, new_teacher
    )


def test_other_settings_are_refused(tmp_path):
    """A finished run, a half-done one and a foreign folder of other settings are never reused."""
    work = comparison(tmp_path)
    folder = finish(work, "alone", 1)
    work.check_kept_runs()
    for done in (True, False):
        if not done:
            (folder / "results.json").unlink()
        other = comparison(tmp_path, opts={"SOLVER.BASE_LR": "0.5"})
        with pytest.raises(ConfigError, match=r"alone_1 was .*SOLVER.BASE_LR was 0.001 and is 0.5"):
            other.check_kept_runs()
        with pytest.raises(ConfigError, match="SOLVER.BASE_LR"):
            other.train(other.suite.arms["alone"], 1)
    (folder / "settings.json").unlink()
    (folder / "model_final.pth").touch()
    with pytest.raises(ConfigError, match="alone_1 was not made by d2kd compare"):
        work.check_kept_runs()


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    """Only what is missing is started; each result is one line, in the order of the runs."""
    work = comparison(tmp_path)
    finish(work, "long", 1)
    started = []

    def stage(name, command, folder, threads):
        started.append(name)
        if not (folder / "results.json").exists():
            (folder / "results.json").write_text((tmp_path / "out/long_1/results.json").read_text())
        assert (folder / "settings.json").is_file() and "--resume" in command

    monkeypatch.setattr(work, "stage", stage)
    monkeypatch.setattr(comparisons, "write_markdown", lambda *_: None)
    monkeypatch.setattr(work, "check", lambda runs: None)
    work.run(["long", "alone"])
    assert started == ["alone 1", "long 1", "alone 2", "long 2"]
    text = (tmp_path / "out" / "results.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [f"{line['arm']} {line['seed']}" for line in lines] == started
    assert lines[0]["baseline"] == "alone" and lines[1]["times"] == 1.5
    # A part of the suite leaves the other runs in the report.
    started.clear()
    work.run(["alone"], seeds=[2])
    assert started == ["alone 2"]
    assert (tmp_path / "out" / "results.jsonl").read_text() == text


def test_after_a_failure_the_rest_goes_on(tmp_path):
    """A stage that fails names its log; the others are done, but for those that wait for it."""
    ended = []
    running = processes.LocalProcesses(2)

    def work(task: str) -> None:
        done = tmp_path / task
        code = f"print('oh no'); open({str(done)!r}, 'w'); raise SystemExit({task == 'bad'})"
        running.run_stage(task, ["-c", code], done, tmp_path / "logs", 1)

    failed = processes.run_in_order(
        ["bad", "waits", "good", "last"],
        work,
        jobs=2,
        ready=lambda task: task != "waits" or "bad" in ended,
        finished=ended.append,
        processes=running,
    )
    assert sorted(ended) == ["good", "last"]
    (bad, why), waits = failed
    assert bad == "bad" and re.match(r"bad failed \(oh no\); its output is in .*bad.log", why)
    assert waits == ("waits", "it needs a run that failed")


def test_a_defect_is_no_failed_run():
    """What is not a run's own failure ends the comparison, with its traceback."""
    with pytest.raises(ZeroDivisionError):
        processes.run_in_order([1, 0, 1], lambda n: 1 / n, jobs=1, processes=processes.Processes())


def test_failed_runs_are_reported(tmp_path, monkeypatch):
    """The report has what finished; then the command fails, and says which runs and why."""

    def run_stage(_, name, command, done, *__):
        if name == "wide 2":
            raise processes.StageFailed("wide 2 failed (no memory); its output is in wide_2.log")
        own = "iterations", "step_seconds", "hook_seconds", "train_seconds", "results"
        done.write_text(json.dumps({key: fake_lines()[2][key] for key in own}))

    monkeypatch.setattr(processes.LocalProcesses, "run_stage", run_stage)
    monkeypatch.setattr(comparisons.Comparison, "check", lambda *_: None)
    monkeypatch.setattr(reports, "draw_pictures", lambda *_: {})
    (tmp_path / "suite.yaml").write_text(ARMS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--suite", str(tmp_path / "suite.yaml"), "--output", "out"])
    assert str(stop.value).startswith("error: 2 runs failed")
    assert "tries again: wide 2 failed (no memory)" in str(stop.value)
    assert "as long as wide 2: it needs a run that failed" in str(stop.value)
    arms = [line["arm"] for line in tables.read_lines(Path("out/results.jsonl"))]
    assert arms == ["alone", "long", "alone", "long"]
    assert "| alone " in Path("out/report.md").read_text()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("alone_1/results.json", '{"r', r"alone_1/results.json is broken \(.*; remove it"),
        ("alone_1/results.json", "[]", "alone_1/results.json is not what d2kd writes there"),
        ("alone_1/settings.json", '{"a": 1}', r"alone_1/settings.json .*\(it has no settings\)"),
    ],
)
def test_broken_kept_files_are_named(tmp_path, file, content, message):
    """A file of an earlier run that was damaged is named, and nothing is trained."""
    work = comparison(tmp_path)
    finish(work, "alone", 1)
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        work.run()
    assert not list((tmp_path / "out").glob("*_2"))


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"a": 1}', "results.jsonl: line 2 is not what d2kd writes there (it has no suite)"),
        ('{"suite": "', "results.jsonl: line 2 is broken"),
        (json.dumps({**dict.fromkeys(tables.LINE_KEYS, {}), "role": "student"}), "it has no seed"),
    ],
)
def test_broken_results_are_named(tmp_path, row, message):
    """--report-only names the line that is broken or of another kind."""
    first = json.dumps(fake_lines()[0])
    (tmp_path / "results.jsonl").write_text(f"{first}\n{row}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--report-only", str(tmp_path)])
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_stopping(tmp_path):
    """Stopping ends the processes that run, and starts no other."""
    running = processes.LocalProcesses(1)

    def work(task: str) -> None:
        code = "import time; print('eta: 1  iter: 1  total_loss: 1'); time.sleep(60)"
        running.run_stage(task, ["-c", code], tmp_path / "no", tmp_path, 1)

    thread = threading.Thread(target=lambda: pytest.raises(ConfigError, work, "run"))
    thread.start()
    while not running._running and thread.is_alive():
        thread.join(0.01)
    running.stop()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(ConfigError, match="stopped"):
        work("next")


def test_what_another_comparison_makes_is_not_made_twice(tmp_path):
    """Suites share teachers: of two comparisons one trains it, the other is told."""
    done, running = tmp_path / "teacher" / "results.json", processes.LocalProcesses(1)
    make = ["-c", f"open({str(done)!r}, 'w')"]
    done.parent.mkdir()
    with processes.lock_file(done.parent / ".results.json.lock", "teacher"):
        with pytest.raises(ConfigError, match="another process works on it"):
            running.run_stage("teacher", make, done, tmp_path / "logs", 1)
    assert not done.exists()
    running.run_stage("teacher", make, done, tmp_path / "logs", 1)
    assert done.exists()


def test_tasks_that_wait_for_each_other():
    """What can never start is an error, not an endless wait."""
    with pytest.raises(RuntimeError, match="wait for each other"):
        processes.run_in_order(
            ["a", "b"], print, jobs=1, ready=lambda _: False, processes=processes.Processes()
        )


@pytest.mark.parametrize("left", ["results.json", "last_checkpoint"])
def test_a_training_of_another_origin_is_refused(tmp_path, left):
    """A teacher's folder with a training that was begun otherwise, and no weights, is refused."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / left).write_text("{}")
    text = ARMS + f"teacher: {{config: {STUDENT}, opts: {{OUTPUT_DIR: {folder}}}}}\n"
    work = comparison(tmp_path, text)
    with pytest.raises(ConfigError, match=f"has a {left} but no student_final.pth"):
        work.prepare(work.suite.prepared[0], 1)
    assert [path.name for path in folder.iterdir()] == [left]


def test_sigterm_in_the_background(tmp_path, monkeypatch):
    """SIGTERM ends a comparison cleanly, also where SIGINT is ignored, as behind nohup."""
    (tmp_path / "suite.yaml").write_text(ARMS)
    monkeypatch.setattr(
        comparisons.Comparison, "run", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped; the same command goes on"):
            command.main(
                ["--suite", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out")]
            )
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_one_process_a_run(tmp_path):
    """What another process works on is not started a second time."""
    with processes.lock_file(tmp_path / "run.lock", "run"):
        with pytest.raises(ConfigError, match="run: another process works on it"):
            processes.lock_file(tmp_path / "run.lock", "run")
    processes.lock_file(tmp_path / "run.lock", "run").close()


# --- the report ---------------------------------------------------------------------------------


AP = {"alone": (30.0, 31.0, 33.0), "kd": (32.0, 34.5, 34.5), "long": (30.5, 31.0, 34.0)}


def fake_lines(task: str = "bbox") -> list[dict]:
    """Lines of three arms with three seeds, a teacher, and a student that they start with."""

    def results(ap: float) -> dict:
        metrics = dict.fromkeys(tables.METRICS, ap)
        return {"bbox": {**metrics, "APl": math.nan}} | (
            {"segm": metrics} if task == "segm" else {}
        )

    common = {"suite": "fakes", "baseline": "alone", "config": STUDENT, "opts": {}}
    lines = [
        {**common, "role": role, "arm": role, "results": results(ap)}
        for role, ap in (("teacher", 40.0), ("start", 29.0))
    ]
    for seed in range(3):
        for label, values in AP.items():
            run = {
                "role": "student",
                "arm": label,
                "seed": seed,
                "times": 1.5 if label == "long" else 1.0,
                "same_time_as": "",
                "threads": 1,
                "folder": f"{label}_{seed}",
                "results": results(values[seed]),
                "iterations": 100,
                "step_seconds": 0.3 if label == "kd" else 0.2,
                "hook_seconds": 0.0,
                "train_seconds": 60.0,
                "peak_memory_mib": 1000.0,
                "memory_of": "process",
                "student_parameters": 10,
                "distillation_parameters": 1234 if label == "kd" else 0,
            }
            lines.append({**common, **run})
    return lines


def test_paired_gains():
    """Means, standard errors and the paired 95 % interval, worked out by hand.

    Gains 2, 3.5, 1.5: mean 7/3, variance 13/12, standard error sqrt(13/36) = 0.601; t of 2 degrees
    of freedom is 4.303, so the interval is 2.585. AP 30, 31, 33: mean 31.33, error 0.882.
    """
    arms = tables.by_arm(fake_lines())
    gains = tables.paired_gains(arms["kd"], arms["alone"])
    assert gains.tolist() == [2.0, 3.5, 1.5]
    assert tables.half_interval(gains) == pytest.approx(4.302653 * math.sqrt(13 / 36), rel=1e-6)
    assert tables.gain_text(gains) == "+2.3 ± 2.6"
    assert tables.error_text([30.0, 31.0, 33.0]) == "31.3 ± 0.9"
    # Only seeds that both have are paired.
    assert tables.paired_gains(arms["kd"], {1: arms["alone"][1]}).tolist() == [3.5]
    assert tables.gain_text(np.array([3.5])) == "+3.5"
    assert tables.gain_text(np.array([])) == "-" == tables.error_text([math.nan])


def test_receipts_of_students(tmp_path):
    """The receipt of each student but the baseline and controls has the gain with its interval, and
    that over as long a training of the baseline."""
    lines = fake_lines()
    timed = [
        {**line, "arm": "timed", "same_time_as": "kd", "folder": f"timed_{line['seed']}"}
        for line in lines
        if line["arm"] == "long"
    ]
    for line in lines:
        if line["role"] == "student":
            (tmp_path / line["folder"]).mkdir()
            receipt = tmp_path / line["folder"] / "receipt.json"
            receipt.write_text('{"compared": null, "seed": 7}')
    receipts.complete_receipts([*lines, *timed], tmp_path)
    found = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/receipt.json")
    }
    assert all(receipt["seed"] == 7 for receipt in found.values())
    assert {name for name, receipt in found.items() if receipt["compared"]} == {
        f"kd_{seed}" for seed in range(3)
    }
    compared = found["kd_1"]["compared"]
    assert (compared["suite"], compared["baseline"]) == ("fakes", "alone")
    gain = compared["gain"]["bbox"]
    assert gain["mean"] == pytest.approx(7 / 3) and gain["seeds"] == 3
    assert gain["half_interval"] == pytest.approx(4.302653 * math.sqrt(13 / 36), rel=1e-6)
    over = compared["over_equal_time"]["timed"]["bbox"]["mean"]
    assert over == pytest.approx(np.mean(np.subtract(AP["kd"], AP["long"])))


def test_holm():
    """Corrected p-values and intervals, worked out by hand.

    With 3 seeds the t of a mean of 1 and differences of d is 1 / (d / sqrt(3)); t = 9.925 has
    p = 0.01, t = 6.205 0.025, t = 4.303 0.05 (tables of Student's t, 2 degrees of freedom).
    """

    def seeds(t: float) -> np.ndarray:
        return 1 + np.sqrt(3) / t * np.array([-1.0, 0.0, 1.0])

    arms = [seeds(4.302653), seeds(9.924843), np.array([5.0]), seeds(6.205347)]
    tests = tables.holm(arms)
    # Times 3, 2 and 1 in the order of their size, and never below the one before.
    assert [p for p, _ in tests] == pytest.approx([0.05, 0.03, math.nan, 0.05], nan_ok=True)
    # The smallest is tested at 0.05 / 3, t 7.649; the next, at 0.025, is just not significant.
    assert tests[1][1] == pytest.approx(7.648841 / 9.924843, rel=1e-5)
    assert tests[3][1] == pytest.approx(1.0, rel=1e-5)
    for values, (p, half) in zip(arms, tables.holm(arms[:2]), strict=False):
        assert (p < 0.05) == (abs(values.mean()) > half)
    # An arm that is not significant stops the descent: those behind it cannot be.
    weak = tables.holm([seeds(6.0), seeds(5.9), seeds(5.8)])
    assert all(p > 0.05 and half > 1 for p, half in weak)
    assert tables.holm([np.array([2.0, 2.0])]) == [(0.0, 0.0)]
    assert tables.holm([np.zeros(2)]) == [(1.0, 0.0)]


def test_detectable_gain():
    """A gain of that size is found in 80 % of draws, with few seeds and many methods too."""
    spread = 0.7
    for count, methods in ((5, 1), (3, 10), (2, 5)):
        least = tables.detectable_gain([spread * np.array([-1.0, 0.0, 1.0])] * methods, count)
        draws = np.random.default_rng(0).normal(least, spread, (100_000, count))
        found = stats.ttest_1samp(draws, 0, axis=1)
        shown = (found.pvalue < 0.05 / methods) & (found.statistic > 0)
        assert shown.mean() == pytest.approx(0.8, abs=0.01)
    assert math.isnan(tables.detectable_gain([np.array([1.0])], 3))
    assert math.isnan(tables.detectable_gain([np.array([1.0, 2.0])], 1))


def test_the_reference_of_a_gain():
    """Gains are tested against the control of the method's own time, else another control."""
    lines = fake_lines()
    table = tables.gain_table(lines, "bbox")
    # 1.5, 3.5, 0.5 over 'long': mean 1.8, variance 2.33, error 0.88, t 2.079, p 0.173; 4.303 x 0.88
    assert table.rows == [["kd", "long", "3", "+1.8 ± 3.8", "0.173", "5.0"]]
    single = [line for line in lines if line.get("seed", 0) == 0]
    assert tables.gain_table(single, "bbox") is None
    controls = tables.controls_of(lines)
    assert controls.keys() == {"long"}
    assert tables.reference_of("kd", {}, "alone") == "alone"
    for name, same in (("timed", "other"), ("own", "kd")):
        controls[name] = {**controls["long"], "times": 1.0, "same_time_as": same}
        assert tables.reference_of("kd", controls, "alone") == name
    assert tables.reference_of("more", controls, "alone") == "timed"
    short = {"short": {**controls["long"], "times": 0.5}}
    assert tables.reference_of("kd", short, "alone") == "alone"


def test_a_method_that_trains_for_longer_is_a_method():
    """It controls nothing: only the baseline does."""
    lines = fake_lines()
    for line in [line for line in lines if line["arm"] == "kd"]:
        line["opts"] = {"DISTILL.HEADS": ["SSIM"]}
        lines.append({**line, "arm": "kd x2", "times": 2.0})
    assert tables.controls_of(lines).keys() == {"long"}
    rows = tables.gain_table(lines, "bbox").rows
    assert [row[:2] for row in rows] == [["kd", "long"], ["kd x2", "long"]]


def test_a_seed_that_collapsed_counts():
    """No detections have no AP in Detectron2; to leave them out would make a mean better."""
    found = tables.counted({"bbox": {"AP": None, "AP50": math.nan, "APs": None, "AP-cat": None}})
    assert found["bbox"]["AP"] == found["bbox"]["AP50"] == 0.0
    assert math.isnan(found["bbox"]["APs"]) and math.isnan(found["bbox"]["AP-cat"])


def test_tables():
    """AP and cost, arm by arm; masks where they were evaluated."""
    ap, tested, masks, _, cost = tables.tables(fake_lines("segm"))
    assert (ap.title, masks.title, cost.title) == ("Boxes", "Masks", "Cost")
    assert tested.title == "Boxes: gains, tested"
    rows = {row[0]: row[1:] for row in ap.rows}
    assert rows["kd"] == ["3", *["33.7 ± 0.8"] * 5, "-", "+2.3 ± 2.6"]
    assert rows["alone"][-1] == "" and rows["teacher"][1] == "40.0" and rows["start"][1] == "29.0"
    assert cost.rows[1] == ["kd", "100", "300", "1.50", "1.0", "1000", "1,234"]
    short = tables.gains_table([fake_lines(), fake_lines()])
    assert short.headers == ["gain in AP", "fakes", "fakes"]
    assert short.rows[:2] == [["(teacher: AP)", "40.0", "40.0"], ["(start: AP)", "29.0", "29.0"]]
    assert short.rows[-2] == ["kd", "+2.3 ± 2.6", "+2.3 ± 2.6"]


def test_report(tmp_path, digits_root):
    """report.md and a self-contained report.html, with plots, curves and detections."""
    config = detector_config(num_classes=10)
    config.DATASETS.TEST = ("digits_tiny_val",)
    student = write_config(config, tmp_path / "student.yaml")
    lines = [{**line, "config": student} for line in fake_lines() if line["role"] == "student"]
    for line in lines:
        folder = tmp_path / line["folder"]
        folder.mkdir()
        entries = [
            {"iteration": i, "total_loss": 3.0 - i / 50, "total_kd_loss": 0.5, "bbox/AP": i / 5}
            for i in (40, 19, 39, 59)
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "metrics.json").write_text(text)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = tmp_path / "alone_0" / "student_final.pth"
    torch.save({"model": build_model(config).state_dict()}, weights)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    command.main(["--report-only", str(tmp_path), "--import", str(tmp_path / "own.py")])
    assert (tmp_path / "imported").exists()
    page = (tmp_path / "report.html").read_text()
    assert "+2.3 ± 2.6" in page and page.count("data:image/svg+xml") == 3
    assert page.count("data:image/jpeg") == 1 and "http" not in re.sub(r"base64,[^']*", "", page)
    text = (tmp_path / "report.md").read_text()
    for name in ("gains.svg", "loss.svg", "ap.svg", "detections.jpg"):
        assert f"({name})" in text and 0 < (tmp_path / name).stat().st_size < 300_000
    first = (tmp_path / "gains.svg").read_bytes()
    plots.plot_gains(lines, tmp_path / "gains.svg")
    assert first == (tmp_path / "gains.svg").read_bytes()


@pytest.mark.parametrize("label", ["$x^{$", "_|_ [a](b) `c` *d*", "<b>&amp;</b>", "数字 \\ ~"])
def test_labels_of_any_character(tmp_path, label):
    """A label is shown as it is in Markdown, HTML and pictures, and does nothing."""
    lines = [
        {**line, "arm": {"kd": label}.get(line["arm"], line["arm"]), "suite": label}
        for line in fake_lines()
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "kd_0"
    folder.mkdir()
    entries = [{"iteration": i, "total_loss": 1.0} for i in (1, 2)]
    (folder / "metrics.json").write_text("".join(json.dumps(e) + "\n" for e in entries) + '{"to')
    text = reports.write_report(tmp_path)
    (row,) = [line for line in text.splitlines() if "33.7" in line]
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 11 and re.sub(r"\\(.)", r"\1", cells[1].strip()) == label
    assert not re.search(r"(?<!\\)(\\\\)*[<`*$\[]", cells[1])
    page = (tmp_path / "report.html").read_text()
    assert html.escape(label) in page and "<b>" not in page
    assert (tmp_path / "gains.svg").exists() and (tmp_path / "loss.svg").exists()
    arm = suites.Arm(label, STUDENT, (1,))
    suites.check_suite(suites.Suite("", label, {label: arm}), "here")
    assert "/" not in arm.slug


def test_curves(tmp_path):
    """Loss is the student's own; of an iteration that was done twice, the second time counts."""
    entries = [
        {"iteration": 19, "total_loss": 5.0, "total_kd_loss": 2.0},
        {"iteration": 39, "total_loss": 9.0},
        {"iteration": 39, "total_loss": 2.0, "bbox/AP": math.nan},
        {"iteration": 40, "bbox/AP": 7.0},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curves = plots.read_metrics(path)
    assert curves == {"loss": {19: 3.0, 39: 2.0}, "AP": {40: 7.0}}
    assert plots.smooth(np.array([1.0, 2.0, 6.0]), 3).tolist() == [1.5, 3.0, 4.0]


def test_an_empty_report(tmp_path):
    """Before the first run has finished there are no tables, and no error."""
    (tmp_path / "results.jsonl").write_text(json.dumps(fake_lines()[0]) + "\n")
    assert reports.write_report(tmp_path) == ""


# --- as a user runs it --------------------------------------------------------------------------


def test_a_project_elsewhere(tmp_path, digits_root):
    """A suite, its config and the weights beside it are found from any directory; runs are made
    below the working directory, and a report from yet another one names them."""
    project = tmp_path / "project"
    (project / "weights").mkdir(parents=True)
    config = detector_config(num_classes=10)
    config.DATASETS.TRAIN, config.DATASETS.TEST = ("digits_tiny_train",), ("digits_tiny_val",)
    config.SOLVER.MAX_ITER = 1
    del config.DISTILL["TOY_MIMIC"]  # the trainings do not know it
    write_config(config, project / "student.yaml")
    torch.save({"model": build_model(config).state_dict()}, project / "weights/start.pth")
    (project / "suite.yaml").write_text(
        "baseline: alone\nseeds: [1]\nopts: {MODEL.WEIGHTS: weights/start.pth}\n"
        "arms:\n  alone: {config: student.yaml}\n  longer: {config: student.yaml, times: 2}\n"
    )
    cli.main(["compare", "--suite", str(project / "suite.yaml"), "SOLVER.BASE_LR", "0.001"])
    output = Path("output/compare/suite")
    lines = tables.read_lines(output / "results.jsonl")
    assert [line["iterations"] for line in lines] == [1, 2]
    dumped = (output / "alone_1/config.yaml").read_text()
    assert f"WEIGHTS: {project}/weights/start.pth" in dumped and "BASE_LR: 0.001" in dumped
    assert (output / "detections.jpg").stat().st_size > 1000
    (project / "weights/start.pth").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--suite", str(project / "suite.yaml"), "--output", "other"])
    assert f"no file 'weights/start.pth'; looked in {Path.cwd()} and {project}" in str(stop.value)
    assert not Path("other").exists()
