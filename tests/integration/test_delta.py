"""Snapshots stored as what remains after a prediction: small, exact enough, never in silence."""

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
    predict_error,
    reconstruct,
)
from posthoc_ema.journal import REWRITTEN
from posthoc_ema.prediction import WHOLE_EVERY

DELTA = ["delta16", "delta8", "delta6", "delta4"]
SHAPES = {"conv": (300, 101), "odd": (77,), "gain": (), "few": (5,), "square": (64, 64)}


def train(
    folder: Path, encoding: str, times: int = 20, every: int = 10, dtype: Any = np.float32
) -> tuple[EMA, dict[float, dict[str, list[Any]]]]:
    """A random walk of shrinking steps; the averages of each snapshot time, as they were."""
    rng = np.random.default_rng(0)
    weights = {n: np.asarray(rng.normal(size=s), dtype) for n, s in SHAPES.items()}
    weights["frozen"] = np.asarray(rng.normal(size=500), dtype)
    ema = EMA(snapshots=folder, every=every, encoding=encoding)
    kept: dict[float, dict[str, list[Any]]] = {}
    for step in range(1, times * every + 1):
        for name in SHAPES:
            weights[name] = weights[name] + np.asarray(
                rng.normal(size=SHAPES[name]) * 0.05 / np.sqrt(1 + step / 30), dtype
            )
        ema.update(weights)
        if step % every == 0:
            both = [ema.average(s) for s in (0.05, 0.10)]
            kept[step] = {name: [average[name] for average in both] for name in weights}
    return ema, kept


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


@pytest.mark.parametrize("encoding", DELTA)
def test_snapshots_decode_to_the_averages(tmp_path: Path, encoding: str) -> None:
    _, kept = train(tmp_path / "ema", encoding)
    snapshots = SnapshotStore(tmp_path / "ema").verify()
    for snapshot in snapshots:
        track = [0.05, 0.10].index(snapshot.profile.sigma_rel)
        square, count = 0.0, 0
        for name, tracks in kept[snapshot.t].items():
            error = np.asarray(snapshot.read(name), np.float64) - tracks[track]
            square, count = square + float((error**2).sum()), count + error.size
            if error.size < 64:  # float16, or as they are
                exact = encoding == "delta16" or snapshot.refines
                bound = 0 if exact else 2**-11 * np.abs(tracks[track]).max()
                assert np.abs(error).max() <= bound
            if name == "frozen" and (snapshot.links or encoding == "delta16"):
                # Predicted from themselves, up to the rounding of a whole snapshot's, which is
                # at most half a step of 8 bits, times the coefficients of a prediction (Σ|x| < 3),
                # and then rounded to 4 bits of its own at least.
                assert np.abs(error).max() <= 3 / 127 / 2 / 7 / 2 * np.abs(tracks[track]).max()
        # What the file says of its own rounding; and predictions are float32 sums of weights
        # around 1, whose rounding adds up along the chain.
        assert square / count == pytest.approx(
            snapshot.statistics["rounding_square"], rel=0.02, abs=(2e-6) ** 2
        )


@pytest.mark.parametrize("encoding", DELTA)
def test_reconstruction_is_the_same_combination(tmp_path: Path, encoding: str) -> None:
    train(tmp_path / "ema", encoding)
    snapshots = SnapshotStore(tmp_path / "ema").list()
    for t in (None, 133):
        for result in reconstruct(tmp_path / "ema", [0.04, 0.07, 0.2], t=t):
            for name, values in result.params.items():
                expected = sum(
                    x * s.read(name).astype(np.float64)
                    for x, s in zip(result.coefficients, snapshots, strict=False)
                )
                # Each decoded number is a float32 sum over a chain; then they are combined.
                bound = 40 * 2**-24 * 5 * max(result.diagnostics["l1_norm"], 1)
                assert np.abs(values - expected).max() <= bound
    stored = reconstruct(tmp_path / "ema", 0.05).params["conv"]
    np.testing.assert_allclose(stored, snapshots[-2].read("conv"), atol=1e-5)


def test_bytes(tmp_path: Path) -> None:
    sizes = {}
    for encoding in ("float16", *DELTA):
        rng = np.random.default_rng(0)
        weights = {"w": rng.normal(size=40_000).astype(np.float32)}
        ema = EMA(snapshots=tmp_path / encoding, every=2, encoding=encoding)
        for _ in range(2 * 8):
            weights["w"] = weights["w"] + 0.01 * rng.normal(size=40_000).astype(np.float32)
            ema.update(weights)
        stored = SnapshotStore(tmp_path / encoding).list()
        stored += [s.base for s in stored if s.base is not None]
        sizes[encoding] = sum(e.nbytes for s in stored for e in s.entries.values()) / 40_000 / 8
    assert sizes["float16"] == 4
    assert sizes["delta16"] <= 4
    assert sizes["delta8"] <= 2
    assert sizes["delta6"] <= 1.6  # of only eight times; a whole and a refined one count more
    assert sizes["delta4"] <= 1.4


def test_a_whole_snapshot_now_and_then(tmp_path: Path) -> None:
    train(tmp_path / "ema", "delta8", times=2 * WHOLE_EVERY + 2, every=2)
    snapshots = SnapshotStore(tmp_path / "ema").list()
    whole = [s.t for s in snapshots if not s.links]
    assert whole == [2, 2 + 2 * WHOLE_EVERY, 2 + 4 * WHOLE_EVERY]
    for snapshot in snapshots:
        assert all(s.t >= max(t for t in whole if t <= snapshot.t) for _, s in snapshot.inputs)


def test_a_missing_link_is_named(tmp_path: Path) -> None:
    train(tmp_path / "ema", "delta8")
    lost = SnapshotStore(tmp_path / "ema").list()[10]
    lost.path.unlink()
    with pytest.raises(MissingInputError, match=rf"needs {lost.path.name}, which is missing"):
        reconstruct(tmp_path / "ema", 0.07)
    snapshots, problems = SnapshotStore(tmp_path / "ema").scan()
    assert len(snapshots) + len(problems) == 39
    assert {s.t for s in snapshots} == {10, 20, 30, 40, 50, 170, 180, 190, 200}, "up to a whole one"


def test_a_snapshot_alone_does_not_decode_in_silence(tmp_path: Path) -> None:
    train(tmp_path / "ema", "delta8")
    store = SnapshotStore(tmp_path / "ema")
    alone = type(store.list()[-1]).open(store.list()[-1].path)
    with pytest.raises(MissingInputError, match="SnapshotStore"):
        alone.read("conv")


def test_damage_is_found(tmp_path: Path) -> None:
    train(tmp_path / "ema", "delta8")
    snapshot = SnapshotStore(tmp_path / "ema").list()[15]
    entry = snapshot.entries["conv"]
    data = bytearray(snapshot.path.read_bytes())
    data[entry.offset + 1000] ^= 4
    snapshot.path.write_bytes(data)
    with pytest.raises(CorruptSnapshotError, match=snapshot.path.name):
        reconstruct(tmp_path / "ema", 0.07)
    with pytest.raises(CorruptSnapshotError, match=snapshot.path.name):
        SnapshotStore(tmp_path / "ema").verify()


def test_damage_while_training_costs_a_prediction_only(tmp_path: Path) -> None:
    ema, _ = train(tmp_path / "ema", "delta8")
    damaged = SnapshotStore(tmp_path / "ema").list()[-1].base
    assert damaged is not None
    data = bytearray(damaged.path.read_bytes())
    data[damaged.entries["conv"].offset + 1000] ^= 4
    damaged.path.write_bytes(data)
    resumed = EMA(snapshots=tmp_path / "ema", every=10, encoding="delta8")
    resumed.load_state_dict(ema.state_dict())
    weights = ema.average(0.05)
    resumed.update(weights)
    with pytest.warns(UserWarning, match="stored whole"):
        resumed.snapshot()
    whole = next(s for s in SnapshotStore(tmp_path / "ema").list() if s.t == 201)
    assert not (whole.base or whole).links


@pytest.mark.parametrize("encoding", DELTA)
def test_deleting_from_the_middle(tmp_path: Path, encoding: str) -> None:
    train(tmp_path / "ema", encoding)
    store = SnapshotStore(tmp_path / "ema")
    before = {s.path.name: s.read("conv") for s in store.list()}
    going = [s for s in store.list() if s.t in (10, 60, 70, 150)]
    freed = store.delete(going)
    assert freed > 0
    after = store.verify()
    assert [s.path.name for s in after] == [
        name for name in before if name not in {s.path.name for s in going}
    ]
    noise = {"delta16": 1e-3, "delta8": 2e-2, "delta6": 6e-2, "delta4": 0.2}[encoding]
    for snapshot in after:
        error = rms(snapshot.read("conv") - before[snapshot.path.name])
        # Rounded twice at most, and the file knows it.
        assert error <= 1.5 * max(snapshot.statistics["rounding_square"] ** 0.5, 1e-7)
        assert error <= noise
    assert not list((tmp_path / "ema").glob(".rewritten*"))


def test_pruning_beside_a_running_training(tmp_path: Path) -> None:
    ema, _ = train(tmp_path / "ema", "delta8", times=6)
    other = SnapshotStore(tmp_path / "ema")
    other.delete([s for s in other.list() if s.t in (20, 50)])
    weights = ema.average(0.05)
    for _ in range(20):
        ema.update(weights)
    assert {s.t for s in SnapshotStore(tmp_path / "ema").verify()} == {10, 30, 40, 60, 70, 80}


@pytest.mark.parametrize("stop", range(12))
def test_a_killed_deletion_is_finished_or_undone(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "ema", "delta8", times=6, every=5)
    store = SnapshotStore(tmp_path / "ema")
    names = [s.path.name for s in store.list()]
    going = [s for s in store.list() if s.t == 10]
    calls = 0

    class Killed(BaseException):
        pass

    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        store.delete(going)
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    found = [s.path.name for s in SnapshotStore(tmp_path / "ema").verify()]
    rest = [name for name in names if name not in {s.path.name for s in going}]
    assert found in ([rest] if finished else [rest, names])
    reconstruct(tmp_path / "ema", 0.07)
    SnapshotStore(tmp_path / "ema").delete([])
    assert not list((tmp_path / "ema").glob(".rewritten*"))


def test_resuming_goes_on_with_the_chain(tmp_path: Path) -> None:
    ema, _ = train(tmp_path / "ema", "delta8", times=5)
    state = ema.state_dict()
    rng = np.random.default_rng(1)
    weights = ema.average(0.05)
    for _ in range(20):
        ema.update(weights)
    resumed = EMA(snapshots=tmp_path / "ema", every=10, encoding="delta8")
    resumed.load_state_dict(state)
    for _ in range(20):
        weights = {n: w + 0.01 * rng.normal(size=w.shape).astype("f4") for n, w in weights.items()}
        resumed.update(weights)
    snapshots = SnapshotStore(tmp_path / "ema").verify()
    assert [s.t for s in snapshots[::2]] == [10, 20, 30, 40, 50, 60, 70]
    last = resumed.average(0.10)["conv"]
    error = rms(snapshots[-1].read("conv") - last)
    assert error <= 1.1 * snapshots[-1].statistics["rounding_square"] ** 0.5


def test_float64_weights_and_a_mix_of_encodings(tmp_path: Path) -> None:
    ema, _ = train(tmp_path / "ema", "float32", times=3, dtype=np.float64)
    state, weights = ema.state_dict(), ema.average(0.05)
    for encoding in ("delta16", "float16", "delta8"):
        ema = EMA(snapshots=tmp_path / "ema", every=10, encoding=encoding)
        ema.load_state_dict(state)
        for _ in range(20):
            weights = {n: w + 0.01 for n, w in weights.items()}
            ema.update(weights)
        state = ema.state_dict()
    result = reconstruct(tmp_path / "ema", 0.10)
    error = rms(result.params["conv"] - ema.average(0.10)["conv"])
    assert (
        error
        <= 2 * SnapshotStore(tmp_path / "ema").list()[-1].statistics["rounding_square"] ** 0.5
        + 1e-6
    )


def test_predicted_errors_know_the_noise(tmp_path: Path) -> None:
    errors = []
    for encoding in ("float32", *DELTA):
        train(tmp_path / encoding, encoding)
        errors.append(predict_error(tmp_path / encoding, 0.07))
    assert errors == sorted(errors), "fewer bits, larger errors"


def test_rewritten_files_are_hidden() -> None:
    """The journal's folder is hidden: no listing takes it for snapshots."""
    assert REWRITTEN.startswith(".")
