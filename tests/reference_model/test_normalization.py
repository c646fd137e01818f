"""Normalisation of pixels and weights: value, gradient in closed form, one norm in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_model.mp_layers as mp_layers
import reference_model.normalization as normalization
from reference_model.mp_layers import MPConv
from reference_model.normalization import normalize, root_mean_square


def by_definition(x: Tensor, dim: int | list[int], factor: float = 1.0) -> Tensor:
    """Differentiated by autograd, step by step."""
    return factor * x / (x.square().mean(dim=dim, keepdim=True).sqrt() + 1e-4)


def gradient(y: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.autograd.grad(y, x, torch.randn_like(y))[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # Float64 rounding of sums of some tens of terms.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 8, 4, 4), 1), ((5, 6, 3, 3), [1, 2, 3]), ((7, 9), [1]), ((2, 3, 4), -1)]
)
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_value_and_gradient_are_those_of_the_definition(
    shape: tuple[int, ...], dim: int | list[int], size: float
) -> None:
    """Also where epsilon weighs as much as the RMS."""
    torch.manual_seed(0)
    x = (size * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    y, expected = normalize(x, dim, factor=0.7), by_definition(x, dim, factor=0.7)
    assert_close(y, expected)
    assert_close(gradient(y, x) * size, gradient(expected, x) * size)


@pytest.mark.parametrize("dim", [1, -1, [1, 2], [0, 3]])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [True, False])
def test_gradient_does_not_depend_on_how_it_is_computed(
    dim: int | list[int],
    memory_format: torch.memory_format,
    kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rows with torch's kernel, and by the formula, in every order of storage."""
    used = []
    by_rows = normalization._gradient_by_rows

    def counted(grad: Tensor, *arguments: Any) -> Tensor:
        used.append(grad.shape)
        return by_rows(grad, *arguments)

    monkeypatch.setattr(normalization, "_gradient_by_rows", counted)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not kernel)
    torch.manual_seed(0)
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    found = gradient(normalize(x, dim, factor=0.7), x)
    assert_close(found, gradient(by_definition(x, dim, factor=0.7), x))
    assert bool(used) == kernel


def test_gradient_survives_another_forced_normalisation() -> None:
    """Two forwards before one backward: the second overwrites the weight that the first used."""
    conv = MPConv(4, 3, (3, 3)).train()
    x = torch.randn(2, 4, 5, 5)
    (conv(x).sum() + conv(x).sum()).backward()
    assert conv.weight.grad is not None


def test_comparison_of_gradients_can_fail() -> None:
    """Twin: without the term along the input, as if the norm were constant."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    wrong = x / (root_mean_square(x, 1).detach() + 1e-4)
    with pytest.raises(AssertionError):
        assert_close(gradient(wrong, x), gradient(by_definition(x, 1), x))


def test_known_rms_is_not_computed_again() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = normalize(x, 1, rms=root_mean_square(x.detach(), 1))
    assert_close(y, normalize(x, 1))
    assert_close(gradient(y, x), gradient(normalize(x, 1), x))


def test_zeros_have_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    normalize(x, 1).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, torch.full_like(x, 1e4))  # 1 / (0 + epsilon)


def test_gradient_in_half_precision_is_summed_in_float32() -> None:
    """Products of 1000 overflow float16 in their sum."""
    x = torch.full((1, 4096), 4.0, dtype=torch.float16, requires_grad=True)
    normalize(x, 1).backward(torch.full((1, 4096), 1000.0, dtype=torch.float16))
    assert x.grad is not None
    # All along the input: nothing remains but the rounding of terms of size 250 (2^-11 of them).
    assert x.grad.abs().max() < 0.5


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(normalize(x, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_training_weight_is_normalised_twice(kernel: tuple[int, ...]) -> None:
    """Algorithm 1, written out: forced norm, then the norm at use with its gradient."""
    torch.manual_seed(0)
    conv = MPConv(8, 4, kernel, factor=1.5).double().train()
    dims = list(range(1, conv.weight.ndim))
    with torch.no_grad():
        conv.weight.mul_(3)
        forced = by_definition(conv.weight.detach(), dims).requires_grad_()
    expected = by_definition(forced, dims, factor=1.5 / math.sqrt(forced[0].numel()))
    weight = conv.kernel()
    assert_close(conv.weight.detach(), forced.detach())
    assert_close(weight, expected)
    assert_close(gradient(weight, conv.weight), gradient(expected, forced))


@pytest.mark.parametrize("training", [True, False])
def test_one_norm_serves_both_normalisations(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(x: Tensor, dim: int) -> Tensor:
        calls.append(x.shape)
        return root_mean_square(x, dim)

    monkeypatch.setattr(mp_layers, "root_mean_square", counted)
    monkeypatch.setattr("reference_model.normalization.root_mean_square", counted)
    MPConv(8, 4, (3, 3)).train(training)(torch.randn(2, 8, 4, 4))
    assert calls == [(4, 8, 3, 3)]
