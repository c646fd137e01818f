"""The movement of the weights, recovered from averages of simulated random walks."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import PowerFunction, Profile, solve
from posthoc_ema.movement import Movement, fit_movement, informative
from posthoc_ema.quadrature import interval_quadrature

STEPS, WALKS = 512, 4096

TWO_TRACKS = (PowerFunction(0.05), PowerFunction(0.10))


def averages_of_walks(
    rate: Any, kept: list[int], seed: int = 0
) -> tuple[list[tuple[float, Profile]], Any]:
    """(t, profile) and values ``[averages, walks]`` of independent Gaussian random walks.

    ``rate`` is the variance of each of the steps at t = 1 … STEPS.
    """
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((STEPS, WALKS)) * np.sqrt(np.broadcast_to(rate, STEPS))[:, None]
    walks = np.cumsum(steps, axis=0)
    grid = np.arange(1.0, STEPS + 1)
    described = [(float(t), profile) for t in kept for profile in TWO_TRACKS]
    values = [profile.weights(grid[: int(t)]) @ walks[: int(t)] for t, profile in described]
    return described, np.stack(values)


def fitted(described: list[tuple[float, Profile]], values: Any, noise: Any) -> Movement:
    differences = np.diff(values, axis=0)
    products = differences @ differences.T / values.shape[1]
    return fit_movement(described, products, noise, values.shape[1])


def mean_rates(movement: Movement, edges: list[int]) -> Any:
    """Mean rate between given times."""
    grid = np.arange(0.5, STEPS)
    rate = movement.rate_at(grid)
    return np.array([rate[a:b].mean() for a, b in pairwise(edges)])


EVEN = list(range(64, STEPS + 1, 64))
UNEVEN = [20, 50, 64, 100, 190, 200, 310, 400, 480, 512]

# A mean of 4096 squared normal numbers is off by √(2/4096) = 2 %; pairs that share a snapshot
# err together, and one interval is seen by a handful of pairs: twice that in practice. Walks
# move in steps, not continuously: up to 3 % more for the first snapshots, at t = 20.
STATISTICAL = 0.15


@pytest.mark.parametrize("kept", [EVEN, UNEVEN])
@pytest.mark.parametrize("rate", [1.0, 1e-8])
def test_constant_rate(kept: list[int], rate: float) -> None:
    described, values = averages_of_walks(rate, kept)
    movement = fitted(described, values, np.zeros(len(described)))
    assert set(kept) <= set(movement.edges)
    seen = movement.rate[movement.edges[1:] > kept[0] / 2]  # before, it is a guess
    assert_close(seen, rate, rtol=2 * STATISTICAL, reason="4096 walks, parts of intervals")
    assert_close(mean_rates(movement, kept), rate, rtol=STATISTICAL, reason="4096 walks")
    assert_at_most(movement.drift, 0.2, reason="there is none")


@pytest.mark.parametrize("kept", [EVEN, UNEVEN])
def test_falling_rate(kept: list[int]) -> None:
    """An inverse-square-root learning rate: the variance of steps falls as 1/t."""
    grid = np.arange(1.0, STEPS + 1)
    described, values = averages_of_walks(1 / grid, kept)
    movement = fitted(described, values, np.zeros(len(described)))
    edges = [0, *kept]
    true = [np.mean(1 / grid[a:b]) for a, b in pairwise(edges)]
    # The first interval holds rates from 1 to 1/20, and snapshots see mostly its end.
    assert_close(
        mean_rates(movement, kept), true[1:], rtol=2 * STATISTICAL, reason="4096 walks, smoothing"
    )


def test_a_rate_that_drops_is_not_constant() -> None:
    """Tenfold in the middle: within the tolerance of the tests above, and not of one rate."""
    rate = np.where(np.arange(STEPS) < 256, 1.0, 0.1)
    described, values = averages_of_walks(rate, EVEN)
    movement = fitted(described, values, np.zeros(len(described)))
    rates = mean_rates(movement, [0, *EVEN])
    assert_close(rates[:3], 1.0, rtol=2 * STATISTICAL, reason="4096 walks, smoothing")
    assert_close(rates[5:], 0.1, rtol=2 * STATISTICAL, reason="4096 walks, smoothing")


def test_noise_is_not_movement() -> None:
    """Rounding as large as the differences between neighbours, declared: rates do not rise."""
    described, values = averages_of_walks(1.0, EVEN)
    variance = 10.0
    noisy = values + sqrt(variance) * np.random.default_rng(1).standard_normal(values.shape)
    declared = fitted(described, noisy, np.full(len(described), variance))
    assert_close(
        mean_rates(declared, [0, *EVEN]),
        1.0,
        rtol=2 * STATISTICAL,
        reason="4096 walks, noise upon them",
    )
    taken_for_movement = fitted(described, noisy, np.zeros(len(described)))
    assert_at_most(1.5, taken_for_movement.rate.mean(), reason="a negative control")


def test_identical_snapshots_do_not_move() -> None:
    described = [(float(t), profile) for t in EVEN for profile in TWO_TRACKS]
    movement = fitted(described, np.ones((len(described), 3)), np.full(len(described), 1e-12))
    assert not movement.rate.any()
    assert movement.drift == 0


def test_a_phase_of_standstill() -> None:
    """Frozen for a quarter of the run: rates there fall far, and stay finite and positive."""
    rate = np.where((np.arange(STEPS) >= 192) & (np.arange(STEPS) < 320), 0.0, 1.0)
    described, values = averages_of_walks(rate, EVEN)
    movement = fitted(described, values, np.zeros(len(described)))
    assert (movement.rate > 0).all()
    assert np.isfinite(movement.rate).all()
    assert_at_most(
        mean_rates(movement, [0, *EVEN])[3:5], 0.5, reason="smoothness keeps it from zero"
    )


def test_predicted_error_is_the_error() -> None:
    """Reconstruct averages of lengths never tracked: their mean squared error is as predicted."""
    described, values = averages_of_walks(1.0, EVEN)
    noise = np.full(len(described), 1e-12)
    movement = fitted(described, values, noise)
    targets = [0.02, 0.03, 0.075, 0.15, 0.2]
    solution = solve(described, [(STEPS, s) for s in targets], movement=movement, noise=noise)
    rng = np.random.default_rng(0)
    walks = np.cumsum(rng.standard_normal((STEPS, WALKS)), axis=0)
    grid = np.arange(1.0, STEPS + 1)
    true = np.stack([PowerFunction(s).weights(grid) @ walks for s in targets])
    error = ((solution.coefficients @ values - true) ** 2).mean(1)
    assert_close(
        error / solution.expected_square, 1, rtol=2 * STATISTICAL, reason="rate within 15 %"
    )


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=30), st.integers(0, 7))
def test_quadrature_is_exact_for_polynomials(steps: list[float], degree: int) -> None:
    """On any intervals; order 4, its lowest, integrates degree 7."""
    edges = np.cumsum(steps)
    end = float(edges[-1])
    nodes, weights = interval_quadrature(edges.tolist(), end)
    assert ((nodes > 0) & (nodes < end)).all()
    assert_close(
        weights @ (nodes / end) ** degree, end / (degree + 1), rtol=1e-13, reason="summation"
    )


def test_rate_is_constant_between_edges() -> None:
    """And the last one holds beyond the end."""
    movement = Movement(np.array([0.0, 1.0, 3.0]), np.array([5.0, 2.0]))
    assert_equal(movement.rate_at(np.array([0.0, 0.5, 1.0, 2.9, 3.0, 9.0])), [5, 5, 2, 2, 2, 2])
    nodes, weights = movement.quadrature([0.7, 2.0, 4.0], end=4.0)
    assert_close(weights.sum(), 5 * 1 + 2 * 3, rtol=1e-14, reason="summation")
    assert_close(weights @ nodes, 5 * 0.5 + 2 * 7.5, rtol=1e-14, reason="summation")


def test_drift_is_told_from_noise() -> None:
    """Walks with a steady direction each, as much of it as of the noise: α is about one."""
    described, values = averages_of_walks(1.0, EVEN)
    still = fitted(described, values, np.zeros(len(described)))
    grid = np.arange(1.0, STEPS + 1)
    means = np.array([p.weights(grid[: int(t)]) @ grid[: int(t)] for t, p in described])
    directions = np.random.default_rng(1).standard_normal(WALKS) / sqrt(STEPS)
    drifting = fitted(described, values + means[:, None] * directions, np.zeros(len(described)))
    assert_at_most(still.drift, 0.2, reason="there is none")
    assert_at_most(0.5, drifting.drift, reason="a direction that is never forgotten looks weaker")
    assert_at_most(drifting.drift, 3.0, reason="or stronger, as e^{-1/2} of it is expected")


@pytest.mark.parametrize("drift", [0.0, 0.7])
def test_whitened_rows_give_the_covariance(drift: float) -> None:
    movement = Movement(np.array([0.0, 1.0, 3.0]), np.array([5.0, 2.0]), drift)
    nodes, weights = movement.quadrature([0.7, 2.0], end=3.0)
    functions = np.stack([np.sin(nodes), nodes**2, np.ones_like(nodes)], axis=1)
    rows = movement.whiten(nodes, weights, functions)
    mass = weights / np.sqrt(movement.rate_at(nodes))
    memory = np.exp(-np.abs(nodes[:, None] - nodes) / 3)
    expected = functions.T @ (weights[:, None] * functions)
    expected += drift / 3 * (mass[:, None] * functions).T @ memory @ (mass[:, None] * functions)
    assert_close(rows.T @ rows, expected, rtol=5e-3, reason="512 steps of drift")


@given(st.integers(1, 600))
def test_what_is_estimated_from_is_recent_or_spread(number: int) -> None:
    """Never many, the last ones without gaps, from the first on."""
    times = np.arange(1.0, number + 1)
    chosen = informative(np.repeat(times, 2))
    assert len(chosen) <= 40
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] == 1
    assert_equal(chosen[-16:], times[-16:])
