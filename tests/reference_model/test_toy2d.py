"""The toy in the plane: its exact distribution, its network, and ways to sample it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from reference_model.cli import main
from reference_model.sampler import heun_sampler
from reference_model.toy2d import Mixture, ToyNet, Truncated, distributions, train_toy
from reference_model.toy2d_figure import SOLVER, judge


def close(actual: Tensor, expected: list[float], decimals: int) -> None:
    """The golden values are printed with so many decimals: half of the last is the tolerance."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    # A millionth more, for a value that lies in the middle between two printed ones.
    atol = 0.5 * 10.0**-decimals * (1 + 1e-6)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=atol)


def test_weights_of_the_classes() -> None:
    classes = distributions()
    sums = torch.stack([classes[name].weights.sum() for name in "AB"])
    close(sums, [8.325511702, 9.127986589], 9)
    assert [classes[name].weights.numel() for name in ("A", "B", "AB")] == [1016, 1016, 2032]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("AB", [-0.000141, 0.000565], [0.499855, 0.499898]),
        ("A", [0.371851, 0.364607], [0.333061, 0.341487]),
    ],
)
def test_moments(name: str, mean: list[float], std: list[float]) -> None:
    data = distributions()[name]
    close(data.mean, mean, 6)
    close(data.covariance.diagonal().sqrt(), std, 6)


def test_first_component() -> None:
    data = distributions()["A"]
    close(data.means[0, 0], [0.02134411, 0.06333431], 8)
    close(data.covariances[0].flatten(), [3.4676e-4, 1.0358e-4, 1.0358e-4, 3.8515e-4], 8)


@pytest.mark.parametrize(
    ("point", "sigma", "logp", "score", "decimals"),
    [
        ((0.3, 0.3), 0.1, 0.9304626638, [-3.37715506, -1.17039377], 8),
        ((0.0, 0.0), 0.5, -1.1410218817, [0.98910212, 1.07014497], 8),
        ((0.5, 1.0), 0.03, -4.7189962088, [-77.37033, 19.261656], 5),
    ],
)
def test_log_density_and_score(
    point: tuple[float, float], sigma: float, logp: float, score: list[float], decimals: int
) -> None:
    x = torch.tensor([point], dtype=torch.float64)
    found, gradient = distributions()["A"].logp_and_score(x, sigma)
    close(found, [logp], 10)
    close(gradient[0], score, decimals)


def test_score_is_the_gradient_of_the_log_density() -> None:
    data = distributions()["B"]
    x = torch.randn(300, 2, dtype=torch.float64, generator=torch.manual_seed(0)) * 0.5
    sigma = torch.linspace(0.05, 2.0, 300, dtype=torch.float64)  # pieces of 64 each get their own
    x.requires_grad_()
    logp, score = data.logp_and_score(x, sigma)
    (gradient,) = torch.autograd.grad(logp.sum(), x)
    # float64 rounding of sums over 1016 terms.
    torch.testing.assert_close(score.detach(), gradient, rtol=1e-9, atol=1e-9)


def test_samples_have_the_moments() -> None:
    data = distributions()["A"]
    x = data.sample(50_000, torch.Generator().manual_seed(0))
    # Standard errors: std 0.34 over √50,000 is 0.0015; four of them.
    torch.testing.assert_close(x.mean(dim=0), data.mean, rtol=0, atol=0.006)
    torch.testing.assert_close(x.T.cov(), data.covariance, rtol=0, atol=0.004)


@pytest.mark.parametrize(("width", "parameters"), [(64, 16_641), (32, 4_225)])
def test_parameter_counts(width: int, parameters: int) -> None:
    assert sum(p.numel() for p in ToyNet(width).parameters()) == parameters


def test_untrained_network_is_the_gaussian_of_the_data() -> None:
    net = ToyNet(8).eval()
    x, sigma = torch.randn(5, 2), torch.rand(5) + 0.1
    # float32 rounding.
    expected = -x / (sigma[:, None] ** 2 + 0.25)
    torch.testing.assert_close(net.score(x, sigma), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(x, sigma), x + sigma[:, None] ** 2 * expected)


def test_training_lowers_the_loss_and_is_repeatable() -> None:
    data = distributions()["A"]
    x = data.sample(1000, torch.Generator().manual_seed(1)).float()
    sigma = torch.full((1000,), 0.3)
    x = x + 0.3 * torch.randn(x.shape, generator=torch.manual_seed(2))
    _, truth = data.logp_and_score(x, sigma)
    state = torch.get_rng_state()
    # The average over the last steps is what counts, hence the long one for a short training.
    nets = [train_toy(data, 16, n, batch_size=128, ema_sigma_rel=0.1) for n in (1, 60, 60)]
    assert torch.equal(torch.get_rng_state(), state)
    first, later, again = (float((net.score(x, sigma) - truth).square().mean()) for net in nets)
    assert later < 0.5 * first
    assert later == again


class Exact:
    """The denoiser of the true score."""

    def __init__(self, data: Mixture) -> None:
        self.data = data

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: None = None) -> Tensor:
        return x + sigma[:, None] ** 2 * self.data.logp_and_score(x, sigma)[1]


def test_true_score_samples_the_data_and_a_longer_one_drops_branches() -> None:
    data = distributions()["A"]
    noise = torch.randn(400, 2, generator=torch.manual_seed(0))
    outliers, coverage = judge(heun_sampler(Exact(data), noise, **SOLVER), data)
    # One in a hundred by definition; 400 samples: standard error 0.5 %, and the solver's error.
    assert outliers == pytest.approx(0.01, abs=0.02)
    truth = judge(data.sample(400, torch.Generator().manual_seed(1)).float(), data)[1]
    # Chance, about 0.015, and that the solver starts from noise around 0 instead of the mean.
    assert coverage == pytest.approx(truth, abs=0.06)
    truncated = heun_sampler(Truncated(Exact(data), 1.4), noise, **SOLVER)
    assert judge(truncated, data)[1] < coverage - 0.1


def test_judge_sees_noise_and_missing_branches() -> None:
    data = distributions()["A"]
    x = data.sample(2000, torch.Generator().manual_seed(1))
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.manual_seed(2))
    assert judge(noisy, data)[0] > 0.2
    half = x[x[:, 0] > x[:, 1]]
    assert judge(half, data)[1] < 0.7 < judge(x, data)[1]


def test_command_draws_the_figure_and_keeps_the_networks(tmp_path: Path) -> None:
    options = ["toy", "--out", str(tmp_path), "--iterations", "8", "--batch-size", "32"]
    options += ["--samples", "50", "--quiet"]
    first = CliRunner().invoke(main, options)
    assert first.exit_code == 0, first.output
    assert first.output.count("outliers") == 5
    with Image.open(tmp_path / "toy2d.png") as picture:
        assert picture.width > 1000
    networks = sorted(tmp_path.glob("*.safetensors"))
    assert len(networks) == 3
    before = [p.stat().st_mtime_ns for p in networks]
    assert CliRunner().invoke(main, options).output == first.output
    assert [p.stat().st_mtime_ns for p in networks] == before
    # Another training is another network.
    assert CliRunner().invoke(main, [*options, "--seed", "1"]).exit_code == 0
    assert all(a < p.stat().st_mtime_ns for a, p in zip(before, networks, strict=True))
