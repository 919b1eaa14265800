"""Teachers from LazyConfig: the zoo's, a user's own file, and what is read from them."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.model_zoo import get_checkpoint_url, get_config_file

from d2kd import DISTILL_HEAD_REGISTRY, ConfigError
from d2kd.detectors.source import build_source
from d2kd.registry import node_name

from . import DENSE_HEADS, build, detector_config, distiller_config, make_batch, run_step

LSJ = "new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ.py"
# The zoo's detector, with three classes and a narrow pyramid and heads.
SMALL = [
    "model.roi_heads.num_classes=3",
    "model.backbone.out_channels=24",
    "model.proposal_generator.head.in_channels=24",
    "model.roi_heads.box_head.input_shape.channels=24",
    "model.roi_heads.box_head.conv_dims=[8]",
    "model.roi_heads.box_head.fc_dims=[16]",
    "model.roi_heads.box_predictor.input_shape.channels=16",
    "model.roi_heads.mask_head.input_shape.channels=24",
    "model.roi_heads.mask_head.conv_dims=[8,8]",
]


def lazy_config(heads: list[str], *opts, teacher: str = LSJ, arch: str = "mask"):
    opts = ("DISTILL.TEACHER.OPTS", SMALL, *opts)
    return distiller_config(detector_config(arch), heads, teacher, opts)


def test_an_lsj_teacher_teaches_a_yaml_student():
    """The zoo's R50 LSJ as teacher of a Mask R-CNN R18 from YAML, through each head that fits."""
    heads = [
        name
        for name, head in DISTILL_HEAD_REGISTRY
        if head.__module__.startswith("d2kd.") and name not in DENSE_HEADS
    ]
    distiller = build(lazy_config(heads))
    losses = run_step(distiller, make_batch())
    sum(losses.values()).backward()
    for name in heads:
        prefix = f"loss_kd_{node_name(name).lower()}"
        found = [loss for term, loss in losses.items() if term.startswith(prefix)]
        assert all(torch.isfinite(loss) for loss in found) and max(found) > 0, name
    assert all(p.grad is not None for p in distiller.student.backbone.parameters())


def test_a_vitdet_of_ones_own_teaches(tmp_path):
    """Padded to its square, whatever the size of the images, with its own pixels."""
    own = tmp_path / "vitdet.py"
    own.write_text(
        "from detectron2 import model_zoo\n"
        "model = model_zoo.get_config('common/models/mask_rcnn_vitdet.py').model\n"
        "model.backbone.square_pad = model.backbone.net.img_size = 128\n"
        "vit = model.backbone.net\n"
        "vit.embed_dim, vit.depth, vit.num_heads, vit.window_block_indexes = 24, 2, 2, [0]\n"
        "model.roi_heads.num_classes = 3\n"
    )
    cfg = lazy_config(["SSIM", "DSIG"], "DISTILL.TEACHER.OPTS", [], teacher=str(own))
    distiller = build(cfg)
    assert distiller.teacher.flip_channels
    for size in ((64, 64), (96, 160)):
        losses = run_step(distiller, make_batch(size=size))
        assert losses["loss_kd_ssim"] > 0 and losses["loss_kd_dsig_foreground"] > 0


def test_a_head_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="CrossKD is for one-stage detectors"):
        build(lazy_config(["CrossKD"]))


def test_the_student_of_a_lazy_teacher_is_plain():
    """Drawing the teacher's weights leaves the student's random numbers alone."""
    plain = run_step(build(detector_config("mask")), make_batch())
    found = run_step(build(lazy_config(["SSIM"])), make_batch())
    assert {name: found[name].item() for name in plain} == {
        name: loss.item() for name, loss in plain.items()
    }


@pytest.mark.parametrize(
    ("name", "order"),
    [(LSJ, "BGR"), ("COCO-Detection/fcos_R_50_FPN_1x.py", "BGR"), ("own.py", "RGB")],
)
def test_pixels_are_the_models_own(name, order, tmp_path):
    """Mean, deviation and order of channels come from the model, or from how its images are
    loaded where the model does not say (FCOS)."""
    opts: list[str] = []
    if name == "own.py":
        path = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.py")
        text = (
            f"from detectron2.config import LazyConfig\nmodel = LazyConfig.load({path!r}).model\n"
        )
        text += "model.pixel_mean = [1.0, 2.0, 3.0]\nmodel.input_format = 'RGB'\n"
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    cfg = distiller_config(detector_config("retinanet"), ["SSIM"], name)
    cfg.DISTILL.TEACHER.OPTS = opts
    source = build_source(cfg)
    expected = LazyConfig.load(get_config_file(name) if "own" not in name else name).model
    assert source.input_format == order
    assert source.model.pixel_mean.flatten().tolist() == pytest.approx(list(expected.pixel_mean))
    assert not isinstance(source.model.pixel_mean, torch.nn.Parameter)


def test_weights(tmp_path):
    """Those of the zoo for a zoo name, else the file's own init_checkpoint; every key must fit."""
    cfg = lazy_config(["SSIM"], "DISTILL.TEACHER.WEIGHTS", "")
    assert build_source(cfg).weights == get_checkpoint_url(LSJ)
    path = get_config_file(LSJ)
    own = tmp_path / "own.py"
    own.write_text(
        "from detectron2.config import LazyConfig\n"
        f"model = LazyConfig.load({path!r}).model\ntrain = dict(init_checkpoint='own.pth')\n"
    )
    trained = build_source(lazy_config(["SSIM"], teacher=str(own)))  # random
    torch.save({"model": trained.model.state_dict()}, tmp_path / "own.pth")
    cfg = lazy_config(["SSIM"], "DISTILL.TEACHER.WEIGHTS", "", teacher=str(own))
    distiller = build(cfg, seed=5)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(distiller.teacher.model.state_dict()[name], value), name
    state = trained.model.state_dict()
    del state["backbone.fpn_output2.weight"]
    torch.save({"model": state}, tmp_path / "own.pth")
    with pytest.raises(
        ConfigError, match="1 of the teacher's weights did not load.*: backbone.fpn_output2"
    ):
        build(cfg)
    (tmp_path / "own.pth").unlink()
    with pytest.raises(ConfigError, match="the teacher has no weights|no file 'own.pth'"):
        build(cfg)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DISTILL.TEACHER.CONFIG_FILE", "new_baselines/mask_rcnn_R_50_FPN_40ep_LSJ.py"), "400ep"),
        (("DISTILL.TEACHER.OPTS", ["model.roi_heds.num_classes=3"]), "close: roi_heads"),
        (("DISTILL.TEACHER.OPTS", ["MODEL.PIXEL_STD", [1.0]]), "give strings a.b=c"),
        (("DISTILL.TEACHER.CONFIG_FILE", "common/optim.py"), "has no 'model' among .*SGD"),
    ],
)
def test_mistakes_are_one_line(opts, message):
    cfg = lazy_config(["SSIM"], "DISTILL.TEACHER.OPTS", [], *opts)
    with pytest.raises(ConfigError, match=message) as error:
        build(cfg)
    assert "\n" not in str(error.value)
