"""Reading a file of tensors by ranges, and comparing what is read with its digests."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from posthoc_ema.encoding import Digest
from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.tensorfile import TensorEntry, read_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int], object]


class Reader(Protocol):
    """Something open to be read."""

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the bytes from ``offset`` on; from any thread."""


class Check(Protocol):
    """Compares one section of a snapshot, its averages or its copies, with the digest on record."""

    def add(self, start: int, data: NDArray[np.uint8]) -> None:
        """What was read, counted from the section's first byte, each once; from any thread."""

    def finish(self, progress: Progress = ...) -> None:
        """Read what was not added, and compare.

        Raises:
            CorruptSnapshotError: If a byte changed or is missing.
        """


class OpenFile:
    """One open file; errors name it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        try:
            read_range(self.descriptor, offset, out)
        except EOFError as error:
            raise CorruptSnapshotError(
                f"{self.path} was truncated while it was read ({error})"
            ) from error
        except OSError as error:
            raise SnapshotError(f"cannot read {self.path}: {error.strerror}") from error


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open a file for reading by ranges.

    Raises:
        SnapshotError: If it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise SnapshotError(f"cannot open {path}: {error.strerror}") from error
    try:
        yield OpenFile(path, descriptor)
    finally:
        os.close(descriptor)


class FileCheck:
    """A :class:`Check` of one file.

    Args:
        path: The file.
        entries: Tensors of the section, in the order of its bytes.
        section: ``"averages"`` or ``"copies"``, for errors.
        expected: Digest on record.
    """

    def __init__(
        self, path: Path, entries: Sequence[TensorEntry], section: str, expected: str
    ) -> None:
        self._path, self._section, self._expected = path, section, expected
        self._entries = entries
        self.digest = Digest(sum(entry.nbytes for entry in entries))

    def add(self, start: int, data: NDArray[np.uint8]) -> None:
        """Take in what was read."""
        self.digest.add(start, data)

    def finish(self, progress: Progress = lambda nbytes: None) -> None:
        """Read what was not added, and compare."""
        missing = list(self.digest.missing())
        if missing:
            starts = list(accumulate((entry.nbytes for entry in self._entries), initial=0))[:-1]
            with open_file(self._path) as file:
                for start, size in missing:
                    self.digest.add(start, self._piece(file, starts, start, size))
                    progress(size)
        if self.digest.hexdigest() != self._expected:
            raise CorruptSnapshotError(
                f"{self._path} is damaged: the digest of its {self._section} does not match, so at "
                "least one byte changed after it was written. Restore it from a copy, or delete it "
                "to reconstruct from the others"
            )

    def _piece(
        self, file: Reader, starts: Sequence[int], start: int, size: int
    ) -> NDArray[np.uint8]:
        """From the tensor in which a piece begins to that in which it ends."""
        piece = np.empty(size, np.uint8)
        k, filled = bisect_right(starts, start) - 1, 0
        while filled < size:
            skip = start + filled - starts[k]
            part = min(self._entries[k].nbytes - skip, size - filled)
            file.read(self._entries[k].offset + skip, piece[filled : filled + part])
            filled, k = filled + part, k + 1
        return piece
