"""Reading over a network: few large requests, several at a time, before their bytes are needed."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from threading import Lock, local
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")

REQUESTS = 32
"""Requests at a time, as far as the file system makes so many."""

MEMORY = 256 << 20
"""Bytes on their way or waiting to be used, of all files that are read side by side."""

_SMALLEST, _LARGEST = 256 << 10, 8 << 20  # bytes of one request
_GAP = 64 << 10  # bytes that are sooner fetched than a further request is answered


class ReadAhead:
    """The bytes of one file that will be read, fetched in pieces a little ahead.

    Args:
        fetch: Gets the bytes of a range, in one request, from any thread.
        ranges: (first byte, number) of all that will be read, each byte once, in about this order.
        together: How many files are read side by side: they share the memory.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], bytes],
        ranges: Iterable[tuple[int, int]],
        together: int = 1,
    ) -> None:
        self._fetch = fetch
        self._ahead = min(max(REQUESTS // together, 1), 16)
        size = MEMORY // together // (1 + self._ahead)
        pieces = list(_pieces(ranges, min(max(size, _SMALLEST), _LARGEST)))
        self._bounds = [(start, stop) for start, stop, _ in pieces]
        self._unread = [unread for _, _, unread in pieces]
        self._by_start = sorted(range(len(pieces)), key=lambda k: pieces[k][0])
        self._starts = [pieces[k][0] for k in self._by_start]
        self._coming: dict[int, Future[bytes]] = {}
        self._lock = Lock()

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` from byte ``start`` on; from any thread.

        Raises:
            EOFError: If the file ends before.
        """
        done = 0
        while done < len(out):
            place = start + done
            k = self._holding(place)
            if k is None:  # not announced
                stop = start + len(out)
                data, first = self._whole(place, stop), place
                part = stop - place
            else:
                first, stop = self._bounds[k]
                data, part = self._piece(k), min(stop, start + len(out)) - place
            out[done : done + part] = np.frombuffer(data, np.uint8, part, place - first)
            if k is not None:
                self._used(k, part)
            done += part

    def _holding(self, place: int) -> int | None:
        """Which piece has a byte, if it is not used up."""
        at = bisect_right(self._starts, place) - 1
        if at < 0:
            return None
        k = self._by_start[at]
        return k if place < self._bounds[k][1] and self._unread[k] > 0 else None

    def _piece(self, k: int) -> bytes:
        with self._lock:
            # Also what comes next; what is used up is not fetched again.
            for i in range(k, min(k + 1 + self._ahead, len(self._bounds))):
                if i not in self._coming and self._unread[i] > 0:
                    future = _submit("request", self._whole, *self._bounds[i])
                    if future is None:
                        break
                    self._coming[i] = future
            coming = self._coming.get(k)
        return self._whole(*self._bounds[k]) if coming is None else coming.result()

    def _used(self, k: int, size: int) -> None:
        with self._lock:
            self._unread[k] -= size
            if self._unread[k] <= 0:
                self._coming.pop(k, None)

    def _whole(self, start: int, stop: int) -> bytes:
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            raise EOFError(f"got {len(data)} of the {stop - start} bytes from byte {start} on")
        return data

    def close(self) -> None:
        """Give up what was not read."""
        with self._lock:
            for future in self._coming.values():
                future.cancel()
            self._coming.clear()


def _pieces(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes of it that will be read): neighbours joined, large ranges cut."""
    start = stop = unread = 0
    for first, number in ranges:
        if not number:
            continue
        last = first + number
        if unread and not (stop <= first <= stop + _GAP and last - start <= size):
            yield start, stop, unread
            start, unread = first, 0
        if not unread:
            start = first
        while last - first > size:  # nothing was joined before it
            yield first, first + size, size
            first += size
            start = first
        unread += last - first
        stop = last
    if unread:
        yield start, stop, unread


def at_once(task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Results in the order of the items, many of which are worked on at a time."""
    if getattr(_thread, "works", False):  # one of many already; to wait for others could be forever
        yield from map(task, items)
        return
    futures = [_submit("file", partial(_work, task), item) for item in items]
    for item, future in zip(items, futures, strict=True):
        yield task(item) if future is None else future.result()


_thread = local()


def _work(task: Callable[[T], R], item: T) -> R:
    _thread.works = True
    return task(item)


def _submit(kind: str, task: Callable[..., R], *arguments: object) -> Future[R] | None:
    """Start a task in a thread; None if the program ends and starts no more of them."""
    try:
        return _pool(os.getpid(), kind).submit(task, *arguments)
    except RuntimeError:
        return None


@cache
def _pool(process: int, kind: str) -> ThreadPoolExecutor:
    """Threads that wait for answers; a forked process needs its own."""
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    return ThreadPoolExecutor(REQUESTS, thread_name_prefix=f"posthoc_ema {kind}")
