"""What must hold for coefficients of any set of snapshots, with either method."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import noise_levels, sigma_rels, stored_averages

from posthoc_ema import Custom, Exponential, PowerFunction, Uniform, solve
from posthoc_ema.movement import Movement

EPS = float(np.finfo(np.float64).eps)

methods = pytest.mark.parametrize("method", ["kriging", "paper"])


def rounding(solution: Any) -> float:
    """How far rounding of the inputs may move coefficients."""
    return float(100 * EPS * np.max(solution.condition_number * solution.l1_norm))


def last(inputs: Any) -> float:
    return max(float(t) for t, _ in inputs)


@methods
@given(stored_averages(), sigma_rels)
def test_coefficients_sum_to_one(method: str, inputs: Any, sigma_rel: float) -> None:
    """Constant weights come back as they are."""
    solution = solve(inputs, (last(inputs), sigma_rel), method=method)
    assert solution.coefficients.dtype == np.float64
    assert solution.coefficients.shape == (len(inputs),)
    assert_close(
        solution.coefficients.sum(), 1, atol=float(20 * EPS * solution.l1_norm), reason="summation"
    )


@methods
@given(stored_averages(), st.data())
def test_a_stored_average_is_itself(method: str, inputs: Any, data: st.DataObject) -> None:
    """To the last bit, whatever else is stored."""
    t, sigma_rel = data.draw(st.sampled_from(inputs))
    solution = solve(inputs, (t, sigma_rel), method=method)
    assert_equal(solution.coefficients, [float(a == (t, sigma_rel)) for a in inputs])
    assert_close(solution.profile_error, 0, atol=1e-7, reason="the root of a rounding error")


@methods
@given(stored_averages(min_times=2), sigma_rels, st.data())
def test_snapshots_of_the_future_are_not_used(
    method: str, inputs: Any, sigma_rel: float, data: st.DataObject
) -> None:
    """Not a bit: coefficients after the target's time are zero, the others as without them."""
    t = data.draw(st.sampled_from(sorted({t for t, _ in inputs})))
    settings = {"movement": Movement.constant(last(inputs)), "noise": np.full(len(inputs), 1e-9)}
    solution = solve(inputs, (t, sigma_rel), method=method, **settings)
    past = [a for a in inputs if a[0] <= t]
    settings["noise"] = settings["noise"][: len(past)]
    alone = solve(past, (t, sigma_rel), method=method, **settings)
    later = np.array([t_i > t for t_i, _ in inputs])
    assert_equal(solution.coefficients[later], 0)
    assert_equal(solution.coefficients[~later], alone.coefficients)


@methods
@given(stored_averages(), st.lists(sigma_rels, min_size=2, max_size=4))
def test_several_targets_are_several_solves(method: str, inputs: Any, several: list[float]) -> None:
    targets = [(last(inputs), s) for s in several] + [(last(inputs) * 1.01, several[0])]
    together = solve(inputs, targets, method=method)
    assert together.coefficients.shape == (len(targets), len(inputs))
    for k, target in enumerate(targets):
        alone = solve(inputs, target, method=method)
        assert_close(
            together.coefficients[k], alone.coefficients, atol=rounding(together),
            reason="another reference input may have been eliminated",
        )  # fmt: skip


@methods
@given(stored_averages(), sigma_rels, st.floats(1e-6, 1e9))
def test_unit_of_time_does_not_matter(
    method: str, inputs: Any, sigma_rel: float, unit: float
) -> None:
    t = last(inputs)
    solution = solve(inputs, (t, sigma_rel), method=method)
    scaled = solve([(u * unit, s) for u, s in inputs], (t * unit, sigma_rel), method=method)
    assert_close(
        scaled.coefficients, solution.coefficients, atol=rounding(solution), reason="rounding of t"
    )
    assert_close(
        scaled.profile_error, solution.profile_error, atol=1e-6, reason="the root of a rounding"
    )


@given(stored_averages(), sigma_rels, noise_levels, st.floats(1e-6, 1e6))
def test_unit_of_weights_does_not_matter(
    inputs: Any, sigma_rel: float, noise: float, unit: float
) -> None:
    """Movement and noise in other units: the same coefficients, the error in those units."""
    t = last(inputs)
    levels = np.full(len(inputs), noise)
    solution = solve(inputs, (t, sigma_rel), movement=Movement.constant(t), noise=levels)
    scaled = solve(
        inputs, (t, sigma_rel), movement=Movement.constant(t, rate=unit), noise=levels * unit
    )
    assert_close(
        scaled.coefficients, solution.coefficients, atol=rounding(solution), reason="rounding"
    )
    assert_close(
        scaled.expected_square, solution.expected_square * unit, rtol=1e-8, reason="rounding"
    )


@methods
@given(stored_averages(min_times=2), sigma_rels, st.randoms(use_true_random=False))
def test_order_of_inputs_does_not_matter(
    method: str, inputs: Any, sigma_rel: float, random: Any
) -> None:
    order = list(range(len(inputs)))
    random.shuffle(order)
    target = (last(inputs), sigma_rel)
    noise = 1e-9 * (1 + np.arange(len(inputs)) % 3)
    straight = solve(inputs, target, method=method, noise=noise)
    shuffled = solve([inputs[i] for i in order], target, method=method, noise=noise[order])
    assert_close(
        shuffled.coefficients,
        straight.coefficients[order],
        atol=rounding(straight),
        reason="order of summation",
    )


@given(stored_averages(min_times=2), sigma_rels, noise_levels)
def test_more_snapshots_never_hurt(inputs: Any, sigma_rel: float, noise: float) -> None:
    """Adding one input at a time: the expected error cannot rise, for it could be ignored."""
    t = last(inputs)
    movement = Movement.constant(t)
    previous = inf
    for n in range(1, len(inputs) + 1):
        current = float(
            solve(
                inputs[:n], (t, sigma_rel), movement=movement, noise=np.full(n, noise)
            ).expected_square
        )
        assert_at_most(
            current, previous * (1 + 1e-9) + 1e-14 * t, reason="quadrature, which has other nodes"
        )
        previous = current


@given(stored_averages(), sigma_rels, noise_levels, st.data())
def test_noise_only_hurts(inputs: Any, sigma_rel: float, noise: float, data: st.DataObject) -> None:
    """On any one snapshot."""
    t = last(inputs)
    levels = np.full(len(inputs), noise)
    more = levels.copy()
    more[data.draw(st.integers(0, len(inputs) - 1))] *= 10
    quiet, noisy = (
        solve(inputs, (t, sigma_rel), movement=Movement.constant(t), noise=n).expected_square
        for n in (levels, more)
    )
    assert_at_most(quiet, noisy * (1 + 1e-9), reason="rounding")


@given(stored_averages(), sigma_rels, noise_levels, st.lists(st.floats(0.01, 100), min_size=3,
       max_size=3))  # fmt: skip
def test_kriging_is_never_worse_than_the_paper(
    inputs: Any, sigma_rel: float, noise: float, rates: list[float]
) -> None:
    """In the error that it minimises, under any movement and noise."""
    t = last(inputs)
    movement = Movement(np.array([0, 0.2, 0.7, 1]) * t, np.array(rates))
    kriging, paper = (
        solve(
            inputs,
            (t, sigma_rel),
            method=method,
            movement=movement,
            noise=np.full(len(inputs), noise),
        ).expected_square
        for method in ("kriging", "paper")
    )
    assert_at_most(kriging, paper * (1 + 1e-9), reason="rounding")


@given(stored_averages(), sigma_rels, noise_levels, st.data())
def test_kriging_is_a_minimum(
    inputs: Any, sigma_rel: float, noise: float, data: st.DataObject
) -> None:
    """Moving weight from one snapshot to another raises the expected error, in closed form."""
    t = last(inputs)
    solution = solve(
        inputs,
        (t, sigma_rel),
        movement=Movement.constant(t),
        noise=np.full(len(inputs), noise),
    )
    optimum = _expected_square(inputs, (t, sigma_rel), solution.coefficients, noise)
    i, j = (data.draw(st.integers(0, len(inputs) - 1)) for _ in range(2))
    for step in (1e-3, -1e-3):
        moved = solution.coefficients.copy()
        moved[i] += step
        moved[j] -= step
        perturbed = _expected_square(inputs, (t, sigma_rel), moved, noise)
        scale = t * float(solution.l1_norm) ** 2
        assert_at_most(optimum, perturbed + 100 * EPS * scale, reason="cancellation")


def _expected_square(inputs: Any, target: Any, x: Any, noise: float) -> float:
    """∫ (Σ x_i F_i - F*)² dτ + ν Σ x_i², from pairwise integrals of (1-F)(1-F)."""
    t = np.array([*(t for t, _ in inputs), target[0]])
    p = np.array([PowerFunction(s).gamma for _, s in [*inputs, target]]) + 1
    q, s = p[:, None], t[:, None]
    end = np.minimum(t, s)
    u, v = (end / s) ** q, (end / t) ** p
    products = end * (1 - u / (q + 1) - v / (p + 1) + u * v / (p + q + 1))
    y = np.append(x, -1)
    return float(y @ products @ y + noise * x @ x)


@given(stored_averages(min_times=2))
def test_weights_that_do_not_move(inputs: Any) -> None:
    """Nothing but noise: inverse-variance weights, as any mean of equal things."""
    t = last(inputs)
    noise = 1.0 + np.arange(len(inputs))
    solution = solve(inputs, (t, 0.07), movement=Movement.constant(t, rate=0.0), noise=noise)
    expected = 1 / noise / (1 / noise).sum()
    assert_close(solution.coefficients, expected, atol=1e-13, reason="rounding")


def test_defaults_are_as_documented() -> None:
    """A constant rate of one, and the rounding of float32: 1e-14 of the movement in all."""
    inputs = [(t, s) for t in (1, 2, 5) for s in (0.05, 0.1)]
    given_nothing = solve(inputs, (5, 0.02))
    given_all = solve(
        inputs, (5, 0.02), movement=Movement.constant(5), noise=np.full(len(inputs), 5e-14)
    )
    assert_equal(given_nothing.coefficients, given_all.coefficients)
    assert_equal(given_nothing.expected_square, given_all.expected_square)


def test_neither_movement_nor_noise() -> None:
    """Every combination is right; the answer must be one of them, and free of NaN."""
    inputs = [(t, s) for t in (1, 2, 3) for s in (0.05, 0.1)]
    solution = solve(
        inputs, (3, 0.07), movement=Movement.constant(3, rate=0.0), noise=np.zeros(len(inputs))
    )
    assert_close(solution.coefficients.sum(), 1, atol=1e-15, reason="rounding")
    assert solution.expected_square == 0
    assert np.isfinite(solution.condition_number)


@methods
def test_duplicates_share(method: str) -> None:
    """Two copies of each snapshot: singular, and still the solution with one copy of each."""
    inputs = [(t, s) for t in (1, 2, 3, 4) for s in (0.05, 0.1)]
    noise = np.full(8, 1e-9)
    once = solve(inputs, (4, 0.075), method=method, noise=noise)
    twice = solve(inputs * 2, (4, 0.075), method=method, noise=np.tile(noise * 2, 2))
    assert_close(
        twice.coefficients[:8] + twice.coefficients[8:], once.coefficients, atol=1e-11,
        reason="two copies of twice the variance are one; rounding by a condition of 80",
    )  # fmt: skip
    assert_close(twice.l1_norm, once.l1_norm, rtol=1e-9, reason="they share, never oppose")


@pytest.mark.parametrize(("method", "digits"), [("kriging", 1e-11), ("paper", 1e-5)])
def test_custom_profile_equal_to_a_power_function(method: str, digits: float) -> None:
    """As input and as target."""

    def custom(sigma_rel: float) -> Custom:
        exponent = PowerFunction(sigma_rel).gamma + 1
        return Custom(cumulative=lambda tau, t: (tau / t) ** exponent)

    inputs = [(t, s) for t in (2, 3, 4) for s in (0.05, 0.1)]
    expected = solve(inputs, (4, 0.08), method=method)
    actual = solve([(t, custom(s)) for t, s in inputs], (4, custom(0.08)), method=method)
    assert_close(
        actual.coefficients, expected.coefficients, atol=digits,
        reason="kriging: other panels; paper: densities by differences over 2e-5 t, whose "
        "relative error of 1e-8 a condition number of 80 amplifies",
    )  # fmt: skip


@pytest.mark.parametrize("target", [Exponential(0.3), Uniform(0.2), Uniform(1.0)])
@methods
def test_other_profiles_as_target(method: str, target: Any) -> None:
    """Reconstructed from power functions, better with more of them."""
    errors = []
    for n in (8, 32):
        inputs = [(4 * k / n, s) for k in range(1, n + 1) for s in (0.05, 0.1)]
        solution = solve(inputs, (4, target), method=method)
        errors.append(float(solution.expected_square))
        assert_close(solution.coefficients.sum(), 1, atol=1e-13, reason="rounding")
    assert_at_most(errors[1], errors[0] / 2, reason="four times as many snapshots")
    # The plain mean needs the start of training, which snapshots see only from far.
    assert_at_most(errors[1], 3e-3, reason="of a movement of 4 in all")


IN = [(1, 0.05), (2, 0.05)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], (1, 0.1)), "at least one input"),
        ((IN, (0.5, 0.1)), "no input at or before the target's t=0.5; the earliest is 1"),
        ((IN, (0, 0.1)), r"t must be finite and > 0 \(got 0"),
        ((IN, (-1, 0.1)), "t must be finite and > 0"),
        ((IN, (nan, 0.1)), "t must be finite and > 0"),
        ((IN, (inf, 0.1)), "t must be finite and > 0"),
        (([(nan, 0.1)], (1, 0.1)), "t must be finite and > 0"),
        (([(-1, 0.1)], (1, 0.1)), "t must be finite and > 0"),
        ((IN, (2, 0.0)), "sigma_rel must be in"),
        ((IN, (2, -0.1)), "sigma_rel must be in"),
        ((IN, (2, 0.29)), "sigma_rel must be in"),
        ((IN, (2, 0.4)), "sigma_rel must be in"),
        ((IN, (2, nan)), "sigma_rel must be"),
        ((IN, (2, inf)), "sigma_rel must be"),
        (([(1, 0.4)], (2, 0.1)), "sigma_rel must be in"),
    ],
)
@methods
def test_domain(method: str, arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        solve(*arguments, method=method)


@pytest.mark.parametrize("noise", [[1e-9], [1e-9, -1e-9], [1e-9, nan], [[1e-9, 1e-9]]])
def test_noise_domain(noise: Any) -> None:
    with pytest.raises(ValueError, match="noise must hold 2 variances >= 0"):
        solve(IN, (2, 0.1), noise=noise)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method must be one of kriging, paper"):
        solve(IN, (2, 0.1), method="ridge")


def test_paper_refuses_where_no_input_has_weight() -> None:
    """A target far later than all snapshots: Σx vanishes, and cannot be rescaled."""
    with pytest.raises(ValueError, match='use method="kriging" or snapshots nearer'):
        solve([(1, 0.05), (1, 0.1)], (1000, 0.05), method="paper")


def test_solution_as_array() -> None:
    """The coefficients, for those who want nothing else."""
    solution = solve(IN, [(2, 0.1), (2, 0.07)])
    assert_equal(np.asarray(solution), solution.coefficients)
    assert_equal(np.asarray(solution[1]), solution.coefficients[1])
    assert_equal(solution.l2_norm, np.linalg.norm(solution.coefficients, axis=1))
