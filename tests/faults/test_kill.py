"""``kill -9`` at any moment: earlier snapshots are whole, no half-written one is seen, and the
resumed run ends like an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from posthoc_ema import SnapshotError, SnapshotStore, reconstruct
from tests.faults import worker

STEPS = 12


def start(folder: Path, steps: int = STEPS, crash: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if crash:
        environment["CRASH"] = crash
    return subprocess.Popen(
        [sys.executable, worker.__file__, str(folder), str(steps)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def identities(folder: Path) -> list[tuple[float, str, str]]:
    """What a finished run must have in common with every other: all but its random name."""
    return [
        (s.t, repr(s.profile), s.digests["averages"] + s.digests["copies"])
        for s in SnapshotStore(folder / "ema").list()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    worker.run(folder, STEPS)
    return folder


def assert_sound(folder: Path) -> int:
    """All that is visible is whole; returns the number of snapshots."""
    store = SnapshotStore(folder / "ema")
    try:
        snapshots = store.verify()
    except SnapshotError as error:
        if "holds no snapshots" in str(error) or "does not exist" in str(error):
            return 0
        raise
    for snapshot in snapshots:
        step = int(snapshot.read("step")[0])
        if snapshot.t != step:
            raise AssertionError(f"{snapshot.path} holds weights of step {step}")
    return len(snapshots)


def assert_like_whole(folder: Path, whole: Path) -> None:
    assert identities(folder) == identities(whole)
    assert len({s.run.run_id for s in SnapshotStore(folder / "ema").list()}) == 1
    hidden = [p.name for p in (folder / "ema").iterdir() if p.name.endswith(".tmp")]
    assert hidden == [], "what kills left behind is swept by the next start"
    a, b = reconstruct(folder / "ema", 0.07), reconstruct(whole / "ema", 0.07)
    np.testing.assert_array_equal(a.params["w"], b.params["w"])


def finish(folder: Path) -> str:
    process = start(folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


# At every step of writing ---------------------------------------------------------------------
# Calls for one snapshot: fsync (file), replace, fsync (folder); checkpoints call replace too.

POINTS = [
    "before:fsync:1",  # the first file is written, not yet durable
    "before:replace:2",  # durable, not yet visible (1 is the first checkpoint)
    "after:replace:2",  # visible, folder not yet durable
    "after:fsync:2",  # first track done, second not begun
    "before:fsync:15",
    "before:replace:12",
    "after:replace:12",
    "before:preadv:1",  # not called while writing: runs to the end
]


@pytest.mark.parametrize("crash", POINTS)
def test_a_crash_at_every_step_of_writing(tmp_path: Path, whole: Path, crash: str) -> None:
    process = start(tmp_path, crash=crash)
    process.communicate(timeout=120)
    assert process.returncode == (0 if "preadv" in crash else 137)
    assert_sound(tmp_path)
    output = finish(tmp_path)
    assert "finished" in output
    assert_like_whole(tmp_path, whole)


@pytest.mark.parametrize("done", [0, 3])
def test_a_crash_while_the_future_is_set_aside(tmp_path: Path, whole: Path, done: int) -> None:
    # Steps 6 to 8 are abandoned, six files: that they move is noted, then the power fails.
    process = start(tmp_path, steps=8)
    process.communicate(timeout=120)
    process = start(tmp_path, crash=f"after:replace:{1 + done}")
    process.communicate(timeout=120)
    assert process.returncode == 137
    aside = tmp_path / "ema" / "abandoned"
    assert len(list(aside.glob("*/*.safetensors"))) == done
    assert_sound(tmp_path)  # whoever reads finishes it
    assert len(list(aside.glob("*/*.safetensors"))) == 6, "set aside once each, none lost"
    finish(tmp_path)
    assert_like_whole(tmp_path, whole)
    assert len(list(aside.glob("*/*.safetensors"))) == 6


# At random moments ----------------------------------------------------------------------------


def kill_repeatedly(folder: Path, kills: int, seed: int, longest: float = 0.1) -> None:
    """Start, wait for the first snapshot, and kill a random moment later."""
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        process = start(folder, steps=10**9)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1] == "updating\n", lines
        time.sleep(float(rng.uniform(0.0, longest)))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        assert assert_sound(folder) > 0


def assert_prefix(folder: Path, whole: Path) -> None:
    """Compare as far as both runs went: each snapshot is a function of its step alone."""
    expected = dict(((t, p), d) for t, p, d in identities(whole))
    found = {(t, p): d for t, p, d in identities(folder) if t <= STEPS}
    for key, digest in found.items():
        assert digest == expected[key], key


def test_kill_9_at_random_moments(tmp_path: Path, whole: Path) -> None:
    kill_repeatedly(tmp_path, kills=6, seed=0)
    assert_prefix(tmp_path, whole)


@pytest.mark.slow
def test_kill_9_many_times(tmp_path: Path, whole: Path) -> None:
    kill_repeatedly(tmp_path, kills=60, seed=1)
    assert_prefix(tmp_path, whole)
