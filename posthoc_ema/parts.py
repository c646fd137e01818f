"""Snapshots that several processes wrote: where the bytes of each tensor lie in their files.

To readers such a snapshot is one long file: the bytes of its index, and after them those of all
tensors that the parts hold, each whole and in the order of its elements. Nothing of it is ever
put together but the ranges that are asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.boxes import Box
from posthoc_ema.encoding import stored_size
from posthoc_ema.errors import CorruptSnapshotError, SnapshotError
from posthoc_ema.places import Place, RemotePath, looked_at
from posthoc_ema.reading import (
    Check,
    FileCheck,
    Progress,
    Reader,
    RemoteFile,
    for_each,
    open_file,
)
from posthoc_ema.tensorfile import TensorEntry, header_digest, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "parts"
"""Beside the indices: all files of all processes."""


@dataclass(frozen=True)
class Part:
    """What an index says of one file.

    Attributes:
        name: In the folder :data:`FOLDER`.
        nbytes: Its size.
        header: Its header digest.
    """

    name: str
    nbytes: int
    header: str


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, in one of several files.

    Attributes:
        box: Which.
        file: Number of the file.
        start: Place of its first byte there.
    """

    box: Box
    file: int
    start: int


class Layout:
    """Finds the bytes of whole tensors in files that hold boxes of them.

    Args:
        tensors: Tensors one after another, ``offset`` being their places in what is asked for.
        pieces: Of each, boxes that together are the tensor.
    """

    def __init__(
        self, tensors: Iterable[TensorEntry], pieces: Mapping[str, Sequence[Piece]]
    ) -> None:
        self._tensors = sorted((e for e in tensors if e.nbytes), key=lambda e: e.offset)
        self._starts = [e.offset for e in self._tensors]
        self._pieces = {
            name: sorted((p for p in listed if p.box.count), key=lambda p: p.box)
            for name, listed in pieces.items()
        }
        self._corners = {n: [p.box.offsets for p in listed] for n, listed in self._pieces.items()}

    def locate(self, start: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(file, place there, number of bytes) of each run of the bytes from ``start`` on."""
        k = bisect_right(self._starts, start) - 1
        while size:
            entry = self._tensors[k]
            skip = start - entry.offset
            wanted = min(entry.nbytes - skip, size)
            yield from self._within(entry, skip, wanted)
            start, size, k = start + wanted, size - wanted, k + 1

    def _within(self, entry: TensorEntry, skip: int, size: int) -> Iterator[tuple[int, int, int]]:
        item = stored_size(entry.dtype, 1)
        shape, pieces = entry.shape, self._pieces[entry.name]
        place, odd = divmod(skip, item)  # what is read in pieces of 64 KiB may begin in a number
        while size:
            index = tuple(map(int, np.unravel_index(place, shape))) if shape else ()
            piece = pieces[self._holding(entry.name, index)]
            inside = [i - o for i, o in zip(index, piece.box.offsets, strict=True)]
            axis = _run_axis(piece.box.shape, shape)
            # Elements that follow each other both in the tensor and in the box.
            behind = prod(shape[axis:])
            position = place % behind if axis else place
            inner = prod(shape[axis + 1 :])
            end = (piece.box.offsets[axis] + piece.box.shape[axis]) * inner if shape else 1
            run = min((end - position) * item - odd, size)
            local = int(np.ravel_multi_index(inside, piece.box.shape)) if shape else 0
            yield piece.file, piece.start + local * item + odd, run
            place, odd = divmod(place * item + odd + run, item)
            size -= run

    def _holding(self, name: str, index: tuple[int, ...]) -> int:
        """Which piece holds an element: not after the last whose corner does not lie after it."""
        pieces = self._pieces[name]
        k = bisect_right(self._corners[name], index) - 1
        while not all(
            s.start <= i < s.stop for i, s in zip(index, pieces[k].box.slices, strict=True)
        ):
            k -= 1
        return k


def _run_axis(box: Sequence[int], shape: Sequence[int]) -> int:
    """The last axis that a box does not fill."""
    return max(
        (k for k, (n, all_) in enumerate(zip(box, shape, strict=True)) if n != all_), default=0
    )


@dataclass(frozen=True, eq=False)
class _File:
    """One file of a snapshot: its sections, in the order of its bytes."""

    path: Place
    entries: Mapping[str, TensorEntry]
    boxes: Mapping[str, Box]
    averages: frozenset[str]
    digests: Mapping[str, str]

    def section(self, section: str) -> list[TensorEntry]:
        """Tensors of the ``"averages"`` or ``"copies"``."""
        wanted = section == "averages"
        return [entry for name, entry in self.entries.items() if (name in self.averages) == wanted]


class Parts:
    """The files of one snapshot, their headers read when first needed.

    Args:
        index: The index file.
        parts: The others.
        own: Tensors of the index itself, all of them copies.
        entries: All tensors, with places in the one long file.
        digests: Of the index itself.
    """

    def __init__(
        self,
        index: Place,
        parts: Sequence[Part],
        own: Mapping[str, TensorEntry],
        entries: Mapping[str, TensorEntry],
        digests: Mapping[str, str],
    ) -> None:
        self._index, self.parts, self._own, self._entries = index, tuple(parts), own, entries
        self._digests = digests

    @property
    def paths(self) -> tuple[Place, ...]:
        """Of all parts."""
        return tuple(self._index.parent / FOLDER / part.name for part in self.parts)

    def check_present(self) -> None:
        """Make sure that all files are there in full length.

        Raises:
            CorruptSnapshotError: If one is not.
            FileNotFoundError: If the index is gone too.
        """
        for part, path in zip(self.parts, self.paths, strict=True):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                size = None
            if size != part.nbytes:
                looked_at(self._index).stat()
                problem = "is missing" if size is None else f"has {size} bytes"
                raise CorruptSnapshotError(
                    f"{self._index} needs {path}, which {problem}, expected {part.nbytes} bytes. "
                    "Restore it from a copy, or delete both to go on without this snapshot"
                )

    def open(self) -> OpenParts:
        """A reader of the one long file."""
        return OpenParts([file.path for file in self._files], self._layout)

    def check(self, section: str, averages: Iterable[str]) -> PartsCheck:
        """A :class:`Check` of one section of all files."""
        wanted = frozenset(averages)
        names = [n for n in self._entries if (n in wanted) == (section == "averages")]
        ends = accumulate((self._entries[name].nbytes for name in names), initial=0)
        tensors = [
            replace(self._entries[name], offset=end) for name, end in zip(names, ends, strict=False)
        ]
        return PartsCheck(self._files, section, tensors)

    @cached_property
    def _files(self) -> list[_File]:
        whole = {name: Box.whole(entry.shape) for name, entry in self._own.items()}
        own = _File(self._index, self._own, whole, frozenset(), self._digests)
        listed = list(zip(self.parts, self.paths, strict=True))
        return [own, *for_each(lambda item: self._read_header(*item), listed, self._index)]

    def _read_header(self, part: Part, path: Place) -> _File:
        try:
            header = read_header(path)
        except OSError as error:
            raise SnapshotError(f"cannot read {path}: {error.strerror}") from error
        data = header.metadata
        try:
            digest = header_digest(data, header.entries.values())
            if not digest == data["digest"]["header"] == part.header:
                raise ValueError("its digest does not match")
            boxes = {
                name: Box(tuple(offsets), header.entries[name].shape)
                for name, (offsets, _) in data["boxes"].items()
            }
            averages = frozenset(name for name, _ in data["averages"])
            return _File(path, header.entries, boxes, averages, data["digest"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSnapshotError(
                f"{path} has a damaged header, or is not the file that {self._index} belongs to "
                f"({error}); restore it from a copy, or delete both"
            ) from error

    @cached_property
    def _layout(self) -> Layout:
        pieces: dict[str, list[Piece]] = {}
        for k, file in enumerate(self._files):
            for name, entry in file.entries.items():
                pieces.setdefault(name, []).append(Piece(file.boxes[name], k, entry.offset))
        return Layout(self._entries.values(), pieces)


class OpenParts:
    """Reads the one long file; the files themselves are opened as they are needed."""

    def __init__(self, paths: Sequence[Place], layout: Layout) -> None:
        self._paths, self._layout = paths, layout
        self._remote: dict[int, RemoteFile] = {}

    def expect(self, ranges: Iterable[tuple[int, int]], together: int = 1) -> None:
        """Let files on other file systems fetch what will be read."""
        if not isinstance(self._paths[0], RemotePath):
            return
        self.close()
        wanted: dict[int, list[tuple[int, int]]] = {}
        for offset, number in ranges:
            for k, start, size in self._layout.locate(offset, number):
                listed = wanted.setdefault(k, [])
                if listed and sum(listed[-1]) == start:  # rows of a box follow each other
                    start, size = listed[-1][0], listed.pop()[1] + size
                listed.append((start, size))
        for k, listed in wanted.items():
            path = self._paths[k]
            if isinstance(path, RemotePath):
                self._remote[k] = RemoteFile(path)
                self._remote[k].expect(listed, together * len(wanted))

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""
        done = 0
        with ExitStack() as stack:
            files: dict[int, Reader] = dict(self._remote)
            for k, start, size in self._layout.locate(offset, len(out)):
                if k not in files:
                    files[k] = stack.enter_context(open_file(self._paths[k]))
                files[k].read(start, out[done : done + size])
                done += size

    def close(self) -> None:
        """Give up what is on its way."""
        for file in self._remote.values():
            file.close()
        self._remote.clear()


class PartsCheck:
    """A :class:`Check` of a snapshot in several files, each of which has digests of its own."""

    def __init__(
        self, files: Sequence[_File], section: str, tensors: Sequence[TensorEntry]
    ) -> None:
        self._checks: list[Check] = []
        pieces: dict[str, list[Piece]] = {}
        for k, file in enumerate(files):
            entries = file.section(section)
            self._checks.append(FileCheck(file.path, entries, section, file.digests[section]))
            start = 0
            for entry in entries:
                pieces.setdefault(entry.name, []).append(Piece(file.boxes[entry.name], k, start))
                start += entry.nbytes
        self._layout = Layout(tensors, pieces)

    def add(self, start: int, data: NDArray[np.uint8]) -> None:
        """Hand what was read to the files that it came from."""
        done = 0
        for k, place, size in self._layout.locate(start, len(data)):
            self._checks[k].add(place, data[done : done + size])
            done += size

    def finish(self, progress: Progress = lambda nbytes: None) -> None:
        """Finish all files."""
        for check in self._checks:
            check.finish(progress)


def covers(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes are a grid that fills a tensor, each element once."""
    found = [box for box in boxes if box.count]
    if not prod(shape):
        return not found
    number = 1
    for axis, size in enumerate(shape):
        ranges = sorted({(box.offsets[axis], box.shape[axis]) for box in found})
        ends = list(accumulate((length for _, length in ranges), initial=0))
        if [start for start, _ in ranges] != ends[:-1] or ends[-1] != size:
            return False
        number *= len(ranges)
    return len(found) == len(set(found)) == number


def joined_entries(tensors: Iterable[Any], first: int) -> dict[str, TensorEntry]:
    """Tensors of the parts, after the bytes of the index.

    Args:
        tensors: ``[name, type, shape]`` of each.
        first: Size of the index.
    """
    entries = {}
    for name, dtype, shape in tensors:
        entries[name] = TensorEntry(name, dtype, tuple(shape), first)
        first += entries[name].nbytes
    return entries
