"""Reading a file of tensors by ranges, and comparing what is read with its digests."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from posthoc_ema.ahead import ReadAhead, at_once
from posthoc_ema.digests import Digest
from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.places import Place, RemotePath
from posthoc_ema.tensorfile import TensorEntry, read_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[int], object]

T = TypeVar("T")
R = TypeVar("R")


class Reader(Protocol):
    """Something open to be read."""

    def expect(self, ranges: Iterable[tuple[int, int]], together: int = 1) -> None:
        """Say what will be read, where that saves time: over a network.

        Args:
            ranges: (first byte, number), in about the order in which they will be read.
            together: How many files are read side by side.
        """

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

    def __init__(self, path: Place, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def expect(self, ranges: Iterable[tuple[int, int]], together: int = 1) -> None:
        """The system reads ahead by itself."""

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


class RemoteFile:
    """One file on another file system; errors name it."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._ahead = ReadAhead(path.fetch, ())

    def expect(self, ranges: Iterable[tuple[int, int]], together: int = 1) -> None:
        """Fetch what will be read in large pieces, some ahead of need."""
        self.close()
        self._ahead = ReadAhead(self.path.fetch, ranges, together)

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        try:
            self._ahead.read(offset, out)
        except EOFError as error:
            raise CorruptSnapshotError(
                f"{self.path} was truncated or replaced while it was read ({error}); read it "
                "again, and if it stays so, restore it from a copy or delete it"
            ) from error
        except FileNotFoundError as error:
            raise SnapshotError(
                f"{self.path} is gone: it was deleted or set aside while it was read; start again"
            ) from error
        except OSError as error:
            raise SnapshotError(
                f"cannot read {self.path}: {error.strerror}; start again once it can be reached"
            ) from error

    def close(self) -> None:
        """Give up what is on its way."""
        self._ahead.close()


@contextmanager
def open_file(path: Place) -> Iterator[Reader]:
    """Open a file for reading by ranges.

    Raises:
        SnapshotError: If it cannot be opened.
    """
    if isinstance(path, RemotePath):
        file = RemoteFile(path)
        try:
            yield file
        finally:
            file.close()
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise SnapshotError(f"cannot open {path}: {error.strerror}") from error
    try:
        yield OpenFile(path, descriptor)
    finally:
        os.close(descriptor)


def for_each(task: Callable[[T], R], items: Sequence[T], place: Place) -> Iterator[R]:
    """Results in order; where each has to wait for an answer from afar, many wait at a time."""
    return at_once(task, items) if isinstance(place, RemotePath) else map(task, items)


def check_unreplaced(paths: Iterable[Place]) -> None:
    """Make sure that what was read is still what the paths were listed as.

    An open local file stays what it is. Elsewhere each request goes to whatever has the name by
    then: pieces of two files would make a third one that never was.

    Raises:
        CorruptSnapshotError: If a file was replaced since.
    """
    folders: dict[RemotePath, RemotePath] = {}
    for path in paths:
        if isinstance(path, RemotePath):
            folder = folders.setdefault(path.parent, path.parent.fresh())
            now = folder / path.name
            if now.is_file() and now.stat() != path.stat():
                raise CorruptSnapshotError(
                    f"{path} was replaced while it was read; start again. If nobody else writes "
                    "there, two processes seem to write the same run"
                )


class FileCheck:
    """A :class:`Check` of one file.

    Args:
        path: The file.
        entries: Tensors of the section, in the order of its bytes.
        section: ``"averages"`` or ``"copies"``, for errors.
        expected: Digest on record.
    """

    def __init__(
        self, path: Place, entries: Sequence[TensorEntry], section: str, expected: str
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
                file.expect(r for start, size in missing for r in self._ranges(starts, start, size))
                for start, size in missing:
                    piece, filled = np.empty(size, np.uint8), 0
                    for offset, part in self._ranges(starts, start, size):
                        file.read(offset, piece[filled : filled + part])
                        filled += part
                    self.digest.add(start, piece)
                    progress(size)
        if self.digest.hexdigest() != self._expected:
            raise CorruptSnapshotError(
                f"{self._path} is damaged: the digest of its {self._section} does not match, so at "
                "least one byte changed after it was written. Restore it from a copy, or delete it "
                "to reconstruct from the others"
            )

    def _ranges(self, starts: Sequence[int], start: int, size: int) -> Iterator[tuple[int, int]]:
        """Of a piece, from the tensor in which it begins to that in which it ends."""
        k, stop = bisect_right(starts, start) - 1, start + size
        while start < stop:
            skip = start - starts[k]
            part = min(self._entries[k].nbytes - skip, stop - start)
            yield self._entries[k].offset + skip, part
            start, k = start + part, k + 1
