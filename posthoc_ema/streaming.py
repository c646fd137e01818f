"""One pass over many snapshot files at once, block by block, combining them linearly.

All averaged tensors of a file are one long sequence of numbers. A block of that sequence is
read from every file, converted to one row each of a matrix, and multiplied by the coefficients
of all targets: memory does not depend on the size of the model or the number of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import local
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema.encoding import ITEM_SIZE, Digest, decode_into
from posthoc_ema.errors import NonFiniteError
from posthoc_ema.kernels import fastest_kernel
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_BYTES = Digest.PIECE  # read of each file at once
_TOGETHER = 16  # files whose blocks are read before they are multiplied
_TILE = 1 << 16  # elements multiplied at once: decoded, those of all files stay in the cache
_RESULTS = 1 << 21  # elements of all targets that a block may have
_MAX_THREADS = 8
_KEPT_OPEN = 128  # files: systems allow so many; others are opened block by block


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors that share their coefficients.

    Attributes:
        names: Their names.
        coefficients: ``[targets, snapshots]`` float64.
    """

    names: Sequence[str]
    coefficients: NDArray[np.float64]


class Sink(Protocol):
    """Takes the results of a pass."""

    def begin(self, outputs: Sequence[TensorEntry]) -> frozenset[str]:
        """Learn all tensors to come; name those before which a run of blocks must end."""

    def start(self, outputs: Sequence[TensorEntry]) -> None:
        """The next run of tensors, of one type, follows as one sequence of blocks."""

    def write(self, start: int, block: NDArray[Any]) -> None:
        """``[targets, m]`` values from element ``start`` of the run on; from any thread.

        Rows are contiguous. The memory is used again afterwards.
        """


@dataclass(frozen=True, eq=False)
class _Run:
    """Tensors that lie next to each other, in one type, in every file."""

    outputs: Sequence[TensorEntry]
    coefficients: NDArray[Any]
    copied: Sequence[tuple[int, int]]  # (target, file) where the target is that file's average
    together: Sequence[Sequence[int]]  # all files but the reference, in groups of one type
    dtypes: Sequence[str]
    offsets: Sequence[int]  # of its first byte in each file
    sections: Sequence[int]  # the same, counted within all averages of the file

    @property
    def count(self) -> int:
        """Number of elements."""
        return sum(entry.count for entry in self.outputs)


def stream(
    snapshots: Sequence[Snapshot],
    groups: Sequence[Group],
    sink: Sink,
    *,
    check: bool,
    progress: Callable[[int], object],
) -> None:
    """Combine the averages of many snapshots.

    Args:
        snapshots: ``n`` files of one structure.
        groups: All tensors wanted, by their coefficients.
        sink: Where results go.
        check: Compare the digest of every file read; needs all averaged tensors in ``groups``.
        progress: Called with the number of bytes read.

    Raises:
        CorruptSnapshotError: If a file was damaged since it was written.
        NonFiniteError: If a result holds NaN or infinity.
    """
    needed = np.any([(g.coefficients != 0).any(0) for g in groups], axis=0)
    used = [snapshot for snapshot, need in zip(snapshots, needed, strict=True) if need]
    wanted = {name for group in groups for name in group.names}
    order = [name for name in used[0].entries if name in wanted]
    runs = _runs(used, groups, order, needed, sink)

    digests = [Digest(snapshot.section_size("averages")) for snapshot in used] if check else []
    with _Reader(used, digests) as reader:
        for run in runs:
            sink.start(run.outputs)
            for count in reader.combine(run, sink.write):
                progress(count * sum(ITEM_SIZE[dtype] for dtype in run.dtypes))
    for snapshot, digest in zip(used, digests, strict=check):
        # Where files are laid out unlike each other, blocks cut some pieces in two.
        snapshot.add_missing("averages", digest)
        snapshot.check_digest("averages", digest)


class _Reader:
    """Combines the files block by block, every block a task for one of several threads.

    One file is the reference R, and the sum runs over differences: R + Σ x_i (S_i - R). Weights
    that do not move come back exactly, and rounding is relative to the movement, not multiplied
    by large coefficients of either sign. The order of the sum, and so the result, does not
    depend on the number of threads.
    """

    def __init__(self, snapshots: Sequence[Snapshot], digests: Sequence[Digest]) -> None:
        self._snapshots, self._digests = snapshots, digests
        self._reference = len(snapshots) - 1  # and together, in a run, leaves out that one
        self._kernel = fastest_kernel()
        self._buffers = local()
        self._stack = ExitStack()
        self._files: list[int] = []

    def __enter__(self) -> _Reader:
        from concurrent.futures import ThreadPoolExecutor  # slow to import

        threads = min(_usable_cores(), _MAX_THREADS)
        with ExitStack() as stack:
            stack.callback(self._kernel.leave)
            self._files = [
                stack.enter_context(snapshot.opened()) for snapshot in self._snapshots[:_KEPT_OPEN]
            ]
            self._pool = stack.enter_context(
                ThreadPoolExecutor(threads, initializer=self._kernel.enter_thread)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        self._pool.shutdown(cancel_futures=True)
        return self._stack.__exit__(*error)

    def combine(self, run: _Run, write: Callable[[int, NDArray[Any]], None]) -> Iterator[int]:
        """Write all blocks of the results; yield the number of elements of each that is done."""
        targets = len(run.coefficients)
        smallest = min(ITEM_SIZE[dtype] for dtype in run.dtypes)
        size = min(_BLOCK_BYTES // smallest, max(_RESULTS // targets, 1 << 12))
        size = 1 << (size.bit_length() - 1)  # whole pieces of files, or whole fractions of them
        # The first block ends where a piece does.
        first = run.sections[self._reference] // smallest % size
        starts = [0, *range(size - first, run.count, size)]
        stops = [*starts[1:], run.count]
        yield from self._pool.map(partial(self._combine, run, write), starts, stops)

    def _combine(
        self, run: _Run, write: Callable[[int, NDArray[Any]], None], start: int, stop: int
    ) -> int:
        """One block of the results."""
        count, dtype = stop - start, run.coefficients.dtype
        base = np.empty(count, dtype)
        stored = self._read(run, [self._reference], start, count)
        decode_into(stored[0], run.dtypes[self._reference], base)
        out = self._buffer("out", len(run.coefficients) * count * dtype.itemsize)
        out = out.view(dtype).reshape(len(run.coefficients), count)
        out.fill(0)
        exact = [(t, base) for t, i in run.copied if i == self._reference]
        for files in run.together:
            stored_as = run.dtypes[files[0]]
            item = ITEM_SIZE[stored_as]
            stored = self._read(run, files, start, count)
            factors = np.ascontiguousarray(run.coefficients[:, files])
            for left in range(0, count, _TILE):
                right = min(left + _TILE, count)
                tile = stored[:, left * item : right * item]
                rows = self._buffer("rows", len(files) * (right - left) * dtype.itemsize)
                rows = rows.view(dtype).reshape(len(files), right - left)
                self._kernel.differences(tile, stored_as, base[left:right], rows)
                self._kernel.accumulate(out[:, left:right], factors, rows)
            for target, i in run.copied:
                if i in files:
                    values = np.empty(count, dtype)
                    decode_into(stored[files.index(i)], stored_as, values)
                    exact.append((target, values))
        out += base
        for target, values in exact:
            out[target] = values
        with np.errstate(invalid="ignore", over="ignore"):
            # A sum is finite only if all of it is; but that of large numbers may overflow.
            if not (np.isfinite(out.sum()) or np.isfinite(out).all()):
                _raise_non_finite(self._snapshots, run, start, out)
        write(start, out)
        return count

    def _read(self, run: _Run, files: Sequence[int], start: int, count: int) -> NDArray[np.uint8]:
        """The same elements of a few files, as bytes, one file to a row; and digest them."""
        size = count * ITEM_SIZE[run.dtypes[files[0]]]
        rows = self._buffer("stored", len(files) * size).reshape(len(files), size)
        for i, row in zip(files, rows, strict=True):
            skip = start * ITEM_SIZE[run.dtypes[i]]
            snapshot = self._snapshots[i]
            # Reads, not a memory map: page faults cost as much, no resident memory grows, and a
            # file that shrinks gives an error instead of a bus error.
            if i < len(self._files):
                snapshot.read_bytes(self._files[i], run.offsets[i] + skip, row)
            else:
                with snapshot.opened() as file:
                    snapshot.read_bytes(file, run.offsets[i] + skip, row)
            if self._digests:
                self._digests[i].add(run.sections[i] + skip, row)
        return rows

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """Memory of this thread, used again and again."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer[:size]


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _runs(
    used: Sequence[Snapshot],
    groups: Sequence[Group],
    order: Sequence[str],
    needed: NDArray[np.bool_],
    sink: Sink,
) -> list[_Run]:
    """Cut the sequence of tensors where types, places or coefficients change."""
    group_of = {name: k for k, group in enumerate(groups) for name in group.names}
    entries = [[snapshot.entries[name] for snapshot in used] for name in order]
    outputs = [
        TensorEntry(name, "F64" if row[0].dtype == "F64" else "F32", row[0].shape)
        for name, row in zip(order, entries, strict=True)
    ]
    sections = [snapshot.section_offsets("averages") for snapshot in used]
    breaks = sink.begin(outputs)
    runs: list[_Run] = []
    first = 0
    for k in range(1, len(order) + 1):
        if k < len(order) and not (
            order[k] in breaks
            or group_of[order[k]] != group_of[order[first]]
            or outputs[k].dtype != outputs[first].dtype
            or any(
                b.dtype != a.dtype or b.offset != a.offset + a.nbytes
                for a, b in zip(entries[k - 1], entries[k], strict=True)
            )
        ):
            continue
        if k > first:
            double = outputs[first].dtype == "F64"
            coefficients = groups[group_of[order[first]]].coefficients[:, needed]
            dtypes = [entry.dtype for entry in entries[first]]
            runs.append(
                _Run(
                    outputs[first:k],
                    coefficients.astype(np.float64 if double else np.float32),
                    [
                        (target, int(np.flatnonzero(row)[0]))
                        for target, row in enumerate(coefficients)
                        if np.count_nonzero(row) == 1
                    ],
                    _together(dtypes[:-1]),
                    dtypes,
                    [entry.offset for entry in entries[first]],
                    [section[order[first]] for section in sections],
                )
            )
        first = k
    return runs


def _together(dtypes: Sequence[str]) -> list[list[int]]:
    """Files in groups of one type, few enough for a thread's buffer."""
    groups: list[list[int]] = []
    for dtype in sorted(set(dtypes)):
        files = [i for i, other in enumerate(dtypes) if other == dtype]
        groups += [files[k : k + _TOGETHER] for k in range(0, len(files), _TOGETHER)]
    return groups


def _raise_non_finite(used: Sequence[Snapshot], run: _Run, start: int, block: NDArray[Any]) -> None:
    place = start + int(np.flatnonzero(~np.isfinite(block).all(0))[0])
    for entry in run.outputs:
        if place < entry.count:
            break
        place -= entry.count
    bad = [s for s in used if not np.isfinite(s.read(entry.name)).all()]
    for snapshot in bad:
        snapshot.verify()  # damage shall be called damage
    culprits = [snapshot.path for snapshot in bad]
    where = f"in {', '.join(map(str, culprits))}" if culprits else "by overflow of float32"
    raise NonFiniteError(
        f"the reconstruction of {entry.name!r} is not finite: NaN or infinity {where}; "
        "delete such a snapshot to reconstruct from the others"
    )
