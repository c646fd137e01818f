"""The sampler against an exactly solvable case, and its promises about seeds and batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_model.sampler import (
    SAMPLERS,
    SeededNoise,
    euler_sampler,
    generate_images,
    heun_sampler,
    sigma_steps,
)
from tests.reference_model.test_network import small_net

DATA_STD = 0.5


class GaussianDenoiser:
    """Exact D for data N(mean, DATA_STD²): the posterior mean. Counts its evaluations."""

    def __init__(self, mean: float = 0.0) -> None:
        self.mean = mean
        self.sigmas: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert sigma.shape == (len(x),)
        self.sigmas.append(float(sigma[0]))
        s = sigma.reshape(-1, 1, 1, 1)
        return (DATA_STD**2 * x + s**2 * self.mean) / (DATA_STD**2 + s**2)


def noise(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 2, 2, dtype=torch.float64, generator=torch.manual_seed(0))


def exact(noise: Tensor, mean: float, sigma_max: float = 80.0) -> Tensor:
    """Solution at σ = 0: deviations shrink by √(d² / (d² + σ_max²)) along the flow."""
    scale = DATA_STD / math.sqrt(DATA_STD**2 + sigma_max**2)
    return mean + (noise * sigma_max - mean) * scale


@pytest.mark.parametrize(
    ("i", "sigma"),
    [
        (0, 80.0),
        (1, 66.930874),
        (8, 16.591375),
        (12, 6.463662),
        (13, 4.999111),
        (16, 2.173860),
        (19, 0.844620),
        (22, 0.283044),
        (28, 0.015757),
        (30, 0.004267),
        (31, 0.002),
        (32, 0.0),
    ],
)
def test_noise_levels(i: int, sigma: float) -> None:
    # The table has six decimals.
    assert sigma_steps(32)[i].item() == pytest.approx(sigma, abs=6e-7)


def test_solves_the_gaussian_case_at_second_order() -> None:
    errors = []
    for num_steps in (32, 64, 128):
        net = GaussianDenoiser(mean=0.3)
        x = heun_sampler(net, noise(), num_steps=num_steps)
        errors.append(float((x - exact(noise(), 0.3)).abs().max()))
        assert len(net.sigmas) == 2 * num_steps - 1
    # Second order: a quarter of the error for twice the steps.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    assert errors[2] < 2e-3


def test_first_step_is_heuns() -> None:
    """By hand: one Heun step from 80 to 0.002, then Euler to 0."""
    x0 = noise() * 80
    net = GaussianDenoiser()

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - net(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma

    euler = x0 + (0.002 - 80) * slope(x0, 80)
    x1 = x0 + (0.002 - 80) * (slope(x0, 80) + slope(euler, 0.002)) / 2
    expected = x1 - 0.002 * slope(x1, 0.002)
    # Float64 rounding beside intermediate values of 80.
    torch.testing.assert_close(
        heun_sampler(net, noise(), num_steps=2), expected, atol=1e-11, rtol=0
    )


def test_euler_solves_it_at_first_order() -> None:
    errors = []
    for num_steps in (64, 128, 256):
        net = GaussianDenoiser(mean=0.3)
        x = euler_sampler(net, noise(), num_steps=num_steps)
        errors.append(float((x - exact(noise(), 0.3)).abs().max()))
        assert len(net.sigmas) == num_steps
    # First order: half of the error for twice the steps.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_one_step_is_the_denoiser() -> None:
    net = GaussianDenoiser(0.3)
    expected = net(noise() * 80, torch.full((4,), 80.0, dtype=torch.float64))
    torch.testing.assert_close(heun_sampler(net, noise(), num_steps=1), expected)


def test_guidance_mixes_denoisers() -> None:
    """Two Gaussians of equal width: guidance by w moves the mean to w·m + (1 − w)·g."""
    net, gnet = GaussianDenoiser(0.3), GaussianDenoiser(-0.1)
    x = heun_sampler(net, noise(), gnet=gnet, guidance=2.0)
    plain = heun_sampler(GaussianDenoiser(2 * 0.3 + 0.1), noise())
    # Linear in the mean, so the same solver steps give the same numbers up to rounding.
    torch.testing.assert_close(x, plain, rtol=1e-10, atol=1e-10)


def test_guidance_of_one_does_not_evaluate_the_guide() -> None:
    gnet = GaussianDenoiser(-0.1)
    plain = heun_sampler(GaussianDenoiser(0.3), noise())
    guided = heun_sampler(GaussianDenoiser(0.3), noise(), gnet=gnet)
    torch.testing.assert_close(guided, plain, rtol=0, atol=0)
    assert gnet.sigmas == []


def test_guidance_interval_is_open_below_and_closed_above() -> None:
    gnet = GaussianDenoiser(-0.1)
    steps = sigma_steps(32).tolist()
    lo, hi = steps[22], steps[17]
    heun_sampler(GaussianDenoiser(0.3), noise(), gnet=gnet, guidance=2, guidance_interval=(lo, hi))
    assert sorted(set(gnet.sigmas), reverse=True) == steps[17:22]


def test_guidance_needs_a_guide() -> None:
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a network to guide with"):
        heun_sampler(GaussianDenoiser(), noise(), guidance=2.0)


def test_churn_keeps_the_distribution() -> None:
    """Adding noise and solving back leaves N(0.3, 0.5²) as it is, but not each sample."""
    torch.manual_seed(0)
    start = torch.randn(5000, 1, 2, 2, dtype=torch.float64)
    x = heun_sampler(GaussianDenoiser(0.3), start, S_churn=20, num_steps=64)
    # 20,000 samples: standard errors 0.0035 and 0.0025; times 4, and solver error of 1e-3.
    assert x.mean().item() == pytest.approx(0.3, abs=0.015)
    assert x.std().item() == pytest.approx(DATA_STD, abs=0.012)
    assert (x - exact(start, 0.3)).std() > 0.1


def test_churn_acts_between_s_min_and_s_max() -> None:
    calls = []

    def randn_like(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.zeros_like(x)

    steps = sigma_steps(32).tolist()
    net = GaussianDenoiser()
    options: dict[str, Any] = dict(S_churn=8.0, S_min=steps[20], S_max=steps[10])
    heun_sampler(net, noise(), randn_like=randn_like, **options)
    assert len(calls) == 11
    # The first evaluation of a churned step is at σ · (1 + S_churn / num_steps).
    assert any(abs(s - steps[10] * 1.25) < 1e-9 for s in net.sigmas)


def test_noise_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        sigma_steps(8, sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        sigma_steps(0)


def test_noise_of_a_seed_does_not_depend_on_its_neighbours() -> None:
    together, alone = SeededNoise([5, 6, 7]), SeededNoise([6])
    first, second = together.randn((1, 2, 2)), alone.randn((1, 2, 2))
    torch.testing.assert_close(first[1:2], second, rtol=0, atol=0)
    x = torch.empty(3, 1, 2, 2, dtype=torch.float64)
    churned = together.randn_like(x)
    assert churned.dtype == torch.float64
    torch.testing.assert_close(churned[1:2], alone.randn_like(x[:1]), rtol=0, atol=0)
    assert together.randint(1000)[1] == alone.randint(1000)[0]


def assert_same_images(a: Tensor, b: Tensor) -> None:
    """Equal but for the last float32 bit, which can turn a rounding to 8 bits."""
    difference = (a.int() - b.int()).abs()
    if a.shape != b.shape or difference.max() > 1 or (difference > 0).float().mean() > 0.01:
        raise AssertionError(f"images differ by up to {int(difference.max())} of 255")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_treats_images_alike_gives_the_same_bits_in_any_batch(sampler: str) -> None:
    """What the sampler itself does depends on nothing but an image's own seed."""

    def solve(seeds: list[int]) -> Tensor:
        rng = SeededNoise(seeds)
        return SAMPLERS[sampler](
            GaussianDenoiser(0.3),
            rng.randn((1, 8, 8)),
            gnet=GaussianDenoiser(0.1),
            guidance=1.5,
            S_churn=10.0,
            randn_like=rng.randn_like,
        )

    whole = solve([0, 1, 2, 3, 4])
    for seeds in ([0], [1, 2], [4, 3, 0]):
        torch.testing.assert_close(solve(seeds), whole[seeds], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"S_churn": 10.0},
        {"sampler": "euler"},
        {"gnet": small_net(label_dim=0), "guidance": 2.0},
    ],
    ids=["heun", "churn", "euler", "guided"],
)
def test_images_do_not_depend_on_the_batch_split(options: dict[str, Any]) -> None:
    net = small_net(label_dim=10)
    whole = generate_images(net, range(7), batch_size=7, num_steps=6, **options)
    split = generate_images(net, range(7), batch_size=3, num_steps=6, **options)
    picked = generate_images(net, [4, 2], batch_size=2, num_steps=6, **options)
    assert whole.shape == (7, 2, 8, 8)
    assert whole.dtype == torch.uint8
    assert_same_images(whole, split)
    assert_same_images(whole[[4, 2]], picked)
    with pytest.raises(AssertionError, match="images differ"):
        assert_same_images(whole[[2, 4]], picked)


def test_generating_leaves_the_network_as_it_was() -> None:
    net, guide = small_net(label_dim=10).train(), small_net(label_dim=10).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    generate_images(net, [0], num_steps=2, gnet=[guide], guidance=[2.0])
    for used in (net, guide):
        assert used.training
        for name, value in used.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler must be one of heun, euler"):
        generate_images(small_net(label_dim=10), [0], sampler="dpm")


def test_classes_choose_the_images() -> None:
    net = small_net(label_dim=10)
    each = generate_images(net, [1, 1], torch.tensor([3, 8]), num_steps=4)
    assert (each[0] != each[1]).any()
    assert_same_images(each[:1], generate_images(net, [1], 3, num_steps=4))


def test_classes_that_do_not_fit_are_named() -> None:
    net = small_net(label_dim=10)
    with pytest.raises(ValueError, match=r"classes must lie in 0\.\.9 \(got 10\.\.10\)"):
        generate_images(net, [0], 10)
    with pytest.raises(ValueError, match=r"class_labels has shape \(2,\) for 3 seeds"):
        generate_images(net, [0, 1, 2], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="unconditional"):
        generate_images(small_net(label_dim=0), [0], 3)
