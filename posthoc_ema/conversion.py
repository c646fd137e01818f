"""Relative standard deviation ("EMA length") to power-function exponent, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SIGMA_REL_MAX: float = 12**-0.5
"""Largest EMA length, 0.288675: γ = 0, the plain mean of all weights since the start."""


def _advice(given: NDArray[np.float64]) -> str:
    """To those who gave the decay of another library."""
    decay = given[(given > 0.9) & (given < 1)]
    return (
        f". The decay β of a classical EMA: Exponential.from_beta({decay[0]})" if len(decay) else ""
    )


def sigma_rel_to_gamma(sigma_rel: ArrayLike) -> NDArray[np.float64]:
    """Convert relative standard deviation to power-function exponent.

    Solves (γ+2)²(γ+3) σ_rel² = γ+1 for its largest root.

    Args:
        sigma_rel: EMA length as a fraction of training time, any shape ``[...]``;
            dimensionless; 0 < sigma_rel <= 12**-0.5.

    Returns:
        Exponent γ >= 0, float64, same shape ``[...]``; relative error below 1e-13.

    Raises:
        ValueError: If any entry is NaN or outside the domain.

    Example:
        >>> sigma_rel_to_gamma([0.05, 0.10]).round(4)
        array([16.9722,  6.9372])

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 126 and Algorithm 2 (closed form ours).
    """
    sigma_rel = np.asarray(sigma_rel, dtype=np.float64)
    bad = ~((sigma_rel > 0) & (sigma_rel <= SIGMA_REL_MAX))
    if bad.any():
        raise ValueError(
            f"sigma_rel must be in (0, {SIGMA_REL_MAX:.6f}] (got {sigma_rel[bad].tolist()}); "
            "0.288675 is the plain mean over the whole run, and no average is longer"
            + _advice(sigma_rel[bad])
        )
    s2, s2_low = _square(sigma_rel)
    # Depressed cubic x³ - p·x + q = 0 with γ = x - 7/3; three real roots.
    p = 1 / s2 + 1 / 3
    q = 4 / 3 / s2 + 2 / 27
    cosine = np.clip(-1.5 * q / p * np.sqrt(3 / p), -1, 1)
    gamma = 2 * np.sqrt(p / 3) * np.cos(np.arccos(cosine) / 3) - 7 / 3
    # Near γ = 0 the subtraction above cancels. Newton on the cubic times σ² repairs that,
    # provided its constant term 12σ² - 1 is exact: both subtractions are, and s2_low is
    # what rounding took from σ².
    constant = (8 * s2 - 1) + 4 * s2 + 12 * s2_low
    linear = 16 * s2 - 1
    for _ in range(2):
        value = constant + gamma * (linear + gamma * s2 * (7 + gamma))
        slope = linear + gamma * s2 * (14 + 3 * gamma)
        gamma = gamma - value / slope
    return np.maximum(gamma, 0.0)


def gamma_to_sigma_rel(gamma: ArrayLike) -> NDArray[np.float64]:
    """Convert power-function exponent to relative standard deviation.

    Args:
        gamma: Exponent of the averaging profile, any shape ``[...]``; dimensionless;
            finite and >= 0.

    Returns:
        σ_rel = √((γ+1) / ((γ+2)²(γ+3))), float64, same shape ``[...]``, in (0, 12**-0.5].

    Raises:
        ValueError: If any entry is NaN, infinite or negative.

    Example:
        >>> gamma_to_sigma_rel(6.94).round(4)
        np.float64(0.1)

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 123.
    """
    gamma = np.asarray(gamma, dtype=np.float64)
    bad = ~((gamma >= 0) & np.isfinite(gamma))
    if bad.any():
        raise ValueError(f"gamma must be finite and >= 0 (got {gamma[bad].tolist()})")
    return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _square(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x² as an unevaluated sum of two float64 (Dekker's product)."""
    high = x * x
    shifted = x * 134217729.0  # 2**27 + 1 splits the significand in halves
    upper = shifted - (shifted - x)
    lower = x - upper
    return high, ((upper * upper - high) + 2 * upper * lower) + lower * lower
