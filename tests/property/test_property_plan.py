"""Plans: within budget, never worse for a larger one, and truly better than even spacing."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_ema import EMA, AtTimes, Plan, PowerFunction, plan, solve
from posthoc_ema.encoding import ENCODINGS
from posthoc_ema.movement import Movement
from posthoc_ema.planning import RATES
from posthoc_ema.thinning import Thinning

TWO = (0.05, 0.10)
RANGE = (0.01, 0.25)

ranges = st.tuples(st.floats(0.01, 0.1), st.floats(1, 20)).map(
    lambda x: (x[0], min(x[0] * x[1], 0.28))
)


@given(
    budget=st.integers(2, 30),
    lengths=ranges,
    tracks=st.sampled_from([TWO, (0.1,), (0.02, 0.06, 0.2)]),
    t_end=st.sampled_from([1.0, 17, 3.5e6]),
    movement=st.sampled_from(RATES),
)
@settings(max_examples=20, deadline=None)
def test_a_plan_is_what_was_asked_for(
    budget: int, lengths: Any, tracks: Any, t_end: float, movement: str
) -> None:
    if budget < len(tracks):
        with pytest.raises(ValueError, match="less than one time"):
            plan(budget, lengths, tracks, t_end=t_end)
        return
    made = plan(budget, lengths, tracks, t_end=t_end, movement=movement, candidates=32)
    assert made.sigma_rel == tracks
    assert made.snapshots <= budget
    assert made.times[-1] == t_end
    assert (np.diff(made.times, prepend=0) > 0).all()
    assert made.targets[0] == lengths[0]
    assert made.targets[-1] == lengths[1]
    assert made.worst_error == max(made.errors) >= 0
    assert made.schedule == AtTimes(made.times)
    assert made == plan(budget, lengths, tracks, t_end=t_end, movement=movement, candidates=32)
    if t_end == 17:
        assert set(made.times) <= set(range(1, 18))


@pytest.mark.parametrize("movement", RATES)
def test_more_snapshots_are_never_worse(movement: str) -> None:
    errors = [
        plan(n, RANGE, TWO, t_end=1.0, movement=movement, candidates=48).worst_error
        for n in range(2, 48, 3)
    ]
    # Choices are compared with a noise of at least 1e-12; what is reported has the true one.
    assert_at_most(errors[1:], np.array(errors[:-1]) * (1 + 1e-6) + 1e-6, reason="a larger budget")


def test_errors_are_those_of_solve() -> None:
    made = plan(16, RANGE, TWO, t_end=500.0, movement="constant")
    inputs = [(t, s) for t in made.times for s in TWO]
    goals = [(500.0, s) for s in made.targets]
    rate = Movement.constant(500.0, 1 / 500)
    expected = (
        solve(inputs, goals, movement=rate, noise=np.full(16, 2.0**-50)).expected_square ** 0.5
    )
    # In fractions of the end there, in its units here.
    assert_close(made.errors, expected, rtol=1e-6, atol=1e-10, reason="the same problem, rescaled")


def test_times_scale_with_the_end() -> None:
    one, many = (plan(20, RANGE, TWO, t_end=t) for t in (1.0, 1e9))
    assert_close(np.array(many.times) / 1e9, one.times, atol=2e-9, reason="whole units of t")


@pytest.mark.parametrize("every", [7, 1000, 2.5])
def test_times_are_multiples(every: float) -> None:
    made = plan(20, RANGE, TWO, t_end=21_000, every=every)
    places = np.array(made.times[:-1]) / every
    assert_close(places, places.round(), rtol=1e-12, reason="rounding of a product")


@pytest.mark.parametrize("budget", [16, 32, 64])
def test_predicted_error_is_far_below_that_of_even_spacing(budget: int) -> None:
    """With tracks that suit the range, under each rate that may come."""
    free, given_tracks = plan(budget, RANGE, t_end=1.0), plan(budget, RANGE, TWO, t_end=1.0)
    assert free.worst_error < 0.25 * max(given_tracks.even_errors)
    assert given_tracks.worst_error < 0.5 * max(given_tracks.even_errors)


# True errors on simulated random walks

STEPS, WALKS = 2048, 128


def _rates() -> dict[str, Any]:
    u = (np.arange(STEPS) + 0.5) / STEPS
    return {
        "constant": np.ones(STEPS),
        "inverse-sqrt": 1 / np.maximum(u / 0.1, 1),
        "cosine": ((1 + np.cos(np.pi * u)) / 2) ** 2,
        "constant, then decaying": np.clip((1 - u) / 0.2, 0, 1) ** 2,
    }


@cache
def walks(rate: str) -> Any:
    rng = np.random.default_rng(0)
    return np.cumsum(rng.standard_normal((STEPS, WALKS)) * _rates()[rate][:, None] ** 0.5, axis=0)


def average(path: Any, sigma_rel: float, t: int) -> Any:
    return PowerFunction(sigma_rel).weights(np.arange(1.0, t + 1)) @ path[:t]


def worst_true_error(rate: str, times: Any, tracks: Any, movement: Movement) -> float:
    path = walks(rate)
    whole = sorted({int(np.ceil(t - 1e-9)) for t in times})
    inputs = [(float(t), s) for t in whole for s in tracks]
    stored = np.stack([average(path, s, int(t)) for t, s in inputs]).astype(np.float32)
    targets = np.geomspace(*RANGE, 8)
    solution = solve(inputs, [(STEPS, s) for s in targets], movement=movement)
    errors = [
        np.sqrt(np.mean((x @ stored - average(path, s, STEPS)) ** 2))
        for s, x in zip(targets, solution.coefficients, strict=True)
    ]
    return float(max(errors) / np.sqrt(np.mean(path[-1] ** 2)))


@cache
def plan_of(number: int) -> Plan:
    return plan(2 * number, RANGE, t_end=STEPS)


@pytest.mark.parametrize("number", [8, 16, 32])
@pytest.mark.parametrize("rate", list(_rates()))
def test_true_error_is_at_most_half_of_that_of_even_spacing(rate: str, number: int) -> None:
    """At equal budget, planned without knowing the rate."""
    made = plan_of(number)
    movement = Movement(np.arange(STEPS + 1.0)[::8], _rates()[rate].reshape(-1, 8).mean(1))
    even = np.arange(1, number + 1) * STEPS / number
    planned = worst_true_error(rate, made.times, made.sigma_rel, movement)
    assert_at_most(planned, 0.5 * worst_true_error(rate, even, TWO, movement), reason="the plan")


def test_knowing_the_rate_helps() -> None:
    """The guard of the test above: a plan for something else does worse."""
    kinds = {kind: plan(16, RANGE, TWO, t_end=1.0, movement=kind) for kind in RATES[1:]}
    assert kinds["constant"].times != kinds["cosine"].times
    inputs = {kind: [(t, s) for t in made.times for s in TWO] for kind, made in kinds.items()}
    goals = [(1.0, s) for s in np.geomspace(*RANGE, 8)]
    worst = {
        kind: solve(x, goals, movement=Movement.constant(1.0)).expected_square.max()
        for kind, x in inputs.items()
    }
    assert worst["constant"] < 0.5 * worst["cosine"]


# With an open end


@pytest.mark.parametrize("number", [4, 8])
def test_an_open_end(number: int) -> None:
    made = plan(2 * number, (0.03, 0.2), TWO, every=10)
    assert isinstance(made.schedule, Thinning)
    assert (made.schedule.number, made.schedule.tracks) == (number, TWO)
    assert made.t_end is None
    assert made.times[-1] == 1
    assert len(made.times) == number
    assert made.even_errors == ()
    known = plan(2 * number, (0.03, 0.2), TWO, t_end=1.0, movement="constant")
    # Bounded by what is possible, and within what the docs say of it.
    assert known.worst_error / 1.1 < made.worst_error < 5 * known.worst_error
    assert made == plan(2 * number, (0.03, 0.2), TWO, every=10)


def test_an_open_end_as_a_schedule(tmp_path: Any) -> None:
    made = plan(8, (0.05, 0.2), every=5)
    ema = EMA(made.sigma_rel, snapshots=tmp_path, schedule=made.schedule)
    for step in range(1, 121):
        ema.update({"w": np.full(3, step, np.float32)})
    assert ema.store is not None
    assert len(ema.store.list()) == 8


# Budgets, tracks, misuse


def test_budget_in_bytes() -> None:
    by_number = plan(12, RANGE, TWO, t_end=100)
    assert plan(12.9e6, RANGE, TWO, t_end=100, snapshot_bytes=1e6) == by_number
    assert plan(12.9e6, RANGE, TWO, t_end=100, parameters=250e3).times == by_number.times
    half = plan(12.9e6, RANGE, TWO, t_end=100, parameters=250e3, encoding="float16")
    assert len(half.times) == 12


def test_every_encoding_is_known() -> None:
    numbers = [
        plan(1e6, RANGE, TWO, t_end=100, parameters=5e4, encoding=encoding).snapshots
        for encoding in ENCODINGS
    ]
    assert min(numbers) == numbers[0] == 4


@pytest.mark.parametrize("number", [1, 2, 3])
def test_tracks_are_chosen(number: int) -> None:
    made = plan(24, (0.02, 0.15), number, t_end=1.0)
    assert len(made.sigma_rel) == number
    assert set(made.sigma_rel) == set(sorted(made.sigma_rel))
    assert len(made.times) == 24 // number
    assert all(0.02 <= s <= 0.15 for s in made.sigma_rel)


def test_one_track_may_be_a_number() -> None:
    assert plan(4, RANGE, 0.1, t_end=1.0) == plan(4, RANGE, [0.1], t_end=1.0)


def test_one_length() -> None:
    made = plan(4, (0.1, 0.1), t_end=1.0)
    assert made.targets == (0.1,)
    assert made.worst_error < 1e-3


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, RANGE), {}, "at least one snapshot"),
        ((float("nan"), RANGE), {}, "at least one snapshot"),
        ((8, (0.2, 0.1)), {}, "must rise"),
        ((8, (0.01, 0.5)), {}, "sigma_rel must be in"),
        ((8, 0.1), {}, "the shortest and the longest"),
        ((8, RANGE, ()), {}, "at least one"),
        ((8, RANGE, (0.1, 0.1)), {}, "each once"),
        ((8, RANGE, 9), {}, "1 to 4"),
        ((8, RANGE, TWO), {"t_end": -1}, "t_end must be finite and > 0"),
        ((8, RANGE, TWO), {"t_end": 10, "every": 20}, "every must be"),
        ((8, RANGE, TWO), {"t_end": 10, "movement": "fast"}, "movement must be one of"),
        ((8, RANGE, TWO), {"movement": "cosine"}, "need t_end"),
        ((8, RANGE, TWO), {"t_end": 10, "encoding": "float8"}, "encoding must be one of"),
        ((8, RANGE, TWO), {"t_end": 10, "snapshot_bytes": 0}, "must be > 0"),
        ((8, RANGE, TWO), {"snapshot_bytes": 1, "parameters": 1}, "not both"),
        ((8, RANGE, TWO), {"t_end": 10, "candidates": 1}, "candidates must be"),
        ((8, RANGE, TWO), {"t_end": 10, "movement": Movement.constant(1, 0.0)}, "not zero"),
    ],
)
def test_misuse(args: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*args, **options)


def test_a_plan_says_what_it_is() -> None:
    assert isinstance(plan(8, RANGE, TWO, t_end=10), Plan)
