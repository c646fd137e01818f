"""Searching over EMA lengths: few evaluations, none of them lost, none of another run."""

from __future__ import annotations

import gc
import json
import weakref
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, assert_equal
from metrics import Metric, count_passes, sigma_rel_of, valley
from small_run import write_run

from posthoc_ema import Reconstruction, SnapshotStore, predict_error, reconstruct
from posthoc_ema.sweep import SweepResult, find_best, sweep

LENGTHS = [0.03, 0.05, 0.1, 0.2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "ema", every=40)


def test_sweep_evaluates_the_weights_of_each_length(run: Path) -> None:
    target = reconstruct(run, 0.1).params["net.weight"]

    def distance(weights: Reconstruction) -> float:
        return float(np.abs(weights.params["net.weight"] - target).mean())

    result = sweep(run, LENGTHS, distance)
    assert list(result) == LENGTHS
    assert (result.best, result.best_metric) == (0.1, 0.0)
    assert min(result[s] for s in (0.03, 0.05, 0.2)) > 0
    assert_close(
        [result.predicted_errors[s] for s in LENGTHS],
        predict_error(run, LENGTHS),
        rtol=1e-12,
        reason="the same computation",
    )


def test_sweep_results_come_in_order_each_length_once(run: Path) -> None:
    metric = Metric(valley(0.05))
    assert list(sweep(run, [0.2, 0.05, 0.2, 0.1], metric)) == [0.05, 0.1, 0.2]
    assert metric.calls == [0.2, 0.05, 0.1]


def test_sweep_reads_the_snapshots_once_if_the_results_fit(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(monkeypatch)
    sweep(run, LENGTHS, Metric(valley(0.05)))
    assert passes == [4]


@pytest.mark.parametrize(("max_bytes", "expected"), [(9000, [2, 2]), (13300, [3, 1]), (1, [1] * 4)])
def test_sweep_holds_no_more_than_it_may(
    run: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int, expected: list[int]
) -> None:
    """A result takes 4,408 bytes: 1,100 float32 and one int64."""
    passes = count_passes(monkeypatch)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def metric(weights: Reconstruction) -> float:
        nonlocal most
        gc.collect()
        alive.append(weakref.ref(weights))
        most = max(most, sum(reference() is not None for reference in alive))
        return sigma_rel_of(weights)

    sweep(run, LENGTHS, metric, max_bytes=max_bytes)
    assert passes == expected
    assert most == 1, "evaluated weights must not be held"


def test_sweep_passes_its_options_on(run: Path) -> None:
    def metric(weights: Reconstruction) -> float:
        assert weights.t == 200
        assert weights.params.keys() == {"net.bias"}
        assert type(weights.params["net.bias"]) is np.ndarray
        return 1.0

    options: Any = {"t": 200, "method": "paper", "names": "*.bias", "framework": "numpy"}
    result = sweep(SnapshotStore(run), [0.07], metric, **options)
    expected = predict_error(run, 0.07, 200, method="paper")
    assert_close(result.predicted_errors[0.07], expected, rtol=1e-12, reason="same computation")


@pytest.mark.parametrize("value", [np.float32(1.5), np.array(1.5), 2, True])
def test_metrics_may_be_any_kind_of_number(run: Path, value: Any) -> None:
    assert sweep(run, [0.07], lambda weights: value).best_metric == float(value)


@pytest.mark.parametrize("value", [None, "good", np.zeros(2)])
def test_a_metric_that_is_no_number_is_refused(run: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="evaluate must return a number"):
        sweep(run, [0.07], lambda weights: value)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_never_the_best(run: Path, bad: float, mode: str) -> None:
    result = sweep(run, LENGTHS, lambda w: bad if sigma_rel_of(w) != 0.1 else 7.0, mode=mode)
    assert (result.best, result.best_metric) == (0.1, 7.0)


def test_no_finite_metric_at_all(run: Path) -> None:
    result = sweep(run, [0.05, 0.1], lambda weights: nan)
    with pytest.raises(ValueError, match="none of the 2 metrics is finite"):
        _ = result.best
    assert "best" not in result.table()


def test_table_marks_the_best() -> None:
    result = SweepResult({0.05: 3.0, 0.1: 4.5}, {0.05: 1e-3, 0.1: nan}, mode="max")
    assert str(result).splitlines() == [
        "sigma_rel        metric  predicted error",
        "     0.05             3         1.00e-03",
        "      0.1           4.5              nan  best",
    ]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "at least one sigma_rel"),
        ([0.05, 0.4], {}, "sigma_rel must be in"),
        ([0.05], {"mode": "best"}, "mode must be one of min, max"),
        ([0.05], {"method": "magic"}, "method must be one of"),
        ([0.05], {"t": 999}, "t=999 is outside"),
    ],
)
def test_sweep_misused(run: Path, lengths: list[float], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(run, lengths, Metric(valley(0.05)), **options)


# The cache


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_interrupted_sweep_goes_on_where_it_was(
    run: Path, tmp_path: Path, stop_after: int
) -> None:
    cache = tmp_path / "deep" / "cache.json"
    first, second = Metric(valley(0.05), stop_after), Metric(valley(0.05))
    with pytest.raises(KeyboardInterrupt):
        sweep(run, LENGTHS, first, cache=cache)
    result = sweep(run, LENGTHS, second, cache=cache)
    assert first.calls + second.calls == LENGTHS
    uninterrupted = sweep(run, LENGTHS, Metric(valley(0.05)))
    assert dict(result) == dict(uninterrupted)
    assert result.predicted_errors == uninterrupted.predicted_errors


def test_a_complete_cache_needs_no_pass(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache.json"
    sweep(run, LENGTHS, Metric(valley(0.05)), cache=cache)
    passes = count_passes(monkeypatch)
    sweep(run, LENGTHS[1:3], Metric(valley(0.05), stop_after=0), cache=cache)
    assert passes == []


def test_without_a_cache_everything_is_evaluated_again(run: Path) -> None:
    """The twin of the test above."""
    with pytest.raises(KeyboardInterrupt):
        sweep(run, LENGTHS, Metric(valley(0.05), stop_after=0))


def test_cached_numbers_come_back_to_the_last_bit(run: Path, tmp_path: Path) -> None:
    values = dict(zip(LENGTHS, [1 / 3, nan, inf, -inf], strict=True))
    for stop_after in (4, 0):
        metric = Metric(values.__getitem__, stop_after)
        result = sweep(run, LENGTHS, metric, cache=tmp_path / "cache.json")
        assert_equal(list(result.values()), list(values.values()))


def test_the_cache_is_strict_json(run: Path, tmp_path: Path) -> None:
    sweep(run, [0.05], lambda weights: nan, cache=tmp_path / "cache.json")
    text = (tmp_path / "cache.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["evaluations"][0]["metric"] == "nan"
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_the_cache_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    sweep(run, LENGTHS, Metric(valley(0.05)), cache=cache)
    before = cache.read_bytes()
    other = write_run(tmp_path / "other", every=40)
    with pytest.raises(ValueError, match=r"cache.json holds metrics of other averages \(run_id"):
        sweep(other, LENGTHS, Metric(valley(0.05)), cache=cache)
    assert cache.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "changed"),
    [({"t": 200}, "t"), ({"method": "paper"}, "method"), ({"names": "*.bias"}, "names")],
)
def test_the_cache_of_another_kind_of_average_is_refused(
    run: Path, tmp_path: Path, options: Any, changed: str
) -> None:
    cache = tmp_path / "cache.json"
    sweep(run, LENGTHS, Metric(valley(0.05)), cache=cache)
    with pytest.raises(ValueError, match=f"{changed} was .*; delete it, or give another cache="):
        find_best(run, Metric(valley(0.05)), cache=cache, **options)


def test_a_cache_is_stale_once_snapshots_come_or_go(tmp_path: Path) -> None:
    folder, cache = write_run(tmp_path / "ema", every=40), tmp_path / "cache.json"
    sweep(folder, LENGTHS, Metric(valley(0.05)), t=300, cache=cache)
    store = SnapshotStore(folder)
    # At t=300 the last time, 320, was not used: the averages are the same without it.
    store.delete([s for s in store.list() if s.t == 320])
    with pytest.raises(ValueError, match="t=300 is outside"):
        sweep(folder, LENGTHS, Metric(valley(0.05)), t=300, cache=cache)
    sweep(folder, LENGTHS, Metric(valley(0.05)), t=200, cache=tmp_path / "at-200.json")
    store.delete([s for s in store.list() if s.t == 240])
    sweep(
        folder, LENGTHS, Metric(valley(0.05), stop_after=0), t=200, cache=tmp_path / "at-200.json"
    )
    store.delete([s for s in store.list() if s.t == 80])
    with pytest.raises(ValueError, match="snapshots was 10, is 8"):
        sweep(folder, LENGTHS, Metric(valley(0.05)), t=200, cache=tmp_path / "at-200.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"posthoc_ema_sweep": 1}', "\x00"])
def test_a_file_that_is_no_cache_is_refused(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(ValueError, match=r"notes.json is not a cache of sweep or find_best"):
        sweep(run, LENGTHS, Metric(valley(0.05)), cache=tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == text


def test_a_cache_of_a_newer_version_is_refused(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    sweep(run, [0.05], Metric(valley(0.05)), cache=cache)
    cache.write_text(cache.read_text().replace('"posthoc_ema_sweep": 1', '"posthoc_ema_sweep": 2'))
    with pytest.raises(ValueError, match="has version 2, this library reads 1"):
        sweep(run, [0.05], Metric(valley(0.05)), cache=cache)


def test_progress_is_shown_on_standard_error_if_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(run, LENGTHS, Metric(valley(0.05)), progress=True)
    shown = capsys.readouterr()
    assert "sweep: 100%" in shown.err
    assert shown.out == ""
    sweep(run, LENGTHS, Metric(valley(0.05)))
    assert capsys.readouterr().err == "", "standard error is no terminal here"
