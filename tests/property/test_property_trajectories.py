"""From updates to reconstructions, on trajectories of known kinds: kriging knows what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most

from posthoc_ema import EMA, PowerFunction, reconstruct

STEPS, WEIGHTS = 1024, 2000
TARGETS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.075, 0.13, 0.16, 0.2, 0.25)


def walk(rng: np.random.Generator) -> Any:
    return np.cumsum(rng.normal(size=(STEPS, WEIGHTS)), axis=0)


def slowing(rng: np.random.Generator) -> Any:
    speed = 1 / np.sqrt(1 + np.arange(STEPS) / 30)
    return np.cumsum(rng.normal(size=(STEPS, WEIGHTS)) * speed[:, None], axis=0)


def white(rng: np.random.Generator) -> Any:
    return 1 + rng.normal(size=(STEPS, WEIGHTS))


def drifting(rng: np.random.Generator) -> Any:
    """With the noise that a training run always has."""
    return np.arange(STEPS)[:, None] / 30 * rng.normal(size=WEIGHTS) + walk(rng)


def ornstein_uhlenbeck(memory: float) -> Callable[[np.random.Generator], Any]:
    def path(rng: np.random.Generator) -> Any:
        keep = np.exp(-1 / memory)
        out = rng.normal(size=(STEPS, WEIGHTS))
        out[1:] *= np.sqrt(1 - keep**2)
        for step in range(1, STEPS):
            out[step] += keep * out[step - 1]
        return out

    return path


KINDS: dict[str, Callable[[np.random.Generator], Any]] = {
    "random walk": walk,
    "slowing walk": slowing,
    "white": white,
    "drift": drifting,
    **{f"OU, {memory} steps": ornstein_uhlenbeck(memory) for memory in (5, 50, 500)},
}


@pytest.mark.parametrize("times", [8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_the_paper(tmp_path: Path, kind: str, times: int) -> None:
    path = KINDS[kind](np.random.default_rng(0)).astype(np.float32)
    ema = EMA(snapshots=tmp_path, every=STEPS // times, encoding="float16")
    for weights in path:
        ema.update({"w": weights})
    grid = np.arange(STEPS + 1.0)
    errors = {}
    for method in ("kriging", "paper"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some are beyond what is there
            made = reconstruct(tmp_path, TARGETS, method=method)
        for result, sigma_rel in zip(made, TARGETS, strict=True):
            share = np.diff(PowerFunction(sigma_rel).cumulative(grid, STEPS))
            true = share @ path.astype(np.float64)
            rms = np.linalg.norm(true)
            error = float(np.linalg.norm(result.params["w"] - true) / rms)
            errors[method, sigma_rel] = error
            if method == "kriging":
                # The bar of this project. OU fluctuations are taken for faster than they are:
                # lengths near their memory come out up to 3.6 times better than predicted.
                allowed = 4.0 if kind.startswith("OU") else 2.5
                assert_at_most(result.predicted_error, allowed * error, reason="predicted")
                assert_at_most(error / 2.5, result.predicted_error, reason="predicted")
    for sigma_rel in TARGETS:
        kriging, paper = errors["kriging", sigma_rel], errors["paper", sigma_rel]
        assert_at_most(kriging, 1.01 * paper, reason="the bar of this project")
    mean = np.mean([np.log(errors["paper", s] / errors["kriging", s]) for s in TARGETS])
    if kind in ("random walk", "slowing walk", "drift"):
        assert_at_most(np.log(1.2), mean, reason="that is what the estimate is for")
