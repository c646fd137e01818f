"""The snapshot store: the only code that knows file names and metadata of snapshots.

One safetensors file for each (track, time). ``docs/snapshot_format.md`` is the contract.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.encoding import (
    ITEM_SIZE,
    PageDigest,
    as_numpy,
    check_encoding,
    decode_into,
    encode,
    stored_dtype,
)
from posthoc_ema.errors import (
    CorruptSnapshotError,
    ForeignSnapshotError,
    NonFiniteError,
    SnapshotError,
    SnapshotVersionError,
    SnapshotWriteError,
    StructureError,
)
from posthoc_ema.profiles import PowerFunction, Profile, profile_from_dict
from posthoc_ema.tensorfile import (
    TensorEntry,
    TensorFileWriter,
    canonical_json,
    read_header,
    read_range,
    sync_directory,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
ABANDONED = "abandoned"
_CHUNK_BYTES = 4 << 20
_NO_DIGEST = "0" * 16


@dataclass(frozen=True)
class AverageSource:
    """One averaged tensor on its way to a file.

    Attributes:
        name: Its name in the state dict.
        shape: Its shape; complex tensors have a trailing axis (real, imaginary).
        kept: ``"F32"`` or ``"F64"``: the precision of the average in memory.
        dtype: Safetensors name of the model's own type.
        chunks: Yields the values in order, as contiguous 1-D arrays of the kept type.
    """

    name: str
    shape: tuple[int, ...]
    kept: str
    dtype: str
    chunks: Callable[[], Iterable[NDArray[Any]]]


@dataclass(frozen=True)
class CopySource:
    """A buffer or integer tensor, copied as it is: its bytes, type and shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: NDArray[np.uint8]


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
        entries: All tensors of the file, in the order of its bytes.
        nbytes: Size of the file.
    """

    path: Path
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

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of buffers and integer tensors, in the order of the file."""
        return tuple(name for name in self.entries if name not in self.averages)

    @classmethod
    def open(cls, path: str | Path) -> Snapshot:
        """Read and check everything but the weights.

        Raises:
            CorruptSnapshotError: If the file is truncated or its header was damaged.
            SnapshotVersionError: If a newer version of this library wrote it.
            ForeignSnapshotError: If it is a safetensors file, but no snapshot.
        """
        path = Path(path)
        header = read_header(path)
        data = header.metadata
        if data is None or "format_version" not in data:
            raise ForeignSnapshotError(
                f"{path} is a safetensors file but no snapshot of posthoc_ema; "
                "move it out of the snapshot folder"
            )
        if data["format_version"] != FORMAT_VERSION:
            raise SnapshotVersionError(
                f"{path} has format version {data['format_version']}, this library reads "
                f"{FORMAT_VERSION}; upgrade posthoc-ema"
            )
        try:
            if data["digest"]["header"] != _header_digest(data, header.entries.values()):
                raise ValueError("its digest does not match")
            return cls(
                path=path,
                t=data["t"],
                profile=profile_from_dict(data["profile"]),
                run=RunIdentity(data["run_id"], data["unit"], data["framework"], data["t_first"]),
                encoding=data["encoding"],
                averages=dict(data["averages"]),
                aliases=data["aliases"],
                statistics=data["statistics"],
                digests=data["digest"],
                entries=header.entries,
                nbytes=path.stat().st_size,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSnapshotError(
                f"{path} has a damaged header ({error}); restore it from a copy, or delete it"
            ) from error

    def read(self, name: str) -> NDArray[Any]:
        """One tensor: averages as float32 (float64 if kept so), copies in their own type."""
        entry = self._entry(name)
        raw = np.empty(entry.nbytes, np.uint8)
        with self.opened() as file:
            read_range(file, entry.offset, raw)
        if entry.name not in self.averages:
            return as_numpy(raw, entry.dtype, entry.shape)
        out = np.empty(entry.count, np.float64 if entry.dtype == "F64" else np.float32)
        decode_into(raw, entry.dtype, out)
        return out.reshape(entry.shape)

    def verify(self, progress: Callable[[int], object] = lambda nbytes: None) -> None:
        """Read every byte and compare with the digests.

        Raises:
            CorruptSnapshotError: If a byte changed or is missing.
        """
        buffer = np.empty(_CHUNK_BYTES, np.uint8)
        with self.opened() as file:
            for part, names in (("averages", [*self.averages]), ("copies", self.copies)):
                digest, members = PageDigest(), set(names)
                for entry in self.entries.values():
                    if entry.name not in members:
                        continue
                    for start in range(0, entry.nbytes, _CHUNK_BYTES):
                        piece = buffer[: min(_CHUNK_BYTES, entry.nbytes - start)]
                        read_range(file, entry.offset + start, piece)
                        digest.update(piece)
                        progress(len(piece))
                self.check_digest(part, digest)

    def check_digest(self, part: str, digest: PageDigest) -> None:
        """Compare a digest of the ``"averages"`` or ``"copies"`` with the stored one."""
        if digest.hexdigest() != self.digests[part]:
            raise CorruptSnapshotError(
                f"{self.path} is damaged: the digest of its {part} does not match, so at least "
                "one byte changed after it was written. Restore it from a copy, or delete it to "
                "reconstruct from the others"
            )

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The open file, errors translated to name it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise SnapshotError(f"cannot open {self.path}: {error.strerror}") from error
        try:
            yield descriptor
        except EOFError as error:
            raise CorruptSnapshotError(
                f"{self.path} was truncated while it was read ({error})"
            ) from error
        finally:
            os.close(descriptor)

    def _entry(self, name: str) -> TensorEntry:
        name = self.aliases.get(name, name)
        if name not in self.entries:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        return self.entries[name]


class SnapshotStore:
    """A folder of snapshots of one run.

    Args:
        path: The folder; made by the first write.

    Example:
        >>> store = SnapshotStore("run/ema")  # doctest: +SKIP
        >>> [(s.t, s.profile.sigma_rel) for s in store.list()]  # doctest: +SKIP
        [(1000, 0.05), (1000, 0.1)]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._headers: dict[Path, tuple[tuple[int, int], Snapshot]] = {}

    def __repr__(self) -> str:
        return f"SnapshotStore({str(self.path)!r})"

    def list(self) -> list[Snapshot]:
        """All snapshots by time, then by profile; headers alone are read.

        Raises:
            SnapshotError: If the folder is missing, empty, or holds anything but intact
                snapshots of one run with one structure; the message names the file.
        """
        snapshots, problems = self.scan()
        if problems:
            raise problems[0]
        if not snapshots:
            state = "holds no snapshots" if self.path.is_dir() else "does not exist"
            raise SnapshotError(
                f"{self.path} {state}; give the folder that EMA(snapshots=...) wrote"
            )
        _check_one_run(snapshots)
        return snapshots

    def scan(self) -> tuple[Sequence[Snapshot], Sequence[SnapshotError]]:
        """All readable snapshots in order, and an error for each file that is not one."""
        snapshots, problems = [], []
        for path in self._files():
            try:
                snapshots.append(self._open(path))
            except SnapshotError as error:
                problems.append(error)
        snapshots.sort(key=lambda s: (s.t, -getattr(s.profile, "gamma", 0.0), s.path.name))
        return snapshots, problems

    def verify(self, progress: Callable[[int], object] = lambda nbytes: None) -> list[Snapshot]:
        """Read every byte of every snapshot; return them if all are intact.

        Raises:
            SnapshotError: The first problem found.
        """
        snapshots = self.list()
        for snapshot in snapshots:
            snapshot.verify(progress)
        return snapshots

    def claim(self, run: RunIdentity, t: float) -> None:
        """Make the folder ready for a run that is at time ``t``.

        Snapshots of the same run later than ``t`` belong to a future that was abandoned by
        resuming from an older checkpoint: they are moved to a subfolder, never deleted.

        Raises:
            ForeignSnapshotError: If the folder holds anything else.
            SnapshotWriteError: If it cannot be written to.
        """
        with self._writing():
            for leftover in self.path.glob(f".*{SUFFIX}.*.tmp"):
                leftover.unlink(missing_ok=True)
            future = [s for s in self._own(run) if s.t > t]
            if not future:
                return
            attic = self.path / ABANDONED
            number = 1 + sum(1 for _ in attic.iterdir()) if attic.is_dir() else 1
            target = attic / f"{number:03d}-after-t={t}"
            target.mkdir(parents=True)
            for snapshot in future:
                os.replace(snapshot.path, target / snapshot.path.name)
            sync_directory(target)
            sync_directory(self.path)

    def write(
        self,
        run: RunIdentity,
        t: float,
        profile: Profile,
        averages: Sequence[AverageSource],
        copies: Sequence[CopySource] = (),
        aliases: Mapping[str, str] | None = None,
        encoding: str = "float32",
    ) -> Snapshot:
        """Write one snapshot, durable and complete when this returns.

        Tensors are streamed in chunks; float16 gives way to the precision in memory for a
        tensor whose values it cannot hold.

        Raises:
            NonFiniteError: If an average holds NaN or infinity; nothing is written.
            ForeignSnapshotError: If the folder holds snapshots of another run, or this one.
            SnapshotWriteError: If the file cannot be written; earlier ones are unharmed.
        """
        check_encoding(encoding)
        path = self.path / f"{_stem(t, profile)}{SUFFIX}"
        entries, statistics = _plan_file(path, averages, copies, encoding)
        by_name = {source.name: source for source in averages}
        copied = {source.name: source for source in copies}
        metadata = {
            "format_version": FORMAT_VERSION,
            "run_id": run.run_id,
            "t": t,
            "t_first": run.t_first,
            "unit": run.unit,
            "framework": run.framework,
            "profile": profile.to_dict(),
            "encoding": encoding,
            # Pairs, not a mapping: the model's order shall survive.
            "averages": [[source.name, source.dtype] for source in averages],
            "aliases": dict(aliases or {}),
            # Digits of a float vary in number: reserve the longest.
            "statistics": {**statistics, "rounding_square": -1.2345678901234567e-300},
            "digest": {"averages": _NO_DIGEST, "copies": _NO_DIGEST, "header": _NO_DIGEST},
        }
        with self._writing():
            if path in [s.path for s in self._own(run)]:
                raise ForeignSnapshotError(
                    f"{path} already exists, from the same run and time; two processes seem to "
                    "write the same run. Give snapshots= to one of them only"
                )
            with TensorFileWriter(path, entries, metadata) as writer:
                digests = {"averages": PageDigest(), "copies": PageDigest()}
                rounding = 0.0
                for entry in entries:
                    if entry.name in copied:
                        data = copied[entry.name].data
                        digests["copies"].update(data)
                        writer.write(data)
                        continue
                    for chunk in by_name[entry.name].chunks():
                        stored = encode(chunk, entry.dtype).view(np.uint8)
                        digests["averages"].update(stored)
                        writer.write(stored)
                        rounding += _rounding_square(chunk, stored, entry.dtype)
                count = statistics["count"]
                metadata["statistics"] = {**statistics, "rounding_square": rounding / max(count, 1)}
                metadata["digest"] = {part: d.hexdigest() for part, d in digests.items()}
                metadata["digest"]["header"] = _header_digest(metadata, entries)
                writer.commit(metadata)
        return self._open(path)

    def delete(self, snapshots: Iterable[Snapshot]) -> int:
        """Delete snapshots of this store; return the bytes freed."""
        freed = 0
        with self._writing():
            for snapshot in snapshots:
                if snapshot.path.parent != self.path:
                    raise SnapshotError(f"{snapshot.path} is not in {self.path}")
                snapshot.path.unlink()
                freed += snapshot.nbytes
            sync_directory(self.path)
        return freed

    def _files(self) -> Iterator[Path]:
        if self.path.is_dir():
            for path in sorted(self.path.glob(f"*{SUFFIX}")):
                if not path.name.startswith(".") and path.is_file():
                    yield path

    def _open(self, path: Path) -> Snapshot:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._headers.get(path)
        if known is None or known[0] != stamp:
            known = self._headers[path] = (stamp, Snapshot.open(path))
        return known[1]

    def _own(self, run: RunIdentity) -> Sequence[Snapshot]:
        """All snapshots, provided that they belong to this run."""
        snapshots, problems = self.scan()
        if problems:
            raise problems[0]
        for snapshot in snapshots:
            if snapshot.run.run_id != run.run_id:
                raise ForeignSnapshotError(
                    f"{snapshot.path} belongs to another run ({snapshot.run.run_id}, this one is "
                    f"{run.run_id}). To continue that run, give its tracker state to "
                    "EMA.load_state_dict before the first update; for a new run, give another "
                    "folder; if several processes train one model, give snapshots= to one of them"
                )
        return snapshots

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Exclusive access among the processes of one machine, errors translated."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / ".lock", "ab") as lock:
                try:
                    import fcntl
                except ImportError:  # no such locks on this system: one writer is assumed
                    pass
                else:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotWriteError(
                error.errno,
                f"cannot write snapshots to {self.path}: {error.strerror}. Those already there "
                "are unharmed; free space or make the folder writable, and the next update tries "
                "again",
            ) from error


def _stem(t: float, profile: Profile) -> str:
    """File name for people; programs read the metadata. Different snapshots, different names."""
    time = f"{t:012d}" if isinstance(t, int) else repr(t)
    if isinstance(profile, PowerFunction):
        return f"t={time}_sigma_rel={profile.sigma_rel!r}"
    return f"t={time}_" + "_".join(f"{key}={value}" for key, value in profile.to_dict().items())


def _plan_file(
    path: Path, averages: Sequence[AverageSource], copies: Sequence[CopySource], encoding: str
) -> tuple[list[TensorEntry], dict[str, float]]:
    """First pass over the values: are they finite, how large, and so in what type stored."""
    entries, total, count = [], 0.0, 0
    for source in averages:
        square, largest, size = 0.0, 0.0, 0
        for chunk in source.chunks():
            square += sum_of_squares(chunk)
            if encoding == "float16" and len(chunk):
                largest = max(largest, float(chunk.max()), -float(chunk.min()))
            size += len(chunk)
        if not np.isfinite(square):
            raise NonFiniteError(
                f"the average of {source.name!r} holds NaN or infinity, so {path} was not "
                "written. Resume from a checkpoint before the weights went bad; "
                'EMA(nonfinite="skip") leaves such steps out of the averages'
            )
        dtype = stored_dtype(encoding, source.kept, largest, (square / max(size, 1)) ** 0.5)
        entries.append(TensorEntry(source.name, dtype, source.shape))
        total, count = total + square, count + size
    entries += [TensorEntry(source.name, source.dtype, source.shape) for source in copies]
    # Larger elements first, so that every tensor is aligned to its own type.
    entries.sort(key=lambda entry: -ITEM_SIZE[entry.dtype])
    return entries, {"count": count, "mean_square": total / max(count, 1)}


def _rounding_square(values: NDArray[Any], stored: NDArray[np.uint8], dtype: str) -> float:
    if dtype == ("F64" if values.dtype == np.float64 else "F32"):
        return 0.0
    decoded = np.empty_like(values)
    decode_into(stored, dtype, decoded)
    decoded -= values
    return sum_of_squares(decoded)


def sum_of_squares(values: NDArray[Any]) -> float:
    """Σx² of a chunk, without overflow in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(values @ values)
        if not np.isfinite(square):
            double = values.astype(np.float64)
            square = float(double @ double)
    return square


def _header_digest(metadata: Mapping[str, Any], entries: Iterable[TensorEntry]) -> str:
    """Digest of all metadata but itself, and of the table of tensors."""
    digest = {key: value for key, value in metadata["digest"].items() if key != "header"}
    table = [[e.name, e.dtype, *e.shape] for e in entries]
    text = canonical_json([{**metadata, "digest": digest}, table])
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _check_one_run(snapshots: Sequence[Snapshot]) -> None:
    first = snapshots[0]
    seen: dict[tuple[float, Profile], Snapshot] = {}
    for snapshot in snapshots:
        if snapshot.run.run_id != first.run.run_id:
            raise ForeignSnapshotError(
                f"{first.path} and {snapshot.path} belong to different runs "
                f"({first.run.run_id}, {snapshot.run.run_id}); move one run to another folder"
            )
        twin = seen.setdefault((snapshot.t, snapshot.profile), snapshot)
        if twin is not snapshot:
            raise ForeignSnapshotError(
                f"{twin.path} and {snapshot.path} both hold t={snapshot.t}, {snapshot.profile}; "
                "delete or move one of them"
            )
        _check_structure(first, snapshot)


def _check_structure(first: Snapshot, other: Snapshot) -> None:
    for name in dict.fromkeys((*first.averages, *other.averages)):
        if name not in first.averages or name not in other.averages:
            missing = (other if name in first.averages else first).path
            raise StructureError(f"{missing} lacks {name!r}, which other snapshots of its run hold")
        a, b = first.entries[name].shape, other.entries[name].shape
        if a != b:
            raise StructureError(
                f"{name} has shape {a} in {first.path} but {b} in {other.path}; "
                "snapshots of one run must agree"
            )
