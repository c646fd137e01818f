"""The digest that finds damaged bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Digest:
    """Digest of a stretch of bytes, at the speed of memory, its pieces in any order.

    The bytes are cut into pieces of 64 KiB. The digest is XXH3-128 over the 64-bit XXH3 hashes of
    the pieces, as little-endian integers, and the total length.

    Args:
        size: Number of bytes.
    """

    PIECE = 1 << 16
    FEW = 240
    """Bytes, up to which XXH3 has ways of its own."""

    def __init__(self, size: int) -> None:
        from xxhash import xxh3_64_intdigest

        self._size = size
        self._hash: Callable[[Any], int] = xxh3_64_intdigest
        self._hashes = np.zeros(-(-size // self.PIECE), "<u8")
        self._known = np.zeros(len(self._hashes), np.bool_)
        self._done = 0
        # Pieces of which only parts have come: their bytes, and how many are there.
        self._parts: dict[int, tuple[NDArray[np.uint8], int]] = {}
        self._lock = Lock()

    def update(self, data: NDArray[np.uint8]) -> None:
        """Add the bytes that follow those of the last call."""
        self.add(self._done, data)
        self._done += len(data)

    def add_hashes(self, start: int, hashes: NDArray[np.uint64]) -> None:
        """Add pieces whose hashes are known, from byte ``start`` on, the first of a piece."""
        whole = slice(start // self.PIECE, start // self.PIECE + len(hashes))
        self._hashes[whole], self._known[whole] = hashes, True

    def takes_hashes(self, start: int, size: int) -> bool:
        """Whether so many bytes from one on are whole pieces, such as :mod:`native` can hash."""
        last = (start + size) % self.PIECE
        whole = last == 0 or (start + size == self._size and last > self.FEW)
        return start % self.PIECE == 0 and whole

    def add(self, start: int, data: NDArray[np.uint8]) -> None:
        """Add the bytes from ``start`` on, each once; from any thread."""
        stop = start + len(data)
        for k in range(start // self.PIECE, -(-stop // self.PIECE)):
            first, last = k * self.PIECE, min((k + 1) * self.PIECE, self._size)
            left, right = max(first, start), min(last, stop)
            part = data[left - start : right - start]
            if right - left == last - first:
                self._hashes[k], self._known[k] = self._hash(part), True
                continue
            with self._lock:
                piece, filled = self._parts.pop(k, (None, 0))
                if piece is None:
                    piece = np.empty(last - first, np.uint8)
                piece[left - first : right - first] = part
                filled += right - left
                if filled == len(piece):
                    self._hashes[k], self._known[k] = self._hash(piece), True
                else:
                    self._parts[k] = piece, filled

    def missing(self) -> Iterator[tuple[int, int]]:
        """First byte and size of each piece that was not added as a whole."""
        for k in np.flatnonzero(~self._known).tolist():
            yield k * self.PIECE, min(self.PIECE, self._size - k * self.PIECE)

    def hexdigest(self) -> str:
        """32 hexadecimal digits; all pieces must have been added."""
        return bytes_digest(np.append(self._hashes, np.uint64(self._size)).tobytes())


def bytes_digest(data: bytes) -> str:
    """XXH3-128 of a few bytes, as 32 hexadecimal digits."""
    from xxhash import xxh3_128_hexdigest

    return xxh3_128_hexdigest(data)
