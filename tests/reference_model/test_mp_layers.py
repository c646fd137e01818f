"""Magnitude-preserving primitives and preconditioning against published and computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference_model.mp_layers import (
    Gain,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)
from reference_model.precond import preconditioning


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_golden(actual: Tensor, *expected: float, digits: int = 7) -> None:
    """Agreement with a table printed to `digits` significant digits or decimals."""
    torch.testing.assert_close(
        actual.flatten().double(), f64(*expected), rtol=10.0**-digits, atol=0.6 * 10.0**-digits
    )


def assert_unit_magnitude(x: Tensor, tolerance: float) -> None:
    magnitude = float(x.detach().double().square().mean().sqrt())
    if abs(magnitude - 1) > tolerance:
        raise AssertionError(f"magnitude {magnitude:.4f} is not 1 ± {tolerance}")


def test_mp_silu() -> None:
    y = mp_silu(f64(-2, -1, 0, 1, 2))
    assert_golden(y, -0.400010, -0.451244, 0, 1.226608, 2.955695, digits=6)


def test_mp_sum_weights() -> None:
    one, zero = f64(1), f64(0)
    assert_golden(mp_sum(one, zero, 0.3), 0.9191450300, digits=9)
    assert_golden(mp_sum(zero, one, 0.3), 0.3939192986, digits=9)
    assert_golden(mp_sum(zero, one), 0.7071067812, digits=9)
    assert_golden(mp_sum(f64(1), f64(2), 0.3), 1.7069836)


@pytest.mark.parametrize(
    ("na", "nb", "factor_a", "factor_b"),
    [
        (768, 576, 0.9354143, 1.0801234),
        (576, 384, 0.9128709, 1.1180340),
        (384, 192, 0.8660254, 1.2247449),
        (64, 64, 1.0, 1.0),
    ],
)
def test_mp_cat_factors(na: int, nb: int, factor_a: float, factor_b: float) -> None:
    y = mp_cat(torch.ones(1, na, dtype=torch.float64), torch.ones(1, nb, dtype=torch.float64))
    assert y.shape == (1, na + nb)
    assert_golden(y[0, :1], factor_a)
    assert_golden(y[0, -1:], factor_b)


def test_mp_cat_balance() -> None:
    """With t, the parts contribute (1−t)² to t² to the square of the magnitude."""
    y = mp_cat(torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64), t=0.2)
    share_a, share_b = y[0, :3].square().sum(), y[0, 3:].square().sum()
    assert_golden(share_b / share_a, 0.2**2 / 0.8**2)
    assert_golden((share_a + share_b) / 8, 1.0)


def test_normalize_adds_epsilon_to_the_rms() -> None:
    assert_golden(normalize(f64(3, 4), dim=0), 0.84850414, 1.13133885)


def test_normalize_takes_norms_of_half_precision_in_float32() -> None:
    x = torch.full((1, 4096), 1000.0, dtype=torch.float16)  # squares overflow float16
    assert normalize(x, dim=1).dtype == torch.float16
    # One float16 rounding of a result of one.
    torch.testing.assert_close(normalize(x, dim=1), torch.ones_like(x), rtol=1e-3, atol=0)


def test_conv_weight_has_unit_norm() -> None:
    conv = MPConv(2, 1, kernel=()).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 4.0]]))
    conv.double()
    assert_golden(conv(torch.eye(2, dtype=torch.float64)), 0.59998303, 0.79997737)


def test_conv_gradient_is_projected() -> None:
    """∇ = (1/‖w‖)(I − ŵŵᵀ) g: for w = (3, 4), g = (1, 0) it is (0.128, −0.096)."""
    conv = MPConv(2, 1, kernel=()).double().eval()
    with torch.no_grad():
        conv.weight.copy_(f64(3, 4)[None])
    conv(f64(1, 0)[None]).sum().backward()
    # The golden value has no epsilon; 1e-4 in the RMS of 3.5 shifts it by 3e-5 relative twice.
    torch.testing.assert_close(conv.weight.grad, f64(0.128, -0.096)[None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_forced_normalisation_is_for_training_only(training: bool) -> None:
    conv = MPConv(8, 4, kernel=(3, 3)).train(training)
    with torch.no_grad():
        conv.weight.mul_(7)
    before = conv.weight.detach().clone()
    conv(torch.randn(2, 8, 4, 4))
    rms = conv.weight.detach().flatten(1).square().mean(1).sqrt()
    if training:
        # Epsilon 1e-4 beside an RMS near 7.
        torch.testing.assert_close(rms, torch.ones(4), rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(conv.weight.detach(), before, rtol=0, atol=0)


def test_forced_normalisation_is_not_recorded_for_gradients() -> None:
    """The overwrite happens outside autograd; the norm at use is differentiated."""
    conv = MPConv(8, 4, kernel=(1, 1)).train()
    conv(torch.randn(2, 8, 4, 4)).square().sum().backward()
    along = (conv.weight.grad * conv.weight).flatten(1).sum(1).abs()
    scale = conv.weight.grad.flatten(1).norm(dim=1) * conv.weight.flatten(1).norm(dim=1)
    # Tangent to the sphere up to epsilon (1e-4).
    assert (along / scale).max() < 1e-3


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_conv_preserves_magnitude(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, *([32, 32] if kernel else []))
    y = MPConv(32, 64, kernel)(x)
    if kernel == (3, 3):
        y = y[:, :, 1:-1, 1:-1]  # zero padding is not compensated
    # Without pixels, 4,096 values of which 64 are independent at a time: 1/√(2·4096) ≈ 0.011.
    assert_unit_magnitude(y, 0.05)


def test_other_layers_preserve_magnitude() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 96, 16)
    c_noise = torch.randn(512)
    # 98,304 values each: 1/√(2·98304) = 0.0023 for normal ones, times 4.
    assert_unit_magnitude(mp_silu(a), 0.01)
    assert_unit_magnitude(mp_sum(a, b, 0.3), 0.01)
    assert_unit_magnitude(mp_cat(a, b[:, :32], 0.5), 0.01)
    assert_unit_magnitude(normalize(a * 5, dim=1), 1e-3)  # epsilon only
    assert_unit_magnitude(MPFourier(256)(c_noise), 0.05)  # 256 random phases


def test_plain_layers_do_not_preserve_magnitude() -> None:
    """Twin: the assertion can fail."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 96, 16)
    for y in (torch.nn.functional.silu(a), a + b, a * 1.05):
        with pytest.raises(AssertionError, match="is not 1"):
            assert_unit_magnitude(y, 0.01)


def test_fourier_features_follow_their_formula() -> None:
    fourier = MPFourier(4).double()
    a = f64(0.3, -1.2)
    angle = 2 * math.pi * (a[:, None] * fourier.freqs + fourier.phases)
    # Rounding of angles of order ten.
    torch.testing.assert_close(fourier(a), math.sqrt(2) * angle.cos(), rtol=0, atol=1e-14)
    assert not list(fourier.parameters())  # frozen
    assert set(fourier.state_dict()) == {"freqs", "phases"}  # but saved


def test_gain_starts_at_zero() -> None:
    assert Gain()(torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in", "c_noise"),
    [
        (0.5, 0.5, 0.3535533906, 1.414213562, -0.1732867951),
        (80.0, 3.906097e-5, 0.4999902347, 0.0124997559, 1.0955066590),
    ],
)
def test_preconditioning(
    sigma: float, c_skip: float, c_out: float, c_in: float, c_noise: float
) -> None:
    c = preconditioning(f64(sigma), sigma_data=0.5)
    assert_golden(torch.cat(c), c_skip, c_out, c_in, c_noise, digits=6)


def test_preconditioning_keeps_unit_variance() -> None:
    """c_in² · Var[y + n] = 1, and the target of F has unit variance (Eq. 5 to 8)."""
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c = preconditioning(sigma, 0.5)
    one = torch.ones_like(sigma)
    # Float64 rounding.
    torch.testing.assert_close(c.c_in**2 * (sigma**2 + 0.25), one, rtol=1e-13, atol=0)
    target = ((1 - c.c_skip) ** 2 * 0.25 + c.c_skip**2 * sigma**2) / c.c_out**2
    torch.testing.assert_close(target, one, rtol=1e-9, atol=0)
