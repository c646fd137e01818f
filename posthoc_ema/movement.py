"""How the weights moved during training, estimated from their snapshots.

Averages of one trajectory with cumulative profiles F_i and F_j differ by -∫(F_i - F_j) dθ. The
increments dθ have two parts. Gradient noise is uncorrelated over time, with variance rate r(τ) per
weight; a drift follows the slope of the loss, at a speed that goes with the same learning rate and
in a direction that is slowly forgotten:

    E[dθ(τ) dθ(τ')] = (r(τ) δ(τ - τ') + α √(r(τ) r(τ')) exp(-|τ - τ'| / T)) dτ dτ'

with T the length of training. Where weights fluctuate about their path faster than snapshots can
tell, as those of a noisy equilibrium do, a third part is their white noise of density β r(τ), which
densities of profiles meet, not cumulative profiles: the metric of the paper. Differences of
snapshots are linear in dθ, so r, α and β give their covariance Σ, storage rounding included. What
was measured on a sample of weights is the matrix S of their mean products, and the estimate
minimises log det Σ + tr(Σ⁻¹ S): the likelihood of Gaussian increments (restricted maximum
likelihood, as constants drop out of differences). Unlike a fit to distances it weighs small
combinations of snapshots as much as large ones, and errors of reconstructions are such
combinations.
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

SMOOTHNESS = 0.01
"""Penalty on (log r_{k+1} - log r_k)²; from 0.003 to 0.03 gives nearly the same."""

_START_SLOPE = -0.5  # of log r over log τ before the first snapshot, which nothing tells
_GRADES = 0.5 ** np.arange(1, 4)
_START = np.array([0.125, 0.25, 0.5, 0.75])
_PERSISTENCE = 0.5
_MAX_TIMES = 40  # that an estimate is made from
_LATE_TIMES = 16  # of these, the last ones without gaps
_FEW = 1000  # weights below which S is itself uncertain
_LEAST_RATE = 1e-12  # of the largest one
_STEPS_OF_DRIFT = 512  # its direction changes in so many steps over training
_JITTER = 1e-4  # what a search for it begins with
_TELLING = 0.25  # gain in likelihood for each difference that makes jitter real
_LIMIT = 1e-13  # of the diagonal of Σ: what double precision leaves of it


@dataclass(frozen=True, eq=False)
class Movement:
    """Covariance of the increments of a weight over training time.

    Attributes:
        edges: ``[K+1]`` times, from 0, rising; the rate is constant between neighbours and the
            last one holds beyond the end.
        rate: ``[K]`` mean squared increment of one weight per unit of t, >= 0.
        drift: α times the last edge, >= 0: about the variance that drift adds over all of
            training, relative to that of the noise.
        jitter: β over the square of the last edge, >= 0: weights that fluctuate about their path
            faster than snapshots can tell.
    """

    edges: NDArray[np.float64]
    rate: NDArray[np.float64]
    drift: float = 0.0
    jitter: float = 0.0

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

    def whiten(
        self,
        nodes: NDArray[np.float64],
        weights: NDArray[np.float64],
        functions: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Rows whose products are covariances of the integrals ∫ f dθ.

        Args:
            nodes: ``[m]`` as from :meth:`quadrature`.
            weights: ``[m]`` likewise.
            functions: ``[m, k]`` values of f at the nodes.

        Returns:
            ``[m, k]``, more with drift; their Gram matrix ``[k, k]`` is what is meant.
        """
        rows = np.sqrt(weights)[:, None] * functions
        rate, parts = self.rate_at(nodes), [rows]
        if self.jitter:
            parts.append(self.jitter**0.5 * self.edges[-1] * _slopes(nodes, rate, functions))
        if not self.drift:
            return np.concatenate(parts)
        mass = np.divide(weights, np.sqrt(rate), out=np.zeros_like(rate), where=rate > 0)
        end = float(self.edges[-1])
        # Drift is slow: what it does within a small step needs no rows of its own.
        step = np.floor(nodes / end * _STEPS_OF_DRIFT)
        starts = np.flatnonzero(np.diff(step, prepend=-1.0))
        slow = np.add.reduceat(mass[:, None] * functions, starts)
        steady = _factor_of_memory(step[starts] / _STEPS_OF_DRIFT, slow)
        return np.concatenate([*parts, (self.drift / end) ** 0.5 * steady])

    def rate_at(self, tau: NDArray[np.float64]) -> NDArray[np.float64]:
        """r(τ)."""
        return self.rate[_interval(self.edges, tau)]


def _slopes(
    nodes: NDArray[np.float64], rate: NDArray[np.float64], functions: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rows whose products are ∫ r f' g' dτ, from differences between neighbouring nodes."""
    mean = (rate[1:] + rate[:-1]) / 2
    return np.sqrt(mean / np.diff(nodes))[:, None] * np.diff(functions, axis=0)


def _interval(edges: NDArray[np.float64], tau: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.clip(np.searchsorted(edges, tau, "right") - 1, 0, len(edges) - 2)


def _factor_of_memory(tau: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lᵀ·values with L Lᵀ = exp(-|τ_i - τ_j|), for τ rising within a few units.

    Such a covariance is that of an Ornstein-Uhlenbeck process, whose innovations are
    independent: value j counts exp(-(τ_j - τ_i)) in each earlier innovation i.
    """
    fading = np.exp(-tau)[:, None]
    later = np.cumsum((fading * values)[::-1], axis=0)[::-1] / fading
    innovation = np.sqrt(-np.expm1(-2 * np.diff(tau)))
    return np.concatenate([[1.0], innovation])[:, None] * later


def informative(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Snapshot times that an estimate is made from: the last ones, and of the others some.

    Distant times far apart say how fast the weights moved there; only the last ones need detail.
    """
    times = np.unique(times)
    early = len(times) - _LATE_TIMES
    if len(times) <= _MAX_TIMES:
        return times
    chosen = np.linspace(0, early - 1, _MAX_TIMES - _LATE_TIMES).round().astype(np.intp)
    return np.concatenate([times[chosen], times[early:]])


def fit_movement(
    inputs: Sequence[tuple[float, Profile]],
    products: NDArray[np.float64],
    noise: NDArray[np.float64],
    weights: float = np.inf,
) -> Movement:
    """Fit rate and drift to the differences between consecutive snapshots.

    Args:
        inputs: ``n`` >= 2 snapshots as (t, profile), in order of time.
        products: ``[n-1, n-1]`` mean over weights of the products of the differences
            S_{i+1} - S_i.
        noise: ``[n]`` variance of storage rounding per weight.
        weights: How many weights the mean was taken over.

    Returns:
        The fitted movement; of rate zero throughout where the snapshots do not differ.
    """
    edges = _grid(np.unique([t for t, _ in inputs]))
    measured = np.diag(products)
    usable = measured > 0
    if not usable.any():
        return Movement(edges, np.zeros(len(edges) - 1))
    breaks = [b for t, profile in inputs for b in profile.breakpoints(t)]
    nodes, mass = interval_quadrature([*edges.tolist(), *breaks], float(edges[-1]))
    survival = np.stack([1 - profile.cumulative(nodes, t) for t, profile in inputs], axis=1)
    model = _Model(nodes, mass, np.diff(survival, axis=1), edges, noise)

    of_unit_rate = mass @ model.rows**2
    level = np.mean(np.log(measured[usable] / of_unit_rate[usable]))
    penalty = _smoothness(edges, float(inputs[0][0]), SMOOTHNESS * max(1.0, _FEW / weights))
    start = np.concatenate([np.full(len(edges) - 1, level), [0.0, -np.inf]])
    fitted, misfit = _minimise(model, products, start, *penalty)
    # Real training shows no jitter; where there is some, it explains much.
    telling = _TELLING * len(products)
    if misfit - _least_misfit(products) > telling:
        start = np.append(fitted[:-1], np.log(_JITTER))
        jittery, with_jitter = _minimise(model, products, start, *penalty)
        fitted = jittery if with_jitter < misfit - telling else fitted
    rate, (drift, jitter) = np.exp(fitted[:-2]), np.exp(fitted[-2:]).tolist()
    # Where weights of some tensors rest, others may move: no coefficient there shall be free.
    return Movement(edges, np.maximum(rate, _LEAST_RATE * rate.max()), drift, jitter)


def _grid(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of rates, two for each interval, more for the outer ones."""
    starts = np.concatenate([[0.0], times[:-1]])
    edges = np.concatenate([starts, times, (starts + times) / 2, times[0] * _START])
    # Short averages at the end see but a small part of the last interval.
    return np.unique(np.concatenate([edges, times[-1] - (times[-1] - starts[-1]) * _GRADES]))


def _smoothness(
    edges: NDArray[np.float64], first: float, penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix and right side of the penalty |R p - a|²."""
    k = len(edges) - 1
    rough, aim = np.zeros((k, k + 2)), np.zeros(k)
    rough[:-1, :k] = np.diff(np.eye(k), axis=0)
    # Nothing tells the rate long before the first snapshot: go on with a part of the slope, over
    # log τ, that is seen where its averages begin to count, and rise a little towards 0.
    centres = np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])
    distance = np.diff(np.log(centres))
    for i in np.flatnonzero(edges[1:-1] <= first / 2):
        rough[i, :k] -= _PERSISTENCE * rough[i + 1, :k] * distance[i] / distance[i + 1]
        aim[i] = (1 - _PERSISTENCE) * _START_SLOPE * distance[i]
    rough *= penalty**0.5
    rough[-1, k] = 0.03  # where there is no telling, a drift of one
    return rough, aim * penalty**0.5


class _Model:
    """Σ as a function of p = (log r_1 … log r_K, log drift, log jitter), and its derivatives."""

    def __init__(
        self,
        nodes: NDArray[np.float64],
        mass: NDArray[np.float64],
        rows: NDArray[np.float64],
        edges: NDArray[np.float64],
        noise: NDArray[np.float64],
    ) -> None:
        self.rows, self.mass = rows, mass
        self.interval = _interval(edges, nodes)
        self.starts = np.searchsorted(self.interval, np.arange(len(edges) - 1))
        self.tau, self.end = nodes / edges[-1], edges[-1]
        self.parts = list(map(slice, self.starts, [*self.starts[1:], len(nodes)]))
        self.noisy = self._products(np.sqrt(mass)[:, None] * rows)
        # Differences lie between nodes, mostly of one interval.
        self.jitter = self.end**2 * self._products(_slopes(nodes, np.ones(len(nodes)), rows))
        # Neighbouring differences share a snapshot, and its rounding.
        self.noise = np.diag(noise[1:] + noise[:-1])
        shared = np.arange(len(noise) - 2)
        self.noise[shared, shared + 1] = self.noise[shared + 1, shared] = -noise[1:-1]

    def _products(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gram matrices of the rows of each interval: what a rate of one there gives."""
        return np.stack([rows[part].T @ rows[part] for part in self.parts])

    def covariance(self, p: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Σ ``[n-1, n-1]`` and its derivatives ``[K+2, n-1, n-1]``."""
        rates, (drift, jitter) = np.exp(p[:-2]), np.exp(p[-2:]) / [self.end, 1]
        rate = rates[self.interval]
        slow = (self.mass * np.sqrt(rate))[:, None] * self.rows
        fading = np.exp(-self.tau)[:, None]
        # exp(-|τ_i - τ_j|) times the columns, by sums from both sides.
        spread = fading * np.cumsum(slow / fading, axis=0) - slow
        spread += np.cumsum((fading * slow)[::-1], axis=0)[::-1] / fading
        derivatives = np.empty((len(p), rows := self.rows.shape[1], rows))
        np.multiply(rates[:, None, None], self.noisy, out=derivatives[:-2])
        for part, derivative in zip(self.parts, derivatives, strict=False):
            cross = slow[part].T @ ((drift / 2) * spread[part])
            derivative += cross
            derivative += cross.T
        derivatives[-2] = drift * (slow.T @ spread)
        if jitter:
            jittery = jitter * rates[:, None, None] * self.jitter
            derivatives[:-2] += jittery
            derivatives[-1] = jittery.sum(0)
        else:
            derivatives[-1] = 0
        return derivatives[:-2].sum(0) + self.noise, derivatives


def _least_misfit(products: NDArray[np.float64]) -> float:
    """Log det Σ + tr(Σ⁻¹ S) where Σ is S itself: no model can have less."""
    scale = 1 / np.sqrt(np.maximum(np.diag(products), np.finfo(np.float64).tiny))
    scaled = products * scale[:, None] * scale + _LIMIT * np.eye(len(products))
    return float(np.linalg.slogdet(scaled)[1] - 2 * np.log(scale).sum()) + len(products)


def _minimise(
    model: _Model,
    products: NDArray[np.float64],
    p: NDArray[np.float64],
    rough: NDArray[np.float64],
    aim: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """Fisher scoring with damping, on log det Σ + tr(Σ⁻¹ S) + penalties; where, and how small."""

    def evaluate(
        p: NDArray[np.float64],
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        sigma, derivatives = model.covariance(p)
        scale = 1 / np.sqrt(np.diag(sigma))
        scaled = sigma * scale[:, None] * scale + _LIMIT * np.eye(len(sigma))
        whitening = np.linalg.inv(np.linalg.cholesky(scaled)) * scale
        seen = whitening @ products @ whitening.T
        value = float(np.trace(seen)) - 2 * float(np.log(np.diag(whitening)).sum())
        # Two large products for all derivatives, which are symmetric, not two small ones for each.
        once = derivatives.reshape(-1, len(sigma)) @ whitening.T
        once = once.reshape(derivatives.shape).swapaxes(1, 2).reshape(-1, len(sigma))
        flat = (once @ whitening.T).reshape(len(p), -1)
        gradient = flat @ (np.eye(len(sigma)) - seen).ravel()
        off = rough[:, :-1] @ p[:-1] - aim  # of jitter nothing is known beforehand
        # Of one half: of a sum of squares the Gauss-Newton matrix.
        return (
            value + float(off @ off),
            gradient + 2 * rough.T @ off,
            flat @ flat.T + 2 * rough.T @ rough,
        )

    damping = 1e-3
    value, gradient, hessian = evaluate(p)
    for _ in range(60):
        ridge = damping * np.diag(np.diag(hessian) + 1e-9)
        step = np.clip(np.linalg.solve(hessian + ridge, gradient), -2, 2)
        found = evaluate(p - step)
        gain = value - found[0]
        if not gain >= 0:
            damping = max(damping, 1e-3) * 10
            if damping > 1e6:
                break
            continue
        p, damping = p - step, damping / 5
        value, gradient, hessian = found
        if gain <= 1e-3:
            break
    return p, value
