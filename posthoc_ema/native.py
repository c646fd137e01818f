"""The compiled inner loops of ``_native.c``, where the installation could compile them.

Nothing depends on them but speed: every caller has a numpy twin. They take raw memory and check
nothing, so callers pass contiguous arrays of the right size and type. ``POSTHOC_EMA_NATIVE=0`` in
the environment leaves them out.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
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
_WORTH_THREADS = 1 << 20  # elements; fewer are moved before a new thread has begun
_PARTS, _PART = 8, 1 << 15  # for each thread, and of at least so many elements

TOGETHER = 8
"""Files combined at once: ROWS in _native.c."""


@cache
def library() -> Any:
    """The loaded library; None where there is none."""
    if os.environ.get("POSTHOC_EMA_NATIVE") == "0":
        return None
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
        "lerp_parts": (None, [pointer]),
        "find_infinite": (None, [pointer]),
        "hash_pieces": (None, [pointer, count, pointer]),
        "read_pieces": (number, [number, count, pointer, pointer]),
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


class _Part(ctypes.Structure):
    """Some tensors, or pieces of them: what C calls ``struct part``."""

    _fields_ = [
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sources", "counts", "averages", "strides")),
    ]


class _Parts(ctypes.Structure):
    """All of them, and what shall be done: ``struct parts``."""

    _fields_ = [
        ("next", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("list", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("tracks", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("infinite", ctypes.c_int64),
    ]


Team = Callable[[Any, Any], None]
"""Calls a compiled function with an argument in several threads at once, and waits for all."""


class Tensors:
    """Tensors in memory, and where their float32 averages lie, as C takes them.

    Args:
        dtype: Stored type of the tensors: F32, F16 or BF16.
        sources: Address of each.
        counts: Number of elements of each.
        averages: Address of the average of each, of the first track.
        strides: From there to that of the next track, in elements.
        team: Threads that stand ready; by default some are started for each call.
    """

    def __init__(
        self,
        dtype: str,
        sources: Sequence[int],
        counts: Sequence[int],
        averages: Sequence[int],
        strides: Sequence[int],
        team: Team | None = None,
    ) -> None:
        total, item = sum(counts), ITEM[dtype]
        number, cores = 1, usable_cores()
        if cores > 1 and (team or total >= _WORTH_THREADS):
            number = min(max(total // _PART, 1), _PARTS * cores)
        self._type, self._team = TYPES[dtype], team or _start_threads
        self._parts: list[_Part] = []
        self._kept: list[NDArray[Any]] = []
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
            self._parts.append(_Part(len(rows), *map(address, arrays)))
        self._list = (_Part * len(self._parts))(*self._parts)

    def lerp(self, weights: NDArray[np.float32]) -> None:
        """Move the averages of each track towards the tensors by its weight."""
        self._call("lerp_parts", len(weights), address(weights))

    def is_finite(self) -> bool:
        """Whether all elements of all tensors are finite."""
        return not self._call("find_infinite").infinite

    def _call(self, function: str, tracks: int = 0, weights: int | None = None) -> _Parts:
        parts = _Parts(
            0, len(self._list), ctypes.addressof(self._list), self._type, tracks, weights, 0
        )
        compiled = getattr(library(), function)
        if len(self._list) > 1:
            self._team(compiled, ctypes.byref(parts))
        else:
            compiled(ctypes.byref(parts))
        return parts


def _start_threads(function: Any, argument: Any) -> None:
    """A team of our own: what little starting threads takes, waking them would take too."""
    number = min(usable_cores(), MAX_THREADS)
    threads = [Thread(target=function, args=(argument,)) for _ in range(1, number)]
    for thread in threads:
        thread.start()
    function(argument)
    for thread in threads:
        thread.join()
