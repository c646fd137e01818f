"""Disks that are full, read-only or failing: earlier snapshots survive, training can go on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import (
    EMA,
    PosthocEMAError,
    SnapshotError,
    SnapshotStore,
    SnapshotWriteError,
    reconstruct,
)
from tests.faults.tools import small_store


def weights(step: float, size: int = 50_000) -> dict[str, Any]:
    return {"w": np.full(size, step, np.float32), "v": np.full(3, step)}


def begun(folder: Path) -> EMA:
    """A run with snapshots at 1 and 2."""
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=1)
    for step in (1, 2):
        ema.update(weights(step))
    return ema


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def assert_update_fails_and_recovers(ema: EMA, folder: Path, failing: Any) -> None:
    """Under the failure an update raises and harms nothing; after it, the next writes."""
    before = contents(folder)
    with failing, pytest.raises(SnapshotWriteError, match="cannot write snapshots to") as caught:
        ema.update(weights(3))
    assert str(folder) in str(caught.value)
    assert "the next update tries again" in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, PosthocEMAError)
    assert caught.value.errno
    assert ema.t == 3, "the averages took the update in"
    assert contents(folder) == before, "not even a temporary file is left"
    SnapshotStore(folder).verify()
    reconstruct(folder, 0.07)

    ema.update(weights(4))
    assert [s.t for s in SnapshotStore(folder).verify()] == [1, 1, 2, 2, 4, 4]
    # And the averages are those of a run that was never disturbed.
    calm = EMA(sigma_rel=(0.05, 0.10))
    for step in (1, 2, 3, 4):
        calm.update(weights(step))
    for sigma_rel in (0.05, 0.10):
        np.testing.assert_array_equal(ema.average(sigma_rel)["w"], calm.average(sigma_rel)["w"])


# Full ----------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system itself refuses bytes beyond (with EFBIG, where a full disk says ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 3000, 150_000, 200_500])
def test_writes_that_stop_half_way(tmp_path: Path, size: int) -> None:
    # In the space reserved for the header, in the data, and in the last bytes.
    ema = begun(tmp_path)
    assert_update_fails_and_recovers(ema, tmp_path, file_size_limit(size))


@contextmanager
def failing_call(module: Any, name: str, number: int = 1, code: int = errno.ENOSPC) -> Any:
    """Calls of one function fail from the ``number``-th on."""
    original, calls = getattr(module, name), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    setattr(module, name, fail)
    try:
        yield
    finally:
        setattr(module, name, original)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failures_at_the_end_of_writing(tmp_path: Path, name: str, code: int) -> None:
    ema = begun(tmp_path)
    assert_update_fails_and_recovers(ema, tmp_path, failing_call(os, name, code=code))


def test_a_failure_of_the_second_track(tmp_path: Path) -> None:
    ema = begun(tmp_path)
    # replace is called once for each track.
    with failing_call(os, "replace", 2), pytest.raises(SnapshotWriteError):
        ema.update(weights(3))
    assert [s.t for s in SnapshotStore(tmp_path).verify()] == [1, 1, 2, 2, 3]
    reconstruct(tmp_path, 0.07)
    assert len(ema.snapshot()) == 1, "by hand at once: the missing track alone"
    ema.update(weights(4))
    assert [s.t for s in SnapshotStore(tmp_path).verify()] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_the_error_is_not_lost_in_clean_up(tmp_path: Path) -> None:
    ema = begun(tmp_path)
    with file_size_limit(1000), pytest.raises(SnapshotWriteError) as caught:
        ema.update(weights(3))
    assert caught.value.errno == errno.EFBIG
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system does not let us mount a small disk")
    try:
        ema = EMA(sigma_rel=(0.05, 0.10), snapshots=mount / "ema", every=1)
        ema.update(weights(1))
        ema.update(weights(2))  # twice two files of 200 kB; the next two do not fit
        with pytest.raises(SnapshotWriteError, match="No space left on device"):
            ema.update(weights(3))
        before = [s.t for s in SnapshotStore(mount / "ema").verify()]
        assert before == [1, 1, 2, 2, 3], "what fitted is whole"
        assert not list((mount / "ema").glob(".*.tmp"))
        store = SnapshotStore(mount / "ema")
        store.delete(store.list()[:2])
        ema.update(weights(10))
        assert SnapshotStore(mount / "ema").verify()[-1].t == ema.t
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_results_that_do_not_fit(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "ema")
    out = tmp_path / "out"
    out.mkdir()
    with file_size_limit(1000), pytest.raises(OSError, match="File too large"):
        reconstruct(folder, 0.07, out=out / "weights.safetensors")
    assert list(out.iterdir()) == []
    with failing_call(os, "fsync"), pytest.raises(OSError, match="No space left"):
        reconstruct(folder, [0.07, 0.2], out=out)
    assert list(out.iterdir()) == []


# Read-only -----------------------------------------------------------------------------------


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder for files, and a process that may not write where permissions forbid it."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        folder = Path(tempfile.mkdtemp())
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o777)
        shutil.rmtree(folder)


def test_a_folder_made_read_only_in_mid_run(unprivileged: Path) -> None:
    folder = unprivileged / "ema"
    ema = begun(folder)

    @contextmanager
    def read_only() -> Iterator[None]:
        folder.chmod(0o555)
        (folder / ".lock").chmod(0o444)
        try:
            yield
        finally:
            folder.chmod(0o755)
            (folder / ".lock").chmod(0o644)

    assert_update_fails_and_recovers(ema, folder, read_only())


def test_a_place_where_no_folder_can_be_made(unprivileged: Path) -> None:
    unprivileged.chmod(0o555)
    ema = EMA(sigma_rel=0.1, snapshots=unprivileged / "ema", every=100)
    with pytest.raises(SnapshotWriteError, match="Permission denied"):
        ema.update(weights(1))  # at the first update, not at step 100


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "ema").write_text("")
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path / "ema", every=100)
    with pytest.raises(SnapshotWriteError, match="It is a file; give a folder"):
        ema.update(weights(1))


def test_reading_needs_no_permission_to_write(unprivileged: Path) -> None:
    folder = unprivileged / "ema"
    begun(folder)
    folder.chmod(0o555)
    store = SnapshotStore(folder)
    assert len(store.verify()) == 4
    reconstruct(store, 0.07)
    with pytest.raises(SnapshotWriteError, match="Permission denied"):
        store.delete(store.list()[:1])
    assert len(store.list()) == 4


def test_a_file_that_may_not_be_read_is_named(unprivileged: Path) -> None:
    folder = unprivileged / "ema"
    begun(folder)
    snapshot = SnapshotStore(folder).list()[1]
    snapshot.path.chmod(0)
    try:
        for action in (lambda: SnapshotStore(folder).list(), lambda: reconstruct(folder, 0.07)):
            with pytest.raises(SnapshotError, match="Permission denied") as caught:
                action()
            assert str(snapshot.path) in str(caught.value)
    finally:
        snapshot.path.chmod(0o644)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ema").write_text("not a folder")
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path / "ema", every=1)
    with pytest.raises(SnapshotWriteError, match="cannot write snapshots to"):
        ema.update(weights(1))
    with pytest.raises(SnapshotError):
        SnapshotStore(tmp_path / "ema").list()


# Systems that cannot do everything -------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_systems_without_locks(tmp_path: Path, code: int) -> None:
    # Lustre mounted without flock, some NFS and FUSE: one writer is assumed there.
    import fcntl

    with failing_call(fcntl, "flock", code=code):
        ema = begun(tmp_path)
        ema.update(weights(3))
    assert [s.t for s in SnapshotStore(tmp_path).verify()] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    begun(tmp_path)
    assert [s.t for s in SnapshotStore(tmp_path).verify()] == [1, 1, 2, 2]


def test_a_folder_that_truly_fails_to_sync_is_an_error(tmp_path: Path) -> None:
    # The file is in its place by then: it is taken back, or the next attempt would trip over it.
    ema = begun(tmp_path)

    @contextmanager
    def failing_folder() -> Iterator[None]:
        original = os.fsync

        def fail(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            original(descriptor)

        os.fsync = fail
        try:
            yield
        finally:
            os.fsync = original

    assert_update_fails_and_recovers(ema, tmp_path, failing_folder())


def test_reads_that_fail_are_named(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "ema")
    with failing_call(os, "preadv", code=errno.EIO), pytest.raises(SnapshotError, match="Input"):
        SnapshotStore(folder).verify()
    with failing_call(os, "preadv", code=errno.EIO), pytest.raises(SnapshotError, match="Input"):
        reconstruct(folder, 0.07)
