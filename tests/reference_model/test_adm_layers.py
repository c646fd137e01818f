"""Layers of configs A to C against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reference_model.layers import (
    Conv,
    GroupNorm,
    GroupScale,
    Sinusoid,
    normal_init,
    num_groups,
    scale_and_shift,
    scale_only,
    zero_init,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "groups"), [(192, 32), (576, 32), (128, 32), (64, 16), (8, 2), (3, 1), (14, 2)]
)
def test_groups(channels: int, groups: int) -> None:
    """32, of four channels at least, and a divisor."""
    assert num_groups(channels) == groups


def test_group_norm_of_a_and_b() -> None:
    """Two groups of four channels with one pixel: means 2.5 and 0, variances 1.25 and 1."""
    norm = GroupNorm(8).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 9))
        norm.bias.fill_(0.5)
    y = norm(f64(1, 2, 3, 4, 1, -1, 1, -1).reshape(1, 8, 1, 1)).detach().flatten().numpy()
    first = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25 + 1e-5) * [1, 2, 3, 4] + 0.5
    second = np.array([1, -1, 1, -1]) / np.sqrt(1 + 1e-5) * [5, 6, 7, 8] + 0.5
    np.testing.assert_allclose(y, [*first, *second], rtol=1e-12)  # float64 rounding


def test_group_norm_from_c_on() -> None:
    """Mean squares 7.5 and 1; nothing is subtracted (Eq. 29)."""
    y = GroupScale(8).double()(f64(1, 2, 3, 4, 1, -1, 1, -1).reshape(1, 8, 1, 1)).flatten()
    expected = [
        *np.array([1, 2, 3, 4]) / np.sqrt(7.5001),
        *np.array([1, -1, 1, -1]) / np.sqrt(1.0001),
    ]
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12)  # float64 rounding


def test_group_scale_sums_half_precision_in_float32() -> None:
    x = torch.full((1, 8, 4, 4), 1000.0, dtype=torch.float16)  # squares overflow float16
    y = GroupScale(8)(x)
    # One float16 rounding of a result of one.
    torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-3, atol=0)


def test_sinusoid() -> None:
    """Cosines of all frequencies 10,000^(−k/2), then sines."""
    y = Sinusoid(4)(f64(0.3, -2)).numpy()
    for row, a in zip(y, (0.3, -2), strict=True):
        expected = [math.cos(a), math.cos(a / 100), math.sin(a), math.sin(a / 100)]
        np.testing.assert_allclose(row, expected, rtol=1e-12)  # float64 rounding


def test_sinusoid_needs_pairs() -> None:
    with pytest.raises(
        ValueError, match=r"must be even in number \(got 5\); change model_channels"
    ):
        Sinusoid(5)


def test_modulations() -> None:
    y = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    assert scale_and_shift(y, f64(1, 2, 10, 20)[None]).flatten().tolist() == [12, 23]
    assert scale_only(y, f64(1, 2)[None]).flatten().tolist() == [2, 3]


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_initial_weights_are_uniform(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = Conv(64, 128, kernel, bias=True)
    fan_in = 64 * math.prod(kernel)
    for p in conv.parameters():
        assert p.detach().abs().max() <= 1 / math.sqrt(fan_in)
        # 128 draws at least, of kurtosis 1.8: relative standard error below 0.04; times 4.
        std = p.detach().std().item() * math.sqrt(3 * fan_in)
        assert std == pytest.approx(1, abs=0.16)


def test_other_inits() -> None:
    torch.manual_seed(0)
    zero = Conv(4, 4, (3, 3), bias=True, init=zero_init)
    assert not any(p.any() for p in zero.parameters())
    # 40,000 draws: relative standard error 0.0035; times 4.
    assert Conv(200, 200, (), init=normal_init).weight.std().item() == pytest.approx(1, abs=0.014)


def test_conv_is_torchs() -> None:
    conv = Conv(3, 4, (3, 3), bias=True, factor=2.0).double()
    x = torch.randn(2, 3, 5, 5).double()
    expected = torch.nn.functional.conv2d(x, 2 * conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)
    up = Conv(3, 4, (3, 3), up=True).double()
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.nn.functional.conv2d(doubled, up.weight, padding=1)
    torch.testing.assert_close(up(x), expected, rtol=1e-13, atol=1e-13)


def test_conv_computes_in_the_type_of_its_input() -> None:
    """Weights stay float32; activations are half precision on GPUs."""
    x = torch.randn(2, 8, 4, 4).bfloat16()
    assert Conv(8, 4, (3, 3), bias=True)(x).dtype == torch.bfloat16
    assert GroupNorm(8)(x).dtype == torch.bfloat16
    assert GroupScale(8)(x).dtype == torch.bfloat16
