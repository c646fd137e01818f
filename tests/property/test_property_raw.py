"""Raw checkpoints as inputs: what the estimator makes of weights at single moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal

from posthoc_ema import (
    Exponential,
    PowerFunction,
    Profile,
    SnapshotStore,
    Uniform,
    reconstruct,
    solve,
)
from posthoc_ema.snapshot_file import AverageSource, RunIdentity
from tests.property.test_property_trajectories import drifting, slowing, walk, white

RAW = Uniform(1, relative=False)
STEPS = 1024
TARGETS = (0.02, 0.05, 0.1, 0.2, 0.25)
KINDS: dict[str, Callable[[np.random.Generator], Any]] = {
    "random walk": walk, "slowing walk": slowing, "drift": drifting, "white": white,
}  # fmt: skip


def dense(times: Any, targets: Any, step: float, end: float) -> Any:
    """Ordinary kriging of a random walk on a fine grid, by its normal equations."""
    tau = (np.arange(200_000) + 0.5) * (end / 200_000)
    survival = np.stack([np.clip((t - tau) / step, 0, 1) for t in times])
    goal = np.stack([1 - profile.cumulative(tau, end) for profile in targets])
    n = len(times)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = survival @ survival.T * (end / len(tau))
    system[n, :n] = system[:n, n] = 1
    right = np.ones((n + 1, len(targets)))
    right[:n] = survival @ goal.T * (end / len(tau))
    x = np.linalg.solve(system, right)[:n]
    square = ((x.T @ survival - goal) ** 2).sum(1) * (end / len(tau))
    return x.T, square


TIMES = [(1000,), (400, 1000), (100, 150, 500, 990), tuple(range(50, 1000, 50))]


@pytest.mark.parametrize("times", TIMES)
def test_the_same_as_a_dense_solution(times: Any) -> None:
    targets: list[Profile] = [
        PowerFunction(0.05),
        PowerFunction(0.2),
        Exponential(80),
        Uniform(0.3),
    ]
    solution = solve([(t, RAW) for t in times], [(1000, p) for p in targets])
    x, square = dense(times, targets, 1, 1000)
    reason = "midpoints of a grid of 200,000"
    assert_close(solution.coefficients, x, atol=1e-4, reason=reason)
    assert_close(solution.expected_square, square, rtol=1e-3, atol=1e-6, reason=reason)


def test_between_neighbours_weights_are_interpolated() -> None:
    """A walk is expected to go straight: the weights half-way are the mean of both ends."""
    x = solve([(100, RAW), (200, RAW), (300, RAW)], (300, Uniform(100, relative=False)))
    assert_close(x.coefficients, [0, 0.5, 0.5], atol=0.01, reason="the step has a length")


def test_a_jump_is_a_step_of_no_length() -> None:
    """What a checkpoint's step is called does not matter, as long as it is short."""
    inputs = range(100, 1001, 100)
    long, short = (
        solve([(t, Uniform(h, relative=False)) for t in inputs], (1000, PowerFunction(0.1)))
        for h in (1, 1e-4)
    )
    assert_close(
        long.coefficients, short.coefficients, atol=5e-3, reason="half a step in a hundred"
    )


# Averaged as they are -------------------------------------------------------------------------


def test_plain_means() -> None:
    inputs = [(t, RAW) for t in range(100, 1001, 100)]
    lawa = solve(inputs, (1000, Uniform(300, relative=False)), method="plain")
    assert_close(lawa.coefficients, [0] * 7 + [1 / 3] * 3, atol=1e-15, reason="rounding")
    everything = solve(inputs, (1000, Uniform(1.0)), method="plain")
    assert_close(everything.coefficients, [0.1] * 10, atol=1e-15, reason="rounding")
    ema = solve(inputs, (1000, Exponential(100)), method="plain").coefficients
    halves = 0.5 ** np.arange(9, 0, -1.0)
    assert_close(ema[1:], halves, atol=1e-15, reason="each update halves the rest")
    assert_close(ema.sum(), 1, atol=1e-15, reason="rounding")
    between = solve(inputs, (950, Uniform(200, relative=False)), method="plain").coefficients
    assert_close(between, [0] * 7 + [0.25, 0.75, 0], atol=1e-15, reason="rounding")


def test_a_plain_mean_of_two_averages_of_one_time_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one input for each time"):
        solve([(1, 0.05), (1, 0.1)], (1, 0.07), method="plain")


def write(folder: Path, path: Any, every: int) -> SnapshotStore:
    store, run = SnapshotStore(folder), RunIdentity("raw", "steps", "numpy", 0)
    for t in range(every, STEPS + 1, every):
        values = path[t - 1].astype(np.float32)
        source = AverageSource("w", values.shape, "F32", "F32", lambda values=values: [values])
        store.write(run, t, RAW, [source])
    return store


@pytest.mark.parametrize("times", [8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_error_is_about_the_true_one(tmp_path: Path, kind: str, times: int) -> None:
    """For our estimate and for the plain mean; and ours is never the worse one."""
    path = KINDS[kind](np.random.default_rng(0))
    store = write(tmp_path, path, STEPS // times)
    rms = np.linalg.norm(path[-1])  # errors are relative to the weights
    for sigma_rel in TARGETS:
        grid = np.arange(STEPS + 1.0)
        true = np.diff(PowerFunction(sigma_rel).cumulative(grid, STEPS)) @ path
        errors = {}
        for method in ("kriging", "plain"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # some are beyond what is there
                made = reconstruct(store, sigma_rel, method=method)
            errors[method] = float(np.linalg.norm(made.params["w"] - true) / rms)
            assert_at_most(made.predicted_error, 1.5 * errors[method], reason="predicted")
            assert_at_most(errors[method], 1.5 * made.predicted_error, reason="predicted")
        assert_at_most(errors["kriging"], 1.02 * errors["plain"], reason="it is a minimum")


def test_a_plain_mean_is_that_of_the_files(tmp_path: Path) -> None:
    path = walk(np.random.default_rng(0))
    store = write(tmp_path, path, 128)
    made = reconstruct(store, target=Uniform(512, relative=False), method="plain")
    mean = np.mean([path[t - 1] for t in (640, 768, 896, 1024)], axis=0)
    assert_close(made.params["w"], mean, rtol=1e-5, atol=1e-4, reason="float32 of numbers near 100")
    assert np.isfinite(made.predicted_error)


def test_beyond_what_raw_checkpoints_support(tmp_path: Path) -> None:
    store = write(tmp_path, walk(np.random.default_rng(0)), 128)
    with pytest.warns(UserWarning, match=r"sigma_rel=0\.003 at t=1024 is beyond"):
        reconstruct(store, 0.003)


def test_the_last_checkpoint_is_itself(tmp_path: Path) -> None:
    store = write(tmp_path, walk(np.random.default_rng(0)), 128)
    assert_equal(reconstruct(store, target=RAW).params["w"], store.list()[-1].read("w"))
