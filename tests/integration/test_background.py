"""Snapshots written by a thread: the same files, bounded memory, errors at the next call."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import EMA, SnapshotStore, SnapshotWriteError


def model(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=(5, 3)).astype(np.float32), "n": np.array(step)}


class Gate:
    """Holds up or fails the writing of snapshots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.threads: list[str] = []
        write = SnapshotStore.write

        def held(store: SnapshotStore, *args: Any, **options: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            self.entered.set()
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error
            return write(store, *args, **options)

        monkeypatch.setattr(SnapshotStore, "write", held)


def files(folder: Path) -> dict[str, bytes]:
    """All snapshots, but for what differs from run to run."""
    return {
        f"{s.path.name} {name}": s.read(name).tobytes()
        for s in SnapshotStore(folder).verify()
        for name in s.entries
    }


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_files_equal_those_of_the_foreground(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the next step changes in place meanwhile."""
    gate = Gate(monkeypatch)
    for background in (False, True):
        gate.open.set()
        weights: Any = nn.BatchNorm1d(4) if kind == "torch" else model(0)
        ema = EMA(snapshots=tmp_path / str(background), every=2, background=background)
        for step in range(8):
            if kind == "torch":
                with torch.no_grad():
                    weights.weight.add_(step)
                    weights.running_mean.add_(1)
            else:
                weights["w"] += step
                weights["n"] += 1
            if background and step == 3:
                ema.close()
                gate.open.clear()
            if background and step == 5:  # the snapshot at 4 has been held up while 5 went on
                gate.open.set()
            ema.update(weights)
        ema.close()
    assert files(tmp_path / "True") == files(tmp_path / "False")
    assert set(gate.threads) == {"MainThread", "posthoc_ema snapshot"}


def test_a_step_does_not_wait_but_the_next_snapshot_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    ema = EMA(snapshots=tmp_path, every=2, background=True)
    for step in range(3):
        ema.update(model(step))
    assert gate.entered.wait(60)
    with pytest.raises(ValueError, match="holds no snapshots"):
        ema.store.list()
    later = threading.Thread(target=ema.update, args=(model(3),))
    later.start()
    later.join(0.2)
    assert later.is_alive()  # one on its way at most
    gate.open.set()
    later.join(60)
    assert not later.is_alive()
    ema.state_dict()  # waits too
    assert [s.t for s in SnapshotStore(tmp_path).verify()] == [2, 2, 4, 4]
    assert [s.t for s in (ema.update(model(4)), ema.snapshot())[1]] == [5, 5]


def test_errors_come_with_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    for call in ("update", "snapshot", "close"):
        gate.error = SnapshotWriteError(28, "no space left")
        ema = EMA(snapshots=tmp_path / call, every=2, background=True)
        ema.update(model(0))
        ema.update(model(1))
        ema.state_dict()  # waits, and says nothing
        with pytest.raises(SnapshotWriteError, match="no space left"):
            ema.update(model(2)) if call == "update" else getattr(ema, call)()
        t = 3 if call == "update" else 2
        assert ema.t == t
        gate.error = None
        ema.update(model(3))  # tries again
        ema.close()
        assert {s.t for s in ema.store.list()} == {t + 1}


def test_the_end_of_the_program_waits_and_tells(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from posthoc_ema import EMA, SnapshotStore\n"
        "ema = EMA(snapshots=sys.argv[1], every=1, background=True)\n"
        "if len(sys.argv) > 2:\n"
        "    def fail(*args, **options): raise OSError('broken disk')\n"
        "    SnapshotStore.write = fail\n"
        "ema.update({'w': np.zeros(1 << 20)})\n"
    )
    for more, said in ([], ""), (["fail"], "the last snapshot was not written: broken disk"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "ema"), *more],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert said in done.stderr
        if not more:
            assert done.stderr == ""
            assert len(SnapshotStore(tmp_path / "ema").verify()) == 2
            for path in (tmp_path / "ema").glob("*.safetensors"):
                path.unlink()
