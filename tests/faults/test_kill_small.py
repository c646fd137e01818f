"""``kill -9`` of runs that store differences, refine the newest, and thin: no link is ever lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posthoc_ema import SnapshotStore, reconstruct
from tests.faults import worker
from tests.faults.test_kill import STEPS, assert_sound, finish, kill_repeatedly, start

KEEP = 4
AS_FINE_AS_FLOAT16 = 2.07e-4  # what rounding to float16 changes, relative to the RMS


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs, in float32."""
    folder = tmp_path_factory.mktemp("exact")
    worker.run(folder, STEPS)
    return folder


@pytest.fixture(params=["all", "thinned"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of times on disk at the end."""
    monkeypatch.setenv("ENCODING", "delta6")
    if request.param == "all":
        return STEPS
    monkeypatch.setenv("THIN", str(KEEP))
    return KEEP


def assert_finished(folder: Path, exact: Path, kept: int) -> None:
    assert assert_sound(folder) == 2 * kept
    snapshots = SnapshotStore(folder / "ema").list()
    assert [s.t for s in snapshots if s.refines] == [STEPS, STEPS]
    hidden = [p.name for p in (folder / "ema").iterdir() if p.name.startswith(".")]
    assert hidden == [".lock"], "nothing half-done is left"
    true = {s.profile: s.read("w") for s in SnapshotStore(exact / "ema").list() if s.t == STEPS}
    for snapshot in snapshots[-2:]:
        difference = snapshot.read("w") - true[snapshot.profile]
        relative = np.linalg.norm(difference) / np.linalg.norm(true[snapshot.profile])
        # Thinning writes it once more, from what it reads.
        assert relative <= AS_FINE_AS_FLOAT16 * (1 if kept == STEPS else 1.5)
    reconstruct(folder / "ema", 0.07)


# A snapshot is two files here, so two renames; with thinning, journals and exchanges follow.
POINTS = [f"{when}:replace:{n}" for n in (3, 9, 14, 31) for when in ("before", "after")]


@pytest.mark.parametrize("crash", [*POINTS, "before:unlink:5", "before:unlink:17"])
def test_a_crash_at_any_step(tmp_path: Path, exact: Path, kept: int, crash: str) -> None:
    process = start(tmp_path, crash=crash)
    process.communicate(timeout=120)
    assert process.returncode == 137
    assert_sound(tmp_path)
    finish(tmp_path)
    assert_finished(tmp_path, exact, kept)


def test_kill_9_at_random_moments(tmp_path: Path, kept: int) -> None:
    kill_repeatedly(tmp_path, kills=5, seed=0, longest=0.3)
    if kept == KEEP:
        assert len({s.t for s in SnapshotStore(tmp_path / "ema").list()}) <= KEEP + 1
