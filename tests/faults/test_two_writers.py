"""Two processes, one folder: never a mixture, and the second is told."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import EMA, ForeignSnapshotError, SnapshotStore, reconstruct


def weights(value: float) -> dict[str, Any]:
    return {"w": np.full(100, value, np.float64)}


def test_the_second_run_is_told_at_once(tmp_path: Path) -> None:
    first = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    first.update(weights(1))
    second = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    with pytest.raises(ForeignSnapshotError, match=r"belongs to another run.*another folder"):
        second.update(weights(-1))
    first.update(weights(2))
    assert {s.run.run_id for s in SnapshotStore(tmp_path).verify()} == {
        first.state_dict()["run_id"]
    }


def test_both_begin_before_either_writes(tmp_path: Path) -> None:
    first = EMA(sigma_rel=0.1, snapshots=tmp_path, every=3)
    second = EMA(sigma_rel=0.1, snapshots=tmp_path, every=3)
    for step in (1, 2):
        first.update(weights(step))
        second.update(weights(-step))
    first.update(weights(3))
    with pytest.raises(ForeignSnapshotError, match="belongs to another run"):
        second.update(weights(-3))
    assert len(SnapshotStore(tmp_path).verify()) == 1


def test_two_that_resumed_the_same_checkpoint(tmp_path: Path) -> None:
    # A scheduler started the job again while the old process was still alive.
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    ema.update(weights(1))
    state = ema.state_dict()
    old, new = (EMA(sigma_rel=0.1, snapshots=tmp_path, every=1) for _ in range(2))
    old.load_state_dict(state)
    new.load_state_dict(state)
    old.update(weights(2))
    # The new one takes the old one's snapshot for an abandoned future: that is what resuming is.
    new.update(weights(-2))
    # But the old one must notice that its last snapshot was replaced.
    with pytest.raises(ForeignSnapshotError, match=r"t=0*2_.*two processes"):
        old.update(weights(3))
    new.update(weights(-3))
    found = {s.t: float(s.read("w")[0]) for s in SnapshotStore(tmp_path).verify()}
    assert found[2] < 1, "of the new process, like"
    assert found[3] < found[2], "this one"


def test_two_that_write_the_same_time(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path, every=1)
    ema.update(weights(1))
    state = ema.state_dict()
    first, second = (EMA(sigma_rel=0.1, snapshots=tmp_path, every=2) for _ in range(2))
    first.load_state_dict(state)
    second.load_state_dict(state)
    first.update(weights(2))
    second.update(weights(-2))  # sets the first one's aside
    second.update(weights(-3))
    second.update(weights(-4))
    before = {s.path.name: s.path.read_bytes() for s in SnapshotStore(tmp_path).list()}
    first.update(weights(3))
    with pytest.raises(ForeignSnapshotError, match="two processes"):
        first.update(weights(4))
    assert {s.path.name: s.path.read_bytes() for s in SnapshotStore(tmp_path).list()} == before


def test_pruning_in_mid_run_is_no_second_writer(tmp_path: Path) -> None:
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=tmp_path, every=1)
    for step in range(1, 6):
        ema.update(weights(step))
        store = SnapshotStore(tmp_path)
        store.delete(store.list()[1:])
    assert len(SnapshotStore(tmp_path).list()) == 1


RACE = """
    import sys
    import numpy as np
    from posthoc_ema import EMA, ForeignSnapshotError

    folder, sign = sys.argv[1], float(sys.argv[2])
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=1)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        for step in range(1, 21):
            ema.update({"w": np.full(20000, sign * step)})
    except ForeignSnapshotError as error:
        print("refused" if "belongs to another run" in str(error) else error)
    else:
        print("finished")
"""


def test_two_processes_race_for_an_empty_folder(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path / "ema"), sign],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for sign in ("1", "-1")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:  # both are ready: let go
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=120)[0].strip())
    assert sorted(outputs) == ["finished", "refused"]
    snapshots = SnapshotStore(tmp_path / "ema").verify()
    assert len(snapshots) == 40
    assert len({s.run.run_id for s in snapshots}) == 1
    sign = 1 if outputs[0] == "finished" else -1
    assert all((sign * s.read("w") > 0).all() for s in snapshots)
    reconstruct(tmp_path / "ema", 0.07)
