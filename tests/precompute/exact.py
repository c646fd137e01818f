"""Post-hoc EMA to 50 digits, straight from the equations of arXiv:2312.02696.

An average is a pair (t, profile); a profile is ("power", σ_rel), ("exponential", half-life) or
("uniform", fraction of t). All float arguments are taken as the exact numbers that they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from mpmath import mp, mpf

mp.dps = 50

Profile = tuple[str, float]
Average = tuple[float, Profile]


@cache
def gamma_of(sigma_rel: float) -> Any:
    """Largest root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²) (Eq. 126)."""
    s = 1 / mpf(sigma_rel) ** 2
    roots = mp.polyroots([1, 7, 16 - s, 12 - s], maxsteps=500, extraprec=400)
    return max(mp.re(root) for root in roots)


def sigma_rel_of(gamma: float) -> Any:
    """Eq. 123."""
    g = mpf(gamma)
    return mp.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def beta(sigma_rel: float, t_next: float, t_delta: float) -> Any:
    """Eq. 127."""
    return (1 - mpf(t_delta) / mpf(t_next)) ** (gamma_of(sigma_rel) + 1)


def cumulative(average: Average, tau: Any) -> Any:
    """F(τ) on 0 <= τ; one from t on."""
    t, (kind, value) = mpf(average[0]), average[1]
    if tau >= t:
        return mpf(1)
    if kind == "power":
        return (tau / t) ** (gamma_of(value) + 1)
    if kind == "exponential":
        return mpf(2) ** ((tau - t) / mpf(value))
    return max(mpf(0), 1 - (t - tau) / (mpf(value) * t))


def density(average: Average, tau: Any) -> Any:
    """p(τ) on 0 < τ <= t, without the jump of an exponential at 0."""
    t, (kind, value) = mpf(average[0]), average[1]
    if tau > t:
        return mpf(0)
    if kind == "power":
        g = gamma_of(value)
        return (g + 1) / t * (tau / t) ** g
    if kind == "exponential":
        return mp.ln2 / mpf(value) * mpf(2) ** ((tau - t) / mpf(value))
    return 1 / (mpf(value) * t) if tau >= t - mpf(value) * t else mpf(0)


def _kinks(average: Average) -> list[Any]:
    t, (kind, value) = mpf(average[0]), average[1]
    return [t, t - mpf(value) * t] if kind == "uniform" else [t]


def _integrate(function: Any, a: Average, b: Average, end: Any) -> Any:
    # Halving panels towards the end: a short EMA has all its weight there.
    graded = [end - end * mpf(2) ** -k for k in range(1, 12)]
    points = sorted({mpf(0), end, *graded, *(k for k in _kinks(a) + _kinks(b) if 0 < k < end)})
    # Panels narrower than rounding come from kinks that coincide but for their last digits.
    points = [p for p, q in pairwise(points) if q - p > end * mpf(10) ** -40] + [end]
    return mp.quad(function, points)


def inner_product(a: Average, b: Average) -> Any:
    """⟨p_a, p_b⟩: Eq. 151 for power functions, else by quadrature."""
    if a[1][0] == b[1][0] == "power":
        (t_a, g_a), (t_b, g_b) = sorted((mpf(t), gamma_of(s)) for t, (_, s) in (a, b))
        return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** g_b / ((g_a + g_b + 1) * t_b)
    end = min(mpf(a[0]), mpf(b[0]))
    return _integrate(lambda tau: density(a, tau) * density(b, tau), a, b, end)


def survival_product(a: Average, b: Average, edges: Sequence[float], rate: Sequence[float]) -> Any:
    """∫ r(τ) (1-F_a)(1-F_b) dτ with r constant between edges (the last one holds beyond).

    In closed form for two power functions: with τ up to the earlier t, the integrand is
    1 - (τ/t_a)^a - (τ/t_b)^b + (τ/t_a)^a (τ/t_b)^b.
    """
    total = mpf(0)
    end = min(mpf(a[0]), mpf(b[0]))
    bounds = [mpf(e) for e in edges[:-1]] + [mp.inf]
    for low, high, r in zip(bounds[:-1], bounds[1:], rate, strict=True):
        high = min(high, end)
        if low >= high:
            continue
        if a[1][0] == b[1][0] == "power":
            value = _power_antiderivative(a, b, high) - _power_antiderivative(a, b, low)
        else:
            # These cases use one rate throughout.
            assert low == 0
            value = _integrate(
                lambda tau: (1 - cumulative(a, tau)) * (1 - cumulative(b, tau)), a, b, high
            )
        total += mpf(r) * value
    return total


def _power_antiderivative(a: Average, b: Average, tau: Any) -> Any:
    if tau == 0:
        return mpf(0)
    p, q = gamma_of(a[1][1]) + 1, gamma_of(b[1][1]) + 1
    u, v = (tau / mpf(a[0])) ** p, (tau / mpf(b[0])) ** q
    return tau * (1 - u / (p + 1) - v / (q + 1) + u * v / (p + q + 1))


class PositiveDefinite:
    """Cholesky factor of a symmetric matrix given as rows of mpf."""

    def __init__(self, matrix: list[list[Any]]) -> None:
        self.rows: list[list[Any]] = []
        for i, source in enumerate(matrix):
            row: list[Any] = []
            for j in range(i):
                other = self.rows[j]
                row.append((source[j] - mp.fdot(row, other[:j])) / other[j])
            row.append(mp.sqrt(source[i] - mp.fdot(row, row)))
            self.rows.append(row)
        self.columns = [[r[j] for r in self.rows[j:]] for j in range(len(matrix))]

    def solve(self, right: Sequence[Any]) -> list[Any]:
        forward: list[Any] = []
        for row, value in zip(self.rows, right, strict=True):
            forward.append((value - mp.fdot(row[:-1], forward)) / row[-1])
        backward: list[Any] = []
        for column, value in zip(reversed(self.columns), reversed(forward), strict=True):
            backward.insert(0, (value - mp.fdot(column[1:], backward)) / column[0])
        return backward


def gram(left: Sequence[Average], right: Sequence[Average], product: Any) -> list[list[Any]]:
    if left is not right:
        return [[product(a, b) for b in right] for a in left]
    lower = [[product(a, b) for b in left[: i + 1]] for i, a in enumerate(left)]
    return [[lower[max(i, j)][min(i, j)] for j in range(len(left))] for i in range(len(left))]


def paper_solve(inputs: Sequence[Average], targets: Sequence[Average]) -> list[dict[str, Any]]:
    """Algorithm 3 as printed, and with coefficients rescaled to sum to one."""
    matrix = gram(inputs, inputs, inner_product)
    factor = PositiveDefinite(matrix)
    results = []
    for target in targets:
        right = [inner_product(a, target) for a in inputs]
        norm = inner_product(target, target)
        x = factor.solve(right)
        total = mp.fsum(x)
        rescaled = [v / total for v in x]
        products = [mp.fdot(row, rescaled) for row in matrix]
        square = norm - 2 * mp.fdot(rescaled, right) + mp.fdot(rescaled, products)
        results.append(
            {
                "raw": x,
                "sum": total,
                "raw_profile_error": mp.sqrt((norm - mp.fdot(x, right)) / norm),
                "coefficients": rescaled,
                "profile_error": mp.sqrt(square / norm),
            }
        )
    return results


def kriging_solve(
    inputs: Sequence[Average],
    targets: Sequence[Average],
    edges: Sequence[float],
    rate: Sequence[float],
    noise: Sequence[float],
) -> list[dict[str, Any]]:
    """min ∫ r (Σ x_i F_i - F*)² dτ + Σ ν_i x_i² subject to Σ x_i = 1.

    With G the matrix of survival products plus noise, the multiplier of the constraint gives
    x = G⁻¹b + G⁻¹1 (1 - Σ G⁻¹b) / Σ G⁻¹1.
    """

    def product(a: Average, b: Average) -> Any:
        return survival_product(a, b, edges, rate)

    matrix = gram(inputs, inputs, product)
    for i, variance in enumerate(noise):
        matrix[i][i] += mpf(variance)
    factor = PositiveDefinite(matrix)
    ones = factor.solve([mpf(1)] * len(inputs))
    results = []
    for target in targets:
        right = [product(a, target) for a in inputs]
        free = factor.solve(right)
        shift = (1 - mp.fsum(free)) / mp.fsum(ones)
        x = [a + shift * b for a, b in zip(free, ones, strict=True)]
        products = [mp.fdot(row, x) for row in matrix]
        square = product(target, target) - 2 * mp.fdot(x, right) + mp.fdot(x, products)
        results.append({"coefficients": x, "expected_square": square})
    return results
