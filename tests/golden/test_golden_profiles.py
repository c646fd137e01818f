"""Decay of updates and inner products of profiles against 50-digit values."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, load_golden, to_averages

from posthoc_ema import PowerFunction, beta
from posthoc_ema.profiles import inner_product
from posthoc_ema.schedule import update_weight


def test_beta() -> None:
    """From the second update to 2²⁰, and over uneven intervals."""
    rows = np.array(load_golden("updates")["rows"])
    actual = [beta(sigma_rel, t_next, t_delta) for sigma_rel, t_next, t_delta in rows[:, :3]]
    expected = rows[:, 3]
    # exp(y) turns an error of one unit in the last place of y into one of |y| units of exp(y).
    error = np.abs(np.array(actual) / expected - 1) / (1 + np.abs(np.log(expected)))
    assert_close(error, 0, atol=2e-15, reason="a few roundings, amplified by |log β|")


def test_update_weight() -> None:
    """1-β keeps all its digits late in a run, where β is within 1e-12 of one."""
    rows = np.array(load_golden("updates")["rows"])
    actual = [update_weight(s, t_next - t_delta, t_next) for s, t_next, t_delta in rows[:, :3]]
    assert_close(actual, rows[:, 4], rtol=2e-15, reason="a few roundings, nothing amplifies")


def test_update_weight_beats_subtraction() -> None:
    """The table reaches far enough for 1 - β in float64 to fail it."""
    rows = np.array(load_golden("updates")["rows"])
    naive = [1 - beta(sigma_rel, t_next, t_delta) for sigma_rel, t_next, t_delta in rows[:, :3]]
    with pytest.raises(AssertionError):
        assert_close(naive, rows[:, 4], rtol=2e-15, reason="as above")


@pytest.mark.parametrize(
    ("sigma_rel", "expected"),
    [
        (0.05, {2: 3.888921e-6, 10: 0.1505349325, 100: 0.8347469683, 1000: 0.9821795063,
                4096: 0.9956213349}),
        (0.10, {2: 0.00408003166, 10: 0.4333247207, 100: 0.9233272423, 1000: 0.9920902726,
                4096: 0.9980638463}),
    ],
)  # fmt: skip
def test_printed_decays(sigma_rel: float, expected: dict[int, float]) -> None:
    """β of the n-th of equal steps."""
    actual = beta(sigma_rel, np.array(list(expected)), 1)
    assert_close(actual, list(expected.values()), rtol=2e-7, reason="7 to 10 digits printed")


@pytest.mark.parametrize(("sigma_rel", "expected"), [(0.05, 1.713948551e-5), (0.10, 7.5694825e-6)])
def test_printed_decay_late(sigma_rel: float, expected: float) -> None:
    """1-β at step 2²⁰."""
    actual = update_weight(sigma_rel, 2**20 - 1, 2**20)
    assert_close(actual, expected, rtol=1e-8, reason="8 digits printed")


def test_inner_products() -> None:
    """Of power functions in closed form, of the others by quadrature."""
    for t_a, profile_a, t_b, profile_b, expected in load_golden("inner_products")["rows"]:
        (t, p), (s, q) = to_averages([(t_a, profile_a), (t_b, profile_b)])
        # (t_a/t_b)^γ multiplies the rounding of the ratio, and that of γ, by up to 100 · log(16).
        assert_close(
            [inner_product(p, t, q, s), inner_product(q, s, p, t)],
            [expected, expected],
            rtol=1e-13,
            reason=f"{profile_a} at {t_a} with {profile_b} at {t_b}: rounding of the exponent",
        )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 0.05), (1, 0.05), 9.243253523860),
        ((1, 0.10), (1, 0.10), 4.235409360537),
        ((1, 0.05), (1, 0.10), 5.726713247539),
        ((1, 0.10), (2, 0.05), 2.227073601181e-5),
        ((2, 0.10), (1, 0.05), 0.02336517135570),
        ((3, 0.05), (8, 0.13), 0.006100237647932),
        ((7, 0.10), (8, 0.20), 0.2250479174980),
        ((0.5, 0.05), (8, 0.05), 4.2283545e-21),
    ],
)
def test_printed_inner_products(
    a: tuple[float, float], b: tuple[float, float], expected: float
) -> None:
    """Independent of the tables."""
    (t, sigma_a), (s, sigma_b) = a, b
    actual = inner_product(PowerFunction(sigma_a), t, PowerFunction(sigma_b), s)
    digits = 1e-8 if expected < 1e-20 else 1e-12
    assert_close(actual, expected, rtol=digits, reason="13 digits printed, 8 for the last one")


@pytest.mark.parametrize(
    ("rate", "gamma", "sigma_rel"), [(0.05, 12.863, 0.0629), (0.09, 6.702, 0.1024)]
)
def test_classical_ema_with_growing_halflife(rate: float, gamma: float, sigma_rel: float) -> None:
    """A classical EMA whose half-life is r·t, as EDM's ramp-up has it, is a power function."""
    profile = PowerFunction(gamma=np.log(2) / rate - 1)
    assert_close(profile.gamma, gamma, atol=6e-4, reason="3 decimals printed")
    assert_close(profile.sigma_rel, sigma_rel, atol=6e-5, reason="4 decimals printed")
    # The decay over an interval that doubles t: 2^(-Δt/h) accumulated with h = r·t.
    assert_close(beta(profile, 2.0, 1.0), 2 ** -(np.log(2) / rate), rtol=1e-14, reason="rounding")
