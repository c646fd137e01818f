"""Comparisons that raise, golden tables, and clean Python processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_ema import Exponential, PowerFunction, Profile, Uniform

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def assert_close(
    actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, reason: str
) -> None:
    """Raise unless |actual - expected| <= atol + rtol |expected| everywhere.

    ``reason`` says where the tolerance comes from; without one there is no tolerance to give.
    """
    np.testing.assert_allclose(
        actual, expected, rtol=rtol, atol=atol, equal_nan=False, err_msg=reason, strict=False
    )


def assert_equal(actual: Any, expected: Any) -> None:
    """Raise unless both are the same to the last bit."""
    np.testing.assert_array_equal(actual, expected)


def assert_at_most(actual: Any, bound: Any, *, reason: str) -> None:
    """Raise if any entry exceeds its bound, or is NaN."""
    actual, bound = np.broadcast_arrays(np.asarray(actual, float), np.asarray(bound, float))
    bad = ~(actual <= bound)
    if bad.any():
        raise AssertionError(f"{reason}: {actual[bad]} exceeds {bound[bad]} at {np.argwhere(bad)}")


@cache
def load_golden(name: str) -> Any:
    """A table that `python -m precompute` wrote."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def to_profile(described: tuple[str, float]) -> Profile:
    """The library's profile for what golden tables call it."""
    kind, value = described
    makers: dict[str, Any] = {
        "power": PowerFunction,
        "exponential": Exponential,
        "uniform": Uniform,
    }
    return makers[kind](value)


def to_averages(described: Any) -> list[tuple[float, Profile]]:
    """The library's (t, profile) for those of a golden table."""
    return [(t, to_profile(profile)) for t, profile in described]


def run_python(*args: str, cwd: Path | None = None, check: bool = True) -> str:
    """What a fresh interpreter prints; raises with its error output if it fails."""
    # The installed package, not whatever lies in the working folder.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    if check and done.returncode:
        raise AssertionError(f"{args} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout
