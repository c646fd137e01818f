"""Which of many averages to keep: greedy choice by the worst expected error.

The expected error of a reconstruction (:mod:`posthoc_ema.solve`) is a least-squares distance,
so what one more input takes from it is one more block of a Cholesky factorisation. That makes
it cheap to try every candidate at every step. No files, numpy only, always in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.movement import Movement
from posthoc_ema.profiles import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A power mean over targets stands for their maximum: helping those next to the worst counts
# too, or greedy choice would stall where no single time helps the worst one.
_SHARPNESS = 4

_LEAST_NOISE = 1e-12  # of the movement: inner products are exact to about 1e-15
_SWEEPS = 4  # of exchanges; one or two are usual
_MOST_EXCHANGED = 40  # with more times than these an exchange gains little, and takes long


@dataclass(frozen=True, eq=False)
class Pool:
    """Inner products of candidate averages and targets, as seen from the base.

    The base is the first average of the last time. It is always kept, and its coefficient makes
    up for the sum of the others, which are then free.

    Attributes:
        times: ``[m]`` candidate times, rising; all tracks of one are kept together.
        gram: ``[s, m, T, m, T]`` of the candidates, for each of ``s`` movements; those that do
            not exist (and the base) are orthogonal to everything.
        cross: ``[s, m, T, k]`` with the targets.
        square: ``[s, k]`` squared error per weight of the base alone.
    """

    times: NDArray[np.float64]
    gram: NDArray[np.float64]
    cross: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        averages: Sequence[tuple[float, Profile]],
        targets: Sequence[Profile],
        movements: Sequence[Movement],
        noise: NDArray[np.float64],
    ) -> Pool:
        """Candidates for reconstructing targets at the time of the last one.

        Args:
            averages: ``n`` candidates as (t, profile), each once.
            targets: ``k`` profiles.
            movements: ``s`` rates at which the weights may move.
            noise: ``[n]`` variance of storage rounding per weight.
        """
        times, place = np.unique([t for t, _ in averages], return_inverse=True)
        tracks = list(dict.fromkeys(profile for _, profile in averages))
        column = place * len(tracks) + [tracks.index(profile) for _, profile in averages]
        base = int(np.flatnonzero(place == len(times) - 1)[0])
        size, end = len(times) * len(tracks), float(times[-1])
        breaks = [b for t, p in averages for b in p.breakpoints(t)]
        breaks += [b for p in targets for b in p.breakpoints(end)]

        gram = np.tile(np.eye(size), (len(movements), 1, 1))
        cross = np.zeros((len(movements), size, len(targets)))
        square = np.empty((len(movements), len(targets)))
        for s, movement in enumerate(movements):
            nodes, weights = movement.quadrature([float(t) for t in times], end, breaks)
            level = np.maximum(noise, _LEAST_NOISE * weights.sum())
            survival = np.stack(
                [
                    *(1 - p.cumulative(nodes, t) for t, p in averages),
                    *(1 - p.cumulative(nodes, end) for p in targets),
                ],
                axis=1,
            )
            whitened = movement.whiten(nodes, weights, survival - survival[:, [base]]).T
            rows, right = whitened[: len(averages)], whitened[len(averages) :]
            # The base's own coefficient is 1 - Σz: its noise enters everywhere.
            inner = rows @ rows.T + level[base] + np.diag(level)
            gram[s][np.ix_(column, column)] = inner
            cross[s][column] = rows @ right.T + level[base]
            square[s] = (right**2).sum(1) + level[base]
        own = column[base]
        gram[:, own], gram[:, :, own], cross[:, own] = 0, 0, 0
        gram[:, own, own] = 1
        shape = len(movements), len(times), len(tracks)
        return cls(
            times, gram.reshape(*shape, *shape[1:]), cross.reshape(*shape, len(targets)), square
        )

    def scaled(self, unit: NDArray[np.float64]) -> Pool:
        """The same with squared errors in units of their own for each movement, ``[s]``."""
        s = len(unit)
        return Pool(
            self.times,
            self.gram / unit.reshape(s, 1, 1, 1, 1),
            self.cross / unit.reshape(s, 1, 1, 1),
            self.square / unit.reshape(s, 1),
        )


class Choice:
    """Some times of a pool, and what they are worth together; it grows.

    Args:
        pool: The candidates.
        places: Which of its times to begin with; the last one is always among them.

    Attributes:
        places: Chosen so far, in the order of choice.
        square: ``[s, k]`` expected squared error per weight.
    """

    def __init__(self, pool: Pool, places: Iterable[int] = ()) -> None:
        s, m, tracks = pool.gram.shape[:3]
        self.pool = pool
        self.places: list[int] = []
        self.square = pool.square.copy()
        # What the chosen ones leave unexplained, of the diagonal blocks and of cross ...
        every = np.arange(m)
        self._blocks = pool.gram[:, every, :, every].swapaxes(0, 1).copy()  # [s, m, T, T]
        self._cross = pool.cross.copy()
        # ... and the rows of the Cholesky factor so far: [s, rows, m, T].
        self._factor = np.empty((s, 4 * tracks, m, tracks))
        for place in dict.fromkeys((m - 1, *places)):
            self.add(place)

    @property
    def worst(self) -> NDArray[np.float64]:
        """``[s]`` largest squared error over the targets."""
        return np.asarray(self.square.max(1))

    @property
    def score(self) -> float:
        """What greedy choice lowers: nearly the largest squared error of all."""
        return float(_nearly_worst(self.square[:, None])[0])

    def add(self, place: int) -> None:
        """Choose one more time."""
        s, m, tracks = self._blocks.shape[:3]
        done = len(self.places) * tracks
        if done == self._factor.shape[1]:
            self._factor = np.concatenate([self._factor, np.empty_like(self._factor)], axis=1)
        factor = self._factor[:, :done].reshape(s, done, m * tracks)
        known = factor.reshape(s, done, m, tracks)[:, :, place].swapaxes(1, 2)  # [s, T, done]
        row = self.pool.gram[:, place].reshape(s, tracks, m * tracks) - known @ factor
        inverse = np.linalg.inv(np.linalg.cholesky(self._blocks[:, place]))
        row, explained = inverse @ row, inverse @ self._cross[:, place]
        row = row.reshape(s, tracks, m, tracks)
        self._factor[:, done : done + tracks] = row
        self._cross -= np.einsum("samt,sak->smtk", row, explained)
        self._blocks -= np.einsum("samt,samu->smtu", row, row)
        self.square = np.maximum(self.square - (explained**2).sum(1), 0)
        self.places.append(place)

    def best_addition(self, allowed: NDArray[np.bool_] | None = None) -> int | None:
        """The time that would help most.

        Args:
            allowed: ``[m]`` which times may be added; default: all.

        Returns:
            Its place, or None if there is none left.
        """
        free = np.ones(len(self.pool.times), bool) if allowed is None else allowed.copy()
        free[self.places] = False
        candidates = np.flatnonzero(free)
        if not len(candidates):
            return None
        cross = self._cross[:, candidates]
        gain = (cross * np.linalg.solve(self._blocks[:, candidates], cross)).sum(2)  # [s, m, k]
        left = np.maximum(self.square[:, None] - gain, 0)
        return int(candidates[np.argmin(_nearly_worst(left))])


def growing(pool: Pool, required: Iterable[int] = (), exchanges: bool = True) -> Iterator[Choice]:
    """Choices of more and more times, nearly the best of their number.

    One is added after the other, at some numbers with exchanges of chosen times for others.
    Fewer times are a stage on the way to more, so the worst error never rises.

    Args:
        pool: The candidates.
        required: Times that are always chosen, beside the last.
        exchanges: Whether to exchange; without it errors are larger by a quarter or so.

    Yields:
        A choice of the required times alone, then of one more each; what was yielded before
        may have changed.
    """
    choice, exchange_at = Choice(pool, required), 3
    fixed = set(choice.places)
    yield choice
    while (place := choice.best_addition()) is not None:
        choice.add(place)
        if len(choice.places) >= exchange_at:
            exchange_at = ceil(exchange_at * 1.4)
            if exchanges and len(choice.places) <= _MOST_EXCHANGED:
                choice = _exchanged(choice, fixed)
        yield choice


def choose_times(pool: Pool, number: int, exchanges: bool = True) -> Choice:
    """The best ``number`` times of a pool, nearly; all, if there are fewer."""
    for choice in growing(pool, exchanges=exchanges):
        if len(choice.places) >= number:
            break
    return choice


def dispensable(pool: Pool) -> int:
    """The place of the time, other than the last, whose loss is felt least."""
    s, m, tracks, k = pool.cross.shape
    inverse = np.linalg.inv(pool.gram.reshape(s, m * tracks, m * tracks))
    z = inverse @ pool.cross.reshape(s, m * tracks, k)
    left = pool.square - (pool.cross.reshape(s, -1, k) * z).sum(1)
    every = np.arange(m)
    blocks = inverse.reshape(s, m, tracks, m, tracks)[:, every, :, every].swapaxes(0, 1)
    z = z.reshape(s, m, tracks, k)
    loss = (z * np.linalg.solve(blocks, z)).sum(2)  # [s, m, k]
    return int(np.argmin(_nearly_worst(left[:, None] + loss)[: m - 1]))


def _exchanged(choice: Choice, fixed: set[int]) -> Choice:
    """Replace chosen times, but for fixed ones, by others while that lowers the error."""
    for _ in range(_SWEEPS):
        before = choice.score
        for place in choice.places[:]:
            if place in fixed:
                continue
            trial = Choice(choice.pool, [p for p in choice.places if p != place])
            replacement = trial.best_addition()
            if replacement is None or replacement == place:
                continue
            trial.add(replacement)
            if trial.score < choice.score and (trial.worst <= choice.worst).all():
                choice = trial
        if choice.score > 0.98 * before:
            break
    return choice


def _nearly_worst(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power mean of ``[s, m, k]`` over all but the middle axis."""
    largest = squares.max((0, 2))
    scale = np.where(largest > 0, largest, 1)
    mean = ((np.maximum(squares, 0) / scale[:, None]) ** _SHARPNESS).mean((0, 2))
    return np.asarray(scale * mean ** (1 / _SHARPNESS))
