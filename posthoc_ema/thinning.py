"""Snapshots of a run whose end is not known: few at every moment, and the right ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import floor, inf, log, log1p
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.movement import Movement
from posthoc_ema.profiles import PowerFunction
from posthoc_ema.selection import Choice, Pool, choose_times, dispensable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Writing starts from a good choice. By e^0.5 in time it has been replaced by what thinning leaves,
# and errors count until another e^0.5.
_SETTLE, _OBSERVE = 0.5, 0.5


@dataclass(frozen=True)
class Thinning:
    """Writes at times in geometric progression, and keeps a bounded number of them.

    After each writing the time whose loss is felt least, over a range of EMA lengths that end
    now, goes. What is kept then looks the same at every moment: dense lately, sparse long ago.
    All follows from the times on disk alone, so that a resumed run goes on as it would have.

    Args:
        number: Times to keep; one more is on disk while the newest is being written.
        tracks: The σ_rel that are tracked.
        targets: The σ_rel to reconstruct.
        ratio: Interval between writings as a fraction of t, > 0.
        every: Shortest interval, in units of t: early in a run a fraction of t is very little.
        noise: Variance of storage rounding, relative to that of the whole movement.
    """

    number: int
    tracks: tuple[float, ...]
    targets: tuple[float, ...]
    ratio: float
    every: float | None = None
    noise: float = 1e-9

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number must be at least 1 (got {self.number})")
        if not 0 < self.ratio < inf:
            raise ValueError(f"ratio must be > 0 (got {self.ratio})")
        if self.every is not None and not 0 < self.every < inf:
            raise ValueError(f"every must be a finite interval > 0 (got {self.every})")
        for sigma_rel in (*self.tracks, *self.targets):
            PowerFunction(sigma_rel)  # raises outside the domain

    def due(self, t_previous: float, t: float) -> bool:
        """Whether the next time of the progression lies in (t_previous, t]."""
        return t_previous == 0 or self._place(t) > self._place(t_previous)

    def keep(self, times: Sequence[float], t: float) -> Collection[float]:
        """The best ``number`` of the stored times; the last one always among them."""
        if len(times) <= self.number:
            return times
        if self.number == 1:
            return times[-1:]
        pool = self.pool(times)
        if len(times) == self.number + 1:
            place = dispensable(pool)
            return [*times[:place], *times[place + 1 :]]
        return [times[place] for place in sorted(choose_times(pool, self.number).places)]

    def pool(self, times: Sequence[float]) -> Pool:
        """Candidates, with a constant rate of movement that sums to one up to the last time."""
        end = float(times[-1])
        tracks = [PowerFunction(sigma_rel) for sigma_rel in self.tracks]
        averages = [(float(t) / end, track) for t in times for track in tracks]
        return Pool.of(
            averages,
            [PowerFunction(sigma_rel) for sigma_rel in self.targets],
            [Movement.constant(1.0)],
            np.full(len(averages), self.noise),
        )

    def _place(self, t: float) -> int:
        """Number of times of the progression up to ``t``."""
        # 0.3 / 0.1 falls short of 3 by rounding, and must count as 3.
        if self.every is None:
            return floor(log(t) / log1p(self.ratio) + 1e-9)
        turn = self.every / self.ratio  # from here on a fraction of t is the longer interval
        if t <= turn:
            return floor(t / self.every * (1 + 1e-12))
        return floor(1 / self.ratio + log(t / turn) / log1p(self.ratio) + 1e-9)


def simulate(thinning: Thinning, start: Sequence[float]) -> tuple[list[float], NDArray[np.float64]]:
    """What thinning keeps in the long run, and the worst it is for each target.

    Args:
        thinning: The schedule.
        start: Kept at time 1, rising, to begin with.

    Returns:
        The times kept last, as fractions of the last, and ``[k]`` largest errors over a factor
        of e^0.5 in time, relative to the RMS distance that the weights travel.
    """
    times, worst = list(start), np.zeros(len(thinning.targets))
    steps = log1p(thinning.ratio)
    for k in range(1, 1 + floor((_SETTLE + _OBSERVE) / steps)):
        t = float(np.exp(k * steps))
        times = list(thinning.keep([*times, t], t))
        if k * steps > _SETTLE:
            pool = thinning.pool(times)
            worst = np.maximum(worst, Choice(pool, range(len(times))).square[0])
    return [t / times[-1] for t in times], np.sqrt(worst)
