"""The compiled inner loops of ``_native.c``, where the installation could compile them.

Nothing depends on them but speed: every caller has a numpy twin. They take raw memory and check
nothing, so callers pass contiguous arrays of the right size and type. ``POSTHOC_EMA_NATIVE=0`` in
the environment leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.workers import MAX_THREADS, usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As the enum in _native.c numbers them.
TYPES = {"F32": 0, "F16": 1, "BF16": 2, **{f"Q{bits}": 64 + bits for bits in (4, 6, 8, 10, 12, 16)}}
"""Stored types that there are loops for, by their names in files."""

ITEM = {"F32": 4, "F16": 2, "BF16": 2}
_WORTH_THREADS = 1 << 20  # elements; fewer are moved before another thread has begun
_PARTS = 8  # for each thread

TOGETHER = 8
"""Files combined at once: ROWS in _native.c."""


@cache
def library() -> Any:
    """The loaded library; None where there is none."""
    if os.environ.get("POSTHOC_EMA_NATIVE") == "0":
        return None
    import ctypes

    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            break
    else:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:  # built for another system
        return None
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "combine": (
            None,
            [number, count, pointer, count, pointer, count, pointer, pointer, count],
        ),
        "finish": (number, [pointer, pointer, count, pointer]),
        "decode": (None, [number, pointer, count, pointer]),
        "encode": (
            ctypes.c_double,
            [number, pointer, count, pointer, pointer, count, pointer, pointer],
        ),
        "measure": (None, [pointer, count, pointer, pointer]),
        "lerp": (
            None,
            [number, count, pointer, pointer, pointer, pointer, count, pointer],
        ),
        "all_finite": (number, [number, count, pointer, pointer]),
        "hash_pieces": (None, [pointer, count, pointer]),
        "combine_files": (
            number,
            [
                number,
                count,
                pointer,
                pointer,
                count,
                count,
                pointer,
                count,
                pointer,
                count,
                pointer,
                count,
                pointer,
                pointer,
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def address(array: NDArray[Any]) -> int:
    """Of its first element."""
    return array.__array_interface__["data"][0]


def addresses(arrays: Sequence[NDArray[Any]] | NDArray[Any]) -> NDArray[np.uint64]:
    """Of the first elements of several arrays, as C takes a list of pointers."""
    if isinstance(arrays, np.ndarray):
        steps = np.arange(len(arrays), dtype=np.uint64) * np.uint64(arrays.strides[0])
        return steps + np.uint64(address(arrays))
    return np.array([address(array) for array in arrays], np.uint64)


class Tensors:
    """Tensors in memory, and where their float32 averages lie, as C takes them.

    Args:
        dtype: Stored type of the tensors: F32, F16 or BF16.
        sources: Address of each.
        counts: Number of elements of each.
        averages: Address of the average of each, of the first track.
        strides: From there to that of the next track, in elements.
    """

    def __init__(
        self,
        dtype: str,
        sources: Sequence[int],
        counts: Sequence[int],
        averages: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        self._type = TYPES[dtype]
        self._parts: list[tuple[int, ...]] = []  # number of tensors, addresses of the arrays
        self._kept: list[NDArray[Any]] = []
        total, item = sum(counts), ITEM[dtype]
        self._threads = min(usable_cores(), MAX_THREADS) if total >= _WORTH_THREADS else 1
        number = _PARTS * self._threads if self._threads > 1 else 1
        edges = [total * k // number for k in range(number + 1)]
        ends = np.cumsum(counts) if counts else np.zeros(0, np.int64)
        for left, right in pairwise(edges):
            rows = []
            for k in range(int(np.searchsorted(ends, left, "right")), len(counts)):
                start = int(ends[k]) - counts[k]
                if start >= right:
                    break
                skip = max(left - start, 0)
                rows.append(
                    (
                        sources[k] + skip * item,
                        min(counts[k], right - start) - skip,
                        averages[k] + 4 * skip,
                        strides[k],
                    )
                )
            columns = list(zip(*rows, strict=True)) or [()] * 4
            kinds = (np.uint64, np.int64, np.uint64, np.int64)
            arrays = list(map(np.array, columns, kinds))
            self._kept += arrays
            self._parts.append((len(rows), *map(address, arrays)))

    def lerp(self, weights: NDArray[np.float32]) -> None:
        """Move the averages of each track towards the tensors by its weight."""
        # Whoever is free takes the next part: a thread that begins late, since others still spin
        # on its core, delays nobody.
        parts = iter(self._parts)

        def move() -> None:
            for part in parts:
                library().lerp(self._type, *part, len(weights), address(weights))

        # Threads of their own: what little starting them takes, waking ones would take too.
        threads = [Thread(target=move) for _ in range(1, self._threads)]
        for thread in threads:
            thread.start()
        move()
        for thread in threads:
            thread.join()

    def is_finite(self) -> bool:
        """Whether all elements of all tensors are finite."""
        return all(library().all_finite(self._type, *part[:3]) for part in self._parts)
