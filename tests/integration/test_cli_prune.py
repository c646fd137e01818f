"""``prune``, the command and the function: what matters stays, and only what was said goes."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from commands import DATA_SAYS_NO, MISUSE, files_of, invoke, invoke_json
from helpers import assert_at_most, assert_close
from small_run import flip_a_byte, write_run

from posthoc_ema import SnapshotStore, predict_error, prune
from posthoc_ema.forecast import forecast

SNAPSHOTS = 32  # 16 times, two tracks
LENGTHS = [0.02, 0.05, 0.1, 0.2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots to read; tests that change them take a copy."""
    return write_run(tmp_path_factory.mktemp("run") / "ema", unit="images")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "ema"))


def test_without_yes_nothing_is_deleted(copy: Path) -> None:
    before = files_of(copy)
    result = invoke("prune", copy, "--keep", 4)
    assert files_of(copy) == before
    said = invoke_json("prune", copy, "--keep", 4)
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines if "would delete" in line] == said["delete"]
    freed = sum((copy / file).stat().st_size for file in said["delete"])
    assert said["bytes_freed"] == freed
    assert f"24 of 32 snapshots, {freed / 1000:.0f} kB; 4 of 16 times stay" in lines
    assert lines[-1].split()[0] == "worst"
    assert "Nothing was deleted" in result.stderr


def test_what_was_announced_is_deleted(copy: Path) -> None:
    announced = invoke_json("prune", copy, "--keep", 4)
    assert announced["deleted"] is False
    done = invoke_json("prune", copy, "--keep", 4, "--yes")
    assert done == {**announced, "deleted": True}
    assert files_of(copy) == sorted(done["keep"])
    assert sorted(done["keep"] + done["delete"]) == sorted({*done["keep"], *done["delete"]})
    # What stays is a store like any other; its last snapshots are exact, others cost something.
    assert len(invoke_json("list", copy)["snapshots"]) == 8
    errors = {e["sigma_rel"]: e for e in done["errors"]}
    assert errors[0.05]["after"] == errors[0.05]["before"]
    assert errors[0.2]["after"] > 2 * errors[0.2]["before"]
    assert done["worst"]["after"] == max(e["after"] for e in done["errors"])


def test_all_tracks_of_a_time_go_together(run: Path) -> None:
    kept = prune(run, LENGTHS, keep=5).kept
    assert len({s.t for s in kept}) == 5
    assert len(kept) == 10


@pytest.mark.parametrize("keep", [2, 3])
def test_nearly_the_best_of_all_choices(run: Path, keep: int) -> None:
    full = forecast(run, LENGTHS)
    times = sorted({s.t for s in full.snapshots})
    best = min(
        full.using([s for s in full.snapshots if s.t in {*c, times[-1]}]).predicted_error.max()
        for c in combinations(times[:-1], keep - 1)
    )
    # Greedy choice weighs all lengths, if the worst one most, and exchanges only single times.
    reason = "the best of all choices is missed by little"
    assert_at_most(prune(run, LENGTHS, keep=keep).worst_error, 1.2 * best, reason=reason)


def test_keeping_more_never_costs(run: Path) -> None:
    worst = [prune(run, LENGTHS, keep=n).worst_error for n in range(1, 17)]
    assert (np.diff(worst) <= 1e-12).all()


def test_bytes(copy: Path) -> None:
    sizes = [path.stat().st_size for path in copy.glob("*.safetensors")]
    limit = 7 * max(sizes)  # three times of two tracks
    said = invoke_json("prune", copy, "--bytes", limit, "--yes")
    left = sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    assert said["bytes_kept"] == left <= limit
    assert len(said["keep"]) == 6
    assert "last snapshot of each track" in invoke("prune", copy, "--bytes", 100, status=2).stderr


def test_of_differences(tmp_path: Path) -> None:
    """What stays is written anew where it depended on what goes; the report counts that."""
    folder = write_run(tmp_path / "ema", encoding="delta8")
    before = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    said = invoke_json("prune", folder, "--keep", 4, "--yes")
    left = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (said["bytes_freed"], said["bytes_kept"]) == (before - left, left)
    assert files_of(folder) == sorted(said["keep"])
    assert len(SnapshotStore(folder).verify()) == 8
    assert len(files_of(folder)) == 10, "the last time of each track is refined"


def test_max_error(run: Path) -> None:
    """As few times as possible: with one fewer the error would be too large."""
    limit = float(np.sqrt(prune(run, LENGTHS, keep=5).worst_error * predict_error(run, 0.02)))
    pruned = prune(run, LENGTHS, max_error=limit)
    number = len({s.t for s in pruned.kept})
    assert pruned.worst_error <= limit < prune(run, LENGTHS, keep=number - 1).worst_error
    assert pruned.doomed


def test_an_error_that_is_out_of_reach(copy: Path) -> None:
    result = invoke("prune", copy, "--max-error", "1e-12", "--yes", status=DATA_SAYS_NO)
    assert "nothing can go" in result.stderr
    assert len(files_of(copy)) == SNAPSHOTS


def test_more_than_there_are(copy: Path) -> None:
    said = invoke_json("prune", copy, "--keep", 99, "--yes")
    assert said["delete"] == []
    assert len(files_of(copy)) == SNAPSHOTS


def test_the_last_of_each_track_stays(copy: Path) -> None:
    """Also where a track ended earlier than the other."""
    store = SnapshotStore(copy)
    store.delete([s for s in store.list() if s.profile.sigma_rel == 0.1 and s.t > 200])
    kept = {(s.t, s.profile.sigma_rel) for s in prune(copy, [0.05, 0.07], keep=2).kept}
    assert {(200, 0.1), (320, 0.05)} <= kept
    with pytest.raises(ValueError, match="takes 2 times"):
        prune(copy, [0.07], keep=1)


def test_one_snapshot_stays(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", every=320, sigma_rel=0.05)
    assert len(prune(folder, [0.05], keep=3, delete=True).kept) == 1
    assert len(files_of(folder)) == 1


def test_weights_that_do_not_move(tmp_path: Path) -> None:
    from posthoc_ema import EMA

    ema = EMA(snapshots=tmp_path / "ema", every=2)
    for _ in range(16):
        ema.update({"w": np.ones(100)})
    assert len({s.t for s in prune(tmp_path / "ema", LENGTHS, keep=3).kept}) == 3
    assert len({s.t for s in prune(tmp_path / "ema", LENGTHS, max_error=0.01).kept}) == 1


def test_a_damaged_folder_is_left_alone(copy: Path) -> None:
    broken = copy / files_of(copy)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    invoke("prune", copy, "--keep", 2, "--yes", status=DATA_SAYS_NO)
    assert len(files_of(copy)) == SNAPSHOTS


def test_damaged_weights_do_not_pass_for_movement(copy: Path) -> None:
    flip_a_byte(copy / files_of(copy)[5])
    pruned = prune(copy, LENGTHS, keep=4)
    assert_close(len(pruned.kept), 8, reason="a flipped byte is for verify to find")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--keep", "0"), "--keep"),
        (("--keep", "many"), "--keep"),
        ((), "exactly one of --keep, --bytes and --max-error"),
        (("--keep", "2", "--bytes", "1MB"), "exactly one of"),
        (("--bytes", "much"), "is not a number"),
        (("--bytes", "0GB"), "expected a size > 0"),
        (("--max-error", "0"), "--max-error"),
    ],
)
def test_misused(run: Path, args: tuple[str, ...], message: str) -> None:
    assert message in invoke("prune", run, *args, status=MISUSE).stderr


def test_limits_exclude_each_other(run: Path) -> None:
    with pytest.raises(TypeError, match="exactly one of keep, max_bytes and max_error"):
        prune(run, LENGTHS, keep=2, max_error=0.1)
