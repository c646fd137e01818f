"""``kill -9`` of a run that thins its snapshots: what is newest is never lost for what is old."""

from __future__ import annotations

from pathlib import Path

import pytest

from posthoc_ema import SnapshotStore
from tests.faults import worker
from tests.faults.test_kill import (
    STEPS,
    assert_prefix,
    assert_sound,
    finish,
    kill_repeatedly,
    start,
)

KEEP = 4


@pytest.fixture(autouse=True)
def _thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIN", str(KEEP))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs, and that keeps everything."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("THIN", raising=False)
        worker.run(folder, STEPS)
    return folder


def times(folder: Path) -> list[float]:
    return sorted({s.t for s in SnapshotStore(folder / "ema").list()})


# Each snapshot written calls unlink once, for its temporary file: step 5 comes to the first old
# file at the 11th call, to its other track at the 12th; step 6 at the 16th and 17th.
@pytest.mark.parametrize(
    ("crash", "newest"),
    [
        ("before:unlink:11", 5),
        ("after:unlink:11", 5),
        ("after:unlink:12", 5),
        ("after:unlink:16", 6),
    ],
)
def test_a_crash_at_every_step_of_deleting(
    tmp_path: Path, whole: Path, crash: str, newest: int
) -> None:
    process = start(tmp_path, crash=crash)
    process.communicate(timeout=120)
    assert process.returncode == 137
    assert_sound(tmp_path)
    assert times(tmp_path)[-1] == newest
    last = [s for s in SnapshotStore(tmp_path / "ema").list() if s.t == newest]
    assert len(last) == 2, "both tracks were on disk before the first deletion"
    assert len(times(tmp_path)) >= KEEP
    finish(tmp_path)
    assert_sound(tmp_path)
    assert_prefix(tmp_path, whole)
    assert len(times(tmp_path)) == KEEP
    assert times(tmp_path)[-1] == STEPS


def test_kill_9_at_random_moments(tmp_path: Path, whole: Path) -> None:
    for seed in range(5):
        kill_repeatedly(tmp_path, kills=1, seed=seed, longest=0.2)
        assert len(times(tmp_path)) <= KEEP + 1
    assert_prefix(tmp_path, whole)
