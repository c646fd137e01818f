"""Memory for large arrays that are written once."""

from __future__ import annotations

import mmap
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGE = 4 << 20  # bytes, from which on numpy asks for large pages


def fresh(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of ordinary pages, to be filled.

    numpy asks for large ones. Once the files of a run fill the system's cache, it has to put
    these together first, which takes several times as long as all that is then written there.
    """
    dtype = np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
