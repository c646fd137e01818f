"""Plans on real training runs: at most half the worst true error of even spacing."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most

from posthoc_ema import PowerFunction, plan, solve
from posthoc_ema.movement import fit_movement

RUNS = ["mlp-sgd-constant", "mlp-adam-onecycle"]
EVEN_TRACKS = (0.05, 0.10)


@cache
def trajectory(name: str) -> Any:
    """``[steps, 1000]`` a sample of the weights after every step."""
    pytest.importorskip("torch")
    from benchmarks import training_runs

    rows = []
    for _, task in training_runs.RUNS[name].train():
        weights = training_runs.flat_weights(task.model)
        rows.append(weights[:: len(weights) // 1000][:1000].copy())
    return np.array(rows)


def average(path: Any, sigma_rel: float, t: float) -> Any:
    return PowerFunction(sigma_rel).weights(np.arange(1.0, t + 1)) @ path[: int(t)]


def worst_true_error(path: Any, times: Any, tracks: Any, lengths: Any) -> float:
    """Reconstructed as the library does: movement fitted to the snapshots, stored in float32."""
    inputs = [(float(t), PowerFunction(s)) for t in times for s in tracks]
    stored = np.stack([average(path, p.sigma_rel, t) for t, p in inputs]).astype(np.float32)
    stored = stored.astype(np.float64)
    noise = np.full(len(inputs), 2.0**-50 * np.mean(stored[-1] ** 2))
    steps = np.diff(stored, axis=0)
    movement = fit_movement(inputs, steps @ steps.T / stored.shape[1], noise, stored.shape[1])
    solution = solve(inputs, [(len(path), s) for s in lengths], movement=movement, noise=noise)
    errors = []
    for s, x in zip(lengths, solution.coefficients, strict=True):
        true = average(path, s, len(path))
        errors.append(np.sqrt(np.mean((x @ stored - true) ** 2) / np.mean(true**2)))
    return float(max(errors))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("number", [8, 16, 32])
@pytest.mark.parametrize("lengths", [(0.01, 0.25), (0.02, 0.15)])
def test_at_most_half_of_even_spacing(name: str, number: int, lengths: Any) -> None:
    path = trajectory(name)
    targets = np.geomspace(*lengths, 8)
    made = plan(2 * number, lengths, t_end=len(path))
    even = np.arange(1, number + 1) * (len(path) // number)
    assert made.snapshots <= 2 * number
    assert_at_most(
        worst_true_error(path, made.times, made.sigma_rel, targets),
        0.5 * worst_true_error(path, even, EVEN_TRACKS, targets),
        reason="a plan at least halves the worst error at equal budget",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_thinning_without_knowing_the_end(name: str) -> None:
    """At every moment of the last half of a run at least as good as even spacing."""
    path, number, lengths = trajectory(name), 8, np.geomspace(0.02, 0.2, 6)
    made = plan(2 * number, (0.02, 0.2), every=4)
    times: list[float] = []
    last = 0
    for t in range(1, len(path) + 1):
        if not made.schedule.due(last, t):
            continue
        times, last = list(made.schedule.keep([*times, t], t)), t  # type: ignore[attr-defined]
        if t > len(path) // 2 and t % 8 == 0:
            even = np.arange(1, number + 1) * (t // number)
            assert_at_most(
                worst_true_error(path[:t], times, made.sigma_rel, lengths),
                worst_true_error(path[:t], even, EVEN_TRACKS, lengths),
                reason="even spacing is what one would do who knew the end",
            )
