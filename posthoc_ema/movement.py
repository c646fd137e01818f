"""How fast the weights moved during training, estimated from their snapshots.

Averages of one trajectory with cumulative profiles F_i and F_j differ by -∫(F_i - F_j) dθ.
Taking the increments dθ as uncorrelated, with variance rate r(τ) per weight, gives

    E|S_i - S_j|² = ∫ r (F_i - F_j)² dτ + ν_i + ν_j

with ν the variance of storage rounding. The left side is measured on a sample of weights; r,
constant between neighbouring snapshot times, is what explains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.profiles import Profile
from posthoc_ema.quadrature import interval_quadrature

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_RATES = 64  # with more snapshot times than these, neighbouring intervals share a rate
_MAX_PAIRS = 2048

SMOOTHNESS = 0.1
"""Penalty on (log r_{k+1} - log r_k)²; anything from 0.01 to 10 gives nearly the same."""


@dataclass(frozen=True, eq=False)
class Movement:
    """Variance rate of the weights over training time.

    Attributes:
        edges: ``[K+1]`` times, from 0, rising; the rate is constant between neighbours and the
            last one holds beyond the end.
        rate: ``[K]`` mean squared increment of one weight per unit of t, >= 0.
    """

    edges: NDArray[np.float64]
    rate: NDArray[np.float64]

    @classmethod
    def constant(cls, t: float, rate: float = 1.0) -> Movement:
        """The same rate throughout: all that is known without looking at weights."""
        return cls(np.array([0.0, t]), np.array([rate]))

    def quadrature(
        self, times: Sequence[float], end: float, breaks: Sequence[float] = ()
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes and weights for ∫₀^end r(τ) f(τ) dτ.

        Args:
            times: Where f has kinks (the times of the averages); the rate's own are added.
            end: Upper limit of the integral.
            breaks: Further kinks.
        """
        nodes, weights = interval_quadrature([*times, *self.edges, *breaks], end)
        return nodes, weights * self.rate_at(nodes)

    def rate_at(self, tau: NDArray[np.float64]) -> NDArray[np.float64]:
        """r(τ)."""
        last = len(self.rate) - 1
        return self.rate[np.clip(np.searchsorted(self.edges, tau, "right") - 1, 0, last)]


def neighbours(
    times: NDArray[np.float64], reach: int = 3
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs of snapshots whose times are at most ``reach`` places apart.

    Distant pairs say little about where the weights moved, and there are many of them.
    """
    place = np.unique(times, return_inverse=True)[1]
    first, second = np.triu_indices(len(times), 1)
    near = np.flatnonzero(np.abs(place[first] - place[second]) <= reach)
    if len(near) > _MAX_PAIRS:  # evenly spread: thousands of pairs say no more
        near = near[np.linspace(0, len(near) - 1, _MAX_PAIRS).astype(np.intp)]
    return first[near], second[near]


def fit_movement(
    inputs: Sequence[tuple[float, Profile]],
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]],
    distances: NDArray[np.float64],
    noise: NDArray[np.float64],
) -> Movement:
    """Fit the rate to measured distances between snapshots.

    Least squares on the *logarithm* of the distances, so that a quiet phase counts as much as
    a busy one, with neighbouring rates tied together: plain non-negative least squares sets
    single rates to zero and then trusts a trajectory that it takes to stand still.

    Args:
        inputs: ``n`` snapshots as (t, profile).
        pairs: Two ``[m]`` index arrays.
        distances: ``[m]`` mean squared difference per weight of each pair.
        noise: ``[n]`` variance of storage rounding per weight.

    Returns:
        The fitted rate; zero throughout where the snapshots do not differ.
    """
    times = np.unique([t for t, _ in inputs])
    number = min(len(times), _MAX_RATES)
    kept = times[np.linspace(len(times) - 1, 0, number).astype(np.intp)[::-1]]
    edges = np.concatenate([[0.0], kept])
    first, second = pairs
    floor = noise[first] + noise[second]
    usable = distances > 0
    if not usable.any():
        return Movement(edges, np.zeros(len(edges) - 1))
    first, second = first[usable], second[usable]
    distances, floor = distances[usable], floor[usable]

    nodes, weights = interval_quadrature(list(times), float(edges[-1]))
    cumulative = np.stack([profile.cumulative(nodes, t) for t, profile in inputs])
    interval = np.clip(np.searchsorted(edges, nodes, "right") - 1, 0, len(edges) - 2)
    starts = np.searchsorted(interval, np.arange(len(edges) - 1))
    share = np.stack(
        [
            np.add.reduceat(weights * (cumulative[i] - cumulative[j]) ** 2, starts)
            for i, j in zip(first, second, strict=True)
        ]
    )
    # What rounding alone could explain says nothing about movement.
    trust = np.clip(1 - floor / distances, 0.02, 1)
    rate = np.full(len(edges) - 1, float(np.exp(np.mean(np.log(distances / share.sum(1))))))
    return Movement(edges, _gauss_newton(rate, share, distances, floor, trust))


def _gauss_newton(
    rate: NDArray[np.float64],
    share: NDArray[np.float64],
    distances: NDArray[np.float64],
    floor: NDArray[np.float64],
    trust: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Minimise Σ trust² log²(predicted/measured) + λ Σ (Δ log r)² over log r, damped."""
    roughness = np.diff(np.eye(len(rate)), axis=0) * SMOOTHNESS**0.5

    def residuals(log_rate: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        parts = share * np.exp(log_rate)
        predicted = parts.sum(1) + floor
        misfit = trust * np.log(predicted / distances)
        jacobian = trust[:, None] * parts / predicted[:, None]
        return np.concatenate([misfit, roughness @ log_rate]), np.concatenate([jacobian, roughness])

    log_rate, damping = np.log(rate), 1e-3
    value, jacobian = residuals(log_rate)
    for _ in range(50):
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ value
        scale = np.diag(normal).mean() or 1.0
        step = np.linalg.solve(normal + damping * scale * np.eye(len(rate)), gradient)
        trial = log_rate - np.clip(step, -3, 3)
        trial_value, trial_jacobian = residuals(trial)
        gain = value @ value - trial_value @ trial_value
        if gain < 0:
            damping *= 10
            if damping > 1e6:
                break
            continue
        log_rate, value, jacobian, damping = trial, trial_value, trial_jacobian, damping / 4
        if gain <= 1e-9 * (value @ value):
            break
    return np.exp(log_rate)
