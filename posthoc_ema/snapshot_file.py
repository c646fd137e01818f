"""One snapshot file: its identity, its weights, its digests; reading and writing it.

``docs/snapshot_format.md`` is the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.blocks import BITS, BLOCK, block_bytes
from posthoc_ema.encoding import as_numpy, block_bits, decode_into
from posthoc_ema.errors import (
    CorruptSnapshotError,
    ForeignSnapshotError,
    MissingInputError,
    SnapshotError,
    SnapshotVersionError,
)
from posthoc_ema.parts import Part, Parts, joined_entries
from posthoc_ema.places import Place, RemotePath, as_place
from posthoc_ema.profiles import Profile, profile_from_dict
from posthoc_ema.reading import Check, FileCheck, Reader, check_unreplaced, open_file
from posthoc_ema.tensorfile import TensorEntry, header_digest, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
PARTS_VERSION = 2
"""Of snapshots in several files, which readers of version 1 would find empty."""
_AVERAGE_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class PartOf:
    """Place of a box in a tensor: that of its first element, and the shape of the whole."""

    offsets: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True)
class AverageSource:
    """One averaged tensor on its way to a file.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape; complex tensors have a trailing axis (real, imaginary).
        kept: ``"F32"`` or ``"F64"``: the precision of the average in memory.
        dtype: Safetensors name of the model's own type.
        chunks: Yields the values in order, as contiguous 1-D arrays of the kept type.
        part: If this is a part of a tensor: its place there.
    """

    name: str
    shape: tuple[int, ...]
    kept: str
    dtype: str
    chunks: Callable[[], Iterable[NDArray[Any]]]
    part: PartOf | None = None


@dataclass(frozen=True)
class CopySource:
    """A buffer or integer tensor (or a part of one), copied as it is: its bytes, type and shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: NDArray[np.uint8]
    part: PartOf | None = None


@dataclass(frozen=True)
class RunIdentity:
    """What all snapshots of one run share.

    Attributes:
        run_id: Random; files of different runs never mix.
        unit: Name of the unit of t, for people.
        framework: ``"numpy"``, ``"torch"`` or ``"jax"``.
        t_first: Time of the first update; the average holds its weights for all time before.
    """

    run_id: str
    unit: str
    framework: str
    t_first: float


@dataclass(frozen=True)
class Link:
    """One snapshot that another was predicted from.

    Attributes:
        coefficient: How much it counts in the prediction.
        header: Its header digest, which says exactly which file it is.
        name: Its file name, for people.
    """

    coefficient: float
    header: str
    name: str


@dataclass(frozen=True)
class Snapshot:
    """One file of a store: its identity, without its weights.

    Attributes:
        path: The file.
        t: Time of the average.
        profile: Its averaging profile.
        run: The run that it belongs to.
        encoding: Storage precision.
        averages: Averaged tensors and the model's own type of each.
        aliases: Tied names, each with the name that is stored.
        statistics: ``count``, ``mean_square`` of the weights, ``rounding_square`` of storage.
        digests: Of the averages and of the copies.
        entries: All tensors of the file, in the order of its bytes; averages of a block type are
            what remains after a prediction.
        nbytes: Size of the file and its parts; of a refinement, and what it refines.
        rewrites: How often pruning wrote it once more.
        refines: Whether it holds what the rounding of another took: the same average, finer.
        links: From which snapshots it was predicted.
        inputs: The same as (coefficient, snapshot), once the store found them.
        parts: The files that hold its tensors, if several processes wrote it.
    """

    path: Place
    t: float
    profile: Profile
    run: RunIdentity
    encoding: str
    averages: Mapping[str, str]
    aliases: Mapping[str, str]
    statistics: Mapping[str, float]
    digests: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    nbytes: int
    rewrites: int = 0
    refines: bool = False
    links: tuple[Link, ...] = ()
    inputs: tuple[tuple[float, Snapshot], ...] = field(default=(), compare=False, repr=False)
    parts: Parts | None = field(default=None, compare=False, repr=False)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of buffers and integer tensors, in the order of the file."""
        return tuple(name for name in self.entries if name not in self.averages)

    @property
    def base(self) -> Snapshot | None:
        """What it refines: the same average, coarser."""
        return self.inputs[0][1] if self.refines and self.inputs else None

    @property
    def files(self) -> tuple[Place, ...]:
        """All that hold it, but for what it was predicted from."""
        if self.base is not None:
            return (*self.base.files, self.path)
        return (self.path, *(self.parts.paths if self.parts else ()))

    @classmethod
    def open(cls, path: str | Place) -> Snapshot:
        """Read and check everything but the weights.

        Raises:
            CorruptSnapshotError: If the file is truncated or its header was damaged.
            SnapshotVersionError: If a newer version of this library wrote it.
            ForeignSnapshotError: If it is a safetensors file, but no snapshot.
        """
        path = as_place(path)
        if isinstance(path, RemotePath):
            path = path.listed()
        try:
            header = read_header(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SnapshotError(f"cannot read {path}: {error.strerror}") from error
        data = header.metadata
        if not isinstance(data, dict) or "format_version" not in data:
            raise ForeignSnapshotError(
                f"{path} is a safetensors file but no snapshot of posthoc_ema; "
                "move it out of the snapshot folder"
            )
        if data["format_version"] not in (FORMAT_VERSION, PARTS_VERSION):
            raise SnapshotVersionError(
                f"{path} has format version {data['format_version']}, this library reads "
                f"{FORMAT_VERSION} and {PARTS_VERSION}; upgrade posthoc-ema"
            )
        if "boxes" in data:
            raise ForeignSnapshotError(
                f"{path} is the part of a snapshot that one process wrote; its place is the "
                "subfolder 'parts' of the snapshot folder"
            )
        try:
            if data["digest"]["header"] != header_digest(data, header.entries.values()):
                raise ValueError("its digest does not match")
            entries = {
                name: _block_entry(entry, data["blocks"][name]) if name in data["blocks"] else entry
                for name, entry in header.entries.items()
            }
            nbytes, parts = path.stat().st_size, None
            if data["format_version"] == PARTS_VERSION:
                own, entries = entries, {**entries, **joined_entries(data["tensors"], nbytes)}
                listed = [Part(*part) for part in data["parts"]]
                parts = Parts(path, listed, own, entries, data["digest"])
                nbytes += sum(part.nbytes for part in listed)
            for name, _ in data["averages"]:
                if name not in data["blocks"] and entries[name].dtype not in _AVERAGE_DTYPES:
                    raise ValueError(f"{name} has type {entries[name].dtype}")
            found = cls(
                path=path,
                t=data["t"],
                profile=profile_from_dict(data["profile"]),
                run=RunIdentity(data["run_id"], data["unit"], data["framework"], data["t_first"]),
                encoding=data["encoding"],
                averages=dict(data["averages"]),
                aliases=data["aliases"],
                statistics=data["statistics"],
                digests=data["digest"],
                entries=entries,
                nbytes=nbytes,
                rewrites=data["rewrites"],
                refines=data["refines"],
                links=tuple(Link(*link) for link in data["prediction"]),
                parts=parts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSnapshotError(
                f"{path} has a damaged header ({error}); restore it from a copy, or delete it"
            ) from error
        if parts is not None:
            parts.check_present()
        return found

    def read(self, name: str) -> NDArray[Any]:
        """One tensor: averages as float32 (float64 if kept so), copies in their own type."""
        entry = self._entry(name)
        if entry.name not in self.averages:
            return as_numpy(self._raw(entry), entry.dtype, entry.shape)
        kind = np.float64 if entry.dtype == "F64" else np.float32
        return self._decoded(entry.name, {}).astype(kind, copy=False).reshape(entry.shape)

    def stored(self, name: str) -> NDArray[Any]:
        """What the file itself holds of one average, flat: of block types, the residual."""
        entry = self._entry(name)
        out = np.empty(entry.count, np.float64 if entry.dtype == "F64" else np.float32)
        decode_into(self._raw(entry), entry.dtype, out)
        return out

    def _decoded(self, name: str, known: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """One average with its prediction, of which many snapshots share parts."""
        key = self.digests["header"]
        if key not in known:
            out = self.stored(name)
            if block_bits(self.entries[name].dtype) is not None:
                if self.links and not self.inputs:
                    raise MissingInputError(
                        f"{self.path} is stored as its difference from a prediction; take it from "
                        "SnapshotStore(folder).list(), which finds what it was predicted from"
                    )
                out = out.astype(np.float64)  # rounding would add up along the chain
                for factor, other in self.inputs:
                    out += factor * other._decoded(name, known)
            known[key] = out
        return known[key]

    def _raw(self, entry: TensorEntry) -> NDArray[np.uint8]:
        (raw,) = self._read_all([entry])
        return raw

    def _read_all(self, entries: Sequence[TensorEntry]) -> list[NDArray[np.uint8]]:
        """The bytes of several tensors."""
        if not entries:
            return []
        found = [np.empty(entry.nbytes, np.uint8) for entry in entries]
        with self.opened() as file:
            file.expect((entry.offset, entry.nbytes) for entry in entries)
            for entry, raw in zip(entries, found, strict=True):
                file.read(entry.offset, raw)
        check_unreplaced(self.files)
        return found

    def copy_sources(self) -> list[CopySource]:
        """Buffers and integer tensors, checked against their digest.

        Raises:
            CorruptSnapshotError: If a byte changed or is missing.
        """
        check, offsets = self.check("copies"), self.section_offsets("copies")
        entries = [self.entries[name] for name in self.copies]
        copies = [
            CopySource(entry.name, entry.shape, entry.dtype, raw)
            for entry, raw in zip(entries, self._read_all(entries), strict=True)
        ]
        for copy in copies:
            check.add(offsets[copy.name], copy.data)
        check.finish()
        return copies

    def verify(self, progress: Callable[[int], object] = lambda nbytes: None) -> None:
        """Read every byte and compare with the digests.

        Raises:
            CorruptSnapshotError: If a byte changed or is missing.
        """
        if self.base is not None:
            self.base.verify(progress)
        for section in ("averages", "copies"):
            self.check(section).finish(progress)

    def section_offsets(self, section: str) -> dict[str, int]:
        """First byte of each tensor among all the ``"averages"`` or ``"copies"`` of the file."""
        offsets, done = {}, 0
        for name, entry in self.entries.items():
            if (name in self.averages) == (section == "averages"):
                offsets[name] = done
                done += entry.nbytes
        return offsets

    def check(self, section: str) -> Check:
        """Compares the ``"averages"`` or ``"copies"`` with their digest, as they are read."""
        if self.parts is not None:
            return self.parts.check(section, self.averages)
        wanted = section == "averages"
        entries = [e for e in self.entries.values() if (e.name in self.averages) == wanted]
        return FileCheck(self.path, entries, section, self.digests[section])

    @contextmanager
    def opened(self) -> Iterator[Reader]:
        """Its bytes, by the offsets of its entries."""
        if self.parts is not None:
            joined = self.parts.open()
            try:
                yield joined
            finally:
                joined.close()
            return
        with open_file(self.path) as file:
            yield file

    def _entry(self, name: str) -> TensorEntry:
        name = self.aliases.get(name, name)
        if name not in self.entries:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        return self.entries[name]


def _block_entry(entry: TensorEntry, shape: Sequence[int]) -> TensorEntry:
    """A tensor of blocks with the shape of its numbers."""
    bits = (entry.shape[1] - block_bytes(0)) * 8 // BLOCK
    found = TensorEntry(entry.name, f"Q{bits}", tuple(shape), entry.offset)
    if bits not in BITS or found.stored() != entry:
        raise ValueError(f"{entry.name} has {entry.dtype} {entry.shape}, no blocks of {shape}")
    return found
