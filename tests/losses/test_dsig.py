"""DSIG losses against hand-computed numbers, slow loops written from the formulas, and limits.

"Oracle n" is the number of the case in section 7 of the method's specification.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from d2kd.losses import dsig
from d2kd.losses.logits import roi_box_loss
from d2kd.losses.mimic import pyramid_mimic_loss
from d2kd.numerics import Ragged

ALPHA = 7.5
T_MINE = 0.6


# ------------------------------------------------------------------ slow references, with loops


def reference_node_losses(student, teacher, foreground, image_index, num_images, alpha):
    """(foreground, background) sums over images of the MSE of the nodes, section 2.1 and 2.2."""
    total_fg = total_bg = 0.0
    for image in range(num_images):
        fg_error, bg_error = [], []
        for i in range(len(student)):
            if image_index[i] == image:
                error = sum((a - b) ** 2 for a, b in zip(student[i], teacher[i], strict=True))
                (fg_error if foreground[i] else bg_error).append(float(error) / len(student[i]))
        if fg_error:
            total_fg += sum(fg_error) / len(fg_error)
        if bg_error:
            omega = alpha * len(fg_error) / len(bg_error)
            total_bg += omega * sum(bg_error) / len(bg_error)
    return total_fg, total_bg


def reference_edge_loss(student, teacher, selected, image_index, num_images):
    """Sum over images of half the mean squared edge error, section 2.3."""

    def cosine(a, b):
        dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
        norms = [max(math.sqrt(sum(float(x) ** 2 for x in v)), 1e-12) for v in (a, b)]
        return dot / norms[0] / norms[1]

    total = 0.0
    for image in range(num_images):
        nodes = [i for i in range(len(student)) if selected[i] and image_index[i] == image]
        error = 0.0
        for p in nodes:
            for q in nodes:
                if p != q:
                    error += (cosine(teacher[p], teacher[q]) - cosine(student[p], student[q])) ** 2
        if nodes:
            total += 0.5 * error / len(nodes) ** 2
    return total


def reference_class_logit_loss(student, teacher, valid, temperature):
    """Element-wise mean of the KL of softmax probabilities, section 2.4."""
    total, count = 0.0, 0
    for s_row, t_row, is_valid in zip(student.tolist(), teacher.tolist(), valid, strict=True):
        if not is_valid:
            continue
        s_exp = [math.exp(z / temperature) for z in s_row]
        t_exp = [math.exp(z / temperature) for z in t_row]
        for s, t in zip(s_exp, t_exp, strict=True):
            p_s, p_t = s / sum(s_exp), t / sum(t_exp)
            total += p_t * math.log(p_t / p_s)
            count += 1
    return temperature**2 * total / max(count, 1)


# ------------------------------------------------------------------------------------- helpers


def layout_of(image_index, num_images) -> Ragged:
    """The images of nodes that lie image after image."""
    return Ragged(image_index.bincount(minlength=num_images).tolist())


def graph_edge_loss(student, teacher, selected, image_index, num_images, **kwargs):
    """Edge loss of the selected nodes of each image."""
    layout = layout_of(image_index, num_images)
    return dsig.edge_loss(*map(layout.pad, (student, teacher, selected)), **kwargs)


def node_losses(student, teacher, foreground, image_index, num_images, **kwargs):
    """Node losses of nodes that lie image after image."""
    layout = layout_of(image_index, num_images)
    return dsig.node_losses(student, teacher, foreground, layout, **kwargs)


def one_image_edge_loss(student, teacher, **kwargs):
    """Edge loss of one image whose nodes are all selected."""
    valid = torch.ones(1, len(student), dtype=torch.bool)
    return dsig.edge_loss(student[None], teacher[None], valid, **kwargs)


def random_batch(counts, dim=6, seed=0):
    """Nodes of images with ``counts`` = [(foreground, background), ...], image after image."""
    generator = torch.Generator().manual_seed(seed)
    image_index, foreground = [], []
    for image, (num_fg, num_bg) in enumerate(counts):
        image_index += [image] * (num_fg + num_bg)
        order = torch.randperm(num_fg + num_bg, generator=generator)
        foreground.append((torch.arange(num_fg + num_bg) < num_fg)[order])
    student, teacher = torch.randn(2, len(image_index), dim, generator=generator).double()
    return student, teacher, torch.cat(foreground), torch.tensor(image_index, dtype=torch.long)


COUNTS = [
    [(3, 5)],
    [(0, 4), (2, 0), (0, 0), (1, 1)],
    [(1, 0)],
    [(0, 0), (0, 0)],
    [(0, 3)],
    [(7, 20), (12, 1), (0, 9)],
]


# ----------------------------------------------------------------------------------- node losses


@pytest.mark.parametrize("counts", COUNTS)
def test_node_losses_equal_the_loops(counts):
    """Both node terms agree with the loops for 0, 1 and many nodes per image, in any order."""
    student, teacher, foreground, image_index = random_batch(counts)
    num_images = len(counts)
    expected = reference_node_losses(student, teacher, foreground, image_index, num_images, ALPHA)
    for reduction, scale in (("sum", 1.0), ("mean", 1.0 / num_images)):
        losses = node_losses(
            student,
            teacher,
            foreground,
            image_index,
            num_images,
            alpha=ALPHA,
            image_reduction=reduction,
        )
        for loss, value in zip(losses, expected, strict=True):
            torch.testing.assert_close(loss.item(), value * scale, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [[(3, 0)], [(0, 0), (2, 0)], [(7, 0), (1, 0), (4, 0)]])
def test_nodes_of_which_all_are_foreground(counts):
    """The foreground loss without a background to tell apart."""
    student, teacher, foreground, index = random_batch(counts, seed=2)
    for reduction in dsig.IMAGE_REDUCTIONS:
        expected, _ = node_losses(
            student, teacher, foreground, index, len(counts), image_reduction=reduction
        )
        layout = layout_of(index, len(counts))
        loss = dsig.foreground_node_loss(student, teacher, layout, image_reduction=reduction)
        torch.testing.assert_close(loss, expected)


def test_node_values():
    """MSE 1 of zeros against ones; two images add 1 + 3 whatever their node counts."""
    zeros, index = torch.zeros(5, 2, 3, 3), torch.zeros(5, dtype=torch.long)
    everything = torch.ones(5, dtype=torch.bool)
    loss, _ = node_losses(zeros, zeros + 1, everything, index, 1, image_reduction="sum")
    assert 0.5 * loss.item() == pytest.approx(0.5)

    gaps = torch.tensor([1.0] + [math.sqrt(3.0)] * 10)
    teacher = gaps[:, None].expand(-1, 4)
    index = torch.tensor([0] + [1] * 10)
    everything = torch.ones(11, dtype=torch.bool)
    student = torch.zeros(11, 4)
    loss, _ = node_losses(student, teacher, everything, index, 2, image_reduction="sum")
    assert 0.5 * loss.item() == pytest.approx(2.0)


def test_adaptive_background_weight():
    """Omega of (32, 480) is 0.5, of (128, 384) 2.5, without foreground 0."""
    omega = dsig.adaptive_background_weight(
        torch.tensor([32.0, 128.0, 0.0]), torch.tensor([480.0, 384.0, 512.0]), ALPHA
    )
    assert omega.tolist() == [0.5, 2.5, 0.0]

    foreground = torch.arange(512) < 32
    student = torch.zeros(512, 8)
    teacher = student + math.sqrt(2.0)
    index = torch.zeros(512, dtype=torch.long)
    _, loss = node_losses(student, teacher, foreground, index, 1, image_reduction="sum")
    assert 0.5 * loss.item() == pytest.approx(0.5)
    no_fg = torch.zeros_like(foreground)
    _, loss = node_losses(student, teacher, no_fg, index, 1, image_reduction="sum")
    assert loss.item() == 0.0


def test_omega_is_finite_without_background():
    """No background: the weight stays finite (it multiplies an empty sum)."""
    omega = dsig.adaptive_background_weight(torch.tensor([4.0]), torch.tensor([0.0]), ALPHA)
    assert torch.isfinite(omega).all()


# ---------------------------------------------------------------------------------------- mining


def test_mining():
    """Hardness of four teacher rows, and which of them reach the threshold 0.6."""
    logits = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 1.2], [0.0, 0.0, -1.0]]
    ).double()
    hardness = dsig.background_hardness(logits)
    expected = torch.tensor([1.098612, 0.239545, 0.751381, 1.861995])
    torch.testing.assert_close(hardness, expected, atol=1e-6, rtol=0)
    background = torch.zeros(4, dtype=torch.bool)
    kept = dsig.nodes_with_edges(logits, background, T_MINE)
    assert kept.tolist() == [True, False, True, True]


def test_mining_limits():
    """A threshold met exactly keeps; 0 keeps all background, infinity none."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    foreground = torch.tensor([True, False, False, True, False, False])
    exact = dsig.background_hardness(logits)[1].item()
    assert dsig.nodes_with_edges(logits, foreground, exact)[1]
    assert dsig.nodes_with_edges(logits, foreground, 0.0).all()
    sure = torch.tensor([[-60.0, -80.0, -70.0, 60.0]]).expand(6, -1)
    assert dsig.nodes_with_edges(sure, foreground, 0.0).all()
    assert torch.equal(dsig.nodes_with_edges(logits, foreground, math.inf), foreground)


# ----------------------------------------------------------------------------------------- edges


def test_edge_value():
    """Sum of squared errors 2.3431458, mean 0.2603495, loss half of it."""
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    student = torch.tensor([[1.0, 0.0]] * 3).double()
    error = (dsig.cosine_graph(student[None]) - dsig.cosine_graph(teacher[None])).square()
    assert error.sum().item() == pytest.approx(2.3431458, abs=1e-7)
    loss = one_image_edge_loss(student, teacher).item()
    assert loss == pytest.approx(0.1301748, abs=1e-7)
    assert 2.0 * loss == pytest.approx(0.2603495, abs=1e-7)


def test_edge_gradient():
    """Loss 2/9 and its gradient, from the table and from the closed form."""
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    student = torch.tensor([[2.0, 1.0], [0.5, -1.0], [1.0, 3.0]]).double().requires_grad_()
    loss = one_image_edge_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 9)
    expected = torch.tensor([[0.0, 0.0], [-0.1777778, -0.0888889], [-0.0666667, 0.0222222]])
    torch.testing.assert_close(student.grad, expected.double(), atol=1e-7, rtol=0)

    norm = student.detach().norm(dim=1, keepdim=True)
    unit, unit_t = student.detach() / norm, teacher / teacher.norm(dim=1, keepdim=True)
    edges, gap = unit @ unit.T, unit @ unit.T - unit_t @ unit_t.T
    closed = torch.zeros_like(unit)
    for p in range(3):
        for q in range(3):
            closed[p] += 2 / 9 * gap[p, q] * (unit[q] - edges[p, q] * unit[p]) / norm[p]
    torch.testing.assert_close(student.grad, closed)


@pytest.mark.parametrize("counts", COUNTS)
def test_edge_loss_equals_the_loops(counts):
    """Packed, batched graphs agree with the loops for 0, 1 and many nodes per image."""
    student, teacher, foreground, image_index = random_batch(counts, seed=3)
    num_images = len(counts)
    logits = torch.randn(len(student), 4, generator=torch.Generator().manual_seed(4))
    selected = dsig.nodes_with_edges(logits, foreground, 1.2)
    expected = reference_edge_loss(student, teacher, selected, image_index, num_images)
    for reduction, scale in (("sum", 1.0), ("mean", 1.0 / num_images)):
        loss = graph_edge_loss(
            student, teacher, selected, image_index, num_images, image_reduction=reduction
        )
        torch.testing.assert_close(loss.item(), expected * scale, rtol=1e-10, atol=1e-12)


def test_nodes_without_edges_change_nothing():
    """Left out of the graph, or in it without edges: the same loss and gradient."""
    student, teacher, selected, index = random_batch([(3, 5), (0, 4), (2, 0)], seed=3)
    student.requires_grad_()
    results = []
    for rows in (slice(None), selected):
        loss = graph_edge_loss(student[rows], teacher[rows], selected[rows], index[rows], 3)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*results)


def test_edge_invariances():
    """Node scale, joint order, and a rotation of either network change nothing."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 7, 5, generator=generator).double()
    expected = one_image_edge_loss(student, teacher)
    scale_s, scale_t = 10 ** (4 * torch.rand(2, 7, 1, generator=generator).double() - 2)
    order = torch.randperm(7, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator).double())[0]
    embedding = torch.linalg.qr(torch.randn(9, 9, generator=generator).double())[0][:5]
    for changed in (
        one_image_edge_loss(student * scale_s, teacher),
        one_image_edge_loss(student, teacher * scale_t),
        one_image_edge_loss(student[order], teacher[order]),
        one_image_edge_loss(student @ rotation, teacher),
        one_image_edge_loss(student, teacher @ embedding),
    ):
        torch.testing.assert_close(changed, expected)


def test_edge_gradient_is_tangential():
    """The gradient of a node is orthogonal to it, as its length does not matter."""
    student, teacher, _, _ = random_batch([(8, 0)], seed=6)
    student.requires_grad_()
    one_image_edge_loss(student, teacher).backward()
    torch.testing.assert_close((student.grad * student).sum(1), torch.zeros(8).double())


def test_node_losses_know_only_the_order_invariance():
    """A permutation in an image changes no node term; scale and rotation do."""
    student, teacher, foreground, index = random_batch([(3, 4), (2, 2)], seed=7)
    losses = node_losses(student, teacher, foreground, index, 2)
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(8))
    order = order[index[order].argsort(stable=True)]
    permuted = node_losses(student[order], teacher[order], foreground[order], index[order], 2)
    scaled = node_losses(2 * student, teacher, foreground, index, 2)
    rolled = node_losses(student.roll(1, 1), teacher, foreground, index, 2)
    for k in range(2):
        torch.testing.assert_close(permuted[k], losses[k])
        assert not torch.isclose(scaled[k], losses[k])
        assert not torch.isclose(rolled[k], losses[k])


def test_mining_threshold_moves_only_edges():
    """T_mine changes the edge term; node terms do not depend on it."""
    student, teacher, foreground, index = random_batch([(3, 9)], seed=9)
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(9))
    chosen = {t: dsig.nodes_with_edges(logits, foreground, t) for t in (0.0, 1.2, math.inf)}
    edges = {
        t: graph_edge_loss(student, teacher, nodes, index, 1).item() for t, nodes in chosen.items()
    }
    assert len(set(edges.values())) == 3
    only_fg = graph_edge_loss(student, teacher, foreground, index, 1).item()
    assert edges[math.inf] == only_fg


# ---------------------------------------------------------------------------------- logit terms


def test_class_logit_value():
    """KL 0.0588915, element mean 0.0196305, times weight 3 the KL again."""
    student = torch.zeros(1, 3).double()
    teacher = torch.tensor([[math.log(2.0), 0.0, 0.0]]).double()
    loss = dsig.class_logit_loss(student, teacher).item()
    assert loss == pytest.approx(0.0196305, abs=1e-7)
    assert 3.0 * loss == pytest.approx(0.0588915, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_logit_loss_equals_the_loops(temperature):
    """KL over the valid rows only, divided by their number and by the number of logits."""
    generator = torch.Generator().manual_seed(10)
    student, teacher = torch.randn(2, 9, 5, generator=generator).double()
    for valid in (torch.rand(9, generator=generator) < 0.5, torch.zeros(9, dtype=torch.bool)):
        loss = dsig.class_logit_loss(student, teacher, valid, temperature=temperature)
        expected = reference_class_logit_loss(student, teacher, valid, temperature)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    everything = torch.ones(9, dtype=torch.bool)
    torch.testing.assert_close(
        dsig.class_logit_loss(student, teacher),
        dsig.class_logit_loss(student, teacher, everything),
    )


def test_box_delta_value():
    """One foreground of four RoIs with a gap of 0.8 gives 0.2; other columns are free."""
    num_classes, labels = 3, torch.tensor([3, 1, 3, 3])
    generator = torch.Generator().manual_seed(11)
    student, teacher = torch.randn(2, 4, 4 * num_classes, generator=generator)
    teacher[1, 4:8] = student[1, 4:8] + torch.tensor([0.1, -0.3, 0.2, -0.2])
    loss = roi_box_loss(student, teacher, labels, num_classes)
    assert loss.item() == pytest.approx(0.2, abs=1e-6)


# ------------------------------------------------------------------- identity, limits, gradients


def test_identity():
    """With student = teacher every term is 0 and no term has a gradient."""
    nodes, _, foreground, index = random_batch([(5, 4), (3, 0)], seed=12)
    nodes = nodes.float().requires_grad_()
    twin = nodes.detach().clone()
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(12)).requires_grad_()
    exact = [
        *node_losses(nodes, twin, foreground, index, 2),
        dsig.class_logit_loss(logits, logits.detach()),
        roi_box_loss(nodes[:, :4], twin[:, :4], (~foreground).long(), 1),
        pyramid_mimic_loss([nodes], [twin]),
    ]
    edge = graph_edge_loss(nodes, twin, foreground | True, index, 2)
    assert all(loss.item() == 0.0 for loss in exact)
    assert edge.item() < 1e-6
    (sum(exact) + edge).backward()
    assert nodes.grad.abs().max() < 1e-6
    assert logits.grad.abs().max() < 1e-7


@pytest.mark.parametrize("counts", [[(0, 4)], [(4, 0)], [(1, 0)], [(0, 0)], [(0, 0), (1, 1)]])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_degenerate_graphs(counts, scale):
    """No foreground, no background, one node, no node, zero features: all finite."""
    student, teacher, foreground, index = random_batch(counts, seed=13)
    student = (scale * student).float().requires_grad_()
    losses = [
        *node_losses(student, teacher.float(), foreground, index, len(counts)),
        graph_edge_loss(student, teacher.float(), foreground, index, len(counts)),
        dsig.class_logit_loss(student, teacher.float()),
    ]
    sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses)
    assert torch.isfinite(student.grad).all()


def test_one_node_and_zero_nodes_have_no_edges():
    """One node has edge loss 0; a zero node has zero edges and a zero gradient."""
    student, teacher, _, _ = random_batch([(4, 0)], seed=14)
    assert one_image_edge_loss(student[:1], teacher[:1]).item() == 0.0

    student[2] = 0.0
    student.requires_grad_()
    edges = dsig.cosine_graph(student[None])[0]
    assert not edges[2].any() and not edges[:, 2].any()
    one_image_edge_loss(student, teacher).backward()
    assert not student.grad[2].any() and student.grad[0].any()

    zero = torch.zeros(4, 3).double().requires_grad_()
    loss = one_image_edge_loss(zero, torch.zeros(4, 6).double())
    loss.backward()
    assert loss.item() == 0.0 and not zero.grad.any()


def test_duplicate_boxes():
    """Equal nodes have edges of 1 in both graphs: they add no error, only entries to the mean."""
    student, teacher, _, _ = random_batch([(2, 0)], seed=15)
    twice = torch.tensor([0, 0, 1, 1])
    single, double = (
        one_image_edge_loss(student, teacher),
        one_image_edge_loss(student[twice], teacher[twice]),
    )
    torch.testing.assert_close(double, single)  # 4 times the errors over 4 times the entries


def test_only_the_student_gets_gradients():
    """Teacher features and logits, and so mining and omega, are constants."""
    student, teacher, foreground, index = random_batch([(3, 4), (1, 2)], seed=16)
    student.requires_grad_()
    teacher.requires_grad_()
    logits = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    selected = dsig.nodes_with_edges(logits, foreground, T_MINE)
    total = (
        sum(node_losses(student, teacher, foreground, index, 2))
        + graph_edge_loss(student, teacher, selected, index, 2)
        + dsig.class_logit_loss(student, teacher)
    )
    total.backward()
    assert student.grad.any() and teacher.grad is None and logits.grad is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batch_splitting(reduction):
    """A batch of two images is the sum, or the mean, of the images alone."""
    student, teacher, foreground, index = random_batch([(3, 5), (4, 2)], seed=17)

    def terms(rows, num_images):
        args = student[rows], teacher[rows], foreground[rows], index[rows] - index[rows].min()
        kwargs = {"image_reduction": reduction}
        fg, bg = node_losses(*args, num_images, **kwargs)
        edge = graph_edge_loss(args[0], args[1], args[2] | True, args[3], num_images, **kwargs)
        return torch.stack([fg, bg, edge])

    together = terms(torch.ones_like(foreground), 2)
    alone = torch.stack([terms(index == image, 1) for image in range(2)])
    torch.testing.assert_close(together, getattr(alone, reduction)(0))


def test_unknown_reduction():
    """A reduction that does not exist is named together with the valid ones."""
    nodes, index = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="'max' is not one of mean, sum"):
        node_losses(nodes, nodes, index.bool(), index, 1, image_reduction="max")


def test_gradients_numerically():
    """Analytic gradients of all terms agree with finite differences in float64."""
    student, teacher, foreground, index = random_batch([(3, 2), (0, 2), (1, 0)], dim=4, seed=18)
    student.requires_grad_()
    selected = foreground | (torch.arange(len(student)) % 2 == 0)
    valid = torch.arange(len(student)) % 3 > 0

    def every_term(x):
        return torch.stack(
            [
                *node_losses(x, teacher, foreground, index, 3),
                graph_edge_loss(x, teacher, selected, index, 3),
                dsig.class_logit_loss(x, teacher, valid, temperature=2.0),
            ]
        )

    assert gradcheck(every_term, student)


def test_half_precision_features_give_full_precision_losses():
    """Under autocast, bfloat16 features are compared in float32 and get bfloat16 gradients."""
    student, teacher, foreground, index = random_batch([(4, 4)], dim=64, seed=19)
    student = student.bfloat16().requires_grad_()
    teacher = teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fg, bg = node_losses(student, teacher, foreground, index, 1)
        edge = graph_edge_loss(student, teacher, foreground, index, 1)
    expected = graph_edge_loss(student.detach().float(), teacher.float(), foreground, index, 1)
    assert {fg.dtype, bg.dtype, edge.dtype} == {torch.float32}
    torch.testing.assert_close(edge.detach(), expected)
    (fg + bg + edge).backward()
    assert student.grad.dtype == torch.bfloat16 and torch.isfinite(student.grad).all()
