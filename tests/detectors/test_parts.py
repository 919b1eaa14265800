"""Parts of detectors: what a view is, and a part of a user's in one file of the user's own."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Keypoints
from torch import Tensor

from d2kd import ConfigError
from d2kd.config import add_distillation_config
from d2kd.detectors.bundle import FeatureBundle, Lazy, RoIView, lazy
from d2kd.detectors.spec import DetectorSpec, describe_detector
from d2kd.detectors.taps import Taps
from d2kd.engine.setup import import_user_module
from d2kd.registry import DETECTOR_PART_REGISTRY, DISTILL_HEAD_REGISTRY

from . import build, detector_config, distiller_config, make_batch, run_step, write_config


@pytest.fixture
def keypoints():
    """The module of a user's, imported for one test."""
    name = "keypoints_of_a_user"
    import_user_module(str(Path(__file__).with_name(f"{name}.py")))
    yield sys.modules.pop(name)
    del DETECTOR_PART_REGISTRY._obj_map["KeypointPart"]
    del DISTILL_HEAD_REGISTRY._obj_map["KeypointMimic"]


def keypoint_config(width: int = 16) -> CfgNode:
    cfg = detector_config("faster", width=width)
    add_distillation_config(cfg)  # heads that this process has registered by now
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "KRCNNConvDeconvUpsampleHead"
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8,)
    cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    return cfg


def keypoint_batch() -> list[dict]:
    batch = make_batch(num_classes=1)
    for item in batch:
        instances = item["instances"]
        boxes = instances.gt_boxes.tensor
        points = (boxes[:, None, :2] + boxes[:, None, 2:]).expand(-1, 5, 2) / 2
        seen = torch.full((len(boxes), 5, 1), 2.0)
        instances.gt_keypoints = Keypoints(torch.cat([points, seen], dim=2))
    return batch


def test_a_part_of_a_users_is_one_file(keypoints, tmp_path):
    """Described, tapped, computed on the student's boxes and read by a head of the user's with a
    key of its own: all through the extension points of the built-in ones."""
    file = write_config(keypoint_config(24), tmp_path / "teacher.yaml")
    opts = ("DISTILL.KEYPOINT_MIMIC.TEMPERATURE", 4.0)
    model = build(distiller_config(keypoint_config(), ["KeypointMimic"], file, opts))
    assert model.distill_heads["KeypointMimic"].temperature == 4.0
    assert model.teacher_spec.extra["keypoint"]["joints"] == 5
    losses = run_step(model, keypoint_batch())
    plain = run_step(build(keypoint_config()), keypoint_batch())
    assert {n: v.item() for n, v in plain.items()} == {n: losses[n].item() for n in plain}
    view = keypoints.KeypointView
    assert FeatureBundle(model.teacher_spec, keypoint=view("teacher")).view(view)
    losses["loss_kd_keypoint_mimic"].backward()
    head = model.student.roi_heads.keypoint_head
    assert head.score_lowres.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_a_pair_without_the_part_is_refused(keypoints, tmp_path):
    """As for built-in fields: the message names the field and what there is."""
    file = write_config(detector_config(num_classes=1), tmp_path / "teacher.yaml")
    with pytest.raises(ConfigError, match="KeypointMimic reads keypoint.logits of the teacher"):
        build(distiller_config(keypoint_config(), ["KeypointMimic"], file))


@pytest.mark.parametrize("path", ["roi_heads.keypoint_head.joints", "roi_heads.option", "no.way"])
def test_a_part_that_taps_what_is_not_there_is_refused(path, keypoints, monkeypatch):
    """When the model is built, by name; an option that is None is nothing to read from."""
    monkeypatch.setattr(keypoints.KeypointPart, "taps", lambda *_: [path])
    student = build(keypoint_config())
    student.roi_heads.option = None
    with pytest.raises(ConfigError, match=f"GeneralizedRCNN, has no '{path}' to read from"):
        Taps(student, describe_detector(student, "student"))


# --- views ----------------------------------------------------------------------------------------


class Computed(RoIView):
    """Counts how often its field is computed."""

    calls = 0

    @lazy
    def hidden(self) -> Tensor:
        self.calls += 1
        return self.features * 2

    @lazy
    def logits(self) -> Tensor:
        return self.hidden.no_such_method()


def test_a_field_is_computed_once_with_gradients():
    """Also where the first reader is under no_grad."""
    view = Computed("student", features=torch.ones(2, requires_grad=True))
    with torch.no_grad():
        first = view.hidden
    assert view.hidden is first and view.calls == 1 and first.requires_grad
    with torch.no_grad():
        plain = RoIView("student", labels=Lazy(lambda: first + 1)).labels
    assert plain.requires_grad


def test_missing_fields_are_named():
    """An unknown field names those there are; what a detector cannot serve is not among them; an
    error within a field is not taken for a missing field."""
    view = Computed("teacher", boxes=[], features=torch.ones(2))
    with pytest.raises(AttributeError, match="teacher's RoIView has no field 'deltas'.* boxes, f"):
        _ = view.deltas
    with pytest.raises(RuntimeError, match="teacher's field 'logits': .*no_such_method"):
        _ = view.logits
    view.bind(torch.no_grad, ["logits"])
    with pytest.raises(AttributeError, match="no field 'logits'; it has: boxes, features, hidden"):
        _ = view.logits
    assert not hasattr(view, "logits") and not view.hidden.requires_grad


def test_what_was_read_can_be_read_again():
    """Paths of computed fields, through lists of views; released, nothing is left."""
    spec = DetectorSpec("teacher", "Toy", {4: 1}, frozenset({"pyramid"}))

    def bundle() -> FeatureBundle:
        pyramid = Lazy(lambda: {4: torch.ones(1)})
        stages = [Computed("teacher", features=torch.ones(2)) for _ in range(2)]
        return FeatureBundle(spec, pyramid=pyramid, rois=stages)

    first = bundle()
    assert list(first.computed()) == []
    _ = first.pyramid, first.rois[1].hidden
    paths = list(first.computed())
    assert paths == [("pyramid",), ("rois", 1, "hidden")]
    again = bundle()
    for path in paths:
        again.at(path)
    assert list(again.computed()) == paths
    stage = first.rois[1]
    first.release()
    for view in (first, stage):
        with pytest.raises(AttributeError, match="it has: "):
            _ = view.features


def test_views_can_be_copied_and_pickled():
    """As data may be kept by a user; nothing asks a view for fields before it has any."""
    view = RoIView("student", boxes=[torch.ones(1, 4)])
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert torch.equal(twin.boxes[0], view.boxes[0])


def test_methods_are_recorded_during_a_forward_only():
    """The student's method is its own again after the forward, also after one that fails, and one
    that a user replaced stays replaced."""
    student = build(detector_config("retinanet"))
    taps = Taps(student, describe_detector(student, "student"))
    with taps:
        assert "label_anchors" in vars(student)
    assert "label_anchors" not in vars(student)
    replaced = student.label_anchors = lambda *args: pytest.fail("stopped in the middle")
    with pytest.raises(pytest.fail.Exception), taps:
        run_step(student, make_batch())
    assert student.label_anchors is replaced
