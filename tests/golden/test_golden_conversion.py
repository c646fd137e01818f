"""σ_rel ↔ γ against 50-digit roots of the cubic."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_close, load_golden

from posthoc_ema import PowerFunction, gamma_to_sigma_rel, sigma_rel_to_gamma

DIGITS = "the promise of the interface: relative error below 1e-13"


def test_gamma_over_the_whole_domain() -> None:
    """From 1e-4 up to the largest float64 below 12^-½, where γ is 3e-16."""
    table = load_golden("conversion")
    assert min(table["sigma_rel"]) == 1e-4
    assert max(table["sigma_rel"]) == 12**-0.5
    assert_close(sigma_rel_to_gamma(table["sigma_rel"]), table["gamma"], rtol=1e-13, reason=DIGITS)


def test_the_naive_formula_would_not_pass() -> None:
    """Roots of the cubic in float64 lose all digits near 12^-½: the table is sharp enough."""
    table = load_golden("conversion")
    naive = [np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real.max() for s in table["sigma_rel"]]
    with pytest.raises(AssertionError, match="relative error below 1e-13"):
        assert_close(naive, table["gamma"], rtol=1e-13, reason=DIGITS)


def test_sigma_rel_of_gamma() -> None:
    """From the plain mean to EMA lengths of 1e-8."""
    table = load_golden("conversion")
    assert_close(
        gamma_to_sigma_rel(table["given_gamma"]),
        table["sigma_rel_of_gamma"],
        rtol=1e-13,
        reason=DIGITS,
    )


# arXiv:2312.02696 gives γ = 6.94 and 16.97 for its two tracks; more digits by mpmath.
PRINTED = [
    (0.01, 96.9948978237098, 0.98989847),
    (0.02, 46.9895821575666, 0.97958750),
    (0.03, 30.3173715768708, 0.96905689),
    (0.05, 16.9721986023035, 0.94729130),
    (0.075, 10.2891164489839, 0.91862718),
    (0.10, 6.93720393760181, 0.88810818),
    (0.13, 4.60359678147986, 0.84856737),
    (0.15, 3.55786877489947, 0.82007492),
    (0.20, 1.82621377989584, 0.73864503),
    (0.25, 0.719823958000710, 0.63232915),
    (0.28, 0.169343993769499, 0.53903115),
]


@pytest.mark.parametrize(("sigma_rel", "gamma", "mean_rel"), PRINTED)
def test_printed_values(sigma_rel: float, gamma: float, mean_rel: float) -> None:
    """Independent of the tables: values as one would look them up."""
    assert_close(sigma_rel_to_gamma(sigma_rel), gamma, rtol=6e-15, reason="15 digits printed")
    assert_close(
        PowerFunction(sigma_rel).mean_rel, mean_rel, atol=5.1e-9, reason="8 decimals printed"
    )
