"""What a plan is judged by: errors of tracks and times under the rates that may come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.evidence import gather_evidence
from posthoc_ema.movement import Movement
from posthoc_ema.profiles import PowerFunction
from posthoc_ema.selection import Pool, choose_times
from posthoc_ema.snapshots import SnapshotStore, as_store
from posthoc_ema.solve import solve

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATES = ("unknown", "constant", "inverse-sqrt", "linear", "cosine")
"""Shapes of the learning rate; the weights move at its square."""

_TRACKS = 2
_REFERENCE = 16  # times at which tracks and rates are compared
_COARSE = 48  # candidate times while tracks are compared


@dataclass(frozen=True)
class Task:
    """What is asked, in fractions of the end of training.

    Attributes:
        targets: EMA lengths.
        movements: Possible rates, each with integral 1.
        unit: Variance, per weight, of the whole movement relative to the mean square.
        noise: Of storage, relative to the mean square.
    """

    targets: tuple[float, ...]
    movements: tuple[Movement, ...]
    unit: float
    noise: float

    def tracks(self, wanted: Sequence[float] | float | None) -> tuple[float, ...]:
        """Tracks as given, or the best of a grid over the range at a medium number of times."""
        if wanted is not None and not isinstance(wanted, int):
            listed = [wanted] if isinstance(wanted, float) else wanted
            given = tuple(float(sigma_rel) for sigma_rel in listed)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"tracks must name at least one, each once (got {wanted})")
            for sigma_rel in given:
                PowerFunction(sigma_rel)  # raises outside the domain
            return given
        number = _TRACKS if wanted is None else wanted
        if not 1 <= number <= 4:
            raise ValueError(f"tracks must be 1 to 4 or a sequence of sigma_rel (got {wanted})")
        low, high = self.targets[0], self.targets[-1]
        spread = np.geomspace(low, high, 8) if high > low else low * np.geomspace(1, 2, 4)
        allowed = dict.fromkeys(float(f"{s:.2g}") for s in np.minimum(spread, 0.28))
        # Independent of the budget, so that a larger one is never worse; greedy beyond two.
        chosen: tuple[float, ...] = min(
            combinations(allowed, min(number, 2, len(allowed))), key=self._merit
        )
        while len(chosen) < min(number, len(allowed)):
            more = [tuple(sorted({*chosen, s})) for s in allowed if s not in chosen]
            chosen = min(more, key=self._merit)
        return chosen

    def places(
        self, tracks: tuple[float, ...], number: int, grid: NDArray[np.float64]
    ) -> list[int]:
        """The best ``number`` times of a grid, rising."""
        return sorted(choose_times(self._pool(tracks, grid), number).places)

    def errors(
        self, tracks: Sequence[float], fractions: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """``[k]`` predicted errors, the largest over the possible movements."""
        return np.sqrt(self._squares(tracks, fractions).max(0))

    def _squares(
        self, tracks: Sequence[float], fractions: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        inputs = [(u, sigma_rel) for u in fractions.tolist() for sigma_rel in tracks]
        goals = [(float(fractions[-1]), sigma_rel) for sigma_rel in self.targets]
        noise = np.full(len(inputs), self.noise / self.unit)
        squares = [
            solve(inputs, goals, movement=movement, noise=noise).expected_square
            for movement in self.movements
        ]
        return self.unit * np.array(squares)

    def _pool(
        self,
        tracks: tuple[float, ...],
        grid: NDArray[np.float64],
        yardstick: tuple[float, ...] | None = None,
    ) -> Pool:
        profiles = [PowerFunction(sigma_rel) for sigma_rel in tracks]
        averages = [(u, profile) for u in grid.tolist() for profile in profiles]
        goals = [PowerFunction(sigma_rel) for sigma_rel in self.targets]
        noise = np.full(len(averages), self.noise / self.unit)
        pool = Pool.of(averages, goals, self.movements, noise)
        return (
            pool.scaled(self._difficulty(yardstick or tracks)) if len(self.movements) > 1 else pool
        )

    def _merit(self, tracks: tuple[float, ...]) -> float:
        """Worst error with as many snapshots as two tracks have at the reference."""
        number = _REFERENCE * 2 // len(tracks)
        pool = self._pool(
            tracks, candidate_times(self.targets[0], _COARSE, 1.0, None), (0.05, 0.10)
        )
        return float(choose_times(pool, number, exchanges=False).worst.max())

    def _difficulty(self, tracks: tuple[float, ...]) -> NDArray[np.float64]:
        """``[s]`` scale of squared errors that makes several movements comparable.

        Weights that come to rest leave so little error that they would not count beside those
        that do not; measured by the error of even spacing alone, they would rule. Between the
        two, the geometric mean did best on real runs.
        """
        even = np.arange(1, _REFERENCE + 1) / _REFERENCE
        return np.sqrt(self._squares(tracks, even).max(1))


def candidate_times(
    low: float, number: int, t_end: float, every: float | None
) -> NDArray[np.float64]:
    """Candidate times up to ``t_end``: half of them even, half denser and denser to the end."""
    even = np.linspace(0, 1, number // 2 + 1)[1:]
    late = 1 - np.geomspace(low / 8, 0.5, number - number // 2)
    times = np.concatenate([even, late]).round(12) * t_end
    if every is None and t_end > 1 and float(t_end).is_integer():
        every = 1
    if every is not None:
        if not 0 < every <= t_end:
            raise ValueError(f"every must be > 0 and at most t_end={t_end} (got {every})")
        times = np.ceil(times / every - 1e-9) * every
    return np.unique(np.concatenate([times[times < t_end], [t_end]]))


def possible_movements(
    movement: str | Movement, like: str | os.PathLike[str] | SnapshotStore | None
) -> tuple[tuple[Movement, ...], float]:
    """Possible movements over [0, 1] with integral 1, and the variance of the whole."""
    if like is not None:
        store = as_store(like)
        evidence = gather_evidence(store.list())
        unit = _total(evidence.movement) * evidence.moving_share / (evidence.mean_square or 1.0)
        if not 0 < unit < inf:
            remark = "; ".join(evidence.remarks) or "they stand still"
            raise ValueError(f"{store.path} does not tell how the weights move: {remark}")
        return (_over_unit_time(evidence.movement),), unit
    if isinstance(movement, Movement):
        return (_over_unit_time(movement),), 1.0
    if movement not in RATES:
        raise ValueError(
            f"movement must be one of {', '.join(RATES)}, or a Movement (got {movement!r})"
        )
    names = ("constant", "cosine") if movement == "unknown" else (movement,)
    return tuple(_over_unit_time(_squared_rate(name)) for name in names), 1.0


def _squared_rate(name: str) -> Movement:
    """Movement at the square of a learning rate of a usual shape, over [0, 1]."""
    edges = np.linspace(0, 1, 65)
    u = (edges[1:] + edges[:-1]) / 2
    rate = {
        "constant": np.ones_like(u),
        "inverse-sqrt": 1 / np.sqrt(np.maximum(u / 0.1, 1)),  # constant over a tenth of the run
        "linear": 1 - u,
        "cosine": (1 + np.cos(np.pi * u)) / 2,
    }[name]
    return Movement(edges, rate**2)


def _over_unit_time(movement: Movement) -> Movement:
    end, total = float(movement.edges[-1]), _total(movement)
    if not 0 < total < inf:
        raise ValueError("the movement must be finite and not zero throughout")
    return replace(movement, edges=movement.edges / end, rate=movement.rate * end / total)


def _total(movement: Movement) -> float:
    return float(np.diff(movement.edges) @ movement.rate)
