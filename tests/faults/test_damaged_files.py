"""Truncated, flipped, shuffled bytes: an error that names the file, never a wrong answer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posthoc_ema import (
    EMA,
    CorruptSnapshotError,
    Snapshot,
    SnapshotError,
    SnapshotStore,
    predict_error,
    reconstruct,
)
from posthoc_ema.digests import Digest
from posthoc_ema.sinks import MemorySink
from tests.faults.tools import (
    damage,
    last_of,
    payload_start,
    piece_digest,
    put_together,
    small_store,
    take_apart,
)

ENCODINGS = ["float32", "float16", "bfloat16"]


@pytest.fixture(params=ENCODINGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return small_store(tmp_path / "ema", request.param)


def assert_refused(folder: Path, path: Path, kind: Any = SnapshotError) -> None:
    """verify and reconstruct both raise, and their messages name the file."""
    named = re.escape(str(path))
    with pytest.raises(kind, match=named):
        SnapshotStore(folder).verify()
    with pytest.raises(kind, match=named):
        reconstruct(folder, 0.07)


def test_the_tool_that_rewrites_files_follows_the_format(folder: Path) -> None:
    # Else the tests that use it would prove nothing: rewritten unchanged, a file is intact.
    before = reconstruct(folder, 0.07)
    for snapshot in SnapshotStore(folder).list():
        put_together(snapshot.path, take_apart(snapshot.path))
    SnapshotStore(folder).verify()
    after = reconstruct(folder, 0.07)
    np.testing.assert_array_equal(after.params["v"], before.params["v"])


# Truncation ----------------------------------------------------------------------------------


def test_truncation_anywhere_is_found(folder: Path) -> None:
    snapshot = last_of(folder)
    whole = snapshot.path.read_bytes()
    start = payload_start(snapshot)
    boundaries = {0, 1, 7, 8, 9, start - 1, start, start + 1, len(whole) - 1}
    for entry in snapshot.entries.values():
        boundaries |= {entry.offset, entry.offset + 1, entry.offset + entry.nbytes - 1}
        boundaries |= {entry.offset + entry.nbytes} - {len(whole)}
    for length in sorted(boundaries):
        snapshot.path.write_bytes(whole[:length])
        with pytest.raises(CorruptSnapshotError, match=re.escape(str(snapshot.path))):
            SnapshotStore(folder).verify()
    assert_refused(folder, snapshot.path, CorruptSnapshotError)
    snapshot.path.write_bytes(whole)
    SnapshotStore(folder).verify()


def test_bytes_added_at_the_end_are_found(folder: Path) -> None:
    snapshot = last_of(folder)
    for extra in (b"\0", b"\0" * 4096):
        snapshot.path.write_bytes(snapshot.path.read_bytes() + extra)
        assert_refused(folder, snapshot.path, CorruptSnapshotError)


def test_truncation_after_the_header_was_read_is_found(folder: Path) -> None:
    # A store that remembers headers, and a file that shrinks under its hands.
    store = SnapshotStore(folder)
    snapshot = store.list()[-1]
    data = snapshot.path.read_bytes()
    snapshot.path.write_bytes(data[:-3])
    with pytest.raises(CorruptSnapshotError, match="was truncated while it was read"):
        snapshot.verify()
    with pytest.raises(CorruptSnapshotError, match="was truncated while it was read"):
        snapshot.read(list(snapshot.entries)[-1])
    with pytest.raises(CorruptSnapshotError, match="truncated or damaged"):
        reconstruct(store, 0.07)


def test_truncation_while_a_pass_is_under_way_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files are mapped: reading beyond their end would end the process with a bus error.
    ema = EMA(sigma_rel=0.1, snapshots=tmp_path)
    for step in range(3):
        ema.update({"w": np.full(700_000, step, np.float32)})  # three blocks
        ema.snapshot()
    path = SnapshotStore(tmp_path).list()[1].path
    original = MemorySink.write

    def write_and_truncate(self: MemorySink, start: int, block: Any) -> None:
        original(self, start, block)
        os.truncate(path, 100_000)

    monkeypatch.setattr(MemorySink, "write", write_and_truncate)
    with pytest.raises(CorruptSnapshotError, match="truncated while it was read") as caught:
        reconstruct(tmp_path, 0.07)
    assert str(path) in str(caught.value)


def test_messages_say_what_to_do(folder: Path) -> None:
    snapshot = last_of(folder)
    damage(snapshot.path, payload_start(snapshot) + 5, 1)
    with pytest.raises(CorruptSnapshotError, match=r"Restore it from a copy, or delete it"):
        reconstruct(folder, 0.07)
    SnapshotStore(folder).delete([snapshot])
    reconstruct(folder, 0.07)


# Flipped bits --------------------------------------------------------------------------------


def flip_everywhere(folder: Path, positions: Any, masks: Any) -> int:
    """Flip, look, restore; returns how many flips reconstruct was asked about."""
    snapshot = last_of(folder)
    whole = snapshot.path.read_bytes()
    expected = reconstruct(folder, 0.07)
    named = re.escape(str(snapshot.path))
    asked = 0
    for position, mask in zip(positions, masks, strict=True):
        data = bytearray(whole)
        data[position] ^= mask
        snapshot.path.write_bytes(data)
        try:
            Snapshot.open(snapshot.path).verify()
        except SnapshotError as error:
            if not re.search(named, str(error)):
                raise AssertionError(f"{error} does not name {snapshot.path}") from error
        else:
            # White space for white space in the header: then nothing has changed.
            found = reconstruct(folder, 0.07)
            for name, value in expected.params.items():
                if found.params[name].tobytes() != value.tobytes():
                    raise AssertionError(f"byte {position} ^ {mask} changed {name} in silence")
            asked += 1
            continue
        if position % 13 == 0:
            with pytest.raises(SnapshotError, match=named):
                reconstruct(folder, 0.07)
            asked += 1
    snapshot.path.write_bytes(whole)
    return asked


def test_a_flipped_bit_anywhere_is_found(folder: Path) -> None:
    # One random bit in each of 300 random bytes: header, metadata and data alike.
    rng = np.random.default_rng(0)
    size = last_of(folder).nbytes
    positions = rng.choice(size, 300, replace=False)
    assert flip_everywhere(folder, positions, 1 << rng.integers(0, 8, 300)) > 10


@pytest.mark.slow
def test_every_single_bit_of_a_file(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "ema", "float16")
    size = last_of(folder).nbytes
    for bit in range(8):
        flip_everywhere(folder, range(size), [1 << bit] * size)


def test_a_changed_byte_is_found_in_every_part(folder: Path) -> None:
    # Every fourth byte of the header, changed at random.
    rng = np.random.default_rng(1)
    start = payload_start(last_of(folder))
    flip_everywhere(folder, range(0, start, 4), rng.integers(1, 256, len(range(0, start, 4))))


def test_damage_that_is_never_used_is_not_looked_for(folder: Path) -> None:
    # A stored average needs one file only; whole-folder checks are verify's business.
    store = SnapshotStore(folder)
    damage(store.list()[0].path, store.list()[0].nbytes - 1, 1)
    last = store.list()[-1]
    np.testing.assert_array_equal(reconstruct(folder, 0.10).params["w"], last.read("w"))
    with pytest.raises(CorruptSnapshotError):
        store.verify()


def test_checks_can_be_left_out_of_the_data_not_of_the_header(folder: Path) -> None:
    snapshot = last_of(folder)
    damage(snapshot.path, snapshot.entries["v"].offset, 1)
    for unchecked in ({"verify": False}, {"names": "v"}):
        reconstruct(folder, 0.07, **unchecked)
    with pytest.raises(CorruptSnapshotError):
        reconstruct(folder, 0.07)
    damage(snapshot.path, snapshot.entries["v"].offset, 1)
    damage(snapshot.path, 50, 1)
    for unchecked in ({"verify": False}, {"names": "v"}):
        with pytest.raises(SnapshotError, match=re.escape(str(snapshot.path))):
            reconstruct(folder, 0.07, **unchecked)


def test_predicting_an_error_checks_headers(folder: Path) -> None:
    snapshot = last_of(folder)
    damage(snapshot.path, 40, 0x10)
    with pytest.raises(SnapshotError, match=re.escape(str(snapshot.path))):
        predict_error(folder, 0.07)


# More than one byte ---------------------------------------------------------------------------


def large_payload(folder: Path) -> tuple[Path, int, int]:
    """A file with 40 pages of data: its path, first byte and number of bytes."""
    ema = EMA(sigma_rel=0.1, snapshots=folder)
    rng = np.random.default_rng(0)
    ema.update({"w": rng.normal(size=40_960).astype(np.float32)})
    [snapshot] = ema.snapshot()
    entry = snapshot.entries["w"]
    return snapshot.path, entry.offset, entry.nbytes


def _swap_words(data: Any, rng: Any) -> None:
    a, b = rng.choice(len(data) // 8, 2, replace=False) * 8
    data[a : a + 8], data[b : b + 8] = data[b : b + 8].copy(), data[a : a + 8].copy()


def _swap_neighbours(data: Any, rng: Any) -> None:
    a = int(rng.integers(0, len(data) // 4 - 1)) * 4
    data[a : a + 4], data[a + 4 : a + 8] = data[a + 4 : a + 8].copy(), data[a : a + 4].copy()


def _swap_pages(data: Any, rng: Any) -> None:
    a, b = rng.choice(len(data) // 4096, 2, replace=False) * 4096
    data[a : a + 4096], data[b : b + 4096] = data[b : b + 4096].copy(), data[a : a + 4096].copy()


def _zero_sector(data: Any, rng: Any) -> None:
    a = int(rng.integers(0, len(data) // 512)) * 512
    data[a : a + 512] = 0


def _repeat_sector(data: Any, rng: Any) -> None:
    a = int(rng.integers(1, len(data) // 512)) * 512
    data[a : a + 512] = data[a - 512 : a]


def _two_flips_in_a_page(data: Any, rng: Any) -> None:
    page = int(rng.integers(0, len(data) // 4096)) * 4096
    a, b = rng.choice(4096, 2, replace=False)
    data[page + a] ^= 1 << int(rng.integers(0, 8))
    data[page + b] ^= 1 << int(rng.integers(0, 8))


def _same_flip_twice(data: Any, rng: Any) -> None:
    # The same bit of two words of one page: what a plain sum cannot see in half of all cases.
    page = int(rng.integers(0, len(data) // 4096)) * 4096
    a, b = rng.choice(4096 // 8, 2, replace=False) * 8 + int(rng.integers(0, 8))
    mask = 1 << int(rng.integers(0, 8))
    data[page + a] ^= mask
    data[page + b] ^= mask


def _shift_by_one(data: Any, rng: Any) -> None:
    a = int(rng.integers(0, len(data) - 1))
    data[a + 1 :] = data[a:-1].copy()


def _negate_two(data: Any, rng: Any) -> None:
    a, b = rng.choice(len(data) // 4, 2, replace=False) * 4 + 3
    data[a] ^= 0x80
    data[b] ^= 0x80


@pytest.mark.parametrize(
    "harm",
    [
        _swap_words,
        _swap_neighbours,
        _swap_pages,
        _zero_sector,
        _repeat_sector,
        _two_flips_in_a_page,
        _same_flip_twice,
        _shift_by_one,
        _negate_two,
    ],
    ids=lambda f: f.__name__.strip("_"),
)
def test_larger_damage_is_found_by_the_digest(tmp_path: Path, harm: Any) -> None:
    path, offset, size = large_payload(tmp_path)
    payload = np.frombuffer(path.read_bytes()[offset : offset + size], np.uint8)
    digest = piece_digest(payload.tobytes())
    rng = np.random.default_rng(0)
    for attempt in range(300):
        data = payload.copy()
        harm(data, rng)
        if np.array_equal(data, payload):
            continue  # equal words exchanged
        other = Digest(len(data))
        other.update(data)
        assert other.hexdigest() != digest, f"attempt {attempt}"
    # And the last of them on disk, through the front door.
    whole = bytearray(path.read_bytes())
    whole[offset : offset + size] = data.tobytes()
    path.write_bytes(whole)
    assert_refused(tmp_path, path, CorruptSnapshotError)


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16, 200_001])
def test_digests_are_what_the_format_says(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    digest = Digest(size)
    digest.update(data)
    assert digest.hexdigest() == piece_digest(data.tobytes())


def test_digests_do_not_depend_on_how_bytes_arrive() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 270_001, dtype=np.uint8)
    whole = piece_digest(data.tobytes())
    for cuts in ([1], [2**16 - 1], [2**16], [2**16 + 1, 2**16 + 2], [5000, 2**17, 2**17 + 1]):
        stream = Digest(len(data))
        for part in np.split(data, cuts):
            stream.update(part)
        assert stream.hexdigest() == whole
        # In any order, and cut anywhere.
        parts = Digest(len(data))
        for start, part in reversed(list(zip([0, *cuts], np.split(data, cuts), strict=True))):
            parts.add(start, part)
        assert not list(parts.missing())
        assert parts.hexdigest() == whole
    shorter = Digest(len(data) - 1)
    shorter.update(data[:-1])
    longer = Digest(len(data) + 1)
    longer.update(np.append(data, np.uint8(0)))
    assert len({whole, shorter.hexdigest(), longer.hexdigest()}) == 3


def test_a_piece_that_was_not_read_is_missing() -> None:
    data = np.zeros(2**17, np.uint8)
    digest = Digest(len(data))
    digest.add(1, data[1:])
    assert list(digest.missing()) == [(0, 2**16)]
    digest.add(0, data[: 2**16])
    assert digest.hexdigest() == piece_digest(data.tobytes())
