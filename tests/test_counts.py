"""What a training step costs a GPU, counted on a CPU: operators, waits for the device, and copies.

A step there is bound by how many kernels are launched and how often the host waits, which is the
same for every machine and every day, unlike seconds. Student and teacher are R18 of the zoo's
Faster R-CNN and RetinaNet on two images of 160 px; blocks have the sizes of a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2kd import add_distillation_config
from d2kd.losses import gaussian, ssim_fast

from .detectors import build, distiller_config, make_batch, run_step, write_config

ZOO = {
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
# The teacher's forward pass (about 60 operators for its pyramid alone) is part of each.
MOST_OPERATORS = {
    "FeatureMimic": 150,
    "Logits": 220,
    "SSIM": 290,
    "MAR": 330,
    "DSIG": 380,
    "GlobalKnowledge": 480,
    "DRKD": 580,
}
# How many nodes its graphs have.
MOST_WAITS = {"DSIG": 1}
# Functions that may wait: non-maximum suppression decides how many boxes are left, and on a CPU,
# where looking costs nothing, padding is cut off.
MAY_WAIT = ("nms", "pick_foreground")
# Past every warm-up, before the end.
ITERATION = 45000

# Operators that start no kernel.
VIEWS = {
    *("_has_compatible_shallow_copy_type", "_reshape_alias", "_unsafe_view", "alias"),
    *("as_strided", "chunk", "detach", "diagonal", "empty", "empty_like", "empty_strided"),
    *("expand", "expand_as", "flatten", "is_pinned", "is_same_size", "lift_fresh", "movedim"),
    *("narrow", "new_empty", "new_empty_strided", "numpy_T", "permute", "prim", "reshape"),
    *("resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("sym_numel", "sym_size", "sym_storage_offset", "sym_stride", "t", "transpose"),
    *("unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
}
# Operators whose result the host must see, or whose size depends on values.
WAITING = {
    *("_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero"),
    *("repeat_interleave", "unique_consecutive", "unique_dim"),
}


class OperatorCount(TorchDispatchMode):
    """Counts operators, and those outside of the student's own forward pass that would wait."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.operators = 0
        self.waits: list[str] = []
        self.student_waits = 0
        self._in_student = False
        self._hooks = [
            student.register_forward_pre_hook(lambda *_: self._enter(True)),
            student.register_forward_hook(lambda *_: self._enter(False)),
        ]

    def _enter(self, in_student: bool) -> None:
        self._in_student = in_student

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operators += name not in VIEWS
        if name in WAITING or (name in ("index", "index_put_") and _by_mask(args[1])):
            self.wait(name)
        return function(*args, **(kwargs or {}))

    def wait(self, name: str) -> None:
        """Take down a wait and its place."""
        stack = traceback.extract_stack()
        if self._in_student:
            self.student_waits += 1
        elif not any(exempt in frame.name for frame in stack for exempt in MAY_WAIT):
            own = [frame for frame in stack if "/d2kd/" in frame.filename]
            place = f"{own[-1].filename}:{own[-1].lineno}" if own else "backward"
            self.waits.append(f"{name} at {place}")


def _by_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def zoo_config(arch: str) -> CfgNode:
    """R18 with 3 classes, random weights."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(ZOO[arch]))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    return cfg


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str, str], nn.Module]:
    """(arch, head) -> a Distiller; head "": without any, which is the student alone."""
    folder = tmp_path_factory.mktemp("zoo")

    def model(arch: str, head: str) -> nn.Module:
        cfg = zoo_config(arch)
        file = write_config(cfg, folder / f"{arch}.yaml")
        return build(distiller_config(cfg, [head] if head else [], file))

    return model


@pytest.fixture
def gpu_blocks(monkeypatch):
    """Blocks as large as on a GPU."""
    monkeypatch.setattr(ssim_fast, "BLOCK_ELEMENTS_CPU", ssim_fast.BLOCK_ELEMENTS_GPU)
    monkeypatch.setattr(gaussian, "_TILE_CPU", gaussian._TILE_GPU)


def count(model: nn.Module, monkeypatch) -> OperatorCount:
    """Operators and waits of a step's forward and backward pass, after a first one."""
    for _ in range(2):  # the first one fills caches, folds norms, ...
        batch = make_batch((4, 4), size=(160, 160))
        counter = OperatorCount(model.student)
        with monkeypatch.context() as patch, counter:
            for name in ("tolist", "numpy", "cpu"):  # no operators on a CPU, waits on a GPU
                _watch(patch, name, counter)
            sum(run_step(model, batch, ITERATION).values()).backward()
        model.zero_grad()
    return counter


def _watch(patch, name: str, counter: OperatorCount) -> None:
    original = getattr(Tensor, name)

    def watched(*args, **kwargs):
        counter.wait(name)
        return original(*args, **kwargs)

    patch.setattr(Tensor, name, watched)


@pytest.fixture(scope="module")
def student_alone(models):
    """arch -> the counts of the student's own step."""
    counts = {}

    def alone(arch: str, monkeypatch) -> OperatorCount:
        if arch not in counts:
            counts[arch] = count(models(arch, ""), monkeypatch)
        return counts[arch]

    return alone


@pytest.mark.parametrize("arch", ZOO)
@pytest.mark.parametrize("head", MOST_OPERATORS)
def test_a_head_adds_few_operators_and_no_wait(
    head, arch, models, student_alone, gpu_blocks, monkeypatch
):
    """Both passes, the teacher's included; nothing is asked of the device but what is named."""
    alone = student_alone(arch, monkeypatch)
    found = count(models(arch, head), monkeypatch)
    assert found.operators - alone.operators <= MOST_OPERATORS[head]
    assert len(found.waits) <= MOST_WAITS.get(head, 0), found.waits
    assert found.student_waits == alone.student_waits


@pytest.mark.parametrize("arch", ZOO)
@pytest.mark.parametrize("head", MOST_OPERATORS)
def test_inputs_are_moved_once(head, arch, models, monkeypatch):
    """Each image and each tensor of the ground truth goes to the device as often as the student
    alone sends it: once."""
    alone = moves(models(arch, ""), monkeypatch)
    assert max(alone.values()) == 1
    assert moves(models(arch, head), monkeypatch) == alone


def moves(model: nn.Module, monkeypatch) -> Counter[str]:
    """Calls of ``.to(device)`` in a training step, by the input that they are made on."""
    batch = make_batch((2, 1), size=(160, 160))
    names = {}
    for i, item in enumerate(batch):
        fields = item["instances"].get_fields()
        tensors = {name: getattr(field, "tensor", field) for name, field in fields.items()}
        for name, tensor in {"image": item["image"], **tensors}.items():
            names[tensor.untyped_storage().data_ptr()] = f"{name} {i}"
    counted: Counter[str] = Counter()
    original = Tensor.to

    def to(tensor, *args, **kwargs):
        name = names.get(tensor.untyped_storage().data_ptr())
        where = [*args, kwargs.get("device")]
        if name and any(isinstance(value, torch.device | str) for value in where):
            counted[name] += 1
        return original(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", to)
        run_step(model, batch, ITERATION)
    return counted
