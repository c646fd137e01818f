"""The expected squared error of a combination of averages, and what makes it smallest."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.movement import Movement
from posthoc_ema.profiles import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIRST = 64  # inputs that a small choice is looked for among first
_MOST = 256  # inputs of which single ones are dropped: each costs as many squared


class Kriging:
    """min E|∫ (Σ x_i F_i - F*) dθ|² + Σ ν_i x_i²  subject to  Σ x_i = 1, by QR.

    Working on the sampled profiles themselves, not on their Gram matrix, squares no condition
    number: three tracks of 512 snapshots are nearly collinear in float64 otherwise.
    """

    def __init__(
        self,
        inputs: list[tuple[float, Profile]],
        targets: list[tuple[float, Profile]],
        movement: Movement,
        noise: NDArray[np.float64],
    ) -> None:
        end = targets[0][0]
        breaks = [b for t, profile in [*inputs, *targets] for b in profile.breakpoints(t)]
        nodes, weights = movement.quadrature([t for t, _ in inputs], end, breaks)
        survival = _survival(nodes, [*inputs, *targets])
        whitened = movement.whiten(nodes, weights, survival)
        self.rows, self.goal = whitened[:, : len(inputs)], whitened[:, len(inputs) :]
        self.noise = noise

    def coefficients(self) -> tuple[NDArray[np.float64], float]:
        """``[k, n]`` for all targets, and the condition number of the system."""
        x = np.zeros((self.goal.shape[1], self.rows.shape[1]))
        j, others, scale, triangle = self._reduced
        x[:, j] = 1
        if not len(others):
            return x, 1.0
        m = len(others)
        z, condition = _solve_triangle(triangle[:m, :m], triangle[:m, m:])
        z /= scale[:, None]
        x[:, others] = z.T
        x[:, j] -= z.sum(0)
        return x, condition

    @cached_property
    def _reduced(
        self,
    ) -> tuple[int, NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
        """The problem without its constraint, in as many rows as inputs and targets.

        Σx = 1 by elimination: x = e_j + Σ z_i (e_i - e_j), with j the best single input.

        Returns:
            j; the other inputs; the scale of their columns; and the R of those columns, over their
            scale, beside the targets.
        """
        rows, goal, sigma = self.rows, self.goal, np.sqrt(self.noise)
        n = rows.shape[1]
        j = int(np.argmin(((rows - goal[:, :1]) ** 2).sum(0) + self.noise))
        others = np.delete(np.arange(n), j)
        # With a thousand inputs each copy counts: arrays filled in place, and one factorisation
        # after the other, of the profiles and then of the noise below what remains of them.
        right = goal.shape[1]
        system = np.empty((len(rows), n - 1 + right))
        for column, i in enumerate(others):
            np.subtract(rows[:, i], rows[:, j], out=system[:, column])
        np.subtract(goal, rows[:, [j]], out=system[:, n - 1 :])
        square = np.einsum("ij,ij->j", system, system)[: n - 1]
        scale = np.sqrt(square + self.noise[others] + self.noise[j])
        scale[scale == 0] = 1  # a copy of input j, free of noise: nothing to choose
        system[:, : n - 1] /= scale
        system = np.asarray(np.linalg.qr(system, mode="r"))
        below = np.zeros((n, n - 1 + right))
        below[np.arange(n - 1), np.arange(n - 1)] = sigma[others] / scale
        below[-1, : n - 1] = -sigma[j] / scale
        below[-1, n - 1 :] = -sigma[j]
        triangle = np.asarray(np.linalg.qr(np.concatenate([system, below]), mode="r"))
        return j, others, scale, triangle

    def sparser(self, x: NDArray[np.float64], slack: float) -> NDArray[np.float64]:
        """Coefficients of fewer inputs, the others exactly 0.

        Args:
            x: ``[k, n]`` as from :meth:`coefficients`, or of a single input.
            slack: By how much the expected error may exceed the least, relative to it.

        Returns:
            ``[k, n]``; each target's are what they would be without the others.
        """
        least = self.expected_square(x)
        if not np.isfinite(least).all():  # nothing is known of the movement
            return x
        limits = least * (1 + slack) ** 2
        _, others, scale, triangle = self._reduced
        columns = np.zeros((len(triangle), x.shape[1]))
        columns[:, others] = triangle[:, : len(others)] * scale
        goals = triangle[:, len(others) :]
        found = np.stack(
            [
                row if np.count_nonzero(row) == 1 else _sparser(columns, goal, row, *bounds)
                for row, goal, *bounds in zip(x, goals.T, least, limits, strict=True)
            ]
        )
        kept = self.expected_square(found) <= limits * (1 + 1e-6)  # false only by rounding
        return np.where(kept[:, None], found, x)

    def expected_square(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[k]`` expected squared error per weight of coefficients ``[k, n]``."""
        misfit = self.rows @ x.T - self.goal
        return (misfit**2).sum(0) + (x**2) @ self.noise

    def nearest_square(self) -> NDArray[np.float64]:
        """``[k]`` the same for the best single input."""
        square = np.einsum("ij,ij->j", self.rows, self.rows)[:, None] - 2 * self.rows.T @ self.goal
        square += (self.goal**2).sum(0)
        return (np.maximum(square, 0) + self.noise[:, None]).min(0)


def _sparser(
    columns: NDArray[np.float64],
    goal: NDArray[np.float64],
    x: NDArray[np.float64],
    least: float,
    limit: float,
) -> NDArray[np.float64]:
    """Few coefficients that sum to one, of which |columns·x - goal|² keeps within the limit.

    First those that count least are dropped all at once, for half of what may be lost; then, one
    by one, that which the others replace best when they change for it (the optimal brain surgeon
    of Hassibi & Stork 1993).
    """
    base = int(np.argmin(((columns - goal[:, None]) ** 2).sum(0)))
    system, right = columns - columns[:, [base]], goal - columns[:, base]
    size = np.sqrt((system**2).sum(0))
    order = np.argsort(-np.abs(x) * size, kind="stable")
    order = order[size[order] > 0]
    number = _FIRST
    while True:
        kept = order[:number]
        both = np.column_stack([system[:, kept] / size[kept], right])
        triangle = np.asarray(np.linalg.qr(both, mode="r"))
        # Of the first m inputs alone, the squares of all rows from m on remain.
        remaining = np.cumsum(triangle[::-1, -1] ** 2)[::-1]
        enough = np.flatnonzero(remaining <= (least + limit) / 2)
        if len(enough) or len(kept) == len(order):
            break
        if number >= len(order) // 2:  # little to gain, and much work
            return x
        number = min(4 * number, len(order) // 2)
    m = int(enough[0]) if len(enough) else len(kept)
    kept, inverse = kept[:m], np.linalg.pinv(triangle[:m, :m])
    z, spent = inverse @ triangle[:m, -1], remaining[m]
    covariance = inverse @ inverse.T
    while 0 < len(z) <= _MOST:
        variance = covariance.diagonal()
        price = z**2 / variance
        k = int(np.argmin(price))
        if not spent + price[k] <= limit:
            break
        spent += price[k]
        change = covariance[:, k] / variance[k]
        z = np.delete(z - change * z[k], k)
        covariance = covariance - np.outer(change, covariance[k])
        covariance = np.delete(np.delete(covariance, k, 0), k, 1)
        kept = np.delete(kept, k)
    found = np.zeros(len(x))
    found[kept] = z / size[kept]
    found[base] = 1 - found.sum()
    return found


def _solve_triangle(
    triangle: NDArray[np.float64], right: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Solve with the R of a QR factorisation, by minimum norm where it is singular."""
    n = len(triangle)
    epsilon = n * float(np.finfo(np.float64).eps)
    diagonal = np.abs(np.diag(triangle))
    if diagonal.min() > epsilon * diagonal.max():
        inverse = np.linalg.inv(triangle)
        condition = float(np.linalg.norm(triangle, 1) * np.linalg.norm(inverse, 1))
        if condition < 1 / epsilon:
            return inverse @ right, condition
    u, s, vt = np.linalg.svd(triangle)
    if s[0] == 0:  # weights that do not move, stored exactly: any input will do
        return np.zeros_like(right), 1.0
    kept = s > s[0] * epsilon
    reciprocal = np.where(kept, 1 / np.where(kept, s, 1), 0)
    z = vt.T @ (reciprocal[:, None] * (u.T @ right))
    return z, float(s[0] / max(s[-1], s[0] * epsilon))


def _survival(
    nodes: NDArray[np.float64], averages: list[tuple[float, Profile]]
) -> NDArray[np.float64]:
    """1 - F(τ) of each average, ``[nodes, averages]``."""
    return np.stack([1 - profile.cumulative(nodes, t) for t, profile in averages], axis=1)
