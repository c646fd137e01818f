"""How much one update counts, and when to keep a snapshot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import floor, inf
from numbers import Real
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from posthoc_ema.profiles import Exponential, PowerFunction, Profile, as_profile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def beta(profile: Profile | float, t_next: ArrayLike, t_delta: ArrayLike) -> NDArray[np.float64]:
    """Decay of one update: average ← β·average + (1-β)·weights.

    Args:
        profile: A power function (a plain number is its σ_rel) or an exponential.
        t_next: Time after the update, > 0, any shape.
        t_delta: Time since the previous update, 0 < t_delta <= t_next; equal to ``t_next`` at
            the first update, where β is the share of the first weights alone.

    Returns:
        β, float64, broadcast shape. 0 at the first update of a power function.

    Raises:
        ValueError: If a time is outside its domain.
        TypeError: If averages of this profile cannot be updated one step at a time.

    Example:
        >>> beta(0.05, t_next=100, t_delta=1).round(6)
        np.float64(0.834747)

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 127.
    """
    return np.exp(_log_beta(profile, t_next, t_delta))


def update_weight(profile: Profile | float, t_previous: float, t_next: float) -> float:
    """1-β of the update from ``t_previous`` (0 before the first) to ``t_next``.

    Computed without the cancellation of ``1 - beta(...)``: late in a long run β is within
    1e-5 of one. The first update has weight 1, whatever the profile: it copies.
    """
    if t_previous == 0:
        return 1.0
    return float(-np.expm1(_log_beta(profile, t_next, t_next - t_previous)))


def _log_beta(
    profile: Profile | float, t_next: ArrayLike, t_delta: ArrayLike
) -> NDArray[np.float64]:
    profile = as_profile(profile)
    t_next, t_delta = np.asarray(t_next, np.float64), np.asarray(t_delta, np.float64)
    if not ((t_delta > 0) & (t_delta <= t_next) & np.isfinite(t_next)).all():
        raise ValueError(
            f"expected finite 0 < t_delta <= t_next (got t_delta={t_delta}, t_next={t_next})"
        )
    if isinstance(profile, PowerFunction):
        with np.errstate(divide="ignore"):  # the first update: log β = -inf
            return (profile.gamma + 1) * np.log1p(-t_delta / t_next)
    if isinstance(profile, Exponential):
        return -np.log(2) * t_delta / profile.halflife
    raise TypeError(
        f"{profile!r} has no update rule of the form average ← β·average + (1-β)·weights; "
        "track power functions and reconstruct it afterwards as reconstruct(..., target=...)"
    )


class Schedule(Protocol):
    """Decides at which updates a snapshot is written."""

    def due(self, t_previous: float, t: float) -> bool:
        """Whether the update from ``t_previous`` (0 at the first) to ``t`` writes one."""


@runtime_checkable
class ThinningSchedule(Schedule, Protocol):
    """Decides too which snapshots stay; :class:`posthoc_ema.EMA` deletes the others.

    It is asked after the snapshots of a time are safely on disk, and only about those that this
    run wrote to this folder. What it answers shall follow from its arguments alone, so that a
    resumed run goes on as if it had not stopped.
    """

    def keep(self, times: Sequence[float], t: float) -> Collection[float]:
        """Those of the stored ``times``, rising up to the present ``t``, that stay."""


@dataclass(frozen=True)
class Every:
    """A snapshot by the first update at or past each multiple of ``interval``.

    Args:
        interval: In units of t; > 0.
    """

    interval: float

    def __post_init__(self) -> None:
        if not isinstance(self.interval, Real) or not 0 < self.interval < inf:
            raise ValueError(f"every must be a finite interval > 0 (got {self.interval!r})")

    def due(self, t_previous: float, t: float) -> bool:
        """Whether a multiple of the interval lies in (t_previous, t]."""
        return self._multiples(t) > self._multiples(t_previous)

    def _multiples(self, t: float) -> int:
        # 0.3 / 0.1 falls short of 3 by rounding, and must count as 3.
        return floor(t / self.interval * (1 + 1e-12))


@dataclass(frozen=True, init=False)
class AtTimes:
    """A snapshot by the first update at or past each of the given times.

    Args:
        times: In units of t, each > 0.
    """

    times: tuple[float, ...]

    def __init__(self, times: Iterable[float]) -> None:
        object.__setattr__(self, "times", tuple(sorted(float(x) for x in times)))
        if not self.times or not all(0 < x < inf for x in self.times):
            raise ValueError(f"times must be finite and > 0, at least one (got {self.times})")

    def due(self, t_previous: float, t: float) -> bool:
        """Whether one of the times lies in (t_previous, t]."""
        return any(t_previous < x <= t for x in self.times)
