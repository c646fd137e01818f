"""Safetensors files, read by ranges and written as a stream.

The safetensors package checks the header and serves as the reference; what it has no call for
is here: reading parts of many files at once without mapping them, and writing a file whose
tensors never are in memory together, durably.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from operator import index
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.blocks import BLOCK, block_bytes
from posthoc_ema.digests import bytes_digest
from posthoc_ema.draft import Draft
from posthoc_ema.encoding import ITEM_SIZE, block_bits, stored_size
from posthoc_ema.errors import CorruptSnapshotError
from posthoc_ema.places import Place, RemotePath

if TYPE_CHECKING:
    from numpy.typing import NDArray

METADATA_KEY = "posthoc_ema"
"""One key with sorted JSON: safetensors writes several keys in random order."""

SUFFIX = ".safetensors"
_HEADER_ALIGNMENT = 8
_FIRST_FETCH = 128 << 10  # holds the header of most files
_LONGEST_HEADER = 100_000_000  # as of the reference parser


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file.

    Attributes:
        name: Its name in the state dict.
        dtype: Safetensors name of its type, or one of our block types.
        shape: Its shape.
        offset: Of its first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes."""
        return stored_size(self.dtype, self.count)

    @cached_property
    def described(self) -> tuple[object, ...]:
        """What the digest of a header says of it."""
        stored = self.stored()
        return (self.name, stored.dtype, *stored.shape)

    def stored(self) -> TensorEntry:
        """As safetensors knows it: of block types, the bytes."""
        bits = block_bits(self.dtype)
        if bits is None:
            return self
        shape = (-(-self.count // BLOCK), block_bytes(bits))
        return TensorEntry(self.name, "U8", shape, self.offset)


# The files of a run have the same ones, by the hundred thousand.
_entry = lru_cache(maxsize=1 << 14)(TensorEntry)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: our metadata (None if it has none) and its tensors in order."""

    metadata: Any
    entries: dict[str, TensorEntry]


def read_header(path: Place) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CorruptSnapshotError: If the file is not a complete safetensors file.
        FileNotFoundError: If there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if isinstance(path, RemotePath):
            length, header = _fetched_header(path)
        else:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                # The reference parser first: it bounds the length and checks every offset.
                with safe_open(str(path), framework="numpy"):
                    pass
                header = json.loads(file.read(length))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CorruptSnapshotError(
            f"{path} is not a complete safetensors file ({error}); it was truncated or damaged. "
            "Restore it from a copy, or delete it to go on without it"
        ) from error
    metadata = (header.pop("__metadata__", None) or {}).get(METADATA_KEY)
    start = 8 + length
    entries = [
        _entry(name, e["dtype"], tuple(e["shape"]), start + e["data_offsets"][0])
        for name, e in header.items()
    ]
    entries.sort(key=lambda entry: entry.offset)
    try:
        parsed = None if metadata is None else json.loads(metadata)
    except ValueError as error:
        raise CorruptSnapshotError(
            f"{path} has damaged metadata ({error}); restore or delete it"
        ) from error
    return Header(parsed, {entry.name: entry for entry in entries})


def _fetched_header(path: RemotePath) -> tuple[int, Any]:
    """Length and content of a header, checked as the reference parser does with local files.

    Raises:
        ValueError: If it does not describe every byte of the file, or is none.
    """
    size = path.stat().st_size
    data = path.fetch(0, min(size, _FIRST_FETCH)) if size else b""
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if not 8 < start <= min(size, _LONGEST_HEADER):
        raise ValueError(f"it has {size} bytes, its header would have {length}")
    if start > len(data):
        data += path.fetch(len(data), start)
    header = json.loads(data[8:start])
    try:
        place = 0
        tensors = [(n, e) for n, e in header.items() if n != "__metadata__"]
        for name, entry in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            nbytes = prod(map(index, shape)) * ITEM_SIZE[entry["dtype"]]
            if begin != place or end - begin != nbytes or any(n < 0 for n in shape):
                raise ValueError(f"the table of tensors is wrong about {name}")
            place = end
        (header.get("__metadata__") or {}).get("format")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header does not describe tensors: {error!r}") from error
    if start + place != size:
        raise ValueError(f"it has {size} bytes, expected {start + place}")
    return length, header


def read_range(file: int, offset: int, out: NDArray[np.uint8]) -> None:
    """Fill ``out`` from an open file.

    Raises:
        EOFError: If the file ends before.
    """
    view, done = memoryview(out.data), 0
    while done < len(view):
        # Reads, not a memory map: cheaper than page faults on one pass, no growth of resident
        # memory, and a file that shrinks gives an error instead of a bus error.
        got = os.preadv(file, [view[done:]], offset + done)
        if not got:
            raise EOFError(f"file ends at byte {offset + done}, expected {offset + len(view)}")
        done += got


class TensorFileWriter:
    """Write one safetensors file as a stream, visible only when complete and on disk.

    Tensors are written in the order of ``entries``; ``commit`` puts the file in its place,
    leaving the context without it (an exception, a kill) leaves no trace but a hidden
    temporary file, which the next writer of that folder removes.

    Args:
        path: Where the file shall be.
        entries: Name, type and shape of each tensor; types of larger elements first, so that
            all are aligned.
        metadata: Stand-in for the metadata given to ``commit``, at least as long.
        new: Refuse to replace another file, where the file system can tell.
    """

    def __init__(
        self,
        path: Place,
        entries: Sequence[TensorEntry],
        metadata: dict[str, Any],
        new: bool = False,
    ):
        self.path, self._new = path, new
        offset = 0
        self._table: dict[str, dict[str, Any]] = {}
        for entry in entries:
            end = offset + entry.nbytes
            self._table[entry.name] = {
                "dtype": entry.stored().dtype,
                "shape": list(entry.stored().shape),
                "data_offsets": [offset, end],
            }
            offset = end
        self._length = len(self._header(metadata))
        self._length += -(8 + self._length) % _HEADER_ALIGNMENT
        self._expected = 8 + self._length + offset
        self._written, self._lock = 8 + self._length, Lock()
        self._draft = Draft(path)

    def write(self, data: NDArray[Any]) -> None:
        """Append the bytes of a contiguous array."""
        self._write_at(self._written, data)

    def write_into(self, name: str, start: int, data: NDArray[Any]) -> None:
        """Write a contiguous array from element ``start`` of a tensor on; from any thread.

        It may reach into the tensors that follow.
        """
        first = self._table[name]["data_offsets"][0]
        self._write_at(8 + self._length + first + start * data.itemsize, data)

    def commit(self, metadata: dict[str, Any]) -> None:
        """Complete the header, make all bytes durable, and show the file under its name."""
        if self._written != self._expected:
            raise RuntimeError(f"wrote {self._written} bytes of {self._expected}")
        header = self._header(metadata)
        if len(header) > self._length:
            raise RuntimeError(f"metadata grew from {self._length} to {len(header)} bytes")
        beginning = self._length.to_bytes(8, "little") + header.ljust(self._length)
        self._write_at(0, np.frombuffer(beginning, np.uint8))
        try:
            self._draft.publish(self._new)
        except OSError:
            if self._draft.shown:  # what may vanish later shall not be seen now
                self.path.unlink(missing_ok=True)
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._draft.discard(kind is None)

    def _write_at(self, position: int, data: NDArray[Any]) -> None:
        view, done = memoryview(data.reshape(-1).view(np.uint8).data), 0
        while done < len(view):
            done += os.pwrite(self._draft.file.fileno(), view[done:], position + done)
        with self._lock:
            self._written += done

    def _header(self, metadata: dict[str, Any]) -> bytes:
        text = canonical_json(metadata)
        table = {"__metadata__": {METADATA_KEY: text, "format": "pt"}, **self._table}
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


def header_digest(metadata: Mapping[str, Any], entries: Iterable[TensorEntry]) -> str:
    """Digest of all metadata but itself, and of the table of tensors."""
    digest = {key: value for key, value in metadata["digest"].items() if key != "header"}
    table = [entry.described for entry in entries]
    text = canonical_json([{**metadata, "digest": digest}, table])
    return bytes_digest(text.encode())


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no white space: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
