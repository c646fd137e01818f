"""How numbers, ranges and profiles are written on the command line."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import Exponential, PowerFunction, Uniform
from posthoc_ema.cli.options import parse_numbers, parse_profile


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.05", (0.05,)),
        ("0.05,0.1", (0.05, 0.1)),
        (" 0.05 , 1e-1 ", (0.05, 0.1)),
        ("0.1,0.05,0.1", (0.1, 0.05)),
        ("0.01,0.02,...,0.05", (0.01, 0.02, 0.03, 0.04, 0.05)),
        ("0.01,0.02,…,0.04", (0.01, 0.02, 0.03, 0.04)),
        ("0.05,0.04,...,0.02", (0.05, 0.04, 0.03, 0.02)),
        ("0.01,0.02,...,0.02", (0.01, 0.02)),
        ("0.01,0.02,...,0.04,0.1,0.15,...,0.25", (0.01, 0.02, 0.03, 0.04, 0.1, 0.15, 0.2, 0.25)),
    ],
)
def test_numbers_and_ranges(text: str, numbers: tuple[float, ...]) -> None:
    """Exactly the numbers that one would type: 0.03, not 0.01 + 2 * 0.01."""
    assert parse_numbers(text) == numbers


@given(
    first=st.integers(1, 500),
    step=st.integers(1, 40),
    count=st.integers(2, 60),
    scale=st.sampled_from([1, 10, 1000, 10000]),
)
def test_ranges_hold_what_typing_them_out_would(
    first: int, step: int, count: int, scale: int
) -> None:
    typed = [str((first + k * step) / scale) for k in range(count)]
    assert parse_numbers(f"{typed[0]},{typed[1]},...,{typed[-1]}") == parse_numbers(",".join(typed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a number"),
        ("abc", "'abc' is not a number"),
        ("0.05,,0.1", "'' in '0.05,,0.1' is not a number"),
        ("nan", "'nan' is not a number"),
        ("0.05,inf", "'inf' in '0.05,inf' is not a number"),
        ("...", "needs two numbers before it and one after it"),
        ("0.01,...,0.25", "needs two numbers before it and one after it"),
        ("0.01,0.02,...", "needs two numbers before it and one after it"),
        ("0.01,0.02,...,x", "'x' in '0.01,0.02,...,x' is not a number"),
        ("0.01,0.02,...,...,0.25", "'...' in '0.01,0.02,...,...,0.25' is not a number"),
        ("0.01,0.03,...,0.24", "steps of 0.02 reach 0.23 and 0.25, not 0.24"),
        ("0.01,0.01,...,0.25", "does not lead to 0.25"),
        ("0.02,0.01,...,0.25", "does not lead to 0.25"),
        ("0.01,0.02,...,0.005", "does not lead to 0.005"),
        ("0.01,0.010001,...,0.25", "more than 1000 values"),
    ],
)
def test_numbers_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_numbers(text)


@pytest.mark.parametrize(
    ("text", "profile"),
    [
        ("exponential:halflife=1000", Exponential(halflife=1000)),
        ("exponential:beta=0.5", Exponential(halflife=1)),
        ("uniform:window=0.2", Uniform(window=0.2)),
        ("uniform: window = 300", Uniform(window=300)),
        ("power:gamma=6.94", PowerFunction(gamma=6.94)),
        ("power:sigma_rel=0.1", PowerFunction(0.1)),
    ],
)
def test_profiles(text: str, profile: object) -> None:
    assert parse_profile(text) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no profile; the forms are exponential:halflife=..."),
        ("exponential", "is no profile"),
        ("exponential:window=3", "is no profile"),
        ("uniform:window", "'' in 'uniform:window' is not a number"),
        ("uniform:window=-1", "window must be a fraction of t in (0, 1] or an amount > 0"),
        ("exponential:beta=2", "beta must be in (0, 1)"),
    ],
)
def test_profiles_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_profile(text)
