"""The loss against its formula, and the learning-rate schedule against golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from reference_model.loss import EDM2Loss
from reference_model.lr_schedule import learning_rate
from tests.reference_model.test_network import example_input, small_net


def test_loss_is_the_weighted_error_plus_uncertainty() -> None:
    """λ(σ)/e^u · (D − y)² + u, element by element, from the network's own outputs."""
    net = small_net().double().eval()
    images, sigma, labels = example_input(net)
    noise = torch.randn_like(images)
    loss = EDM2Loss(sigma_data=0.5).at(net, images, sigma, noise, labels).detach().numpy()
    for i in range(3):
        s = float(sigma[i])
        x = images[i : i + 1] + s * noise[i : i + 1]
        D, u = net(x, sigma[i : i + 1], labels[i : i + 1], return_logvar=True)
        error = (D[0] - images[i]).detach().numpy() ** 2
        weight = (s**2 + 0.25) / (s * 0.5) ** 2
        # Float64 rounding; the batch size may change the order of sums.
        np.testing.assert_allclose(
            loss[i], weight / np.exp(u.item()) * error + u.item(), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(("sigma", "weight"), [(0.5, 8.0), (80.0, 4.0001563), (0.002, 250004.0)])
def test_weight_of_noise_levels(sigma: float, weight: float) -> None:
    """λ from a network that errs by one everywhere and is certain (u = 0)."""

    def net(x: Tensor, sigma: Tensor, labels: object, return_logvar: bool) -> tuple[Tensor, Tensor]:
        return torch.ones_like(x), torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)

    images = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    sigmas = torch.tensor([sigma], dtype=torch.float64)
    loss = EDM2Loss().at(net, images, sigmas, torch.randn_like(images))
    # The table has eight digits.
    assert loss.mean().item() == pytest.approx(weight, rel=1e-7)


def test_noise_levels_are_log_normal_and_noise_is_scaled() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, sigma: Tensor, labels: object, return_logvar: bool) -> tuple[Tensor, Tensor]:
        seen.append((x, sigma))
        return x, torch.zeros(len(x), 1, 1, 1)

    EDM2Loss(P_mean=-0.8, P_std=1.6)(net, torch.zeros(20_000, 1, 2, 2))
    x, sigma = seen[0]
    # 20,000 draws: standard error of the mean 0.011, of the standard deviation 0.008; times 4.
    assert sigma.log().mean().item() == pytest.approx(-0.8, abs=0.045)
    assert sigma.log().std().item() == pytest.approx(1.6, abs=0.035)
    noise = x / sigma[:, None, None, None]
    assert noise.std().item() == pytest.approx(1.0, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0, 0, 0], sigma.log()]))[0, 1]) < 0.03


def test_loss_is_a_function_of_its_generator() -> None:
    net = small_net().eval()
    images, _, labels = (t.float() for t in example_input(net))
    losses = [
        EDM2Loss()(net, images, labels, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert (losses[0] - losses[2]).abs().max() > 1e-3


def test_no_uncertainty_beats_the_log_of_the_error() -> None:
    """x/e^u + u is least where e^u = x, here λ times the mean squared error of an image."""
    net = small_net().double().eval()
    images, sigma, labels = example_input(net)
    noise = torch.randn_like(images)
    s = sigma[:, None, None, None]
    losses = EDM2Loss().at(net, images, sigma, noise, labels)
    D = net(images + s * noise, sigma, labels)
    per_image = ((s**2 + 0.25) / (s * 0.5) ** 2 * (D - images) ** 2).mean((1, 2, 3))
    best = per_image.log() + 1  # value of x/e^u + u at u = ln x
    losses = losses.mean((1, 2, 3))
    assert (losses >= best - 1e-9).all()


@pytest.mark.parametrize(
    ("nimg", "rate"),
    [
        (0, 0.0),
        (2048, 2.048e-6),
        (5_000_000, 0.005),
        (10_000_000, 0.01),
        (143_360_000, 0.01),
        (286_720_000, 0.00707107),
        (2**31, 0.00258374),
    ],
)
def test_learning_rate_of_size_s(nimg: int, rate: float) -> None:
    # The table has six digits.
    assert learning_rate(nimg, batch_size=2048) == pytest.approx(rate, rel=1e-6)


def test_learning_rate_without_decay_or_ramp_up() -> None:
    assert learning_rate(0, 128, ref_lr=0.5, ref_batches=0, rampup_nimg=0) == 0.5
    assert learning_rate(10**9, 128, ref_lr=0.5, ref_batches=0, rampup_nimg=0) == 0.5
