"""Kriging coefficients against a KKT system of exact integrals, solved to 50 digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, load_golden, to_averages

from posthoc_ema import Solution, solve
from posthoc_ema.movement import Movement

CASES = list(load_golden("kriging_solves"))


def _solved(case: dict[str, Any]) -> Solution:
    return solve(
        to_averages(case["inputs"]),
        to_averages(case["targets"]),
        method="kriging",
        movement=Movement(np.array(case["edges"]), np.array(case["rate"])),
        noise=case["noise"],
    )


@pytest.mark.parametrize("name", CASES)
def test_coefficients(name: str) -> None:
    """The library's quadrature and QR against closed forms."""
    case = load_golden("kriging_solves")[name]
    solution = _solved(case)
    for row, expected in zip(solution.coefficients, case["coefficients"], strict=True):
        # 2e-12 was measured where coefficients reach 84 and the condition number 1.4e4.
        assert_close(row, expected, atol=1e-11, reason="rounding, amplified by the condition")
    # One is eliminated; terms of either sign, up to 84, each round.
    assert_at_most(
        np.abs(solution.coefficients.sum(1) - 1),
        np.finfo(np.float64).eps * solution.l1_norm,
        reason="rounding of the sum",
    )


@pytest.mark.parametrize("name", CASES)
def test_expected_square(name: str) -> None:
    """What the error of the coefficients would be, given movement and noise."""
    case = load_golden("kriging_solves")[name]
    assert_close(
        _solved(case).expected_square,
        case["expected_square"],
        rtol=1e-11,
        reason="a sum of squares: no cancellation, but that of the misfit itself",
    )


def test_noise_and_movement_matter() -> None:
    """The cases differ by more than the tolerance: neither argument is ignored."""
    case = load_golden("kriging_solves")["8 times"]
    for key, value in (("noise", [1e-6] * 16), ("rate", [0.5])):
        with pytest.raises(AssertionError):
            assert_close(
                _solved({**case, key: value}).coefficients,
                case["coefficients"],
                atol=1e-11,
                reason="a negative control",
            )


def test_many_snapshots() -> None:
    """256 times of two tracks, where the quadrature has few nodes for each interval."""
    inputs = [(8 * k / 256, track) for k in range(1, 257) for track in (0.05, 0.10)]
    table = load_golden("kriging_accuracy")
    for noise in (8e-14, 1e-6):
        rows = np.array([row[1:] for row in table["rows"] if row[0] == noise])
        sigma_rels, expected_square, l1_norm, l2_norm = rows.T
        solution = solve(
            inputs,
            [(8.0, s) for s in sigma_rels],
            movement=Movement.constant(8.0),
            noise=np.full(len(inputs), noise),
        )
        # The coefficients minimise it, so that their error enters squared; what remains is
        # quadrature of a squared misfit down to 1e-14 of the movement.
        assert_close(
            solution.expected_square, expected_square, rtol=1e-4, reason="quadrature, 256 intervals"
        )
        assert_close(solution.l1_norm, l1_norm, rtol=1e-5, reason="quadrature, 256 intervals")
        assert_close(solution.l2_norm, l2_norm, rtol=1e-6, reason="quadrature, 256 intervals")


def test_singular_to_working_precision() -> None:
    """512 times × 3 tracks, nearly collinear: coefficients stay small and sum to one."""
    inputs = [(t, s) for t in range(1, 513) for s in (0.03, 0.08, 0.2)]
    targets = [(512, s) for s in (0.02, 0.05, 0.1, 0.15, 0.25)]
    solution = solve(inputs, targets)
    assert_close(solution.coefficients.sum(1), 1, atol=1e-13, reason="one is eliminated")
    # The noise of float32 alone keeps the norm at a tenth of that of the paper's solve, 143.
    assert_at_most(solution.l1_norm, 15, reason="12 was measured, for the shortest target")
