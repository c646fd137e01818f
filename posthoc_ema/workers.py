"""Threads for numeric work on all cores."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

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
        from concurrent.futures import ThreadPoolExecutor  # slow to import

        self.number = min(usable_cores(), MAX_THREADS)
        self._pool = ThreadPoolExecutor(self.number, initializer=initializer)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, task: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items, which are taken only a few ahead."""
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(self._pool.submit(task, item))
            if len(pending) > 2 * self.number:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
