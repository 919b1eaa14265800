"""A whole training from a LazyConfig: the one of docs/lazy_config.md, made small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.model_zoo import get_config

from d2kd import ConfigError, Distiller, load_teacher
from d2kd.engine import train as train_net
from d2kd.engine.launch import launch
from d2kd.engine.setup import build_parser

from ..detectors import make_batch, run_step
from ..test_meta_arch import train_three_steps

PAGE = Path(__file__).parents[2] / "docs" / "lazy_config.md"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"
SMALL = [
    "train.device=cpu",
    "train.seed=3",
    "train.check_teacher=False",
    "dataloader.train.dataset.names=digits_tiny_train",
    "dataloader.test.dataset.names=digits_tiny_val",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "optimizer.lr=0.001",
    "model.student.roi_heads.num_classes=10",
    "model.student.roi_heads.box_predictor.test_score_thresh=0.9",
    "model.heads.GlobalKnowledge={prototypes: {count: 2}}",
    "train.ema.enabled=True",
    "model.teacher.weights=random",
    'model.teacher.opts=["model.roi_heads.num_classes=10"]',
]


@pytest.fixture(scope="module")
def job(tmp_path_factory, digits_root):
    """The documented file, trained for two iterations: (file, output folder)."""
    folder = tmp_path_factory.mktemp("lazy")
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (folder / "lazy_R18.py").write_text(text)
    opts = [*SMALL, "train.max_iter=2", f"train.output_dir={folder / 'out'}"]
    results = train_net.main(["--config-file", str(folder / "lazy_R18.py"), *opts])
    assert "AP" in results["bbox"]
    return folder / "lazy_R18.py", folder / "out"


def test_the_documented_file_trains(job):
    """Its heads' losses are logged, its values kept, and what is left is a plain student."""
    file, out = job
    logged = set().union(*map(json.loads, (out / "metrics.json").read_text().splitlines()))
    assert {"loss_kd_ssim", "loss_kd_mask_mimic_logits", "lr"} <= logged
    run = json.loads((out / "run.json").read_text())
    assert "loss_kd_global_knowledge_global" in logged and (out / "prototypes.pth").is_file()
    assert run["heads"] == ["SSIM", "MaskMimic", "GlobalKnowledge"] and run["finished"]
    assert run["settings"]["LAZY.optimizer.lr"] == 0.001
    assert run["settings"]["DISTILL.MASK_MIMIC.WEIGHT"] == 0.5
    state = torch.load(out / "student_final.pth")["model"]
    assert not any(key.startswith("distill_heads.") for key in state)
    student = LazyConfig.load(str(out / "student_config.yaml"))
    model = instantiate(student.model)
    assert model.load_state_dict(state).missing_keys == []
    assert student.train.init_checkpoint == str(out / "student_final.pth")
    assert type(model).__name__ == "GeneralizedRCNN"


def test_it_goes_on(job):
    """--resume trains on from the last checkpoint, says what changed, and --eval-only evaluates."""
    file, out = job
    opts = [*SMALL, f"train.output_dir={out}", "optimizer.lr=0.002", "model.heads.SSIM.weight=2.0"]
    train_net.main(["--config-file", str(file), "--resume", *opts, "train.max_iter=3"])
    run = json.loads((out / "run.json").read_text())
    changed = run["changes"][0]["changed"]
    assert "LAZY.optimizer.lr is 0.002 (was 0.001)" in changed
    assert "DISTILL.SSIM.WEIGHT is 2.0 (was its default)" in changed
    checkpoint = torch.load(out / "model_final.pth", weights_only=False)
    assert checkpoint["trainer"]["iteration"] == 2
    groups = checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.002}
    weights = f"train.init_checkpoint={out / 'student_final.pth'}"
    results = train_net.main(["--config-file", str(file), "--eval-only", *opts, weights])
    assert "AP" in results["bbox"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_itr=3", "no key 'train.max_itr'; close: max_iter"),
        ("train.init_checkpoint=no.pth", "train.init_checkpoint: no file 'no.pth'"),
        ("train.amp.enabled=True", "train.amp.precision fp16 needs a GPU"),
        ("dataloader.train.dataset.names=digit", "there is no dataset 'digit'"),
        ("model.heads.SSIM.wieght=2.0", "DISTILL.SSIM.WIEGHT"),
        ("model.heads.SIM={}", "unknown head 'SIM'; valid"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(override, message, job, tmp_path):
    file, _ = job
    out = tmp_path / "out"
    argv = ["--config-file", str(file), *SMALL, f"train.output_dir={out}", override]
    with pytest.raises((SystemExit, ConfigError)) as error:
        launch(train_net.process, build_parser().parse_args(argv))
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value) and not out.exists()


def lazy_retinanet():
    model = get_config(RETINANET).model
    model.num_classes = 3
    model.backbone.bottom_up.stages.depth = 18
    del model.backbone.bottom_up.stages.stride_in_1x1
    model.backbone.top_block.in_channels = 512
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
    return model


@pytest.mark.parametrize("teacher", [None, RETINANET])
def test_no_heads_is_plain_detectron2(teacher):
    """With heads off, losses and weights after three steps are those of the plain LazyConfig."""
    opts = ["model.num_classes=3"]
    lazy = L(Distiller)(
        student=lazy_retinanet(),
        teacher=L(load_teacher)(config_file=teacher, weights="random", opts=opts)
        if teacher
        else None,
        heads={},
    )
    torch.manual_seed(0)
    plain = instantiate(lazy_retinanet()).train()
    torch.manual_seed(0)
    distiller = instantiate(lazy).train()
    train_three_steps(plain)  # TorchScript recompiles the focal loss in its first calls
    torch.manual_seed(0)
    plain = instantiate(lazy_retinanet()).train()
    assert train_three_steps(plain) == train_three_steps(distiller)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, distiller.state_dict()[name]), name


def test_heads_leave_the_student_alone():
    """With a head, the student's own losses are the same; a mistake in a head's keys is named."""
    teacher = L(load_teacher)(config_file=RETINANET, weights="random", opts=["model.num_classes=3"])
    lazy = L(Distiller)(
        student=lazy_retinanet(), teacher=teacher, heads={"Logits": {"class_weight": 2.0}}
    )
    torch.manual_seed(0)
    plain = instantiate(lazy_retinanet()).train()
    torch.manual_seed(0)
    distiller = instantiate(lazy).train()
    expected, found = run_step(plain, make_batch()), run_step(distiller, make_batch())
    assert {name: found[name].item() for name in expected} == {
        name: loss.item() for name, loss in expected.items()
    }
    assert found["loss_kd_logits_cls"] > 0
    assert distiller.distill_heads["Logits"].options.class_weight == 2.0
    with pytest.raises(ConfigError, match="need a teacher"):
        Distiller(student=plain, heads={"SSIM": {}})
