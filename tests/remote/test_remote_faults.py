"""What goes wrong elsewhere: kills at any request, two writers, files that change or vanish."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from stores import Killed, ObjectStore, crash_at, names

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    ForeignSnapshotError,
    SnapshotError,
    SnapshotStore,
    SnapshotWriteError,
    reconstruct,
)

TRACKS = (0.05, 0.10)


def weights(step: float, size: int = 500) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"w": rng.standard_normal(size) + 0.01 * step * rng.standard_normal(size)}


def tracker(fs: ObjectStore, **options: Any) -> EMA:
    return EMA(sigma_rel=TRACKS, snapshots=fs.at("/ema"), **{"every": 1, **options})


def train(ema: EMA, first: int, last: int) -> EMA:
    for step in range(first, last + 1):
        ema.update(weights(step))
    return ema


def store_of(fs: ObjectStore) -> SnapshotStore:
    return SnapshotStore(fs.at("/ema"))


def contents(fs: ObjectStore) -> dict[str, bytes]:
    return {key: file.getvalue() for key, file in fs.store.items()}


def times(fs: ObjectStore) -> set[float]:
    return {s.t for s in store_of(fs).list()}


def in_turn(fs: ObjectStore, work: Callable[[], object]) -> Any:
    """Do some work again and again, killed one request later each time, until it is not.

    Yields after each kill; everything is put back before the next try.
    """
    before, stamps = contents(fs), dict(fs.store)
    for number in range(1, 200):
        fs.before = crash_at(number)
        try:
            work()
        except Killed:
            killed = True
        else:
            killed = False
        fs.before = lambda kind, key: None
        yield killed
        if not killed:
            return
        fs.store.clear()
        fs.store.update(stamps)
        assert contents(fs) == before
    raise AssertionError("it never ends")


# Kills -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float32", "delta8"])
def test_a_kill_while_snapshots_are_deleted(encoding: str, tmp_path: Path) -> None:
    """Files predicted from others are written once more; at no time is anything unreadable."""
    fs = ObjectStore()
    ema = train(tracker(fs, encoding=encoding), 1, 5)
    state, run = ema.state_dict(), store_of(fs).list()[0].run
    exact = {(s.t, s.profile): s.read("w") for s in store_of(fs).list()}
    doomed = {1, 3}
    count = 0

    def delete() -> None:
        store = store_of(fs)
        store.delete([s for s in store.list() if s.t in doomed])

    def assert_sound(least: set[float]) -> None:
        found = store_of(fs).verify()
        assert len(found) == len({(s.t, s.profile) for s in found})
        assert {s.t for s in found} >= least
        for s in found:
            difference = np.linalg.norm(s.read("w") - exact[s.t, s.profile])
            # Blocks of 8 bits round by 0.7 % (of normal numbers, RMS); the coarser file, twice.
            assert difference <= 1.5e-2 * np.linalg.norm(exact[s.t, s.profile])

    for killed in in_turn(fs, delete):
        count += 1
        assert_sound(set(range(1, 6)) - doomed)
        copy = tmp_path / f"copy-{count}"  # as a backup at this moment would be
        copy.mkdir()
        for name in names(fs, "ema"):
            (copy / name).write_bytes(fs.cat_file(f"/ema/{name}"))
        assert {s.t for s in SnapshotStore(copy).verify()} == times(fs)
        if killed:  # then again, to the end; or a run goes on there
            if count % 2:
                delete()
            else:
                resumed = tracker(fs, encoding=encoding)
                resumed.load_state_dict(state)
                train(resumed, 6, 6)
                store = store_of(fs)
                store.delete([s for s in store.list() if s.t == 6])
                delete()
        assert_sound(set(range(1, 6)) - doomed)
        assert times(fs) == set(range(1, 6)) - doomed
        store = store_of(fs)
        store.claim(run, 5)
        assert len(names(fs, "ema")) == sum(len(s.files) for s in store.list()), "nothing is left"
        if encoding == "delta8" and (count % 2 or not killed):
            finest = [s for s in store.list() if s.t == 5]
            assert all(s.refines for s in finest), "the newest stays as fine as it was"
    assert count > (3 if encoding == "float32" else 15)


@pytest.mark.parametrize("encoding", ["float32", "delta8"])
def test_a_kill_while_an_abandoned_future_is_set_aside(encoding: str) -> None:
    fs = ObjectStore()
    state = train(tracker(fs, encoding=encoding), 1, 3).state_dict()
    ema = tracker(fs, encoding=encoding)
    ema.load_state_dict(state)
    train(ema, 4, 6)
    everything = {key.rpartition("/")[2]: data for key, data in contents(fs).items()}

    def resume() -> None:
        again = tracker(fs, encoding=encoding, every=100)
        again.load_state_dict(state)
        train(again, 4, 4)

    for _ in in_turn(fs, resume):
        found = store_of(fs).verify()
        assert {s.t for s in found} >= {1, 2, 3}, "what was there before stays"
        assert max(s.t for s in found) <= 6
        resume()
        assert times(fs) == {1, 2, 3}
        kept = {key.rpartition("/")[2]: data for key, data in contents(fs).items()}
        assert kept == everything, "nothing is lost"


def test_a_kill_while_a_run_writes() -> None:
    fs = ObjectStore()
    state = train(tracker(fs, encoding="delta8"), 1, 3).state_dict()

    def go_on() -> None:
        ema = tracker(fs, encoding="delta8")
        ema.load_state_dict(state)
        train(ema, 4, 5)

    for _ in in_turn(fs, go_on):
        found = store_of(fs).verify()
        assert {s.t for s in found} >= {1, 2, 3}
        go_on()
        assert {s.t for s in store_of(fs).verify()} == {1, 2, 3, 4, 5}
        assert [s.refines for s in store_of(fs).list()][-2:] == [True, True]


UPLOAD = """
import os, sys
import numpy as np
import s3fs, s3fs.core
from posthoc_ema import EMA

s3fs.core.calculate_chunksize = lambda size, chunksize=None: 5 << 20
call, parts = s3fs.S3FileSystem._call_s3, 0
async def called(self, method, *args, **kwargs):
    global parts
    parts += method == "upload_part"
    if method == "upload_part" and parts == int(sys.argv[2]):
        if sys.argv[3] == "kill":
            os._exit(137)
        raise OSError(5, "the connection broke")
    return await call(self, method, *args, **kwargs)
s3fs.S3FileSystem._call_s3 = called

ema = EMA(sigma_rel=0.1, snapshots=sys.argv[1], every=1)
try:
    ema.update({"w": np.full(4_000_000, 1.0, np.float32)})
except OSError as error:
    print(error)
ema.update({"w": np.full(4_000_000, 2.0, np.float32)})
"""


@pytest.mark.parametrize("way", ["kill", "error"])
def test_an_upload_in_several_parts_that_ends_half_way(
    bucket: str, tmp_path: Path, way: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, bucket, "3", way],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    fs, key = fsspec.core.url_to_fs(bucket)
    fs.invalidate_cache()
    assert list(tmp_path.iterdir()) == [], "and nothing stays in the folder of temporary files"
    if way == "kill":
        assert done.returncode == 137
        assert fs.find(key) == [], "nothing is visible"
        with pytest.raises(SnapshotError, match="does not exist"):
            SnapshotStore(bucket).list()
    else:
        assert done.returncode == 0, done.stderr
        assert "cannot write snapshots to s3://" in done.stdout
        assert "the connection broke" in done.stdout
        assert [s.t for s in SnapshotStore(bucket).verify()] == [2], "the next update tried again"
        bucket_name = key.partition("/")[0]
        assert fs.list_multipart_uploads(bucket_name) == [], "the broken one was given up"


def test_a_file_system_without_objects_shows_no_half_files(memory: str) -> None:
    """There files grow where others see them, under a hidden name, and are renamed."""
    ema = EMA(sigma_rel=0.1, snapshots=memory, every=1)
    ema.update(weights(1))
    fs = SnapshotStore(memory).path.fs
    seen: list[str] = []

    def failing(source: str, target: str, **options: Any) -> None:
        fs.pipe_file(target, b"half of it")
        seen.extend(name for name in fs.find("/runs") if "/." not in name)
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "put_file", failing, raising=False)
        with pytest.raises(SnapshotWriteError, match="No space left on device"):
            ema.update(weights(2))
    assert len(seen) == 1
    assert len(fs.find("/runs")) == 1, "the hidden one was removed"
    ema.update(weights(3))
    assert [s.t for s in SnapshotStore(memory).verify()] == [1, 3]


def test_what_a_kill_left_under_hidden_names_is_removed(memory: str) -> None:
    ema = EMA(sigma_rel=0.1, snapshots=memory, every=1)
    ema.update(weights(1))
    fs = SnapshotStore(memory).path.fs
    fs.pipe_file("/runs/.t=2.safetensors.1234abcd.tmp", b"half of it")
    resumed = EMA(sigma_rel=0.1, snapshots=memory, every=1)
    resumed.load_state_dict(ema.state_dict())
    resumed.update(weights(2))
    assert len(fs.find("/runs")) == 2


@pytest.mark.parametrize("system", ["linux", "other"])
def test_no_room_to_put_a_file_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Files for elsewhere grow in the folder of temporary files, and leave nothing there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if system == "other":  # without names for open files
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda p: "/proc/" not in str(p) and exists(p))
    fs = ObjectStore()
    ema = train(tracker(fs), 1, 1)
    before = contents(fs)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        message = rf"objects:///ema: No space left on device.*free space in {tmp_path}"
        with pytest.raises(SnapshotWriteError, match=message):
            ema.update(weights(2))
    assert contents(fs) == before
    train(ema, 3, 3)
    assert times(fs) == {1, 3}
    assert list(tmp_path.iterdir()) == []


# Two writers -----------------------------------------------------------------------------------


def at_first_put(fs: ObjectStore, work: Callable[[], object]) -> None:
    """Let somebody else do something between another's look and its writing."""

    def before(kind: str, key: str) -> None:
        if kind == "put":
            fs.before = lambda kind, key: None
            work()

    fs.before = before


@pytest.mark.parametrize("knows_create", [True, False])
def test_two_runs_that_begin_at_the_same_moment(knows_create: bool) -> None:
    fs = ObjectStore(knows_create=knows_create)
    first, second = tracker(fs), tracker(fs, every=2)
    second.update(weights(1))
    at_first_put(fs, lambda: second.update(weights(-2)))
    with pytest.raises(ForeignSnapshotError, match="belongs to another run"):
        first.update(weights(1))
    assert {s.run.run_id for s in store_of(fs).verify()} == {second.state_dict()["run_id"]}
    train(second, 3, 4)
    assert times(fs) == {2, 4}


def test_two_processes_that_write_the_same_snapshot_at_the_same_moment() -> None:
    fs = ObjectStore()
    state = train(tracker(fs), 1, 1).state_dict()
    first, second = tracker(fs), tracker(fs)
    for ema in (first, second):
        ema.load_state_dict(state)
    at_first_put(fs, lambda: second.update(weights(-2)))
    with pytest.raises(ForeignSnapshotError, match=r"t=0*2_.*already exists.*two processes"):
        first.update(weights(2))
    store_of(fs).verify()


def test_a_store_that_does_not_say_why_it_refuses() -> None:
    """Not all of them do; and some have never heard of refusing."""
    fs = ObjectStore()
    put = fs.put_file

    def refuses(source: str, target: str, mode: str = "overwrite") -> None:
        try:
            put(source, target, mode=mode)
        except FileExistsError:
            raise OSError(22, "At least one of the pre-conditions did not hold") from None

    def knows_nothing(source: str, target: str, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(38, "A header you provided implies functionality not implemented")
        put(source, target)

    fs.put_file = knows_nothing  # type: ignore[method-assign]
    state = train(tracker(fs), 1, 1).state_dict()
    fs.put_file = refuses  # type: ignore[method-assign]
    first, second = tracker(fs), tracker(fs)
    for ema in (first, second):
        ema.load_state_dict(state)
    at_first_put(fs, lambda: second.update(weights(-2)))
    with pytest.raises(ForeignSnapshotError, match="already exists"):
        first.update(weights(2))


def test_one_that_is_replaced_where_nothing_can_be_refused_is_noticed_later() -> None:
    fs = ObjectStore(knows_create=False)
    state = train(tracker(fs), 1, 1).state_dict()
    first, second = tracker(fs), tracker(fs)
    for ema in (first, second):
        ema.load_state_dict(state)
    at_first_put(fs, lambda: second.update(weights(-2)))
    with pytest.raises(ForeignSnapshotError, match=r"t=0*2_"):
        first.update(weights(2))  # replaced the first track, and finds the second
    with pytest.raises(ForeignSnapshotError, match=r"was replaced since this process wrote it"):
        second.update(weights(-3))


def test_an_answer_that_gets_lost_is_no_second_writer() -> None:
    """The client tries again, and the store refuses: the object is there, and is ours."""
    fs = ObjectStore()
    ema = train(tracker(fs), 1, 1)
    put = fs.put_file

    def twice(source: str, target: str, mode: str = "overwrite") -> None:
        put(source, target, mode=mode)
        put(source, target, mode=mode)

    fs.put_file = twice  # type: ignore[method-assign]
    train(ema, 2, 3)
    assert times(fs) == {1, 2, 3}


def test_a_snapshot_whose_basis_is_pruned_while_it_is_written() -> None:
    """By a command on another machine: it is written again, from what stays."""
    fs = ObjectStore()
    ema = train(tracker(fs, encoding="delta8"), 1, 3)

    def prune() -> None:
        store = store_of(fs)
        store.delete([s for s in store.list() if s.t in (2, 3)])

    at_first_put(fs, prune)
    with pytest.raises(SnapshotError, match="cannot be decoded: it is stored as its difference"):
        ema.update(weights(4))
    store_of(fs).verify()
    train(ema, 5, 6)
    assert times(fs) == {1, 5, 6}


# Reading what changes --------------------------------------------------------------------------


def during_reads(fs: ObjectStore, number: int, work: Callable[[], object]) -> None:
    """Let something happen before the n-th range is answered."""
    count = 0

    def before(kind: str, key: str) -> None:
        nonlocal count
        count += kind == "read"
        if kind == "read" and count == number:
            work()

    fs.before = before


@pytest.fixture
def run() -> ObjectStore:
    """Three times, whose headers were read."""
    fs = ObjectStore()
    train(tracker(fs), 1, 3)
    return fs


def victim(fs: ObjectStore) -> str:
    return str(sorted(fs.store)[0])


def test_a_file_that_is_deleted(run: ObjectStore) -> None:
    snapshot = store_of(run).list()[0]
    run.rm_file(victim(run))
    with pytest.raises(SnapshotError, match=r"objects:///ema/t=.* is gone: it was deleted or set"):
        snapshot.read("w")
    with pytest.raises(SnapshotError, match="is gone"):
        snapshot.verify()


def test_a_file_that_is_cut_short(run: ObjectStore) -> None:
    snapshot = store_of(run).list()[0]
    run.pipe_file(victim(run), run.cat_file(victim(run))[:-100])
    with pytest.raises(CorruptSnapshotError, match=r"objects:///ema/t=.* was truncated or"):
        snapshot.read("w")


@pytest.mark.parametrize("names_", [None, "w"])
def test_a_file_that_is_replaced_by_one_of_the_same_size(
    run: ObjectStore, names_: str | None
) -> None:
    """Whole passes find it by digests; others by what the listing says afterwards."""
    store = store_of(run)
    snapshots = store.list()
    other = ObjectStore()
    train(tracker(other), 1, 1)  # another run, of the same structure
    (key, data) = sorted(contents(other).items())[0]
    assert len(data) == len(run.cat_file(key))
    during_reads(run, 1, lambda: run.pipe_file(key, data))
    with pytest.raises(CorruptSnapshotError, match=r"objects:///ema/t=.*1_.* was replaced while"):
        snapshots[0].read("w")
    with pytest.raises(SnapshotError):
        reconstruct(store, 0.07, names=names_)


def test_a_whole_pass_finds_it_by_the_digest(run: ObjectStore) -> None:
    store, key = store_of(run), victim(run)
    data = bytearray(run.cat_file(key))
    data[-5] ^= 1
    store.list()
    reads = len(store.list()) * 2 + 1  # headers are known; the sample is read, then the pass
    during_reads(run, reads // 2 + 1, lambda: run.pipe_file(key, bytes(data)))
    with pytest.raises(CorruptSnapshotError, match=r"is damaged|was replaced while it was read"):
        reconstruct(store, 0.07)


def test_a_connection_that_breaks(run: ObjectStore) -> None:
    snapshot = store_of(run).list()[0]

    class ClientError(Exception):
        """As clients have them: not of the operating system's kind."""

    def broken(kind: str, key: str) -> None:
        raise ClientError("throttled")

    run.before = broken
    with pytest.raises(SnapshotError, match=r"cannot read objects:///.*ClientError: throttled"):
        snapshot.read("w")
    with pytest.raises(SnapshotError, match="cannot list objects:///ema"):
        store_of(run).list()


def test_a_snapshot_pruned_since_it_was_listed_is_no_error(run: ObjectStore) -> None:
    gone = victim(run)

    def before(kind: str, key: str) -> None:
        if kind == "read" and key == gone:
            run.store.pop(gone)

    run.before = before
    assert len(store_of(run).list()) == 5
