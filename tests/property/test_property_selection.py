"""Greedy choice of snapshot times: what it says of errors is what ``solve`` says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_ema import PowerFunction, solve
from posthoc_ema.movement import Movement
from posthoc_ema.selection import Choice, Pool, choose_times, dispensable, growing

NOISE = 1e-8  # of the movement: well above what inner products in float64 lose
# Cholesky factors of a Gram matrix with that noise: 1e-16 times 1e8, and some.
ROUNDING = 1e-6

TARGETS = (0.02, 0.06, 0.15, 0.25)
CONSTANT = Movement.constant(1.0)
SLOWING = Movement(np.linspace(0, 1, 9), np.linspace(2, 0.1, 8))

times_of = st.lists(st.integers(1, 60), min_size=2, max_size=9, unique=True).map(
    lambda places: [p / max(places) for p in sorted(places)]
)
tracks_of = st.lists(st.sampled_from([0.03, 0.05, 0.1, 0.2]), min_size=1, max_size=3, unique=True)


def pool_of(
    times: list[float], tracks: list[float], movements: tuple[Movement, ...] = (CONSTANT,)
) -> Pool:
    averages = [(t, PowerFunction(s)) for t in times for s in tracks]
    goals = [PowerFunction(s) for s in TARGETS]
    return Pool.of(averages, goals, movements, np.full(len(averages), NOISE))


def solved(times: Any, tracks: list[float], movement: Movement = CONSTANT) -> Any:
    """``[k]`` expected squares from :func:`posthoc_ema.solve`."""
    inputs = [(t, s) for t in times for s in tracks]
    goals = [(times[-1], s) for s in TARGETS]
    noise = np.full(len(inputs), NOISE)
    return solve(inputs, goals, movement=movement, noise=noise).expected_square


@given(times=times_of, tracks=tracks_of, data=st.data())
@settings(max_examples=40, deadline=None)
def test_errors_are_those_of_solve(times: list[float], tracks: list[float], data: Any) -> None:
    order = data.draw(st.permutations(range(len(times) - 1)))
    some = order[: data.draw(st.integers(0, len(order)))]
    choice = Choice(pool_of(times, tracks, (CONSTANT, SLOWING)), some)
    kept = [times[k] for k in sorted([*some, len(times) - 1])]
    expected = [solved(kept, tracks, movement) for movement in (CONSTANT, SLOWING)]
    # A target that is a stored average has the error of its noise, to the last bit in solve.
    assert_close(choice.square, expected, rtol=ROUNDING, atol=NOISE / 50, reason="two algorithms")


@given(times=times_of, tracks=tracks_of)
@settings(max_examples=25, deadline=None)
def test_the_best_addition_and_the_least_loss(times: list[float], tracks: list[float]) -> None:
    """Against trying every one, by the same measure."""
    pool = pool_of(times, tracks)
    last = len(times) - 1
    place = Choice(pool).best_addition()
    assert place is not None
    scores = {k: Choice(pool, [k]).score for k in range(last)}
    assert_at_most(scores[place], min(scores.values()) * (1 + ROUNDING), reason="two algorithms")
    gone = dispensable(pool)
    left = {k: Choice(pool, [p for p in range(last) if p != k]).score for k in range(last)}
    assert_at_most(left[gone], min(left.values()) * (1 + ROUNDING), reason="two algorithms")


@given(times=times_of, tracks=tracks_of, data=st.data())
@settings(max_examples=25, deadline=None)
def test_growing_never_costs(times: list[float], tracks: list[float], data: Any) -> None:
    required = data.draw(st.sets(st.integers(0, len(times) - 1), max_size=3))
    pool = pool_of(times, tracks, (CONSTANT, SLOWING))
    before = np.full(2, np.inf)
    for number, choice in enumerate(growing(pool, required), len(required | {len(times) - 1})):
        assert len(choice.places) == len(set(choice.places)) == number
        assert required | {len(times) - 1} <= set(choice.places)
        assert_at_most(choice.worst, before * (1 + 1e-12), reason="rounding alone may raise it")
        before = choice.worst
    assert number == len(times)


def test_exchanges_pay() -> None:
    """Greedy choice alone ends higher: the guard that exchanges do anything."""
    times = np.linspace(0, 1, 65)[1:].tolist()
    pool = pool_of(times, [0.05, 0.1])
    greedy = Choice(pool)
    while len(greedy.places) < 8:
        place = greedy.best_addition()
        assert place is not None
        greedy.add(place)
    assert choose_times(pool, 8).score < 0.8 * greedy.score


def test_missing_averages_count_for_nothing() -> None:
    """A track that lacks some times: the same as if those were never there."""
    here = [(0.25, 0.05), (0.5, 0.05), (0.5, 0.1), (0.8, 0.1), (1.0, 0.05)]
    averages = [(t, PowerFunction(s)) for t, s in here]
    goals = [PowerFunction(s) for s in TARGETS]
    pool = Pool.of(averages, goals, [CONSTANT], np.full(len(here), NOISE))
    targets = [(1.0, s) for s in TARGETS]
    noise = np.full(len(here), NOISE)
    expected = solve(here, targets, movement=CONSTANT, noise=noise).expected_square
    actual = Choice(pool, range(4)).square[0]
    assert_close(actual, expected, rtol=ROUNDING, reason="two algorithms")


def test_scaling_scales() -> None:
    pool = pool_of([0.3, 0.7, 1.0], [0.05], (CONSTANT, SLOWING))
    scaled = Choice(pool.scaled(np.array([4.0, 0.5])), [0, 1]).square
    expected = Choice(pool, [0, 1]).square / np.array([[4.0], [0.5]])
    assert_close(scaled, expected, rtol=ROUNDING, reason="rounding, amplified by the noise")


@pytest.mark.parametrize("number", [1, 3, 99])
def test_number_of_times(number: int) -> None:
    places = choose_times(pool_of([0.1, 0.2, 0.5, 0.8, 1.0], [0.05, 0.1]), number).places
    assert_equal(len(places), min(number, 5))
    assert 4 in places
