"""The benchmark: what it counts and times, its file, and its tables."""

from __future__ import annotations

import functools
import json
import warnings

import pytest
import torch
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY, ConfigError, cli
from d2kd.benchmark import command as benchmark
from d2kd.benchmark import selection, steps
from d2kd.benchmark import tables as report
from d2kd.benchmark.counts import count_operators, count_waits
from d2kd.commands import prototypes
from d2kd.detectors.bundle import FeatureBundle
from d2kd.detectors.roi import box_stages
from d2kd.losses.dsig import background_hardness

from ..detectors import DENSE_HEADS, build, detector_config, distiller_config, make_batch

ONE_BY_ONE = "GlobalKnowledge DISTILL.GLOBAL_KNOWLEDGE.LOCAL.ADAPTER_KERNEL 1"


def fake_row(setting: dict, *_) -> dict:
    """What ``measure`` returns, without measuring."""
    seconds = {"student": 1.0, "teacher": 0.5, "full": 1.8, "inference": 1.0, "plain_teacher": 0.6}
    counts = dict.fromkeys(steps.OPERATORS, 0.0) | {"other": 0.0}
    phases = {"forward": 0.4, "backward": 0.5, "update": 0.1}
    return {
        **setting,
        "repeats": 3,
        "seconds": seconds,
        "overhead": 1.2,
        "overhead_quartiles": [1.2],
        "flops": {"student": 10e9, "teacher": 5e9, "full": 16.5e9},
        "teacher_share_of_inference": 0.5,
        "images_per_second": 1.1,
        "memory_mib": {"student": 10.0, "full": 12.0},
        "parameters_added": 1_000_000,
        "profile": {
            "phases": {"student": phases, "full": {"forward": 1.0, "backward": 0.6, "update": 0.3}},
            "operators": {name: counts for name in ("student", "teacher", "full")},
        },
    }


def test_variants():
    """Heads and options of a row, its name and its promise."""
    assert benchmark.parse_variant("DSIG,SSIM") == (["DSIG", "SSIM"], [])
    heads, opts = benchmark.parse_variant(ONE_BY_ONE)
    row = {**report.PROMISED_AT, "arch": "faster", "heads": heads, "opts": opts}
    assert opts == ["DISTILL.GLOBAL_KNOWLEDGE.LOCAL.ADAPTER_KERNEL", "1"]
    assert report.label(row) == "GlobalKnowledge, LOCAL.ADAPTER_KERNEL 1"
    assert report.bound(row) == 1.10 and report.bound({**row, "opts": []}) == 1.25
    dsig = {**report.PROMISED_AT, "heads": ["DSIG"], "opts": []}
    assert [report.bound({"arch": arch, **dsig}) for arch in ("mask", "retinanet")] == [1.10, 1.15]
    assert report.bound({**row, "heads": ["DSIG", "SSIM"]}) is None
    assert report.bound({**row, "size": 640}) is None
    with pytest.raises(ConfigError, match="KEY VALUE"):
        benchmark.parse_variant("SSIM DISTILL.SSIM.WEIGHT")


def test_a_run_goes_on(tmp_path, monkeypatch, capsys):
    """Rows of the file are kept, other settings add rows, and all tables come from the file."""
    measured = []

    def measure(setting, args):
        if len(measured) == 2 and not args.growth:
            raise KeyboardInterrupt
        measured.append(setting)
        return fake_row(setting)

    monkeypatch.setattr(benchmark, "measure", measure)
    file = tmp_path / "out" / "cost.json"
    words = ["--json", str(file), "--archs", "faster", "--device", "cpu", "--heads"]
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*words, "SSIM", ONE_BY_ONE, "MAR"])
    assert len(json.loads(file.read_text())["rows"]) == 2
    grow = ["--growth", "--sizes", "64", "--batches", "2", "--object-counts", "0"]
    benchmark.main([*words, "SSIM", ONE_BY_ONE, "MAR", *grow])
    identities = [benchmark.identity(row) for row in measured]
    assert len(identities) == len(set(identities)) == 3 * 3
    benchmark.main([*words, "SSIM", "--teacher-precision", "bf16", "--growth", "--sizes", "320"])
    printed = capsys.readouterr().out
    assert "| 64 px" in printed and "| 0 objects" in printed and "bf16" in printed
    assert "limit" in printed and "RoIAlign ms" in printed
    assert 0 < file.with_suffix(".png").stat().st_size < 150_000


def test_rows_of_another_machine_are_refused(tmp_path):
    """A file is of one machine, PyTorch and number of threads."""
    file = tmp_path / "cost.json"
    file.write_text(json.dumps({"environment": {"device": "abacus"}, "base": {}, "rows": []}))
    with pytest.raises(SystemExit, match="^error: .*measured elsewhere: name another file"):
        cli.main(["benchmark", "--json", str(file), "--device", "cpu"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "18"], "--pairs '18': two depths of 18, 34"),
        (["--heads", "SSIN"], "unknown head 'SSIN'; valid: "),
        (["--heads", "SSIM DISTILL.SSIM.WEIGTH 1"], "no config key 'DISTILL.SSIM.WEIGTH'; close"),
        (["--repeats", "0"], "--repeats: '0' must be a whole number of at least 1"),
        (["--json", "."], "--json: '.' is a folder"),
        (["--json", "other.json"], "other.json is no file of d2kd benchmark"),
        (["--heads", "SSIM", "DISTILL.SSIM.WEIGHT"], "DISTILL.SSIM.WEIGHT has no value"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch):
    """A mistake ends in one line, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "--device", "cpu", "--archs", "retinanet", *words])
    assert str(stop.value).startswith("error: ") and message in str(stop.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_overrides_are_for_all_rows():
    """KEY VALUE pairs at the end join those of each row."""
    args = benchmark.build_parser().parse_command(["--heads", "SSIM", "MAR", "SEED", "3"])
    assert [row["opts"] for row in benchmark.settings(args)] == [["SEED", "3"]] * 4


def test_every_head_has_a_row():
    """Without --heads each built-in method is measured where two such detectors can serve it;
    MaskMimic, which needs masks, is for --archs mask."""
    built_in = {n for n, head in DISTILL_HEAD_REGISTRY if head.__module__.startswith("d2kd.")}
    args = benchmark.build_parser().parse_command(["--profile"])
    rows = {arch: set() for arch in args.archs}
    for row in benchmark.settings(args):
        rows[row["arch"]].update(row["heads"])
    assert rows["retinanet"] == built_in - {"MaskMimic"}
    assert rows["faster"] == rows["retinanet"] - set(DENSE_HEADS)


def test_flop_bound_and_empty_tables():
    """The bound is the ratio of operations; a table without rows says so."""
    assert report.flop_bound(fake_row({})) == pytest.approx(1.1)
    data = {"environment": {}, "base": {"size": 1, "batch": 1, "objects": 1}, "rows": []}
    for table in (report.main_table, report.growth_table, report.teacher_table):
        assert table(data) == report.NOT_MEASURED


def test_flops_are_counted():
    """Products of both passes, those that add in place too."""
    a, b = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 5, 7)
    assert steps.count_flops(lambda: (a @ b).sum().backward()) == 2 * (2 * 2 * 3 * 5 * 7)
    assert steps.count_flops(lambda: torch.zeros(2, 3, 7).baddbmm_(a.detach(), b)) == 2 * 210


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_the_teachers_part(arch, tmp_path, teacher_files):
    """It reads what the heads read, no more, and the full step holds it and the student's."""
    opts = ("DISTILL.DRKD.BOTTLENECK", 8)
    model = build(
        distiller_config(detector_config(arch), ["DRKD", "Logits"], teacher_files[arch], opts)
    )
    batch = make_batch()
    with EventStorage(5):
        part = steps.TeacherPart(model, batch)
        outputs = "rois" if arch == "faster" else "dense"
        fields = {path[0] for path in part.paths}
        assert {"pyramid", outputs} <= fields and "mask" not in fields
        assert len(part.pooled) == len(model.distill_heads["DRKD"].instance_strides)
        student = steps.count_flops(steps.TrainingStep(model.student, batch))
        teacher = steps.count_flops(part)
        full = steps.count_flops(steps.TrainingStep(model, batch))
        assert 0 < teacher and student + teacher < full
        assert steps.count_flops(part.of(steps.plain_copy(model.teacher))) == teacher


@pytest.mark.parametrize("arch", ["faster", "retinanet"])
def test_levels_that_heads_read_are_the_teachers_part(arch, teacher_files):
    """Their last convolutions too: a head without products of its own adds none to the step."""
    student = detector_config(arch, width=24)  # the teacher's: no adapters
    model = build(distiller_config(student, ["FeatureMimic"], teacher_files[arch]))
    batch = make_batch()
    with EventStorage(5):
        part = steps.TeacherPart(model, batch)
        parts = (steps.TrainingStep(model.student, batch), part, steps.TrainingStep(model, batch))
        student, teacher, full = (steps.count_flops(step) for step in parts)
    assert 0 < teacher and student + teacher == full


def test_training_step_changes_nothing(teacher_files):
    """Its learning rate is 0 and its random numbers are the same each time."""
    model = build(distiller_config(detector_config(), ["SSIM"], teacher_files["faster"]))
    before = [p.clone() for p in model.parameters()]
    step = steps.TrainingStep(model, make_batch())
    with EventStorage(0):
        found = steps.phases(step, "cpu")
    assert found.keys() == {"forward", "backward", "update"} and min(found.values()) > 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_selection_file(tmp_path, capsys):
    """The selection's benchmark writes what its table says; refreshes have a table, too."""
    file = tmp_path / "selection.json"
    size = ["--classes", "2", "--instances", "30", "--channels", "32", "--levels", "1"]
    prototypes.main(["time", *size, "--naive-instances", "30", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["one"]["same_choice"] and result["one"]["naive_seconds"] > 0
    assert selection.markdown(result) in capsys.readouterr().out
    made = {"iteration": 400, "seconds": 2.0, "feature_seconds": 1.5, "selection_seconds": 0.5}
    made |= {"objects": 90, "images": 30, "prototypes": 50, "features_mib": 1.0}
    table = selection.refresh_markdown({"period": 400, "refreshes": [made]})
    assert "| 5.0 " in table


@pytest.mark.parametrize("arch", ["faster", "cascade", "retinanet"])
def test_settled_weights(arch):
    """Frozen norms at random let maps grow; settled ones do not, and the teacher knows most
    background without being sure of all of it."""
    cfg = detector_config(arch, depth=50)
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = "FrozenBN", ""
    model, batch = build(cfg), make_batch((2, 2), size=(96, 96))
    images = model.preprocess_image(batch).tensor
    with torch.no_grad():
        wild = model.backbone.bottom_up(images)["res5"].std()
        steps.settle(model, batch)
        settled = model.backbone.bottom_up(images)["res5"].std()
    assert model.training
    assert settled < 10 < wild
    if arch == "retinanet":
        return
    boxes = [steps._all_over(size, images.device) for size in ((96, 96),) * 2]
    with torch.no_grad():
        maps = model.backbone(images)
        pooled = model.roi_heads.box_pooler([maps[f"p{level}"] for level in (2, 3, 4, 5)], boxes)
        for _, head, predictor in box_stages(model.roi_heads):
            hard = background_hardness(predictor.cls_score(head(pooled))) >= steps.HARDNESS
            assert hard.float().mean().item() == pytest.approx(steps.HARD_SHARE, abs=0.01)


@pytest.mark.parametrize("precision", ["", "bf16"])
def test_the_teachers_part_follows_the_precision_of_the_step(precision, teacher_files, monkeypatch):
    """Under autocast its maps are bfloat16, as they are in the step."""
    model = build(distiller_config(detector_config(), ["FeatureMimic"], teacher_files["faster"]))
    found, at = [], FeatureBundle.at

    def recording(bundle, path):
        if path == ("pyramid", 8):
            found.append(at(bundle, path).dtype)

    with EventStorage(5):
        part = steps.TeacherPart(model, make_batch(), precision)
        steps.TrainingStep(model, make_batch(), precision)()  # forgets what its own taps recorded
        monkeypatch.setattr(FeatureBundle, "at", recording)
        part()
    assert found == [torch.bfloat16 if precision else torch.float32]


def test_losses_that_are_no_numbers_are_refused():
    """Timing them would time nothing that a training does."""

    class Step:
        last_loss = torch.tensor(float("nan"))

    with pytest.raises(ConfigError, match="the student step's loss is not finite"):
        benchmark.check_finite({"student": Step(), "full": Step()})


def test_rows_that_do_not_fit_or_come_too_late(tmp_path, monkeypatch, capsys):
    """Larger batches of what did not fit are not tried; after the minutes no row is started."""
    tried = []

    def measure(setting, args):
        tried.append((setting["heads"][0], setting["batch"]))
        if setting["batch"] == 4:
            raise torch.OutOfMemoryError("out of memory")
        return fake_row(setting)

    monkeypatch.setattr(benchmark, "measure", measure)
    file = tmp_path / "cost.json"
    words = ["--json", str(file), "--device", "cpu", "--archs", "faster", "--growth"]
    words += ["--sizes", "320", "--object-counts", "8", "--batches", "2", "4", "8"]
    benchmark.main([*words, "--heads", "SSIM", "MAR"])
    assert tried == [("SSIM", 2), ("MAR", 2), ("SSIM", 4), ("MAR", 4)]
    printed = capsys.readouterr().err
    assert printed.count("does not fit in memory") == 2 and printed.count("a smaller one") == 2
    assert len(json.loads(file.read_text())["rows"]) == 2
    clock = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(clock))
    benchmark.main([*words[:6], "--heads", "DSIG", "DRKD", "--minutes", "1"])
    assert tried[-1] == ("DSIG", 2) and "left for another call" in capsys.readouterr().err


def test_a_row_counts_operators_and_waits(teacher_files):
    """What a head adds, the teacher's part included; on a CPU no kernels."""
    cfg = distiller_config(detector_config(), ["FeatureMimic"], teacher_files["faster"])
    model, batch = build(cfg), make_batch()
    with EventStorage(5):
        parts = {
            "student": steps.TrainingStep(model.student, batch),
            "teacher": steps.TeacherPart(model, batch),
            "full": steps.TrainingStep(model, batch),
        }
        for part in parts.values():
            part()
        found = benchmark.count_parts(parts, model.student, model, "", "cpu")
    operators = found["operators"]
    assert operators["student"] + operators["teacher"] < operators["full"]
    assert "kernels" not in found and isinstance(found["waits"], list)


def test_waits_have_a_place():
    """An operator that would wait is counted with the function that calls it, unless it may."""
    student = torch.nn.Linear(2, 2)

    def nms() -> None:
        torch.ones(3).nonzero()

    def step() -> None:
        student(torch.ones(1, 2)).sum().item()
        torch.arange(4)[torch.ones(4, dtype=torch.bool)].tolist()
        nms()

    counts = count_operators(step, student, may_wait=("nms",))
    assert counts.waits == ["_local_scalar_dense", "index", "tolist"]
    assert counts.student_waits == 0 and counts.operators > 4
    handle = student.register_forward_hook(lambda *_: nms())
    assert count_operators(lambda: student(torch.ones(1, 2)), student).student_waits == 1
    handle.remove()
    assert torch.ones(1).tolist() == [1.0]


class Masked(torch.nn.Linear):
    """A student whose backward pass waits: it indexes by a mask, as RetinaNet does."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(x)[x > 0].sum()}


def test_waits_of_a_backward_pass():
    """The student's own are not d2kd's, those that a head adds are; gradients stay."""
    student, x = Masked(2, 2), torch.ones(1, 2)
    torch.nn.init.ones_(student.weight)

    def step(extra: bool) -> None:
        loss = student(x)["loss"]
        (loss + student.weight[:, x[0] > 0].sum() if extra else loss).backward()

    alone, full = (count_operators(functools.partial(step, extra), student) for extra in (0, 1))
    assert alone.waits == [] and alone.student_waits == full.student_waits == 2
    assert full.waits == ["index", "index_put in the backward pass"]
    assert alone.operators < full.operators and (student.bias.grad == 2).all()  # of two steps


def test_waits_that_cuda_reports(monkeypatch):
    """As warnings: each counts but the student's and those that may be; not what is said of the
    mode itself."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: report(mode))
    student, x = torch.nn.Linear(2, 2), torch.ones(1, 2)

    def report(message: object = None) -> None:
        mode = "Synchronization debug mode is a prototype feature"
        warnings.warn(mode if message else "called a synchronizing CUDA operation", stacklevel=1)

    def nms() -> None:
        report()

    def tap(*found: torch.Tensor) -> None:
        report()
        found[-1].register_hook(lambda _: report())

    def step() -> None:
        loss, head = student(x).sum(), student.weight.sum()
        head.register_hook(lambda _: report())
        report()
        nms()
        (loss + head).backward()

    student.register_forward_hook(tap)
    counts = count_waits(step, student, may_wait=("nms",))
    assert counts.waits == ["wait", "wait in the backward pass"] and counts.student_waits == 2


@pytest.mark.parametrize(
    ("place", "arch", "head", "expected"),
    [
        (report.PROMISED_AT, "faster", "SSIM", 1.15),
        (report.PROMISED_ON_GPU_AT, "faster", "SSIM", 1.08),
        (report.PROMISED_ON_GPU_AT, "retinanet", "DRKD", 1.20),
        ({**report.PROMISED_ON_GPU_AT, "precision": ""}, "faster", "SSIM", None),
    ],
)
def test_bounds(place, arch, head, expected):
    """Of a CPU and of a GPU, each at its own setting."""
    assert report.bound({**place, "arch": arch, "heads": [head], "opts": []}) == expected
