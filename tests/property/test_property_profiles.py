"""Profiles as weightings: from 0 to 1, summing to one, and equal to step-by-step averaging."""

from __future__ import annotations

from itertools import pairwise
from math import inf, log, nan
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from strategies import power_functions, profiles, sigma_rels, update_times

from posthoc_ema import AtTimes, Custom, Every, Exponential, PowerFunction, Profile, Uniform, beta
from posthoc_ema.profiles import as_profile, inner_product, power_inner_products, profile_from_dict
from posthoc_ema.schedule import update_weight

times = st.floats(1e-3, 1e9)


@given(profiles(), st.floats(0.1, 10))
def test_cumulative_rises_from_zero_to_one(profile: Profile, t: float) -> None:
    tau = np.linspace(-0.5, 1.5, 301) * t
    values = profile.cumulative(tau, t)
    assert values.dtype == np.float64
    assert_equal(values[tau < 0], 0)
    assert_equal(values[tau >= t], 1)
    assert (np.diff(values) >= 0).all()


@given(profiles(), st.floats(0.1, 10))
def test_density_is_the_derivative(profile: Profile, t: float) -> None:
    """Its integral is what the cumulative form gains between 0 and t, jump at 0 excluded."""
    graded = t * (1 - 0.5 ** np.arange(20))
    edges = sorted({*graded, *profile.breakpoints(t), t})
    total = sum(quad(profile.density, a, b, args=(t,), epsabs=1e-12)[0] for a, b in pairwise(edges))
    jump = float(profile.cumulative(0.0, t))
    assert_close(total + jump, 1, atol=1e-9, reason="adaptive quadrature with epsabs 1e-12 a panel")


@given(profiles(), update_times())
def test_weights_sum_to_one(profile: Profile, grid: np.ndarray[Any, Any]) -> None:
    weights = profile.weights(grid)
    assert (weights >= 0).all()
    assert_close(weights.sum(), 1, atol=1e-14, reason="differences of values up to 1 telescope")


def recursive_weights(profile: Profile, grid: np.ndarray[Any, Any]) -> Any:
    """What EMA does: the first update copies, each later one mixes. Weights are one-hot."""
    average = np.zeros(len(grid))
    previous = 0.0
    for step, t in enumerate(grid):
        decay = 0.0 if previous == 0 else beta(profile, t, t - previous)
        average *= decay
        average[step] += 1 - decay
        previous = t
    return average


@given(st.one_of(power_functions, st.floats(0.05, 5).map(Exponential)), update_times())
def test_weights_are_those_of_step_by_step_averaging(
    profile: Profile, grid: np.ndarray[Any, Any]
) -> None:
    """Exact on any irregular grid: the products of decays telescope."""
    assert_close(
        profile.weights(grid),
        recursive_weights(profile, grid),
        atol=1e-13,
        reason="forty products of rounded decays, with exponents up to 97",
    )


def test_ignoring_the_interval_is_noticed() -> None:
    """Decaying as if every update were one unit of time gives another profile."""
    grid = np.arange(10, 1000, 10.0)
    average = np.zeros(len(grid))
    for step, t in enumerate(grid):
        decay = 0.0 if step == 0 else beta(0.05, t, 1.0)
        average = average * decay
        average[step] += 1 - decay
    with pytest.raises(AssertionError):
        assert_close(average, PowerFunction(0.05).weights(grid), atol=1e-3, reason="a control")


@given(st.one_of(power_functions, st.floats(0.1, 10).map(Exponential)), st.floats(0.1, 10),
       st.floats(0.01, 3), st.floats(0.01, 3))  # fmt: skip
def test_beta_is_multiplicative(profile: Profile, t: float, first: float, second: float) -> None:
    """Two consecutive intervals decay as the one they make up."""
    middle, end = t + first, t + first + second
    whole = beta(profile, end, end - t)
    parts = beta(profile, middle, middle - t) * beta(profile, end, end - middle)
    scale = 1 + abs(log(max(float(whole), 1e-300)))
    assert_close(parts, whole, rtol=1e-14 * scale, reason="rounding of log β, exponentiated")


@given(sigma_rels, times, times)
def test_one_minus_beta(sigma_rel: float, t: float, t_delta: float) -> None:
    """The weight of an update and its decay are two views of one number."""
    t_next = t + t_delta
    weight = update_weight(sigma_rel, t, t_next)
    assert 0 < weight <= 1
    assert_close(
        weight + beta(sigma_rel, t_next, t_next - t), 1, atol=4e-16, reason="two roundings"
    )


@given(sigma_rels, st.floats(1e-3, 1e3))
def test_first_update_copies(sigma_rel: float, t: float) -> None:
    assert beta(sigma_rel, t, t) == 0
    assert update_weight(sigma_rel, 0, t) == 1
    assert update_weight(Exponential(1e9), 0, t) == 1


@given(st.lists(st.tuples(st.floats(0.1, 100), sigma_rels), min_size=1, max_size=12))
def test_gram_matrix_is_symmetric_and_positive_semidefinite(
    averages: list[tuple[float, float]],
) -> None:
    t = np.array([t for t, _ in averages])
    gamma = np.array([PowerFunction(s).gamma for _, s in averages])
    gram = power_inner_products(t[:, None], gamma[:, None], t, gamma)
    assert_equal(gram, gram.T)
    unit = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    assert_at_most(unit, 1 + 1e-14, reason="Cauchy-Schwarz, and rounding")
    assert_at_most(-np.linalg.eigvalsh(unit)[0], 1e-13, reason="12 rows of rounded entries")


@given(profiles(), profiles(), st.floats(0.5, 2), st.floats(0.5, 2))
def test_inner_product_is_symmetric_and_bounded(
    p: Profile, q: Profile, t_p: float, t_q: float
) -> None:
    cross = inner_product(p, t_p, q, t_q)
    assert_close(inner_product(q, t_q, p, t_p), cross, rtol=1e-13, reason="order of summation")
    bound = np.sqrt(inner_product(p, t_p, p, t_p) * inner_product(q, t_q, q, t_q))
    assert_at_most(cross, bound * (1 + 1e-9), reason="Cauchy-Schwarz, and quadrature")


@given(sigma_rels)
def test_moments_of_power_functions(sigma_rel: float) -> None:
    """Closed forms against integration of the cumulative form, as any profile has them."""
    profile = PowerFunction(sigma_rel)
    same = Custom(cumulative=lambda tau, t: (tau / t) ** (profile.gamma + 1))
    assert_close(
        [same.mean_rel, same.sigma_rel],
        [profile.mean_rel, profile.sigma_rel],
        rtol=1e-9,
        reason="σ² is a difference of two integrals, 1e-4 of either for short EMAs",
    )


@given(st.floats(0.01, 1), st.floats(0.5, 5))
def test_moments_of_uniform(window: float, t: float) -> None:
    expected = 1 - window / 2, window / 12**0.5
    profile = Uniform(window)
    assert_close([profile.mean_rel, profile.sigma_rel], expected, rtol=1e-9, reason="quadrature")
    absolute = Uniform(window * t, relative=False)
    assert_close(absolute.relative_moments(t), expected, rtol=1e-9, reason="quadrature")


def test_relative_width_of_exponential_depends_on_t() -> None:
    """A half-life much shorter than the run: mean t - h/ln 2, deviation h/ln 2."""
    profile = Exponential(0.02)
    tail = 0.02 / log(2)
    assert_close(profile.relative_moments(1.0), [1 - tail, tail], rtol=1e-9, reason="quadrature")
    with pytest.raises(ValueError, match=r"changes with t.*relative_moments"):
        _ = profile.sigma_rel


@given(st.floats(0.5, 0.9999), st.floats(0.1, 10))
def test_exponential_from_beta(decay: float, dt: float) -> None:
    """The decay that defined it comes back."""
    profile = Exponential.from_beta(decay, dt)
    assert_close(beta(profile, 100.0, dt), decay, rtol=1e-14, reason="a logarithm and its inverse")


@given(st.one_of(profiles(), st.just(Uniform(3.0))))
def test_profiles_survive_storage(profile: Profile) -> None:
    assert profile_from_dict(profile.to_dict()) == profile
    assert repr(profile_from_dict(profile.to_dict())) == repr(profile)
    assert as_profile(profile) is profile


@given(sigma_rels)
def test_number_means_power_function(sigma_rel: float) -> None:
    assert as_profile(sigma_rel) == PowerFunction(sigma_rel)
    assert as_profile(sigma_rel).sigma_rel == sigma_rel


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PowerFunction(), "either sigma_rel or gamma"),
        (lambda: PowerFunction(0.1, gamma=3.0), "either sigma_rel or gamma"),
        (lambda: PowerFunction("0.1x"), "sigma_rel must be a number"),
        (lambda: Custom(cumulative=0.5), "cumulative must be a function"),  # type: ignore[arg-type]
        (lambda: as_profile(None), "sigma_rel must be a number"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types(make: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Exponential(0), r"halflife must be > 0 \(got 0"),
        (lambda: Exponential(-1), "halflife must be > 0"),
        (lambda: Exponential(nan), "halflife must be finite"),
        (lambda: Exponential.from_beta(1.0), r"beta must be in \(0, 1\) \(got 1.0\)"),
        (lambda: Exponential.from_beta(0.0), "beta must be in"),
        (lambda: Exponential.from_beta(nan), "beta must be in"),
        (lambda: Exponential.from_beta(0.9, dt=0), "dt must be > 0"),
        (lambda: Uniform(0), "window must be a fraction"),
        (lambda: Uniform(-3), "window must be a fraction"),
        (lambda: Uniform(1.5, relative=True), "window must be a fraction"),
        (lambda: Uniform(inf), "window must be finite"),
        (lambda: Custom(cumulative=lambda tau, t: tau / t / 2), "must be 1"),
        (lambda: Custom(cumulative=lambda tau, t: np.sin(6 * tau / t)), "must rise"),
        (lambda: Custom(cumulative=lambda tau, t: tau * nan), "must rise"),
        (lambda: Custom(cumulative=lambda tau, t: 1.0), "must work on arrays"),
        (lambda: Custom(cumulative=lambda tau, t: tau / t).to_dict(), "cannot be stored"),
        (lambda: profile_from_dict({"kind": "cosine"}), "unknown profile kind 'cosine'"),
        (lambda: profile_from_dict({"kind": "power"}), "lacks the field"),
        (lambda: PowerFunction(0.1).cumulative(0.5, 0.0), "t must be > 0"),
        (lambda: PowerFunction(0.1).density(0.5, nan), "t must be > 0"),
        (lambda: PowerFunction(0.1).weights([]), "strictly increasing"),
        (lambda: PowerFunction(0.1).weights([1, 1]), "strictly increasing"),
        (lambda: PowerFunction(0.1).weights([0, 1]), "strictly increasing"),
        (lambda: PowerFunction(0.1).weights([1, nan, 3]), "strictly increasing"),
        (lambda: PowerFunction(0.1).weights([1, inf]), "strictly increasing"),
        (lambda: beta(0.1, 1.0, 0.0), "0 < t_delta <= t_next"),
        (lambda: beta(0.1, 1.0, 1.5), "0 < t_delta <= t_next"),
        (lambda: beta(0.1, 1.0, nan), "0 < t_delta <= t_next"),
        (lambda: beta(0.1, inf, 1.0), "0 < t_delta <= t_next"),
        (lambda: beta(0.1, -1.0, -2.0), "0 < t_delta <= t_next"),
        (lambda: Every(0), "finite interval > 0"),
        (lambda: Every(nan), "finite interval > 0"),
        (lambda: AtTimes([]), "at least one"),
        (lambda: AtTimes([1, -1]), "finite and > 0"),
        (lambda: AtTimes([1, nan]), "finite and > 0"),
        (lambda: AtTimes([nan, 1]), "finite and > 0"),
        (lambda: AtTimes([1, nan, 2]), "finite and > 0"),
    ],
)
def test_values_outside_their_domain(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_profiles_without_an_update_rule() -> None:
    with pytest.raises(TypeError, match="no update rule"):
        beta(Uniform(0.5), 2, 1)


@given(st.lists(st.floats(1e-3, 3), min_size=1, max_size=40), st.floats(0.1, 5))
def test_every_writes_once_for_each_multiple(steps: list[float], interval: float) -> None:
    """A snapshot by the first update at or past each multiple, and at no other."""
    schedule, previous = Every(interval), 0.0
    for t in np.cumsum(steps).tolist():
        crossed = np.floor(t / interval + 1e-9) > np.floor(previous / interval + 1e-9)
        exact = abs(t / interval - round(t / interval)) > 1e-8  # else either answer may be right
        if exact and abs(previous / interval - round(previous / interval)) > 1e-8:
            assert schedule.due(previous, t) == crossed
        previous = t


def test_every_counts_rounded_multiples() -> None:
    """0.1 added up falls short of 0.3 and 0.7 in float64."""
    grid = np.cumsum(np.full(1000, 0.1))
    due = [Every(0.5).due(a, b) for a, b in pairwise([0.0, *grid])]
    assert sum(due) == 200
    assert np.flatnonzero(due).tolist() == list(range(4, 1000, 5))


def test_at_times() -> None:
    schedule = AtTimes([10, 3, 3.5])
    assert [t for t in range(1, 14) if schedule.due(t - 1, t)] == [3, 4, 10]
