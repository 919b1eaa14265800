"""SSIM distillation: the oracles of its specification, and an independent slow reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kd.losses import gaussian, ssim_fast
from d2kd.losses.gaussian import Blur, blur_matrix, gaussian_window
from d2kd.losses.rescale import live_channels, min_max_rescale
from d2kd.losses.ssim import (
    patch_statistics,
    pyramid_ssim_loss,
    ssim_factors,
    ssim_loss,
    ssim_map,
)

C1, C2 = 1e-4, 9e-4


def random_maps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two related random maps in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(*shape, dtype=torch.float64, generator=generator)
    noise = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return teacher + 0.7 * noise, teacher


def checkerboard(size: int = 32) -> Tensor:
    """(1, 1, size, size) of alternating zeros and ones."""
    index = torch.arange(size)
    return ((index[:, None] + index) % 2).to(torch.float64)[None, None]


def impulse(row: int = 15, column: int = 15) -> Tensor:
    """(1, 1, 31, 31) of zeros with a single one."""
    x = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    x[0, 0, row, column] = 1
    return x


def reference_map(s: Tensor, t: Tensor) -> Tensor:
    """Wang et al.'s SSIM as image libraries write it: five padded depth-wise 2-D convolutions.

    This is the formula of kornia's ``ssim`` (window 11, sigma 1.5, max_val 1, padding "same").
    """
    channels = s.shape[1]
    line = torch.tensor(
        [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=s.dtype
    )
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum()).expand(channels, 1, 11, 11)
    mode = "reflect" if min(s.shape[-2:]) > 5 else "replicate"

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode=mode), kernel, groups=channels)

    mu_s, mu_t = blur(s), blur(t)
    var_s, var_t = blur(s * s) - mu_s**2, blur(t * t) - mu_t**2
    cov = blur(s * t) - mu_s * mu_t
    top = (2 * mu_s * mu_t + C1) * (2 * cov + C2)
    return top / ((mu_s**2 + mu_t**2 + C1) * (var_s + var_t + C2))


def reference_rescale(x: Tensor, scope: str) -> Tensor:
    """Min-max rescaling with loops over images and channels."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            group = {"image": x[b], "tensor": x, "channel": x[b, c]}[scope]
            out[b, c] = (x[b, c] - group.min()) / max(group.max() - group.min(), 1e-6)
    return out


def reference_loss(student: Tensor, teacher: Tensor, scope: str = "image") -> Tensor:
    """The whole loss of one level by autograd on the slow parts."""
    ssim = reference_map(reference_rescale(student, scope), reference_rescale(teacher, scope))
    return ((1 - ssim) / 2).clamp(0, 1).mean()


# ---------------------------------------------------------------- oracles of the specification


def test_window():
    """The window sums to 1, its centre is 0.26601172, its energy 0.18813419."""
    window = gaussian_window(11, 1.5)
    assert window.sum().item() == pytest.approx(1, abs=1e-15)
    assert window[5].item() == pytest.approx(0.26601172, abs=1e-8)
    assert (window**2).sum().item() == pytest.approx(0.18813419, abs=1e-8)
    expected = [0.00102838, 0.00759876, 0.03600077, 0.10936069, 0.21300554]
    assert window[:5].tolist() == pytest.approx(expected, abs=1e-8)


def test_equal_maps_have_no_loss_and_no_gradient():
    """S = t gives loss 0 and gradient 0."""
    student = random_maps(2, 3, 16, 12)[0].requires_grad_()
    loss = ssim_loss(student, student.detach().clone())
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert gradient.abs().max() < 1e-15


def test_symmetry_and_range():
    """The loss is symmetric and within [0, 1]."""
    s, t = random_maps(2, 3, 16, 12)
    assert ssim_loss(s, t).item() == pytest.approx(ssim_loss(t, s).item(), abs=1e-15)
    assert 0 < ssim_loss(s, t) < 1
    assert 0.9 < ssim_loss(s, -s) <= 1


def test_constant_maps():
    """0.2 against 0.8 gives SSIM 0.4706661, loss 0.2646670."""
    s = torch.full((1, 2, 12, 12), 0.2, dtype=torch.float64)
    t = torch.full_like(s, 0.8)
    assert ssim_map(s, t).mean().item() == pytest.approx(0.4706661, abs=1e-7)
    assert ssim_loss(s, t, rescale=None).item() == pytest.approx(0.2646670, abs=1e-7)


def test_impulse_against_nothing():
    """Statistics at the centre, SSIM 1 six positions away, mean loss 0.0327695."""
    s, t = impulse(), torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    mu_s, _, var_s, _, _ = (x[0, 0, 15, 15].item() for x in patch_statistics(s, t))
    luminance, contrast, structure = (x[0, 0, 15, 15].item() for x in ssim_factors(s, t))
    ssim = ssim_map(s, t)[0, 0]
    assert mu_s == pytest.approx(0.07076224, abs=1e-8)
    assert var_s == pytest.approx(0.06575494, abs=1e-8)
    assert luminance == pytest.approx(0.01957984, abs=1e-8)
    assert contrast * structure == pytest.approx(0.01350237, abs=1e-8)
    assert ssim[15, 15].item() == pytest.approx(2.643743e-4, abs=1e-9)
    assert ssim[15, 21].item() == pytest.approx(1, abs=1e-7)
    assert ssim_loss(s, t, rescale=None).item() == pytest.approx(0.0327695, abs=1e-7)


def test_shifted_impulse_is_worse_than_a_missing_one():
    """Factors at the centre and mean loss 0.0390120 for a shift by one position."""
    s, t = impulse(), impulse(column=16)
    luminance, contrast, structure = (x[0, 0, 15, 15].item() for x in ssim_factors(s, t))
    merged = ssim_map(s, t, (0, 1, 1))[0, 0, 15, 15].item()
    assert luminance == pytest.approx(0.976098, abs=1e-6)
    assert contrast == pytest.approx(0.994699, abs=1e-6)
    assert structure == pytest.approx(-0.059589, abs=1e-6)
    assert merged == pytest.approx(-0.059273, abs=1e-6)
    loss = ssim_loss(s, t, rescale=None).item()
    assert loss == pytest.approx(0.0390120, abs=1e-7)
    assert loss > ssim_loss(s, torch.zeros_like(s), rescale=None)


def test_inverted_checkerboard():
    """L = c = 1, k = -0.9964065 inside, loss 0.9982032."""
    s = checkerboard()
    luminance, contrast, structure = (x[0, 0, 16, 16].item() for x in ssim_factors(s, 1 - s))
    assert luminance == pytest.approx(1, abs=1e-6)
    assert contrast == pytest.approx(1, abs=1e-6)
    assert structure == pytest.approx(-0.9964065, abs=1e-7)
    # Reflection continues a checkerboard, so the borders are no exception.
    assert ssim_loss(s, 1 - s, rescale=None).item() == pytest.approx(0.9982032, abs=1e-7)


def test_checkerboard_of_half_contrast():
    """L = k = 1, c = 0.8005743, loss 0.0997128."""
    s = checkerboard()
    t = 0.25 + 0.5 * s
    luminance, contrast, structure = (x[0, 0, 16, 16].item() for x in ssim_factors(s, t))
    assert (luminance, structure) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert contrast == pytest.approx(0.8005743, abs=1e-7)
    assert ssim_loss(s, t, rescale=None).item() == pytest.approx(0.0997128, abs=1e-7)


def test_brighter_checkerboard():
    """C = k = 1, l = 0.8000640, loss 0.0999680."""
    s = 0.5 * checkerboard()
    luminance, contrast, structure = (x[0, 0, 16, 16].item() for x in ssim_factors(s, s + 0.25))
    assert (contrast, structure) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert luminance == pytest.approx(0.8000640, abs=1e-7)
    assert ssim_loss(s, s + 0.25, rescale=None).item() == pytest.approx(0.0999680, abs=1e-7)


def test_affine_invariance_and_gradient_identities():
    """L(aS + b, T) = L(S, T); the gradient is orthogonal to shift and scale."""
    student, teacher = random_maps(2, 3, 16, 12)
    loss = ssim_loss(student, teacher)
    assert abs(ssim_loss(3.7 * student - 11, teacher) - loss) < 1e-12
    assert abs(ssim_loss(-student, teacher) - loss) > 1e-2

    student.requires_grad_()
    (gradient,) = torch.autograd.grad(ssim_loss(student, teacher), student)
    (detached,) = torch.autograd.grad(ssim_loss(student, teacher, detach_range=True), student)
    for image in range(2):
        assert abs(gradient[image].sum()) < 1e-14
        assert abs((gradient[image] * student[image]).sum()) < 1e-14
        assert abs(detached[image].sum()) > 1e-6
        assert abs((detached[image] * student[image]).sum()) > 1e-6


@pytest.mark.parametrize("size", [(7, 11), (6, 6), (5, 8), (4, 6), (3, 3), (1, 1), (1, 9)])
def test_small_maps(size):
    """Reflection down to 6 rows, replication below, both equal to the slow reference."""
    student, teacher = random_maps(2, 3, *size)
    student.requires_grad_()
    loss = ssim_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(reference_loss(student, teacher).item(), abs=1e-9)
    assert gradient.isfinite().all()


def test_merged_form_equals_three_factors():
    """L * (c*k merged) = l * c * k wherever the variances are above 1e-6."""
    s, t = (min_max_rescale(x) for x in random_maps(2, 3, 20, 24))
    _, _, var_s, var_t, _ = patch_statistics(s, t)
    textured = (var_s > 1e-6) & (var_t > 1e-6)
    luminance, contrast, structure = ssim_factors(s, t)
    difference = (ssim_map(s, t) - luminance * contrast * structure).abs()
    assert textured.float().mean() > 0.9
    assert difference[textured].max() < 1e-9


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (33, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_library_formula(size, dtype):
    """Equal to the image-library formula on [0, 1] maps to 1e-5, written here again."""
    generator = torch.Generator().manual_seed(1)
    s = torch.rand(2, 3, *size, dtype=dtype, generator=generator)
    t = torch.rand(2, 3, *size, dtype=dtype, generator=generator)
    expected = ((1 - reference_map(s, t)) / 2).clamp(0, 1).mean()
    assert ssim_loss(s, t, rescale=None).item() == pytest.approx(expected.item(), abs=1e-5)
    assert (ssim_map(s, t) - reference_map(s, t)).abs().max() < 1e-5


def test_levels_add_up_and_images_average():
    """Five equal levels give five times the loss, a doubled batch the same loss."""
    student, teacher = random_maps(2, 3, 12, 16)
    single = ssim_loss(student, teacher)
    five = pyramid_ssim_loss([student] * 5, [teacher] * 5)
    doubled = ssim_loss(torch.cat([student, student]), torch.cat([teacher, teacher]))
    assert five.item() == pytest.approx(5 * single.item(), abs=1e-14)
    assert doubled.item() == pytest.approx(single.item(), abs=1e-14)


def test_gradient_reaches_student_and_adapter_only():
    """Adapter and student receive a gradient, the teacher none."""
    student, teacher = (x.float().requires_grad_() for x in random_maps(2, 4, 9, 10))
    adapter = nn.Conv2d(4, 4, 1)
    ssim_loss(adapter(student), teacher).backward()
    assert teacher.grad is None
    for tensor in (student, adapter.weight):
        assert tensor.grad.abs().sum() > 0


def test_independent_noise_of_small_contrast_is_masked():
    """Pitfall: independent noise costs 0.009 at std 0.003 and 0.475 at std 0.1 (C2 dominates)."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(1, 4, 96, 96, dtype=torch.float64, generator=generator)
    t = torch.randn(1, 4, 96, 96, dtype=torch.float64, generator=generator)
    for std, expected in ((0.003, 0.009), (0.01, 0.087), (0.03, 0.326), (0.1, 0.475)):
        loss = ssim_loss(0.5 + std * s, 0.5 + std * t, rescale=None).item()
        assert loss == pytest.approx(expected, rel=0.06)


# ---------------------------------------------------------------- the slow reference, gradients


@pytest.mark.parametrize("scope", ["image", "tensor", "channel"])
@pytest.mark.parametrize("size", [(13, 17), (4, 9)])
def test_value_and_gradient_equal_the_slow_reference(scope, size):
    """Value and gradient of the fused loss equal autograd through the convolution reference."""
    student, teacher = random_maps(2, 3, *size)
    student.requires_grad_()
    loss, expected = ssim_loss(student, teacher, scope), reference_loss(student, teacher, scope)
    (gradient,) = torch.autograd.grad(loss, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-10)


def test_blocks_do_not_change_the_result(monkeypatch):
    """Splitting the planes into blocks changes neither value nor gradient."""
    student, teacher = random_maps(2, 5, 8, 8)
    student.requires_grad_()
    whole = ssim_loss(student, teacher)
    (whole_gradient,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(ssim_fast, "BLOCK_ELEMENTS_CPU", 3 * 64)
    split = ssim_loss(student, teacher)
    (split_gradient,) = torch.autograd.grad(split, student)
    assert split.item() == pytest.approx(whole.item(), abs=1e-15)
    torch.testing.assert_close(split_gradient, whole_gradient)


@pytest.mark.parametrize("scope", ["image", "tensor", "channel"])
@pytest.mark.parametrize("detach_range", [False, True])
def test_gradcheck(scope, detach_range):
    """The hand-written gradients agree with finite differences."""
    student, teacher = random_maps(2, 2, 6, 7)
    if detach_range:  # finite differences cannot see a detached range: compare with autograd
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(ssim_loss(student, teacher, scope, True), student)
        dims = {"image": (1, 2, 3), "tensor": (0, 1, 2, 3), "channel": (2, 3)}[scope]
        low = student.detach().amin(dims, keepdim=True)
        high = student.detach().amax(dims, keepdim=True)
        s, t = (student - low) / (high - low), reference_rescale(teacher, scope)
        (expected,) = torch.autograd.grad(((1 - reference_map(s, t)) / 2).mean(), student)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-10)
    else:
        assert torch.autograd.gradcheck(
            lambda x: ssim_loss(x, teacher, scope), student.requires_grad_()
        )


@pytest.mark.parametrize(
    "exponents", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)]
)
def test_exponents(exponents):
    """Each choice of factors equals the product of those factors and differentiates."""
    student, teacher = random_maps(2, 2, 7, 8)
    s, t = min_max_rescale(student), min_max_rescale(teacher)
    factors = ssim_factors(s, t)
    product = torch.ones_like(s)
    for factor, exponent in zip(factors, exponents, strict=True):
        product = product * factor**exponent
    loss = ssim_loss(student, teacher, exponents=exponents)
    assert loss.item() == pytest.approx(((1 - product) / 2).mean().item(), abs=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: ssim_loss(x, teacher, exponents=exponents), student.requires_grad_()
    )


@pytest.mark.parametrize("exponents", [(1, 0.5, 1), (0, 0, 0), (2, 1, 1)])
def test_bad_exponents(exponents):
    """Exponents other than 0 and 1, or none at all, are refused by name."""
    student, teacher = random_maps(1, 1, 6, 6)
    with pytest.raises(ValueError, match="exponents must be 0 or 1"):
        ssim_loss(student, teacher, exponents=exponents)


@pytest.mark.parametrize("reflect, mode", [(True, "reflect"), (False, "replicate")])
@pytest.mark.parametrize("size", [6, 7, 15])
def test_blur_matrix_is_padding_then_convolution(reflect, mode, size):
    """The banded matrix does what padding and a 1-D convolution do."""
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = blur_matrix(size, 11, 1.5, reflect, torch.float64, torch.device("cpu"))
    padded = F.pad(x[None, None], (5, 5), mode=mode)
    expected = F.conv1d(padded, gaussian_window(11, 1.5)[None, None])[0, 0]
    torch.testing.assert_close(matrix @ x, expected)


@pytest.mark.parametrize("size", [(9, 23), (40, 9), (3, 31)])
def test_tiles_skip_nothing_but_zeros(size, monkeypatch):
    """The blur and its transpose by tiles equal the products with the whole matrices."""
    x = random_maps(2, *size)[0]
    blur = Blur.like(x, 11, 1.5)
    monkeypatch.setattr(gaussian, "_TILE_CPU", 4)
    torch.testing.assert_close(blur(x), blur.rows @ x @ blur.cols.T)
    torch.testing.assert_close(blur.transposed(x), blur.rows.T @ x @ blur.cols)


def test_other_windows():
    """Window size and width change the patch: a window of 1 compares element by element."""
    s, t = (min_max_rescale(x) for x in random_maps(1, 2, 8, 8))
    luminance = (2 * s * t + C1) / (s * s + t * t + C1)
    single = ssim_map(s, t, window_size=1)
    torch.testing.assert_close(single, luminance, rtol=0, atol=1e-7)
    assert ssim_loss(s, t, window_size=7) != ssim_loss(s, t, window_size=11)
    assert ssim_loss(s, t, sigma=3.0) != ssim_loss(s, t, sigma=1.5)
    assert ssim_loss(s, t, k1=0.1) != ssim_loss(s, t, k2=0.1)


# ---------------------------------------------------------------- degenerate and odd inputs


def test_constant_student_is_harmless():
    """A student map without any structure has a finite loss and no exploding gradient."""
    teacher = random_maps(2, 3, 8, 8)[1].float()
    for value in (0.0, 5.0):
        student = torch.full_like(teacher, value).requires_grad_()
        loss = ssim_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert 0 < loss < 1
        assert gradient.abs().max() == 0
    assert ssim_loss(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 7.0)) == 0


def test_dead_channels_are_left_out():
    """Scope "channel": a dead channel in either map does not count, not even in the mean."""
    student, teacher = random_maps(2, 3, 8, 8)
    alone = ssim_loss(student[:, :1], teacher[:, :1], "channel")
    student[:, 1] = 4e-9 * torch.rand(2, 8, 8, dtype=torch.float64)
    teacher[:, 2] = 1.0
    student.requires_grad_()
    assert live_channels(student).flatten(1).tolist() == [[True, False, True]] * 2
    loss = ssim_loss(student, teacher, "channel")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(alone.item(), abs=1e-14)
    assert gradient[:, 1:].abs().max() == 0

    teacher = torch.zeros_like(teacher)
    teacher[:, 0, 0, 0] = 1  # no channel is live in both maps
    student = torch.zeros_like(teacher)
    student[:, 1, 0, 0] = 1
    loss = ssim_loss(student.requires_grad_(), teacher, "channel")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and gradient.abs().max() == 0


def test_empty_batch_is_a_connected_zero():
    """No image gives zero with a zero gradient, not None."""
    student = torch.zeros(0, 3, 8, 8, requires_grad=True)
    loss = ssim_loss(student, torch.zeros(0, 3, 8, 8))
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


def test_half_precision_is_widened():
    """bfloat16 features are compared in float32; their gradient returns in bfloat16."""
    student, teacher = (x.bfloat16() for x in random_maps(2, 3, 16, 16))
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ssim_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ssim_loss(student.double(), teacher.double()).item(), 1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


def test_channels_last_and_gradient_scale():
    """Memory format does not matter, and the gradient follows the loss's weight."""
    student, teacher = random_maps(2, 3, 8, 9)
    student.requires_grad_()
    (plain,) = torch.autograd.grad(ssim_loss(student, teacher), student)
    last = student.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    (scaled,) = torch.autograd.grad(4 * ssim_loss(last, teacher), last)
    torch.testing.assert_close(scaled, 4 * plain)


def test_nan_is_not_hidden():
    """A NaN in the student shows in the loss, so that the trainer can stop."""
    student, teacher = random_maps(1, 2, 8, 8)
    student[0, 0, 0, 0] = float("nan")
    assert ssim_loss(student, teacher).isnan()


def test_inference_mode_does_not_poison_the_cache():
    """A loss computed under inference mode leaves nothing behind that breaks training."""
    student, teacher = random_maps(1, 2, 19, 23)
    with torch.inference_mode():
        ssim_loss(student, teacher, exponents=(0, 1, 1))
    student.requires_grad_()
    ssim_loss(student, teacher, exponents=(0, 1, 1)).backward()
    assert student.grad.isfinite().all()


def test_errors_name_the_problem():
    """Different shapes and an unknown scope are refused in one line."""
    student, teacher = random_maps(1, 2, 8, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        ssim_loss(student, teacher[:, :1])
    with pytest.raises(ValueError, match="valid: image, tensor, channel"):
        ssim_loss(student, teacher, rescale="level")
