"""Conversions between σ_rel and γ: inverse to each other, monotone, and strict about domains."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from helpers import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIGMA_REL_MAX, all_sigma_rels

from posthoc_ema import PowerFunction, gamma_to_sigma_rel, sigma_rel_to_gamma


@given(all_sigma_rels)
def test_round_trip_from_sigma_rel(sigma_rel: float) -> None:
    assert_close(
        gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)),
        sigma_rel,
        rtol=2e-15,
        reason="dσ/σ <= dγ/(γ+1): a few roundings, not amplified",
    )


@given(st.floats(0, 9000))
def test_round_trip_from_gamma(gamma: float) -> None:
    # Near γ = 0, where dσ/dγ = -0.048, rounding of σ_rel moves γ by 20 times as much.
    assert_close(
        sigma_rel_to_gamma(gamma_to_sigma_rel(gamma)),
        gamma,
        rtol=2e-15,
        atol=4e-15,
        reason="rounding of σ_rel in between",
    )


@given(st.lists(all_sigma_rels, min_size=2, max_size=20, unique=True))
def test_longer_averages_have_smaller_exponents(sigma_rels: list[float]) -> None:
    """Never out of order, not even between neighbouring floats."""
    gamma = sigma_rel_to_gamma(np.sort(sigma_rels))
    assert (np.diff(gamma) <= 0).all()
    assert (gamma >= 0).all()


@given(all_sigma_rels)
def test_cubic_is_solved(sigma_rel: float) -> None:
    """(γ+2)²(γ+3)σ² = γ+1, Eq. 126 itself."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert_close(
        (gamma + 2) ** 2 * (gamma + 3) * sigma_rel**2 / (gamma + 1), 1, rtol=1e-14,
        reason="a dozen roundings",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 3)])
def test_shape_and_type_are_kept(shape: tuple[int, ...]) -> None:
    sigma_rel = np.full(shape, 0.1, np.float32)
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert (gamma.shape, gamma.dtype) == (shape, np.float64)
    back = gamma_to_sigma_rel(gamma)
    assert (back.shape, back.dtype) == (shape, np.float64)
    assert_equal(sigma_rel_to_gamma(np.full(shape, 0.1)), sigma_rel_to_gamma(0.1))


# From 0.3003 on the cubic has one real root, the largest real part of which is another profile;
# between 12^-½ = 0.288675 and there γ would be negative, with infinite density at 0.
BAD_SIGMA_RELS = [nan, 0.0, -0.1, -inf, inf, np.nextafter(SIGMA_REL_MAX, 1), 0.2887, 0.295, 0.3003,
                  0.301, 0.4, 1.0]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SIGMA_RELS)
def test_sigma_rel_outside_its_domain(bad: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be in \(0, 0\.288675\] \(got \["):
        sigma_rel_to_gamma(bad)
    with pytest.raises(ValueError, match="sigma_rel must be"):
        sigma_rel_to_gamma([0.1, bad, 0.2])
    with pytest.raises(ValueError, match="sigma_rel must be"):
        PowerFunction(bad)


def test_message_names_the_culprit_alone() -> None:
    with pytest.raises(ValueError, match=r"\(got \[0\.4\]\); 0\.288675 is the plain mean over"):
        sigma_rel_to_gamma([0.1, 0.4, 0.2])


@pytest.mark.parametrize("bad", [nan, -1e-9, -1.0, -2.0, inf, -inf])
def test_gamma_outside_its_domain(bad: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must be finite and >= 0 \(got \["):
        gamma_to_sigma_rel([1.0, bad])
    with pytest.raises(ValueError, match="gamma must be finite"):
        PowerFunction(gamma=bad)


def test_ends_of_the_domain_are_inside() -> None:
    """The plain mean, and an average far shorter than anyone needs."""
    assert_close(sigma_rel_to_gamma(SIGMA_REL_MAX), 0, atol=1e-15, reason="12^-½ is rounded")
    assert_close(sigma_rel_to_gamma(1e-4), 1e4 - 3, rtol=1e-8, reason="γ = 1/σ - 3 - σ/2 + …")
    assert gamma_to_sigma_rel(0.0) == SIGMA_REL_MAX
