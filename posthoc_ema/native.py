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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As the enum in _native.c numbers them.
TYPES = {"F32": 0, "F16": 1, "BF16": 2, **{f"Q{bits}": 64 + bits for bits in (4, 6, 8, 10, 12, 16)}}
"""Stored types that there are loops for, by their names in files."""


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
        "decode": (None, [number, pointer, count, pointer]),
        "encode": (ctypes.c_double, [number, pointer, pointer, count, pointer, pointer]),
        "measure": (None, [pointer, count, pointer, pointer]),
        "lerp": (
            None,
            [number, count, pointer, pointer, pointer, pointer, count, pointer],
        ),
        "all_finite": (number, [number, count, pointer, pointer]),
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
        self._type, self._number = TYPES[dtype], len(sources)
        self._arrays = (
            np.array(sources, np.uint64),
            np.array(counts, np.int64),
            np.array(averages, np.uint64),
            np.array(strides, np.int64),
        )
        self._addresses = [address(array) for array in self._arrays]

    def lerp(self, weights: NDArray[np.float32]) -> None:
        """Move the averages of each track towards the tensors by its weight."""
        library().lerp(self._type, self._number, *self._addresses, len(weights), address(weights))

    def is_finite(self) -> bool:
        """Whether all elements of all tensors are finite."""
        return bool(library().all_finite(self._type, self._number, *self._addresses[:2]))
