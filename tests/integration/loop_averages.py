"""What an average must be, from the weights a real training loop went through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from helpers import assert_close

from posthoc_ema import PowerFunction


def expected_average(history: Mapping[float, Mapping[str, Any]], sigma_rel: float) -> Any:
    """The profile's weighting of a history t → weights, summed in float64.

    The weights after an update count for the time since the one before; the first ones for all
    time before them too.
    """
    times = sorted(history)
    profile = PowerFunction(sigma_rel=sigma_rel)
    shares = np.diff([0.0, *(float(profile.cumulative(t, times[-1])) for t in times)])
    return {
        name: sum(
            share * np.asarray(history[t][name], np.float64)
            for share, t in zip(shares, times, strict=True)
        )
        for name in history[times[0]]
    }


def assert_average(actual: Mapping[str, Any], history: Any, sigma_rel: float) -> None:
    """Compare all tensors of an average with what it must be."""
    expected = expected_average(history, sigma_rel)
    for name, value in expected.items():
        assert_close(
            np.asarray(actual[name], np.float64),
            value,
            rtol=1e-5,
            atol=1e-6,
            reason=f"{name}: float32 averages, one rounding of 6e-8 for each of tens of updates",
        )


def snapshot_of(module: Any) -> dict[str, Any]:
    """Parameters of a PyTorch module as copies, by name."""
    return {name: p.detach().clone().numpy() for name, p in module.named_parameters()}


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets of tensors have equal names and equal values."""
    return set(first) == set(second) and all(
        np.array_equal(first[name], second[name]) for name in first
    )
