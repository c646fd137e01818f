"""Fewer inputs within the slack: what must hold for any set of snapshots."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import noise_levels, sigma_rels, stored_averages

from posthoc_ema import solve
from posthoc_ema.movement import Movement

EPS = float(np.finfo(np.float64).eps)
slacks = st.floats(1e-4, 0.5)

# As a float16 run has it: evenly spaced, two tracks, noise of rounding.
EVEN: dict[str, Any] = {
    "inputs": [(t, s) for t in range(1, 33) for s in (0.05, 0.10)],
    "movement": Movement.constant(32.0),
    "noise": np.full(64, 1e-4),
}


def settings_of(inputs: Any, noise: float) -> dict[str, Any]:
    end = max(t for t, _ in inputs)
    return {"movement": Movement.constant(end), "noise": np.full(len(inputs), noise * end)}


@given(stored_averages(min_times=2), sigma_rels, noise_levels, slacks)
def test_the_error_grows_by_no_more_than_the_slack(
    inputs: Any, sigma_rel: float, noise: float, slack: float
) -> None:
    target = (max(t for t, _ in inputs), sigma_rel)
    settings = settings_of(inputs, noise)
    best = solve(inputs, target, **settings)
    fewer = solve(inputs, target, slack=slack, **settings)
    assert_at_most(
        fewer.expected_square,
        best.expected_square * (1 + slack) ** 2 * (1 + 2e-6),
        reason="a millionth for rounding, twice",
    )
    assert np.count_nonzero(fewer.coefficients) <= np.count_nonzero(best.coefficients)
    assert_close(
        fewer.coefficients.sum(), 1, atol=float(20 * EPS * fewer.l1_norm), reason="summation"
    )


@given(stored_averages(min_times=2), st.data(), slacks)
def test_a_stored_average_stays_itself(inputs: Any, data: st.DataObject, slack: float) -> None:
    t, sigma_rel = data.draw(st.sampled_from(inputs))
    solution = solve(inputs, (t, sigma_rel), slack=slack)
    assert_equal(solution.coefficients, [float(a == (t, sigma_rel)) for a in inputs])


@pytest.mark.parametrize("sigma_rel", [0.015, 0.03, 0.07, 0.13])
def test_the_choice_does_not_depend_on_the_other_targets(sigma_rel: float) -> None:
    alone = solve(targets=(32, sigma_rel), slack=0.005, **EVEN)
    targets = [(32, 0.2), (31, 0.02), (32, sigma_rel), (32, 0.05)]
    among = solve(targets=targets, slack=0.005, **EVEN).coefficients[2]
    assert_equal(among != 0, alone.coefficients != 0)
    assert_close(among, alone.coefficients, atol=1e-9, reason="another input was eliminated")


@pytest.mark.parametrize(("sigma_rel", "most"), [(0.015, 16), (0.03, 16), (0.07, 24), (0.13, 48)])
def test_few_snapshots_make_up_most_averages(sigma_rel: float, most: int) -> None:
    fewer = solve(targets=(32, sigma_rel), slack=0.005, **EVEN)
    assert 1 < np.count_nonzero(fewer.coefficients) <= most
    assert np.count_nonzero(solve(targets=(32, sigma_rel), **EVEN).coefficients) == 64, "the twin"


@pytest.mark.parametrize("sigma_rel", [0.02, 0.07])
def test_no_smaller_choice_of_the_last_snapshots_would_do(sigma_rel: float) -> None:
    """Simply leaving out what is old needs more of them."""
    limit = solve(targets=(32, sigma_rel), **EVEN).expected_square * 1.005**2
    chosen = np.count_nonzero(solve(targets=(32, sigma_rel), slack=0.005, **EVEN).coefficients)
    last = {
        "inputs": EVEN["inputs"][-chosen + 1 :],
        "noise": EVEN["noise"][-chosen + 1 :],
        "movement": EVEN["movement"],
    }
    assert solve(targets=(32, sigma_rel), **last).expected_square > limit


def test_many_snapshots() -> None:
    """Where single ones cannot be dropped in good time, groups of them are."""
    inputs = [(t, s) for t in range(1, 401) for s in (0.05, 0.10)]
    noise = np.full(len(inputs), 1e-4)
    for sigma_rel, most in ((0.02, 200), (0.07, 400), (0.25, 800)):
        best = solve(inputs, (400, sigma_rel), noise=noise)
        fewer = solve(inputs, (400, sigma_rel), noise=noise, slack=0.005)
        assert np.count_nonzero(fewer.coefficients) <= most
        assert fewer.expected_square <= best.expected_square * 1.005**2 * (1 + 1e-6)


@pytest.mark.parametrize("slack", [-0.1, nan, inf])
def test_slack_is_a_share(slack: float) -> None:
    with pytest.raises(ValueError, match="slack must be finite and >= 0"):
        solve([(1, 0.05), (2, 0.05)], (2, 0.1), slack=slack)


def test_other_methods_know_no_slack() -> None:
    exact = solve(targets=(32, 0.07), method="paper", **EVEN).coefficients
    assert_equal(solve(targets=(32, 0.07), method="paper", slack=0.1, **EVEN).coefficients, exact)
