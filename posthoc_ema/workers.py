"""Threads for numeric work on all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

MAX_THREADS = 8
"""More would wait for each other, and for memory."""


class Workers:
    """A pool with a thread for each core, up to a few.

    Args:
        initializer: Called first by each thread.
    """

    def __init__(self, initializer: Callable[[], object] | None = None) -> None:
        self.number = min(usable_cores(), MAX_THREADS)
        self._pool: ThreadPoolExecutor | None = None
        try:
            from concurrent.futures import ThreadPoolExecutor  # slow to import

            self._pool = ThreadPoolExecutor(self.number, initializer=initializer)
        except RuntimeError:  # the program ends, and starts no more threads
            if initializer is not None:
                initializer()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items, which are taken only a few ahead."""
        pending: deque[Callable[[], R]] = deque()
        for item in items:
            pending.append(self._begin(task, item))
            if len(pending) > 2 * self.number:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

    def _begin(self, task: Callable[[T], R], item: T) -> Callable[[], R]:
        """Start a task; what gives its result."""
        if self._pool is not None:
            try:
                return self._pool.submit(task, item).result
            except RuntimeError:  # the program ends: a last snapshot is written by one thread
                pass
        return partial(task, item)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
