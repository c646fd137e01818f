"""Averaging profiles: how an average at time t weights the training history before it.

A profile is a probability density p_t(τ) over the history 0 <= τ <= t. All of them are given
by their cumulative form F_t(τ), so that the weight of one update is exact on any grid of
update times: the weights reached at t_i, in force since t_{i-1}, count F(t_i) - F(t_{i-1}).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, log, log2
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.conversion import gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_ema.quadrature import panel_quadrature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Profile(ABC):
    """What all profiles have in common; the concrete ones below are final."""

    @abstractmethod
    def cumulative(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """F_t(τ): the share of the average at ``t`` that stems from times up to ``tau``.

        Args:
            tau: Times, any shape, in the unit of ``t``; 0 before the start, 1 from t on.
            t: Time of the average, > 0; broadcast against ``tau``.

        Returns:
            float64, broadcast shape, rising from 0 to 1. A jump at τ = 0 is the share that
            stays on the first weights.
        """

    @abstractmethod
    def density(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """p_t(τ) = dF_t/dτ on (0, t], zero outside; per unit of ``t``."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data from which :func:`profile_from_dict` makes the profile again."""

    def weights(self, times: ArrayLike) -> NDArray[np.float64]:
        """Weight of each update in the average after the last one.

        Args:
            times: ``[n]`` update times, > 0 and strictly increasing; any unit.

        Returns:
            ``[n]`` float64, non-negative, summing to one.
        """
        times = np.asarray(times, dtype=np.float64)
        rising = times.ndim == 1 and len(times) and (np.diff(times, prepend=0.0) > 0).all()
        if not (rising and np.isfinite(times[-1])):
            raise ValueError(
                "times must be one-dimensional, finite, positive and strictly increasing"
            )
        # Whatever lies before the first update can only be the first weights.
        return np.diff(self.cumulative(times, times[-1]), prepend=0.0)

    def relative_moments(self, t: float) -> tuple[float, float]:
        """Mean and standard deviation of τ under p_t, as fractions of ``t``."""
        nodes, quadrature_weights = panel_quadrature(self.breakpoints(t), t)
        # By parts, so that a jump at 0 is counted: E[τ] = ∫(1-F), E[τ²] = 2∫τ(1-F).
        survival = 1 - self.cumulative(nodes, t)
        mean = float(quadrature_weights @ survival) / t
        second = 2 * float(quadrature_weights @ (nodes * survival)) / t**2
        return mean, max(second - mean**2, 0.0) ** 0.5

    def breakpoints(self, t: float) -> tuple[float, ...]:
        """Times inside (0, t) where the density is not smooth."""
        return ()

    @property
    def mean_rel(self) -> float:
        """Mean of τ/t, where it does not depend on t."""
        return self._scale_free_moments()[0]

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of τ/t ("EMA length"), where it does not depend on t."""
        return self._scale_free_moments()[1]

    def _scale_free_moments(self) -> tuple[float, float]:
        # Powers of two: a profile of τ/t alone gives the same numbers to the last bit.
        first, second = self.relative_moments(1.0), self.relative_moments(1024.0)
        if not np.allclose(first, second, rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"the relative width of {self!r} changes with t; "
                "ask relative_moments(t) for its mean and standard deviation at one time"
            )
        return first


@dataclass(frozen=True, init=False)
class PowerFunction(Profile):
    """Power-function profile p_t(τ) = (γ+1) τ^γ / t^(γ+1): scale-free, no weight at the start.

    Args:
        sigma_rel: EMA length, 0 < sigma_rel <= 12**-0.5; or
        gamma: the exponent, >= 0. Exactly one of the two.

    Raises:
        ValueError: If the value is outside its domain.
        TypeError: If neither or both are given.

    Example:
        >>> PowerFunction(sigma_rel=0.1).cumulative(0.9, 1.0).round(4)
        np.float64(0.4333)

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 117-126.
    """

    gamma: float

    def __init__(self, sigma_rel: float | None = None, *, gamma: float | None = None) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise TypeError("PowerFunction takes either sigma_rel or gamma")
        if sigma_rel is not None:
            gamma = float(sigma_rel_to_gamma(_scalar("sigma_rel", sigma_rel)))
        else:
            gamma = _scalar("gamma", gamma)
            sigma_rel = float(gamma_to_sigma_rel(gamma))
        object.__setattr__(self, "gamma", gamma)
        # As given: 0.05 shall print, compare and be found again as 0.05.
        object.__setattr__(self, "_sigma_rel", float(sigma_rel))

    def __repr__(self) -> str:
        return f"PowerFunction(sigma_rel={self.sigma_rel:.10g})"

    @property
    def mean_rel(self) -> float:
        """(γ+1)/(γ+2)."""
        return (self.gamma + 1) / (self.gamma + 2)

    @property
    def sigma_rel(self) -> float:
        """EMA length."""
        return float(self._sigma_rel)  # type: ignore[attr-defined]

    def relative_moments(self, t: float) -> tuple[float, float]:
        """Mean and standard deviation of τ/t; the same at every ``t``."""
        return self.mean_rel, self.sigma_rel

    def cumulative(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """F_t(τ) = min(τ/t, 1)^(γ+1)."""
        tau, t = _times(tau, t)
        return np.clip(tau / t, 0, 1) ** (self.gamma + 1)

    def density(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """p_t(τ) = (γ+1)/t · (τ/t)^γ."""
        tau, t = _times(tau, t)
        inside = (tau >= 0) & (tau <= t)
        return np.where(inside, (self.gamma + 1) / t * np.clip(tau / t, 0, 1) ** self.gamma, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Kind, exponent and EMA length."""
        return {"kind": "power", "gamma": self.gamma, "sigma_rel": self.sigma_rel}


@dataclass(frozen=True)
class Exponential(Profile):
    """Classical EMA with constant decay, started from the first weights.

    Args:
        halflife: In units of t; > 0.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 114 (β of a classical EMA).
    """

    halflife: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "halflife", _scalar("halflife", self.halflife))
        if not self.halflife > 0:
            raise ValueError(f"halflife must be > 0 (got {self.halflife})")

    @classmethod
    def from_beta(cls, beta: float, dt: float = 1) -> Exponential:
        """The profile of updates ``average = beta * average + (1 - beta) * weights``.

        Args:
            beta: Decay of one update, 0 < beta < 1.
            dt: Time between updates, in units of t.
        """
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1) (got {beta})")
        if not dt > 0:
            raise ValueError(f"dt must be > 0 (got {dt})")
        return cls(halflife=-dt / log2(beta))

    def cumulative(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """F_t(τ) = 2^((τ-t)/halflife); 2^(-t/halflife) of it stays on the first weights."""
        tau, t = _times(tau, t)
        return np.where(tau < 0, 0.0, np.exp2((np.minimum(tau, t) - t) / self.halflife))

    def density(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """p_t(τ) = ln 2/halflife · 2^((τ-t)/halflife), without the jump at 0."""
        tau, t = _times(tau, t)
        inside = (tau >= 0) & (tau <= t)
        rate = log(2) / self.halflife
        return np.where(inside, rate * np.exp2((np.minimum(tau, t) - t) / self.halflife), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Kind and half-life."""
        return {"kind": "exponential", "halflife": self.halflife}


@dataclass(frozen=True)
class Uniform(Profile):
    """Plain mean over the last part of training (SWA, LAWA).

    Args:
        window: Up to 1, a fraction of t; above 1, an amount in units of t.
        relative: Say which of the two it is, where the rule above is wrong for your unit.
    """

    window: float
    relative: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", _scalar("window", self.window))
        relative = self.window <= 1 if self.relative is None else bool(self.relative)
        object.__setattr__(self, "relative", relative)
        if not self.window > 0 or (relative and self.window > 1):
            raise ValueError(
                f"window must be a fraction of t in (0, 1] or an amount > 0 (got {self.window})"
            )

    def cumulative(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """F_t(τ) rises linearly from the start of the window to t."""
        tau, t = _times(tau, t)
        return np.clip(1 - (t - tau) / self._width(t), 0, 1)

    def density(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """p_t(τ) = 1/window inside the window."""
        tau, t = _times(tau, t)
        width = self._width(t)
        return np.where((tau >= 0) & (tau <= t) & (tau >= t - width), 1 / width, 0.0)

    def breakpoints(self, t: float) -> tuple[float, ...]:
        """The start of the window."""
        start = t - float(self._width(np.asarray(t, np.float64)))
        return (start,) if start > 0 else ()

    def to_dict(self) -> dict[str, Any]:
        """Kind, window, and whether it is a fraction."""
        return {"kind": "uniform", "window": self.window, "relative": self.relative}

    def _width(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.window * t if self.relative else np.minimum(self.window, t))


@dataclass(frozen=True)
class Custom(Profile):
    """Any profile, given by its cumulative form.

    Args:
        cumulative: Function ``fn(tau, t)`` of arrays, rising from 0 (or a jump at τ = 0) to 1
            at τ = t.
        breaks: Fractions of t, in (0, 1), at which ``fn`` has a kink or jump.

    Example:
        >>> linear = Custom(cumulative=lambda tau, t: (tau / t) ** 2)
        >>> round(linear.mean_rel, 6)
        0.666667
    """

    fn: Callable[[Any, Any], Any] = field(repr=False)
    breaks: tuple[float, ...] = ()

    def __init__(
        self, cumulative: Callable[[Any, Any], Any], breaks: tuple[float, ...] = ()
    ) -> None:
        if not callable(cumulative):
            raise TypeError(f"cumulative must be a function of (tau, t) (got {cumulative!r})")
        object.__setattr__(self, "fn", cumulative)
        object.__setattr__(self, "breaks", tuple(float(b) for b in breaks))
        # A wrong function would give wrong weights in silence: look at it once.
        tau = np.linspace(0, 1, 257)
        values = np.asarray(cumulative(tau, 1.0), dtype=np.float64)
        if values.shape != tau.shape:
            raise ValueError(f"cumulative must work on arrays: shape {values.shape} for (257,)")
        if not np.isfinite(values).all() or (np.diff(values) < -1e-12).any() or values[0] < -1e-12:
            raise ValueError("cumulative must rise from 0 to 1 between tau = 0 and tau = t")
        if abs(values[-1] - 1) > 1e-9:
            raise ValueError(f"cumulative(t, t) must be 1 (got {values[-1]})")

    def cumulative(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """The given function, cut to 0 before the start and 1 after ``t``."""
        tau, t = _times(tau, t)
        inside = np.asarray(self.fn(np.clip(tau, 0, t), t), dtype=np.float64)
        return np.where(tau < 0, 0.0, np.where(tau >= t, 1.0, inside))

    def density(self, tau: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """Central difference of the cumulative form over 2e-5 t, one-sided at the ends."""
        tau, t = _times(tau, t)
        lower, upper = np.clip(tau - 1e-5 * t, 0, t), np.clip(tau + 1e-5 * t, 0, t)
        rise = np.asarray(self.fn(upper, t), np.float64) - np.asarray(self.fn(lower, t), np.float64)
        inside = (tau >= 0) & (tau <= t)
        return np.where(inside, rise / np.where(upper > lower, upper - lower, 1.0), 0.0)

    def breakpoints(self, t: float) -> tuple[float, ...]:
        """The fractions given as ``breaks``, times t."""
        return tuple(b * t for b in self.breaks)

    def to_dict(self) -> dict[str, Any]:
        """A function is code, and files hold data only."""
        raise ValueError("a Custom profile cannot be stored; use it as a target only")


def profile_from_dict(data: Mapping[str, Any]) -> Profile:
    """Make a profile from what its ``to_dict`` gave.

    Raises:
        ValueError: If the kind is unknown or a field is missing.
    """
    kind = data.get("kind")
    try:
        if kind == "power":
            profile = PowerFunction(gamma=data["gamma"])
            object.__setattr__(profile, "_sigma_rel", float(data["sigma_rel"]))
            return profile
        if kind == "exponential":
            return Exponential(halflife=data["halflife"])
        if kind == "uniform":
            return Uniform(window=data["window"], relative=data["relative"])
    except KeyError as error:
        raise ValueError(f"profile of kind {kind!r} lacks the field {error}") from error
    raise ValueError(f"unknown profile kind {kind!r}; expected power, exponential or uniform")


def as_profile(value: Profile | float) -> Profile:
    """A profile as it is, or a number as the power function of that σ_rel."""
    if isinstance(value, Profile):
        return value
    return PowerFunction(sigma_rel=_scalar("sigma_rel", value))


def inner_product(profile_a: Profile, t_a: float, profile_b: Profile, t_b: float) -> float:
    """⟨p_a, p_b⟩ = ∫ p_a(τ) p_b(τ) dτ of two densities, in 1/unit of t.

    Closed form for two power functions, else Gauss-Legendre quadrature on graded panels
    (relative error below 1e-10 for the densities of this module; that of a ``Custom`` profile
    is itself a finite difference). A jump at 0 has no square integral and is left out.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 151.
    """
    if isinstance(profile_a, PowerFunction) and isinstance(profile_b, PowerFunction):
        return float(power_inner_products(t_a, profile_a.gamma, t_b, profile_b.gamma))
    end = min(t_a, t_b)
    breaks = [b for b in (*profile_a.breakpoints(t_a), *profile_b.breakpoints(t_b)) if b < end]
    nodes, weights = panel_quadrature(breaks, end)
    return float(weights @ (profile_a.density(nodes, t_a) * profile_b.density(nodes, t_b)))


def power_inner_products(
    t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike
) -> NDArray[np.float64]:
    """Inner products of power functions, vectorised over broadcast arrays.

    For t_a <= t_b: (γ_a+1)(γ_b+1) (t_a/t_b)^γ_b / ((γ_a+γ_b+1) t_b); the ratio cannot overflow.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 151 and Algorithm 3.
    """
    t_a, gamma_a, t_b, gamma_b = (np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    later = np.maximum(t_a, t_b)
    exponent = np.where(t_a <= t_b, gamma_b, gamma_a)
    ratio = np.minimum(t_a, t_b) / later
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * later)


def _times(tau: ArrayLike, t: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    t = np.asarray(t, dtype=np.float64)
    if not (t > 0).all():
        raise ValueError(f"t must be > 0 (got {t})")
    return np.asarray(tau, dtype=np.float64), t


def _scalar(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number (got {value!r})") from None
    if not isfinite(number):
        raise ValueError(f"{name} must be finite (got {number})")
    return number
