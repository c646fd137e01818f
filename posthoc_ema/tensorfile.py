"""Safetensors files, read by ranges and written as a stream.

The safetensors package checks the header and serves as the reference; what it has no call for
is here: reading parts of many files at once without mapping them, and writing a file whose
tensors never are in memory together, durably.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.blocks import BLOCK, block_bytes
from posthoc_ema.encoding import block_bits, bytes_digest, stored_size
from posthoc_ema.errors import CorruptSnapshotError

if TYPE_CHECKING:
    from numpy.typing import NDArray

METADATA_KEY = "posthoc_ema"
"""One key with sorted JSON: safetensors writes several keys in random order."""

SUFFIX = ".safetensors"
_HEADER_ALIGNMENT = 8


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

    def stored(self) -> TensorEntry:
        """As safetensors knows it: of block types, the bytes."""
        bits = block_bits(self.dtype)
        if bits is None:
            return self
        shape = (-(-self.count // BLOCK), block_bytes(bits))
        return TensorEntry(self.name, "U8", shape, self.offset)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: our metadata (None if it has none) and its tensors in order."""

    metadata: Any
    entries: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CorruptSnapshotError: If the file is not a complete safetensors file.
        FileNotFoundError: If there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
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
    metadata = header.pop("__metadata__", {}).get(METADATA_KEY)
    start = 8 + length
    entries = [
        TensorEntry(name, e["dtype"], tuple(e["shape"]), start + e["data_offsets"][0])
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
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry], metadata: dict[str, Any]):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
        self._file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__

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
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.temporary, self.path)
        try:
            sync_directory(self.path.parent)
        except OSError:
            self.path.unlink(missing_ok=True)  # what may vanish later shall not be seen now
            raise

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError:
            if kind is None:
                raise
        finally:
            self.temporary.unlink(missing_ok=True)

    def _write_at(self, position: int, data: NDArray[Any]) -> None:
        view, done = memoryview(data.reshape(-1).view(np.uint8).data), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], position + done)
        with self._lock:
            self._written += done

    def _header(self, metadata: dict[str, Any]) -> bytes:
        text = canonical_json(metadata)
        table = {"__metadata__": {METADATA_KEY: text, "format": "pt"}, **self._table}
        return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


def header_digest(metadata: Mapping[str, Any], entries: Iterable[TensorEntry]) -> str:
    """Digest of all metadata but itself, and of the table of tensors."""
    digest = {key: value for key, value in metadata["digest"].items() if key != "header"}
    table = [[e.name, e.stored().dtype, *e.stored().shape] for e in entries]
    text = canonical_json([{**metadata, "digest": digest}, table])
    return bytes_digest(text.encode())


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no white space: equal data, equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sync_directory(path: Path) -> None:
    """Make renames in a folder durable (where the system can)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; their renames are as durable as they get.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a small text file as a whole, durably."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file by what ``write`` puts into an open one, as a whole, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
