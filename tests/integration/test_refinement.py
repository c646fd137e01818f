"""The newest snapshots of small encodings are kept finer, in a file of their own beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    MissingInputError,
    SnapshotStore,
    convert,
    reconstruct,
)

SMALL = ["delta8", "delta6", "delta4"]
TRACKS = (0.05, 0.10)
# Rounding to float16 changes numbers by 2.07e-4 of their RMS.
AS_FINE_AS_FLOAT16 = 2.07e-4


def train(ema: EMA, first: int, last: int, seed: int = 0) -> None:
    """A random walk that slows down."""
    rng = np.random.default_rng(seed)
    weights = {"w": rng.normal(size=5000), "small": rng.normal(size=7)}
    for step in range(1, last + 1):
        for name, values in weights.items():
            weights[name] = values + rng.normal(size=values.shape) * 0.05 / np.sqrt(1 + step / 30)
        if step >= first:
            ema.update({n: v.astype(np.float32) for n, v in weights.items()}, t=step)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def relative(found: Any, true: Any) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


@pytest.mark.parametrize("encoding", SMALL)
@pytest.mark.parametrize("times", [1, 2, 16, 17])
def test_the_newest_is_fine(tmp_path: Path, encoding: str, times: int) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path, every=20, encoding=encoding)
    train(ema, 1, 20 * times)
    store = SnapshotStore(tmp_path)
    snapshots = store.verify()
    assert len(snapshots) == 2 * times
    assert len(files(tmp_path)) == 2 * times + 2
    assert [s.refines for s in snapshots] == [False] * (2 * times - 2) + [True] * 2
    for snapshot in snapshots[-2:]:
        true = ema.average(snapshot.profile.sigma_rel)
        assert snapshot.base is not None
        fine, coarse = (relative(s.read("w"), true["w"]) for s in (snapshot, snapshot.base))
        assert fine <= AS_FINE_AS_FLOAT16
        assert fine < coarse / 4
        assert np.array_equal(snapshot.read("small"), true["small"]), "as they are"
        found = reconstruct(tmp_path, snapshot.profile.sigma_rel).params["w"]
        assert relative(found, true["w"]) <= AS_FINE_AS_FLOAT16


def test_exact_encodings_need_none(tmp_path: Path) -> None:
    for encoding in ("float32", "float16", "delta16"):
        folder = tmp_path / encoding
        train(EMA(TRACKS, snapshots=folder, every=20, encoding=encoding), 1, 60)
        assert len(files(folder)) == 6


def test_size_counts_both_files(tmp_path: Path) -> None:
    train(EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta6"), 1, 60)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert sum(s.nbytes for s in SnapshotStore(tmp_path).list()) == total


@pytest.mark.parametrize("stop", range(6))
def test_a_kill_while_writing(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two files of a snapshot, or before the older refinement is dropped."""
    ema = EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta6")
    train(ema, 1, 40)
    state, before = ema.state_dict(), len(SnapshotStore(tmp_path).list())
    calls = 0

    class Killed(BaseException):
        pass

    def dying(action: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise Killed
            return action(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        try:
            train(ema, 41, 60)
        except Killed:
            assert stop < 4
    snapshots = SnapshotStore(tmp_path).verify()
    assert before <= len(snapshots) <= before + 2
    reconstruct(tmp_path, 0.07)

    resumed = EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta6")
    resumed.load_state_dict(state)
    train(resumed, 41, 80)
    snapshots = SnapshotStore(tmp_path).verify()
    assert sorted({s.t for s in snapshots}) == [20, 40, 60, 80]
    assert [s.t for s in snapshots if s.refines] == [80, 80]
    assert len(files(tmp_path)) == 10


def test_resuming_from_before_sets_refinements_aside(tmp_path: Path) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta4")
    train(ema, 1, 40)
    state = ema.state_dict()
    train(ema, 41, 60)
    resumed = EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta4")
    resumed.load_state_dict(state)
    train(resumed, 41, 55, seed=0)
    aside = [path.name for path in (tmp_path / "abandoned").rglob("*.safetensors")]
    assert len(aside) == 4
    assert {s.t for s in SnapshotStore(tmp_path).verify()} == {20, 40}
    train(resumed, 56, 60)
    assert [s.refines for s in SnapshotStore(tmp_path).verify()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("encoding", SMALL)
def test_deleting_keeps_what_is_fine(tmp_path: Path, encoding: str) -> None:
    """From the middle, which writes all later ones anew; and the newest itself."""
    ema = EMA(TRACKS, snapshots=tmp_path, every=20, encoding=encoding)
    train(ema, 1, 100)
    store = SnapshotStore(tmp_path)
    store.delete([s for s in store.list() if s.t == 40])
    for snapshot in store.verify()[-2:]:
        true = ema.average(snapshot.profile.sigma_rel)["w"]
        # What was fine is rounded once more.
        assert relative(snapshot.read("w"), true) <= 1.5 * AS_FINE_AS_FLOAT16
    freed = store.delete([s for s in store.list() if s.t == 100])
    assert freed > 0
    assert {s.t for s in store.verify()} == {20, 60, 80}
    assert len(files(tmp_path)) == 6


def test_one_without_the_other(tmp_path: Path) -> None:
    train(EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta6"), 1, 60)
    newest = SnapshotStore(tmp_path).list()[-1]
    assert newest.base is not None
    fine = newest.path.read_bytes()
    newest.path.unlink()
    coarse = SnapshotStore(tmp_path).verify()[-1]
    assert coarse.path == newest.base.path, "the coarser file serves alone"
    newest.path.write_bytes(fine)
    newest.base.path.unlink()
    with pytest.raises(MissingInputError, match=f"needs {newest.base.path.name}"):
        SnapshotStore(tmp_path).list()


@pytest.mark.parametrize("which", ["fine", "coarse"])
def test_damage_of_either_is_found(tmp_path: Path, which: str) -> None:
    train(EMA(TRACKS, snapshots=tmp_path, every=20, encoding="delta6"), 1, 60)
    newest = SnapshotStore(tmp_path).list()[-1]
    victim = newest if which == "fine" else newest.base
    assert victim is not None
    data = bytearray(victim.path.read_bytes())
    data[victim.entries["w"].offset + 100] ^= 8
    victim.path.write_bytes(data)
    for action in (SnapshotStore(tmp_path).verify, lambda: reconstruct(tmp_path, 0.1)):
        with pytest.raises(CorruptSnapshotError, match=victim.path.name.replace("+", r"\+")):
            action()


def test_converting_refines_the_newest(tmp_path: Path) -> None:
    ema = EMA(TRACKS, snapshots=tmp_path / "a", every=20)
    train(ema, 1, 100)
    convert(tmp_path / "a", tmp_path / "b", "delta4")
    assert len(files(tmp_path / "b")) == 12
    convert(tmp_path / "b", tmp_path / "c", "float16")
    assert len(files(tmp_path / "c")) == 10
    true = ema.average(0.10)["w"]
    for folder, bound in (("b", 1.0), ("c", 1.5)):
        found = SnapshotStore(tmp_path / folder).verify()[-1].read("w")
        assert relative(found, true) <= bound * AS_FINE_AS_FLOAT16


def test_buffers_come_from_the_newest(tmp_path: Path) -> None:
    ema = EMA(snapshots=tmp_path, every=1, encoding="delta6")
    for step in range(1, 4):
        ema.update({"w": np.full(100, step, np.float32), "count": np.array(step)})
    assert reconstruct(tmp_path, 0.05).buffers["count"] == 3


@pytest.mark.parametrize("encoding", SMALL)
def test_models_of_small_tensors_alone(tmp_path: Path, encoding: str) -> None:
    """No tensor fills a block, so neither file holds a residual; they are a pair all the same."""
    ema = EMA(TRACKS, snapshots=tmp_path, every=1, encoding=encoding)
    for step in range(1, 4):
        ema.update({"w": np.full(5, 1 / step, np.float32)})
    snapshots = SnapshotStore(tmp_path).verify()
    assert [s.refines for s in snapshots] == [False] * 4 + [True] * 2
    assert len(files(tmp_path)) == 8
    for sigma_rel in TRACKS:
        found = reconstruct(tmp_path, sigma_rel).params["w"]
        assert np.array_equal(found, ema.average(sigma_rel)["w"]), "the newest, as it is"
