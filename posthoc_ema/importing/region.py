"""Bytes of a file, or in memory, that are not read before they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Region:
    """A stretch of bytes.

    Attributes:
        path: The file.
        start: Its first byte there.
        size: Number of bytes.
        held: The bytes themselves where the file holds them in another form.
    """

    path: Path
    start: int
    size: int
    held: bytes | None = field(default=None, repr=False)

    @classmethod
    def of_file(cls, path: Path) -> Region:
        """A whole file."""
        return cls(path, 0, path.stat().st_size)

    def part(self, start: int, size: int) -> Region:
        """Bytes ``[start, start + size)`` of this region.

        Raises:
            EOFError: If it does not have them.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise EOFError(f"bytes {start} to {start + size} were promised, of {self.size}")
        return Region(self.path, self.start + start, size, self.held)

    def read(self) -> NDArray[np.uint8]:
        """The bytes, in memory of the caller's own."""
        if self.held is not None:
            return np.frombuffer(self.held, np.uint8, self.size, self.start).copy()
        out = np.fromfile(self.path, np.uint8, self.size, offset=self.start)
        if len(out) != self.size:
            raise EOFError(f"the file ends after {len(out)} of {self.size} bytes")
        return out


class Cursor:
    """Reads a region from front to back; what it lacks is an error, never an allocation."""

    def __init__(self, region: Region) -> None:
        self.region, self.place = region, 0
        self._buffer, self._buffered = b"", 0  # bytes, and the place of their first

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self.place - self._buffered
        if not 0 <= start <= start + size <= len(self._buffer):
            self.region.part(self.place, size)  # raises before memory is taken
            ahead = min(max(size, 1 << 16), self.region.size - self.place)
            self._buffer = self.region.part(self.place, ahead).read().tobytes()
            self._buffered, start = self.place, 0
        self.place += size
        return self._buffer[start : start + size]

    def skip(self, size: int) -> Region:
        """The next bytes, unread."""
        found = self.region.part(self.place, size)
        self.place += size
        return found

    def line(self) -> bytes:
        """Up to the next end of line, which is left out.

        Raises:
            EOFError: If there is none within a thousand bytes: names are shorter.
        """
        ahead = min(1000, self.region.size - self.place)
        text, found, _ = self.take(ahead).partition(b"\n")
        if not found:
            raise EOFError("a line does not end")
        self.place += len(text) + 1 - ahead
        return text
