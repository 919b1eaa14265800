"""Losses, and a training that goes on, are those of version 0.1."""

from __future__ import annotations

import json
import shutil

import pytest

from .cases import all_cases, builtin_heads, measure
from .training import CONTINUATION, OUTPUT, RUN, outcome, train, write_inputs
from .write import LOSSES

GOLDEN = json.loads(LOSSES.read_text())
CASES = {case.name: case for case in all_cases()}

# Losses agree to 1e-6, which is 8 steps of float32. With the kernels of other CPUs (SSE4.1 or AVX2
# instead of AVX-512, in PyTorch and oneDNN) they moved by up to 7e-7, where convolutions sum in
# another order. These terms square differences of nearly equal cosines or probabilities, in which
# that rounding is a larger share: they moved by up to 6e-6.
LOSS_RTOL = 1e-6
DIFFERENCES = (
    "loss_kd_drkd_relation",
    "loss_kd_dsig_edge",
    "loss_kd_global_knowledge_soft",
    "loss_kd_mar_relation",
)
DIFFERENCES_RTOL = 1e-5
# The gradient passes 50 convolutions once more, and a ReLU whose input is about 0 may change sides:
# it moved by up to 7e-6.
GRADIENT_RTOL = 2e-5
# A little noise of PyTorch's takes part (Case.has_noise).
NOISE_RTOL = 1e-3
# Three updates of the weights, each computed from the last.
TRAINING_RTOL = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the files of teachers that cases share."""
    return tmp_path_factory.mktemp("golden")


def rtol_of(name: str, has_noise: bool) -> float:
    if has_noise:
        return NOISE_RTOL
    return DIFFERENCES_RTOL if name in DIFFERENCES else LOSS_RTOL


def test_every_case_is_golden():
    """Nothing is left out of ``losses.json``; each head is served somewhere, not only refused."""
    assert set(CASES) == set(GOLDEN), "python -m tests.golden.write adds new cases"
    for head in builtin_heads():
        of_head = [GOLDEN[name] for name, case in CASES.items() if case.head == head]
        assert any("losses" in golden for golden in of_head), head


@pytest.mark.parametrize("name", CASES)
def test_losses(name, folder):
    """The same terms with the same values, and the same gradient; what was refused still is."""
    case, golden = CASES[name], GOLDEN[name]
    found = measure(case, folder)
    assert found.keys() == golden.keys()
    if "losses" not in golden:
        return
    assert found["losses"].keys() == golden["losses"].keys()
    for term, value in golden["losses"].items():
        expected = pytest.approx(value, rel=rtol_of(term, case.has_noise), abs=0)
        assert found["losses"][term] == expected, term
    if "gradient" in golden:
        assert found["gradient"] == pytest.approx(golden["gradient"], rel=GRADIENT_RTOL)


@pytest.mark.parametrize("head", builtin_heads())
def test_a_repeat_is_equal(head, folder):
    """On one machine nothing but the weights and images has an effect: equal to the last bit."""
    served = (c for c in CASES.values() if c.head == head and "losses" in GOLDEN[c.name])
    case = next(served)
    assert measure(case, folder) == measure(case, folder)


def test_a_training_of_version_0_1_goes_on(tmp_path):
    """Its checkpoint resumes with its own config; losses, weights and momenta become those of 0.1.

    Weights of all parts move, those of the heads' adapters too.
    """
    write_inputs(tmp_path)
    shutil.copytree(RUN, tmp_path / OUTPUT)
    for iterations in ("4", "5", "6"):
        train(tmp_path, RUN / "config.yaml", "--resume", "SOLVER.MAX_ITER", iterations)
    golden, found = json.loads(CONTINUATION.read_text()), outcome(tmp_path / OUTPUT)
    assert {"distill_heads.SSIM", "distill_heads.FeatureMimic"} <= golden["change"].keys()
    for kind in ("losses", "change"):
        assert found[kind] == pytest.approx(golden[kind], rel=TRAINING_RTOL), kind
    assert found["momentum"] == pytest.approx(golden["momentum"], rel=TRAINING_RTOL)
