"""Searching for the best EMA length: near it in few evaluations, whatever the metric does."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from metrics import Metric, count_passes, valley
from small_run import write_run

from posthoc_ema import PowerFunction, Reconstruction, evaluations, reconstruct
from posthoc_ema.sweep import find_best, sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "ema", every=40)


GAP = 0.64 / 2**3  # after the twelve evaluations of the default budget

SHAPES: dict[str, Callable[[float], Callable[[float], float]]] = {
    "parabola in log": valley,
    "parabola": lambda best: lambda s: (s / best - 1) ** 2,
    "kink": lambda best: lambda s: abs(log(s / best)),
    "steeper to one side": lambda best: lambda s: log(s / best) ** 2 * (3 if s > best else 1),
    "flat far away": lambda best: lambda s: float(np.log1p((log(s / best) / 0.4) ** 2)),
}


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches without reading anything: metrics of these tests look at the length alone."""

    def only_lengths(snapshots: Any, sigma_rel: Any, **options: Any) -> Any:

        return [
            Reconstruction(
                1.0, PowerFunction(s), [], np.zeros(0), 0.0, {}, {}, [], lambda: ({}, {})
            )
            for s in sigma_rel
        ]

    monkeypatch.setattr(evaluations, "reconstruct", only_lengths)


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("shape", SHAPES)
def test_find_best_is_near_within_the_default_budget(run: Path, shape: str) -> None:
    for best in np.geomspace(0.011, 0.24, 25).tolist():
        metric = Metric(SHAPES[shape](best))
        found = find_best(run, metric)
        assert len(metric.calls) == len(set(metric.calls)) <= 12
        # Six places leave gaps of 0.64 in log; two more halve both gaps beside the best.
        assert_close(log(found.best / best), 0, atol=GAP, reason="width of the last gap")
        assert found.best_metric == metric.function(found.best)


@pytest.mark.usefixtures("_no_weights")
def test_find_best_looks_for_the_largest_too(run: Path) -> None:
    found = find_best(run, Metric(lambda s: -valley(0.06)(s)), mode="max")
    assert_close(found.best, 0.06, rtol=GAP, reason="width of the last gap")


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("best", [0.001, 0.28])
def test_find_best_outside_the_bounds_is_at_the_bound(run: Path, best: float) -> None:
    found = find_best(run, Metric(valley(best)), bounds=(0.02, 0.2))
    assert found.best == (0.02 if best < 0.02 else 0.2)
    assert min(found) == 0.02
    assert max(found) == 0.2


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("budget", [3, 4, 7, 30])
def test_find_best_keeps_to_its_budget(run: Path, budget: int) -> None:
    metric = Metric(lambda s: abs(log(s / 0.06)))
    find_best(run, metric, budget=budget, tolerance=1e-9)
    assert len(metric.calls) == budget


@pytest.mark.usefixtures("_no_weights")
def test_find_best_stops_when_there_is_nothing_left_to_learn(run: Path) -> None:
    metric = Metric(valley(0.06))
    found = find_best(run, metric, budget=100, tolerance=0.1)
    assert len(metric.calls) < 20
    assert_close(found.best, 0.06, rtol=0.1, reason="the tolerance given")


@pytest.mark.usefixtures("_no_weights")
@given(seed=st.integers(0, 10**6))
def test_find_best_under_noise_stays_in_the_valley(run: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = find_best(run, Metric(lambda s: valley(0.06)(s) + 0.01 * rng.standard_normal()))
    # A length looks best by luck only where the valley is no deeper than the noise, here five
    # standard deviations of a difference: log(s / 0.06)² < 5 · 0.014.
    assert_close(log(found.best / 0.06), 0, atol=0.27, reason="noise of the metric")


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_find_best_goes_round_what_is_not_finite(run: Path, bad: float) -> None:
    found = find_best(run, Metric(lambda s: bad if s < 0.05 else valley(0.06)(s)))
    assert_close(found.best, 0.06, rtol=GAP, reason="width of the last gap")


@pytest.mark.usefixtures("_no_weights")
def test_find_best_without_any_finite_metric(run: Path) -> None:
    metric = Metric(lambda s: nan)
    with pytest.raises(ValueError, match="none of the 6 metrics is finite"):
        find_best(run, metric)
    assert len(metric.calls) == 6, "no search without a direction"


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("stop_after", [0, 1, 4, 6, 9, 11])
def test_an_interrupted_search_ends_as_if_it_had_not_been(
    run: Path, tmp_path: Path, stop_after: int
) -> None:
    shape = SHAPES["parabola"](0.07)
    first, second, whole = Metric(shape, stop_after), Metric(shape), Metric(shape)
    with pytest.raises(KeyboardInterrupt):
        find_best(run, first, cache=tmp_path / "cache.json", tolerance=1e-9)
    resumed = find_best(run, second, cache=tmp_path / "cache.json", tolerance=1e-9)
    uninterrupted = find_best(run, whole, tolerance=1e-9)
    assert first.calls + second.calls == whole.calls
    assert dict(resumed) == dict(uninterrupted)
    # And once more, with nothing left to do.
    find_best(run, Metric(shape, 0), cache=tmp_path / "cache.json", tolerance=1e-9)


@pytest.mark.usefixtures("_no_weights")
def test_find_best_refines_a_sweep_in_the_same_cache(run: Path, tmp_path: Path) -> None:
    cache, shape = tmp_path / "cache.json", valley(0.0613)
    sweep(run, np.geomspace(0.01, 0.25, 9).tolist(), Metric(shape), cache=cache)
    metric = Metric(shape)
    found = find_best(run, metric, budget=4, cache=cache)
    assert len(found) == 9 + len(metric.calls)
    assert len(metric.calls) <= 4
    assert_close(found.best, 0.0613, rtol=0.01, reason="a parabola, found at the first attempt")


def test_find_best_with_real_weights_reads_the_grid_in_one_pass(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = reconstruct(run, 0.06).params["net.weight"]
    passes = count_passes(monkeypatch)
    found = find_best(
        run, lambda weights: float(np.square(weights.params["net.weight"] - truth).mean())
    )
    assert passes == [6] + [1] * (len(found) - 6)
    assert_close(found.best, 0.06, rtol=GAP, reason="width of the last gap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (0.2, 0.1)}, r"bounds must rise \(got 0.2, 0.1\)"),
        ({"bounds": (0.1, 0.1)}, "bounds must rise"),
        ({"bounds": (0.0, 0.1)}, "sigma_rel must be in"),
        ({"bounds": (0.1, 0.3)}, "sigma_rel must be in"),
        ({"budget": 2}, r"budget must be at least 3 \(got 2\)"),
        ({"tolerance": 0}, r"tolerance must be > 0 \(got 0\)"),
        ({"mode": "lowest"}, "mode must be one of min, max"),
    ],
)
def test_find_best_misused(run: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_best(run, Metric(valley(0.05)), **options)
