"""The accuracy benchmark: its true averages are true, and it tells good estimates from bad."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import peer_synthesis
from benchmarks import reconstruct_accuracy as accuracy
from benchmarks.training_runs import RUNS
from benchmarks.trajectories import TARGETS, TRACKS, Averages, Recording, record
from posthoc_ema import EMA, beta

ROOT = Path(__file__).parents[2]
STEPS = 128  # two for each candidate snapshot time


@pytest.fixture(scope="module")
def run():
    return replace(RUNS["mlp-sgd-constant"], steps=STEPS)


@pytest.fixture(scope="module")
def recording(run):
    return record(run)


def test_averages_equal_those_of_the_tracker_and_of_the_recursion():
    walk = np.random.default_rng(0).standard_normal((150, 7)).cumsum(0)
    averages, ema = Averages(TARGETS), EMA(TARGETS)
    by_recursion = np.zeros((len(TARGETS), 7))
    for k, weights in enumerate(walk):
        averages.add(k + 1, weights)
        ema.update({"w": weights}, t=k + 1)
        decay = np.array([beta(s, k + 1, 1) for s in TARGETS])[:, None]
        by_recursion = decay * by_recursion + (1 - decay) * weights
    # Sums of 150 terms of size 10 in float64.
    np.testing.assert_allclose(averages.values(), by_recursion, rtol=0, atol=1e-12)
    tracked = [ema.average(s)["w"] for s in TARGETS]
    np.testing.assert_allclose(averages.values(), tracked, rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(averages.values() + 1e-9, tracked, rtol=0, atol=1e-12)


def test_training_gives_the_same_weights_every_time(run, recording):
    again, other = record(run), record(replace(run, learning_rate=0.9 * run.learning_rate))
    np.testing.assert_array_equal(again.true, recording.true)
    np.testing.assert_array_equal(again.tracks, recording.tracks)
    assert not np.array_equal(other.true, recording.true)


def test_a_recording_read_back_is_the_one_made(run, recording, tmp_path):
    made, read = (Recording.of(run, tmp_path) for _ in range(2))
    for name in ("times", "tracks", "ends", "true"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
        np.testing.assert_array_equal(getattr(read, name), getattr(recording, name))
    assert read.shapes == recording.shapes


def test_stored_averages_come_back_and_a_wrong_one_is_noticed(recording, tmp_path):
    store = recording.write(tmp_path, 8, "float32")
    assert [s.t for s in store.list()] == [16 * (k // 2 + 1) for k in range(16)]
    curve, made = accuracy.measure("run", recording, store, "kriging", "end")
    errors = dict(zip(TARGETS, curve.error, strict=True))
    # float32 rounds to 2⁻²⁴ of a weight at most.
    assert max(errors[s] for s in TRACKS) < 2.0**-24
    assert curve.bytes == 8  # two tracks of four bytes
    assert accuracy.relative_error(made[5] * 1.01, recording.true[-1, 5]) == pytest.approx(
        0.01, abs=1e-6
    )


def test_gains_and_calibration_are_counted_over_lengths_that_are_not_stored():
    ones = (1.0,) * len(TARGETS)
    paper = accuracy.Curve("r", "end", 8, "float16", "paper", 4.0, tuple(2 * e for e in ones), ones)
    kriging = accuracy.Curve("r", "end", 8, "float16", "kriging", 4.0, ones, (2.0, *ones[1:]))
    _, compared = accuracy.with_gains([paper, kriging])
    listed = accuracy.cells([compared])
    assert len(listed) == len(TARGETS) - len(TRACKS)
    assert accuracy.geometric_mean(c.gain for c in listed) == pytest.approx(2)
    assert accuracy.within(listed, 1.5) == pytest.approx(10 / 11)
    assert accuracy.within(listed, 2.5) == 1


def test_a_bar_that_is_missed_is_called_missed():
    errors = (1.0,) * len(TARGETS)
    paper = accuracy.Curve("r", "end", 8, "float16", "paper", 4.0, errors, errors)
    kriging = replace(paper, method="kriging", error=tuple(2 * e for e in errors))
    worse = "\n".join(accuracy._bars(accuracy.with_gains([paper, kriging])[1:]))
    assert "MISSED  float16, gain: 0.50" in worse
    assert "MISSED  float16, smallest gain: 0.50" in worse
    assert "met     float16, share predicted within 2.5 ×: 1.00" in worse


def test_checkpoints_for_other_libraries_hold_the_same_averages(run, recording, tmp_path):
    import torch

    peer_synthesis.write_checkpoints(recording, run.make().model, tmp_path, 8)
    assert len(list(tmp_path.iterdir())) == 16
    state = torch.load(tmp_path / f"1.{STEPS}.pt", weights_only=True)
    assert state["step"] == STEPS
    stored = np.concatenate([state[f"ema_model.{n}"].numpy().ravel() for n in recording.shapes])
    # Rounding to float16: half a unit in the last of 11 bits.
    assert accuracy.relative_error(stored, recording.tracks[-1, 1]) < 2.0**-11
    assert accuracy.relative_error(stored, recording.tracks[-1, 0]) > 2.0**-11


def test_benchmark_runs_and_leaves_recorded_results_alone(tmp_path):
    before = _results()
    command = ["--quick", "--encodings", "float32", "--runs", "mlp-sgd-constant", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reconstruct_accuracy", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| float32  | 8 " in done.stdout
    assert "bar:" not in done.stdout, "a tiny run must not be compared with the bars"
    assert _results() == before


def _results():
    folder = ROOT / "benchmarks" / "results"
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}
