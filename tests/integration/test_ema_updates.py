"""``EMA.update``: time, the guard against NaN, and when snapshots are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from posthoc_ema import (
    EMA,
    AtTimes,
    Every,
    NonFiniteError,
    PowerFunction,
    SnapshotStore,
    StateError,
    Uniform,
)

FRAMEWORKS: dict[str, Any] = {"numpy": np.full, "torch": torch.full, "jax": jnp.full}


def weights(value: float) -> dict[str, Any]:
    return {"w": np.full(3, value, np.float64)}


# Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, -1, 3, 2.5, float("nan"), float("inf")])
def test_time_must_increase(t: float) -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update(weights(0), t=3)
    with pytest.raises(ValueError, match="t must increase strictly"):
        ema.update(weights(1), t=t)
    assert ema.t == 3
    np.testing.assert_array_equal(ema.average()["w"], 0)


@pytest.mark.parametrize("t", [0, -5, float("nan")])
def test_the_first_time_must_be_positive(t: float) -> None:
    with pytest.raises(ValueError, match="t must increase strictly"):
        EMA(sigma_rel=0.1).update(weights(0), t=t)


def test_time_is_given_always_or_never() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update(weights(0))
    with pytest.raises(StateError, match="would mix units"):
        ema.update(weights(0), t=2)
    ema = EMA(sigma_rel=0.1)
    ema.update(weights(0), t=2)
    with pytest.raises(StateError, match="would mix units"):
        ema.update(weights(0))


@pytest.mark.parametrize("number", [int, float, np.int32, np.int64, np.float32, np.float64])
def test_any_kind_of_number_is_a_time(number: Any, tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=10)
    for t in (10, 20):
        ema.update(weights(t), t=number(t))
    assert [s.t for s in SnapshotStore(tmp_path).list()] == [10, 20]


def test_large_and_fractional_times_are_kept_exactly(tmp_path: Path) -> None:
    # Neither rounded to a unit nor to the digits of a file name, nor counted in low precision.
    times = [70_001, 2_147_483_648, 2_147_483_649, 2**53 - 1]
    ema = EMA(sigma_rel=(0.05, 0.051), snapshots=tmp_path / "int", encoding="float16")
    for t in times:
        ema.update(weights(1), t=t)
        ema.snapshot()
    assert sorted({s.t for s in SnapshotStore(tmp_path / "int").list()}) == times
    fractions = [0.1, 0.1 + 2**-50, 1 / 3, 1e5 + 1 / 7]
    ema = EMA(sigma_rel=(0.0505, 0.051), snapshots=tmp_path / "float", unit="epochs")
    for t in fractions:
        ema.update(weights(1), t=t)
        ema.snapshot()
    stored = SnapshotStore(tmp_path / "float").list()
    assert sorted({s.t for s in stored}) == fractions
    assert {s.profile.sigma_rel for s in stored} == {0.0505, 0.051}
    assert {s.run.unit for s in stored} == {"epochs"}


def test_begun_in_mid_run_the_first_weights_stand_for_all_before() -> None:
    ema = EMA(sigma_rel=0.1)
    ema.update(weights(1), t=5000)
    ema.update(weights(2), t=5001)
    share = PowerFunction(0.1).weights([5000, 5001])
    np.testing.assert_allclose(ema.average()["w"], share @ [1, 2], rtol=1e-14)


# Arguments -----------------------------------------------------------------------------------


def test_arguments_are_checked_when_they_are_given(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sigma_rel": ()}, "at least one track"),
        ({"sigma_rel": (0.1, 0.1)}, "each once"),
        ({"sigma_rel": 0}, r"must be in \(0, 0.288675\]"),
        ({"sigma_rel": -0.05}, r"must be in \(0, 0.288675\]"),
        ({"sigma_rel": 0.3}, "no average is longer"),
        ({"sigma_rel": 0.9999}, r"longer\. The decay .*: Exponential\.from_beta\(0\.9999\)"),
        ({"sigma_rel": "0.5"}, r"got \[0\.5\]"),
        ({"sigma_rel": float("nan")}, "must be finite"),
        ({"every": 10}, "give snapshots= too"),
        ({"schedule": Every(5)}, "give snapshots= too"),
        ({"snapshots": tmp_path, "every": 5, "schedule": Every(5)}, "not both"),
        ({"snapshots": tmp_path, "every": 0}, "every must be a finite interval > 0"),
        ({"snapshots": tmp_path, "every": -3}, "every must be a finite interval > 0"),
        ({"snapshots": tmp_path, "every": "1k"}, "every must be a finite interval > 0"),
        ({"encoding": "float8"}, "encoding must be one of float32"),
        ({"nonfinite": "drop"}, "nonfinite must be one of ignore, skip, raise"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            EMA(**arguments)
    with pytest.raises(TypeError, match="has no update rule"):
        EMA(sigma_rel=Uniform(0.2))
    assert list(tmp_path.iterdir()) == [], "nothing is written before the first update"


def test_tracks_are_reported_as_given() -> None:
    assert EMA(sigma_rel=(0.10, 0.05)).sigma_rel == (0.10, 0.05)
    assert EMA(sigma_rel=PowerFunction(gamma=6.94)).sigma_rel[0] == pytest.approx(0.1, abs=1e-4)
    assert EMA().sigma_rel == (0.05, 0.10)
    assert EMA().t == 0


def test_what_is_not_tracked_is_not_given() -> None:
    ema = EMA(sigma_rel=(0.05, 0.1))
    ema.update(weights(1))
    with pytest.raises(ValueError, match=r"is not tracked, only .*reconstruct"):
        ema.average(0.07)
    with pytest.raises(ValueError, match="several tracks are kept"):
        ema.average()
    with pytest.raises(StateError, match="call update first"):
        EMA(sigma_rel=0.1).average()


# Guard against NaN ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_skip_leaves_bad_updates_out(framework: str, bad: float) -> None:
    full = FRAMEWORKS[framework]
    ema = EMA(sigma_rel=0.1, nonfinite="skip")
    for value in (1.0, bad, 2.0, bad, bad, 3.0):
        ema.update({"w": full((3,), value), "n": full((1,), 1)})
    assert ema.skipped == 3
    assert ema.t == 6
    # The weights in force since the last good update: the bad steps' time goes to the next.
    expected = PowerFunction(0.1).weights([1, 3, 6]) @ [1, 2, 3]
    np.testing.assert_allclose(np.asarray(ema.average()["w"]), expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_raise_stops_and_averages_nothing(framework: str) -> None:
    full = FRAMEWORKS[framework]
    ema = EMA(sigma_rel=0.1, nonfinite="raise")
    ema.update({"w": full((3,), 1.0)})
    with pytest.raises(NonFiniteError, match="NaN or infinite at t=2; nothing was averaged"):
        ema.update({"w": full((3,), float("nan"))})
    assert ema.t == 1
    assert float(ema.average()["w"][0]) == 1
    ema.update({"w": full((3,), 1.0)})
    assert ema.t == 2


def test_without_the_guard_one_nan_stays_and_snapshots_refuse_it(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=2)
    ema.update(weights(1))
    ema.update(weights(1))
    ema.update(weights(float("nan")))
    with pytest.raises(NonFiniteError, match=r"'w' holds NaN or infinity.*nonfinite=\"skip\""):
        ema.update(weights(1))
    assert [s.t for s in SnapshotStore(tmp_path).list()] == [2]


@pytest.mark.parametrize(
    "model",
    [
        {"w": torch.full((4,), 6e4, dtype=torch.float16)},  # the sum overflows, no weight does
        {"w": torch.full((4,), 3e38)},
        {"w": torch.full((3,), 448.0).to(torch.float8_e4m3fn)},
        {"w": torch.tensor([1 + 1j])},
        {"w": torch.zeros(0), "v": torch.ones(1)},
        {"w": np.full(4, 3e38, np.float32)},
        {"w": np.array([], np.float32), "v": np.ones(1)},
        {"w": jnp.full(4, 3e38)},
        {"w": jnp.ones(2, jnp.float8_e5m2)},
    ],
    ids=lambda m: f"{type(m['w']).__module__}-{m['w'].dtype}",
)
def test_the_guard_lets_all_finite_weights_through(model: Any) -> None:
    ema = EMA(sigma_rel=0.1, nonfinite="raise")
    ema.update(model)
    assert ema.t == 1


@pytest.mark.parametrize(
    "model",
    [
        {"a": torch.ones(3), "w": torch.tensor([1 + 1j, complex("nan")])},
        {"a": torch.ones(3), "w": torch.tensor([1, float("nan")]).to(torch.float8_e4m3fn)},
        {"a": torch.ones(3), "w": torch.tensor([float("inf"), float("-inf")])},
        {"a": np.ones(2), "w": np.array(np.nan)},
    ],
    ids=["complex", "float8", "infinities that cancel", "0-dim"],
)
def test_the_guard_sees_every_type(model: Any) -> None:
    with pytest.raises(NonFiniteError, match="at t=1"):
        EMA(sigma_rel=0.1, nonfinite="raise").update(model)


def test_a_guarded_run_that_begins_badly() -> None:
    ema = EMA(sigma_rel=0.1, nonfinite="skip")
    ema.update(weights(float("nan")))
    with pytest.raises(StateError, match="call update first"):
        ema.average()
    ema.update(weights(2))
    assert (ema.t, ema.skipped) == (2, 1)
    np.testing.assert_array_equal(ema.average()["w"], 2)


# Snapshots -----------------------------------------------------------------------------------


def snapshot_times(folder: Path) -> list[float]:
    return sorted({s.t for s in SnapshotStore(folder).list()})


@pytest.mark.parametrize(
    ("every", "times", "expected"),
    [
        (10, range(1, 31), [10, 20, 30]),
        (10, range(3, 40, 7), [10, 24, 31]),  # the first at or past each multiple
        (10, [5, 35, 36, 50], [35, 50]),  # several multiples at once: one snapshot
        (0.1, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),  # 0.3 / 0.1 < 3 by rounding
        (2.5, [1, 2, 3, 4, 5, 6], [3, 5]),
        (1000, [4096, 8192], [4096, 8192]),
    ],
)
def test_every(every: float, times: Any, expected: list[float], tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=every)
    for t in times:
        ema.update(weights(t), t=t)
    assert snapshot_times(tmp_path) == expected
    assert len(SnapshotStore(tmp_path).list()) == 2 * len(expected), "one of each track"


def test_schedules(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, schedule=AtTimes([25, 3, 9.5]))
    for t in range(2, 30, 2):
        ema.update(weights(t), t=t)
    assert snapshot_times(tmp_path) == [4, 10, 26]


def test_snapshots_by_hand(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path)
    with pytest.raises(StateError, match="call update first"):
        ema.snapshot()
    ema.update(weights(1))
    written = ema.snapshot()
    assert [s.profile.sigma_rel for s in written] == [0.05, 0.1]
    assert all(s.path.exists() for s in written)
    assert ema.snapshot() == [], "already on disk"
    assert len(SnapshotStore(tmp_path).list()) == 2
    assert ema.store is not None
    with pytest.raises(StateError, match=r"give EMA\(snapshots=folder\)"):
        EMA(sigma_rel=0.1).snapshot()


def test_by_hand_and_by_schedule(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=4)
    for step in range(1, 11):
        ema.update(weights(step))
        if step in (6, 8):
            ema.snapshot()
    assert snapshot_times(tmp_path) == [4, 6, 8]


def test_what_a_snapshot_holds_is_the_average(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.1), snapshots=tmp_path, every=5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        ema.update({"w": rng.normal(size=7).astype(np.float32), "n": np.array([5])})
    for snapshot in SnapshotStore(tmp_path).list():
        average = ema.average(snapshot.profile.sigma_rel)
        np.testing.assert_array_equal(snapshot.read("w"), average["w"])
        np.testing.assert_array_equal(snapshot.read("n"), [5])
