"""Prototype selection against loops written from the definition, and the prototype tensors."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2kd.prototypes.select import (
    coupled_coefficients,
    dense_candidates,
    density,
    matching_pursuit,
    select_prototypes,
)
from d2kd.prototypes.store import Instance, LevelPrototypes, PrototypeBank, Prototypes


def unit(rows) -> torch.Tensor:
    rows = torch.as_tensor(rows, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def random_pair(n: int, c_t: int = 7, c_s: int = 5, seed: int = 0):
    """Features of n objects in two related spaces, with a common mean as real features have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 1
    maps = (torch.randn(4, c, generator=generator, dtype=torch.float64) for c in (c_t, c_s))
    noise = (torch.randn(n, c, generator=generator, dtype=torch.float64) for c in (c_t, c_s))
    return tuple(hidden @ m + 0.3 * e for m, e in zip(maps, noise, strict=True))


def loop_density(rows: np.ndarray) -> np.ndarray:
    return np.array([sum(math.exp(-(((1 - a @ b) / 0.1) ** 2)) for b in rows) for a in rows])


def naive_pursuit(teacher, student, candidates, count, alpha):
    """Explicit residuals and the full objective of each candidate; returns picks and costs J."""
    spaces = [np.asarray(teacher), np.asarray(student)]
    rests = [space.copy() for space in spaces]
    picks, costs = [], [sum((rest**2).sum() for rest in rests)]
    for _ in range(min(count, len(candidates))):
        trials = {}
        for k in candidates:
            if k in picks:
                continue
            p_t, p_s = (rest @ space[k] for rest, space in zip(rests, spaces, strict=True))
            w_t = (alpha * (p_t + p_s) + p_t) / (1 + 2 * alpha)
            w_s = (alpha * (p_t + p_s) + p_s) / (1 + 2 * alpha)
            after = [
                rest - np.outer(w, space[k])
                for rest, w, space in zip(rests, (w_t, w_s), spaces, strict=True)
            ]
            cost = sum((rest**2).sum() for rest in after) + alpha * ((w_t - w_s) ** 2).sum()
            trials[k] = (cost, after)
        energy = sum((rest**2).sum() for rest in rests)
        best = min(cost for cost, _ in trials.values())
        if energy - best < 1e-6 * costs[0]:
            break
        pick = min(k for k, (cost, _) in trials.items() if cost <= best + 1e-6 * costs[0])
        rests = trials[pick][1]
        picks.append(int(pick))
        costs.append(trials[pick][0])
    return picks, costs


def test_coupled_coefficients():
    """P = (1, 0) at three couplings, and both identities on random products."""
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for alpha, expected in ((10, (11 / 21, 10 / 21)), (0, (1, 0)), (math.inf, (0.5, 0.5))):
        assert coupled_coefficients(one, zero, alpha) == pytest.approx(expected)
    p_t, p_s = torch.randn(2, 9, dtype=torch.float64)
    w_t, w_s = coupled_coefficients(p_t, p_s, 3.0)
    torch.testing.assert_close(w_t + w_s, p_t + p_s)
    torch.testing.assert_close(w_t - w_s, (p_t - p_s) / 7)
    torch.testing.assert_close(w_t, (3 * (p_t + p_s) + p_t) / 7)


@pytest.mark.parametrize("alpha, gains, choice", [(0, (2.0, 1.28), 0), (10, (4 / 42, 1.28), 1)])
def test_coupling_decides(alpha, gains, choice):
    """Products (1, -1) win without coupling, (0.8, 0.8) with it."""
    for (p_t, p_s), gain in zip(((1.0, -1.0), (0.8, 0.8)), gains, strict=True):
        w_t, w_s = coupled_coefficients(torch.tensor(p_t), torch.tensor(p_s), alpha)
        left = (p_t - w_t) ** 2 + (p_s - w_s) ** 2 + alpha * (w_t - w_s) ** 2
        assert (p_t**2 + p_s**2 - left).item() == pytest.approx(gain, abs=1e-6)
    # The same choice by the pursuit: many copies of the object outweigh what the candidates
    # explain of themselves.
    teacher = torch.tensor([[1.0, 0.0], [0.8, 0.6], *[[1.0, 0.0]] * 50])
    student = torch.tensor([[-1.0, 0.0], [0.8, 0.6], *[[1.0, 0.0]] * 50])
    assert matching_pursuit(teacher, student, torch.tensor([0, 1]), 1, alpha) == [choice]


@pytest.mark.parametrize(
    "alpha, first, costs",
    [
        (10, (2.785714, 2.785714, 2.523810), (6, 3.214286, 1.596291, 0.658393)),
        (0, (3.5, 3.5, 3.0), (6, 2.5, 0.75, 0.375)),
    ],
)
def test_toy_pursuit(alpha, first, costs):
    """Three objects, picks 0, 2, 1 with these costs; the tie of 0 and 1 goes to 0."""
    teacher, student = unit([[1, 0], [0, 1], [1, 1]]), unit([[1, 0], [1, 0], [0, 1]])
    assert matching_pursuit(teacher, student, torch.arange(3), 3, alpha) == [0, 2, 1]
    picks, loop_costs = naive_pursuit(teacher, student, [0, 1, 2], 3, alpha)
    assert picks == [0, 2, 1]
    assert loop_costs == pytest.approx(costs, abs=1e-6)
    for index, gain in enumerate(first):
        _, (start, after) = naive_pursuit(teacher, student, [index], 1, alpha)
        assert start - after == pytest.approx(gain, abs=1e-6)


def test_degenerate_pursuit():
    """Duplicates explain each other, and the density rule falls back to >=."""
    rows = unit([[1, 0], [1, 0], [0, 1]])
    assert matching_pursuit(rows, rows, torch.arange(3), 3) == [0, 2]
    assert naive_pursuit(rows, rows, [0, 1, 2], 2, 10)[1][1:] == pytest.approx([2.0, 0.0])
    assert density(rows).tolist() == pytest.approx([2, 2, 1])
    assert dense_candidates(rows, rows).tolist() == [0, 1]


def test_density():
    """Densities of five rows, the threshold at index 2 leaves two."""
    rows = unit([[1, 0], [1, 0.05], [1, 0.1], [1, -0.05], [0, 1]])
    expected = (3.997229, 3.997207, 3.984981, 3.984953, 1.0)
    assert density(rows).tolist() == pytest.approx(expected, abs=1e-6)
    assert dense_candidates(rows, rows).tolist() == [0, 1]


def test_density_in_blocks():
    """More rows than one block: each pair counts once in each direction."""
    rows = unit(torch.randn(600, 3) + 2)
    expected = (-((1 - rows @ rows.T) / 0.1).square()).exp().sum(1)
    torch.testing.assert_close(density(rows), expected)
    np.testing.assert_allclose(density(rows[:20]), loop_density(rows[:20].numpy()))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_fast_pursuit_equals_naive(alpha, seed):
    """The fast form makes the naive form's choices, and the cost falls monotonically."""
    teacher, student = map(unit, random_pair(60, seed=seed))
    candidates = dense_candidates(teacher, student)
    picks, costs = naive_pursuit(teacher, student, candidates.tolist(), 10, alpha)
    assert matching_pursuit(teacher, student, candidates, 10, alpha) == picks
    assert costs == sorted(costs, reverse=True)


def test_float32_pursuit_is_as_good():
    """float32 reaches the naive float64 cost, whichever of two equals it takes."""
    teacher, student = map(unit, random_pair(200, 32, 16))
    candidates = torch.arange(200)
    picks = matching_pursuit(teacher.float(), student.float(), candidates, 10)
    _, best = naive_pursuit(teacher, student, candidates.tolist(), 10, 10.0)
    cost = best[0]
    rests = [teacher.clone(), student.clone()]
    for pick in picks:
        w_t, w_s = coupled_coefficients(rests[0] @ teacher[pick], rests[1] @ student[pick], 10.0)
        rests[0] -= torch.outer(w_t, teacher[pick])
        rests[1] -= torch.outer(w_s, student[pick])
        cost = sum(r.square().sum() for r in rests) + 10.0 * (w_t - w_s).square().sum()
    assert cost.item() == pytest.approx(best[-1], rel=1e-4)


def test_selection_invariances():
    """Rescaled objects, rotated spaces, swapped spaces and permuted objects."""
    teacher, student = random_pair(80)
    chosen = select_prototypes(teacher, student, 10)
    assert len(chosen) == len(set(chosen)) == 10
    scales = torch.rand(2, 80, 1, dtype=torch.float64) * 9 + 0.1
    assert select_prototypes(teacher * scales[0], student * scales[1], 10) == chosen
    turn_t = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    turn_s = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert select_prototypes(teacher @ turn_t, student @ turn_s, 10) == chosen
    assert select_prototypes(student, teacher, 10) == chosen
    order = torch.randperm(80)
    permuted = select_prototypes(teacher[order], student[order], 10)
    assert {order[i].item() for i in permuted} == set(chosen)


def test_tiny_classes():
    """No object, one object, and fewer objects than prototypes."""
    teacher, student = random_pair(4)
    assert select_prototypes(teacher[:0], student[:0], 10) == []
    assert select_prototypes(teacher[:1], student[:1], 10) == [0]
    few = select_prototypes(teacher, student, 10)
    assert 1 <= len(few) <= 4 and len(set(few)) == len(few)
    assert select_prototypes(torch.ones(3, 2), torch.ones(3, 2), 10) == [0]


def test_unusable_objects_are_left_out():
    """Zero and non-finite features are never chosen and spoil nothing."""
    teacher, student = random_pair(40)
    chosen = select_prototypes(teacher, student, 5)
    broken = torch.zeros(3, 7, dtype=torch.float64)
    broken[1], broken[2] = math.nan, math.inf
    with_broken = select_prototypes(
        torch.cat([broken, teacher]), torch.cat([student[:3], student]), 5
    )
    assert with_broken == [row + 3 for row in chosen]


def toy_prototypes(counts=(2, 0, 1), teacher_channels=3, student_channels=2) -> Prototypes:
    total = sum(counts)
    offsets = torch.tensor([0, *np.cumsum(counts).tolist()])
    levels = {
        stride: LevelPrototypes(
            torch.randn(total, teacher_channels),
            torch.randn(total, student_channels),
            offsets,
            torch.arange(total),
        )
        for stride in (4, 8)
    }
    instances = [
        Instance(image_id=i, file_name=f"{i}.jpg", box=(0.0, 1.0, 2.0, 3.5), category=0)
        for i in range(total)
    ]
    return Prototypes(levels, instances, {"alpha": 10.0})


def toy_bank(num_prototypes=4) -> PrototypeBank:
    return PrototypeBank(3, num_prototypes, {4: 2, 8: 2}, {4: 3, 8: 3})


def test_file_round_trip(tmp_path):
    """What is saved is what is loaded, and nothing else lies beside it."""
    path = str(tmp_path / "prototypes.pth")
    saved = toy_prototypes()
    saved.save(path)
    loaded = Prototypes.load(path)
    assert loaded.instances == saved.instances and loaded.meta == saved.meta
    assert loaded.counts.tolist() == [[2, 0, 1]] * 2
    for stride, level in saved.levels.items():
        for name in ("teacher", "student", "offsets", "instances"):
            assert torch.equal(getattr(loaded.levels[stride], name), getattr(level, name))
    assert os.listdir(tmp_path) == ["prototypes.pth"]


def test_likeness_of_prototypes():
    """Mean cosines over pairs of one class and of two, by loops; NaN without such pairs."""
    level = toy_prototypes(counts=(2, 3, 1)).levels[4]
    classes = [0, 0, 1, 1, 1, 2]
    for name, found in level.likeness().items():
        rows = F.normalize(getattr(level, name), dim=1)
        pairs = {True: [], False: []}
        for i, j in itertools.permutations(range(6), 2):
            pairs[classes[i] == classes[j]].append(float(rows[i] @ rows[j]))
        assert found == pytest.approx((np.mean(pairs[True]), np.mean(pairs[False])), abs=1e-5)
    same, different = toy_prototypes(counts=(1, 0, 1)).levels[4].likeness()["teacher"]
    assert math.isnan(same) and math.isfinite(different)


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    """A save that dies half-way leaves the previous file whole."""
    path = str(tmp_path / "prototypes.pth")
    old = toy_prototypes()
    old.save(path)

    def die(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        toy_prototypes().save(path)
    assert torch.equal(Prototypes.load(path).levels[4].teacher, old.levels[4].teacher)
    assert os.listdir(tmp_path) == ["prototypes.pth"]


def test_bank_pads_classes():
    """Each class lies in its own rows, absent ones are zero and marked."""
    bank, prototypes = toy_bank(), toy_prototypes()
    assert bank.iteration.item() == -1
    bank.fill(prototypes, iteration=7)
    student, teacher, present = bank.level(8)
    assert student.shape == (3, 4, 2) and teacher.shape == (3, 4, 3)
    assert present.sum(1).tolist() == [2, 0, 1]
    level = prototypes.levels[8]
    assert torch.equal(student[present], level.student)
    assert torch.equal(teacher[present], level.teacher)
    assert not student[~present].any() and not teacher[~present].any()
    assert bank.iteration.item() == 7


def test_bank_is_refilled_in_place():
    """A second fill leaves nothing of the first, and the buffers stay the same tensors."""
    bank = toy_bank()
    buffers = bank.level(4)
    bank.fill(toy_prototypes((4, 4, 4)), 0)
    second = toy_prototypes((0, 1, 0))
    bank.fill(second, 1)
    assert all(a is b for a, b in zip(bank.level(4), buffers, strict=True))
    assert buffers[2].sum().item() == 1
    assert torch.equal(buffers[0].sum((0, 1)), second.levels[4].student[0])


@pytest.mark.parametrize(
    "prototypes",
    [toy_prototypes((5, 0, 0)), toy_prototypes((1, 1)), toy_prototypes(student_channels=9)],
    ids=["too many of a class", "other classes", "other channels"],
)
def test_bank_refuses_what_does_not_fit(prototypes):
    """Prototypes of another model or setting are an error and change nothing."""
    bank = toy_bank()
    with pytest.raises(ValueError, match="stride 4"):
        bank.fill(prototypes, 3)
    assert bank.iteration.item() == -1 and not bank.level(4)[2].any()


def test_bank_travels_in_the_state_dict():
    """A checkpoint carries the prototypes and their iteration."""
    bank, copy = toy_bank(), toy_bank()
    bank.fill(toy_prototypes(), 5)
    copy.load_state_dict(bank.state_dict())
    assert copy.iteration.item() == 5
    for stride in (4, 8):
        for a, b in zip(bank.level(stride), copy.level(stride), strict=True):
            assert torch.equal(a, b)
