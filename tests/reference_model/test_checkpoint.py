"""Files of a run directory: replaced whole or not at all, and never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import IO

import pytest
import torch

from reference_model.checkpoint import (
    RunDirError,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from reference_model.checkpoint_shards import Rows


def test_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: IO[bytes]) -> None:
        file.write(b"new, cut sh")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_content_is_on_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert events == ["fsync", "replace", "fsync"]


def test_checkpoint_comes_back(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"nimg": 3, "net": {"w": torch.arange(3)}})
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["nimg"] == 3
    assert state["net"]["w"].tolist() == [0, 1, 2]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"nimg": 3})
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunDirError, match=r"checkpoint\.pt cannot be read"):
        load_checkpoint(tmp_path)


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "attacked"),))

    torch.save({"nimg": Attack()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunDirError, match="cannot be read"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "attacked").exists()
    # Twin: the same file does harm where loading runs code.
    torch.load(tmp_path / "checkpoint.pt", weights_only=False, pickle_module=pickle)
    assert (tmp_path / "attacked").exists()


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"nimg": 3, "shards": ["checkpoint-3/1-of-1.pt"]})
    with pytest.raises(RunDirError, match=r"1-of-1\.pt cannot be read .*; remove checkpoint\.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (1, 4), (2, 2), (4, 5)])
def test_rows_come_from_all_pieces(start: int, stop: int) -> None:
    whole = torch.arange(10).reshape(5, 2)
    rows = Rows((5, 2), [(0, whole[:2]), (2, whole[2:4]), (4, whole[4:]), (5, whole[5:])])
    assert rows.read(start, stop).tolist() == whole[start:stop].tolist()
    assert rows.read().tolist() == whole.tolist()
