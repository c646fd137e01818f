"""Snapshots thinned while training: few at every moment, the right ones, and never one lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_ema import EMA, Snapshot, SnapshotStore, SnapshotWriteError, reconstruct, solve
from posthoc_ema.schedule import Every, ThinningSchedule
from posthoc_ema.thinning import Thinning

TRACKS = (0.05, 0.10)
SCHEDULE = Thinning(6, TRACKS, (0.02, 0.05, 0.1, 0.2), ratio=0.04, every=3)


def weights_at(step: int) -> dict[str, Any]:
    """A trajectory of which any part can be replayed."""
    return {"w": np.sin(np.arange(5) * 0.01 * step).astype(np.float32)}


def train(ema: EMA, first: int, last: int) -> None:
    for step in range(first, last + 1):
        ema.update(weights_at(step))


def times_in(folder: Path) -> list[float]:
    return sorted({s.t for s in SnapshotStore(folder).list()})


def contents(folder: Path) -> dict[str, Any]:
    """What the averages are, without the run's random identity."""
    return {s.path.name: s.digests["averages"] for s in SnapshotStore(folder).list()}


def test_a_run_keeps_few(tmp_path: Path) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    written: list[float] = []
    for step in range(1, 151):
        before = set(times_in(tmp_path)) if written else set()
        ema.update(weights_at(step))
        kept = times_in(tmp_path)
        written += [t for t in kept if t not in before]
        assert len(kept) <= SCHEDULE.number
        assert kept[-1] == written[-1]
        assert len(SnapshotStore(tmp_path).list()) == 2 * len(kept)
    assert len(written) > 4 * SCHEDULE.number
    # One of them at a time is what the schedule says of the same times.
    expected: list[float] = []
    for t in written:
        expected = list(SCHEDULE.keep([*expected, t], t))
    assert_equal(times_in(tmp_path), expected)


def test_a_snapshot_asked_for_counts_too(tmp_path: Path) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    for step in range(1, 41):
        ema.update(weights_at(step))
        ema.snapshot()
        assert len(times_in(tmp_path)) <= SCHEDULE.number
    assert times_in(tmp_path)[-1] == 40


@pytest.mark.parametrize("encoding", ["delta16", "delta8"])
def test_differences_are_thinned_too(tmp_path: Path, encoding: str) -> None:
    """Deleting what later snapshots were predicted from changes no average."""
    ema = EMA(TRACKS, snapshots=tmp_path / "thin", schedule=SCHEDULE, encoding=encoding)
    exact = EMA(TRACKS, snapshots=tmp_path / "all", every=1)
    for step in range(1, 61):
        weights = {"w": np.sin(np.arange(999) * 0.001 * step).astype(np.float32)}
        ema.update(weights)
        exact.update(weights)
    kept = SnapshotStore(tmp_path / "thin").verify()
    assert len({s.t for s in kept}) == SCHEDULE.number
    for sigma_rel in TRACKS:
        thin = reconstruct(tmp_path / "thin", sigma_rel).params["w"]
        whole = reconstruct(tmp_path / "all", sigma_rel).params["w"]
        assert_close(thin, whole, atol=0.02, reason="one step of the coarsest quantiser here")


def test_other_schedules_delete_nothing(tmp_path: Path) -> None:
    assert not isinstance(Every(1), ThinningSchedule)
    assert isinstance(SCHEDULE, ThinningSchedule)
    train(EMA(TRACKS, snapshots=tmp_path, every=1), 1, 40)
    assert_equal(times_in(tmp_path), np.arange(1, 41))


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    """Neither other tracks of the same run, nor what was set aside, nor other files."""
    ema = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    train(ema, 1, 5)
    old = SnapshotStore(tmp_path).list()[0]
    other = EMA(0.2, snapshots=tmp_path / "elsewhere", every=1)
    other.load_state_dict({**other.state_dict(), "run_id": old.run.run_id, "t_first": 1})
    train(other, 1, 1)
    (stranger,) = SnapshotStore(tmp_path / "elsewhere").list()
    shutil.copy(stranger.path, tmp_path)
    (tmp_path / "abandoned").mkdir()
    (tmp_path / "abandoned" / old.path.name).write_bytes(old.path.read_bytes())
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    train(ema, 6, 150)
    mine = [s for s in SnapshotStore(tmp_path).list() if s.profile.sigma_rel in TRACKS]
    assert len(mine) == 2 * SCHEDULE.number
    assert [s.t for s in SnapshotStore(tmp_path).list() if s.profile.sigma_rel == 0.2] == [1]
    assert (tmp_path / "abandoned" / old.path.name).exists()
    assert (tmp_path / "notes.txt").exists()


class _Crash(BaseException):
    """What no handler catches: the process is gone."""


def _break_deletion(
    monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> list[list[Snapshot]]:
    """The next deletion stops after some files; returns what deletions were asked for."""
    asked: list[list[Snapshot]] = []
    delete = SnapshotStore.delete

    def broken(store: SnapshotStore, snapshots: Iterable[Snapshot]) -> int:
        listed = list(snapshots)
        asked.append(listed)
        if len(asked) > 1:
            return delete(store, listed)
        # The newer ones are safely on disk before the first of the older goes.
        newest = [s for s in store.list() if s.t > max(d.t for d in listed)]
        assert len({s.profile for s in newest}) == len(TRACKS)
        for snapshot in newest:
            snapshot.verify()
        delete(store, listed[:after])
        raise error

    monkeypatch.setattr(SnapshotStore, "delete", broken)
    return asked


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_crash_while_deleting_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    train(EMA(TRACKS, snapshots=tmp_path / "whole", schedule=SCHEDULE), 1, 70)

    ema = EMA(TRACKS, snapshots=tmp_path / "broken", schedule=SCHEDULE)
    train(ema, 1, 15)
    state = ema.state_dict()
    kept_before = set(times_in(tmp_path / "broken"))
    asked = _break_deletion(monkeypatch, after, _Crash())
    with pytest.raises(_Crash):
        train(ema, 16, 70)
    doomed = {s.t for s in asked[0]}
    assert len(doomed) == 1
    assert kept_before - doomed <= set(times_in(tmp_path / "broken"))
    for snapshot in SnapshotStore(tmp_path / "broken").list():
        snapshot.verify()

    resumed = EMA(TRACKS, snapshots=tmp_path / "broken", schedule=SCHEDULE)
    resumed.load_state_dict(state)
    train(resumed, 16, 70)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_failed_deletion_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    _break_deletion(monkeypatch, 0, SnapshotWriteError(5, "the disk says no"))
    failures = 0
    for step in range(1, 121):
        try:
            ema.update(weights_at(step))
        except SnapshotWriteError:
            failures += 1
    assert failures == 1
    assert ema.t == 120
    assert len(times_in(tmp_path)) == SCHEDULE.number


def test_resuming_from_an_older_checkpoint(tmp_path: Path) -> None:
    """What was thinned since then stays gone; the run goes on, and fills up again."""
    ema = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    train(ema, 1, 60)
    state = ema.state_dict()
    train(ema, 61, 100)
    kept = times_in(tmp_path)
    resumed = EMA(TRACKS, snapshots=tmp_path, schedule=SCHEDULE)
    resumed.load_state_dict(state)
    resumed.update(weights_at(61))
    assert_equal(times_in(tmp_path), [t for t in kept if t <= 60])
    train(resumed, 62, 200)
    assert len(times_in(tmp_path)) == SCHEDULE.number
    aside = {p.name for p in (tmp_path / "abandoned").rglob("*.safetensors")}
    assert len(aside) == 2 * len([t for t in kept if t > 60])


# The schedule itself


@given(
    ratio=st.floats(0.005, 0.5),
    every=st.none() | st.floats(0.5, 50),
    step=st.floats(0.01, 5),
)
@settings(max_examples=50, deadline=None)
def test_intervals(ratio: float, every: float | None, step: float) -> None:
    """As long as asked for, and no longer than the ratio, the interval and one update."""
    schedule = Thinning(4, TRACKS, (0.1,), ratio, every)
    written, t = [0.0], 0.0
    for _ in range(400):
        t += step
        if schedule.due(written[-1], t):
            written.append(t)
    first, second = np.array(written[1:-1]), np.array(written[2:])
    longest = np.maximum(first * ratio * (1 + ratio), every or 0) + step
    assert_at_most(second - first, longest * (1 + 1e-9) + (every or 0) * ratio, reason="due late")
    # Places are fixed, so two that are written late and soon after each other may be close, but
    # on the whole there are no more than places.
    places = (t / every if every else np.log(t / step) / np.log1p(ratio)) + 2
    assert len(written) - 1 <= places


@given(number=st.integers(2, 10), seed=st.integers(0, 2**16))
@settings(max_examples=10, deadline=None)
def test_every_moment_is_served(number: int, seed: int) -> None:
    """After each writing, no worse than three times the best of a long run: no bad moments."""
    rng = np.random.default_rng(seed)
    targets = (0.03, 0.06, 0.12, 0.2)
    schedule = Thinning(number, TRACKS, targets, ratio=0.06)
    times: list[float] = []
    worst = []
    t = float(rng.uniform(1, 2))
    for _ in range(90):
        times = list(schedule.keep([*times, t], t))
        assert len(times) <= number
        assert times[-1] == t
        goals = [(t, s) for s in targets]
        inputs = [(x, s) for x in times for s in TRACKS]
        worst.append(float(np.sqrt(solve(inputs, goals).expected_square.max() / t)))
        t *= 1.06
    settled = np.array(worst[45:])
    assert_at_most(settled, 3 * settled.min(), reason="the same pattern at every moment")


def test_keeping_is_deterministic_and_needs_no_history() -> None:
    times = [float(t) for t in (1, 2, 5, 9, 14, 20, 27, 35, 44, 54)]
    kept = list(SCHEDULE.keep(times, 54))
    assert kept == list(SCHEDULE.keep(times, 54))
    assert set(kept) <= set(times)
    assert (len(kept), kept[-1]) == (6, 54)
    assert list(SCHEDULE.keep(times[:4], 9)) == times[:4]
    assert list(Thinning(1, TRACKS, (0.1,), 0.1).keep(times, 54)) == [54]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "number must be at least 1"),
        ({"ratio": 0.0}, "ratio must be > 0"),
        ({"every": -1.0}, "every must be a finite interval > 0"),
        ({"targets": (0.5,)}, "sigma_rel must be in"),
    ],
)
def test_misuse(options: Any, message: str) -> None:
    defaults: Any = {"number": 4, "tracks": TRACKS, "targets": (0.1,), "ratio": 0.1}
    with pytest.raises(ValueError, match=message):
        Thinning(**{**defaults, **options})
