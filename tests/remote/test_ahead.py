"""Reading ahead: the right bytes in any order, few requests, little memory, honest errors."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posthoc_ema import ahead
from posthoc_ema.ahead import ReadAhead, at_once

DATA = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)


class File:
    """Counts what is fetched of it."""

    def __init__(self, data: Any = DATA, wait: float = 0.0) -> None:
        self.data, self.wait, self.asked = data.tobytes(), wait, list[tuple[int, int]]()
        self.held, self.most, self._lock = 0, 0, threading.Lock()

    def fetch(self, start: int, stop: int) -> bytes:
        with self._lock:
            self.asked.append((start, stop))
            self.held += 1
            self.most = max(self.most, self.held)
        time.sleep(self.wait)
        with self._lock:
            self.held -= 1
        return self.data[start:stop]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rules at a scale that is quick to test."""
    monkeypatch.setattr(ahead, "_SMALLEST", 1 << 10)
    monkeypatch.setattr(ahead, "_LARGEST", 1 << 14)
    monkeypatch.setattr(ahead, "_GAP", 100)


def read(reader: ReadAhead, start: int, size: int) -> None:
    out = np.empty(size, np.uint8)
    reader.read(start, out)
    np.testing.assert_array_equal(out, DATA[start : start + size])


@given(st.data())
def test_any_ranges_read_in_any_cuts(data: st.DataObject) -> None:
    edges = sorted(data.draw(st.sets(st.integers(0, len(DATA)), min_size=2, max_size=40)))
    ranges = [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    if data.draw(st.booleans()):
        ranges.reverse()
    file = File()
    reader = ReadAhead(file.fetch, ranges, together=data.draw(st.sampled_from([1, 3, 5000])))
    cuts = []
    for start, size in ranges:
        number = data.draw(st.integers(1, 5))
        inner = [start + size * k // number for k in range(number + 1)]
        cuts += [(a, b - a) for a, b in pairwise(inner)]
    order = data.draw(st.permutations(range(len(cuts))))
    for k in order:
        read(reader, *cuts[k])
    # In order nothing is fetched twice, and no more than gaps beside what was wanted.
    file.asked.clear()
    reader = ReadAhead(file.fetch, ranges)
    for cut in cuts:
        read(reader, *cut)
    fetched = sum(stop - start for start, stop in file.asked)
    assert fetched <= sum(size for _, size in ranges) + 100 * len(ranges)


def test_neighbours_share_requests() -> None:
    file = File()
    reader = ReadAhead(file.fetch, [(k * 90, 40) for k in range(100)])
    for k in range(100):
        read(reader, k * 90, 40)
    assert len(file.asked) == 1
    file = File()
    reader = ReadAhead(file.fetch, [(k * 200, 40) for k in range(100)])
    for k in range(100):
        read(reader, k * 200, 40)
    assert [stop - start for start, stop in file.asked] == [40] * 100, "far apart: no gaps"


def test_what_comes_is_fetched_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(wait=0.02)
    reader = ReadAhead(file.fetch, [(0, len(DATA))])
    started = time.perf_counter()
    for start in range(0, len(DATA), 1 << 14):
        read(reader, start, 1 << 14)
    # One after the other, 64 pieces would take 1.28 s; 17 are on their way at a time.
    assert time.perf_counter() - started < 0.64
    assert 8 < file.most <= 17


def test_many_threads_and_a_straggler() -> None:
    file = File(wait=0.001)
    reader = ReadAhead(file.fetch, [(0, len(DATA))], together=8)
    starts = list(range(0, len(DATA), 5000))

    def task(start: int) -> None:
        if start == 0:
            time.sleep(0.1)
        read(reader, start, min(5000, len(DATA) - start))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(task, starts))


def test_files_that_are_read_together_share_the_memory() -> None:
    for together in (1, 2, 10, 100, 1000):
        file = File(np.zeros(32 << 20, np.uint8))
        reader = ReadAhead(file.fetch, [(0, 32 << 20)], together)
        reader.read(0, np.empty(1, np.uint8))
        reader.close()
        waiting = sum(stop - start for start, stop in file.asked)
        # Below the smallest request there would be too many of them.
        assert waiting * together <= max(ahead.MEMORY, 2 * ahead._SMALLEST * together)


def test_what_was_not_announced() -> None:
    file = File()
    reader = ReadAhead(file.fetch, [(100, 50)])
    read(reader, 0, 300)
    read(reader, 5000, 10)
    read(reader, 100, 50)


def test_a_file_that_ends_too_soon() -> None:
    reader = ReadAhead(File().fetch, [(len(DATA) - 10, 20)])
    with pytest.raises(EOFError, match="got 10 of the 20 bytes from byte"):
        reader.read(len(DATA) - 10, np.empty(20, np.uint8))


def test_errors_reach_whoever_waits() -> None:
    def fetch(start: int, stop: int) -> bytes:
        raise PermissionError(13, "no", "it")

    reader = ReadAhead(fetch, [(0, 20)])
    for _ in range(2):
        with pytest.raises(PermissionError):
            reader.read(0, np.empty(20, np.uint8))


def test_work_inside_of_work_ends() -> None:
    """All threads wait for others that wait for a thread: that must not happen."""

    def outer(k: int) -> int:
        return sum(at_once(lambda i: i * k, range(10)))

    assert list(at_once(outer, range(200))) == [45 * k for k in range(200)]
