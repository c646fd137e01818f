"""One pass over many snapshot files at once, block by block, combining them linearly.

All averaged tensors of a file are one long sequence of numbers. A block of that sequence is
read from every file, converted to one row each of a matrix, and multiplied by the coefficients
of all targets: memory does not depend on the size of the model or the number of files.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema.encoding import ITEM_SIZE, PageDigest
from posthoc_ema.errors import CorruptSnapshotError, NonFiniteError
from posthoc_ema.kernels import Kernel, fastest_kernel
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = 1 << 18  # float32 elements taken of each file at once; whole pages of any type
_TOGETHER = 8  # files whose blocks are in the cache together
_STRETCH = 4 << 20
_KEPT_OPEN = 128  # files kept mapped: systems allow so many; others are read block by block


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
        """``[targets, m]`` values from element ``start`` of the run on."""


@dataclass(frozen=True, eq=False)
class _Run:
    """Tensors that lie next to each other, in one type, in every file."""

    outputs: Sequence[TensorEntry]
    coefficients: NDArray[Any]
    copied: Sequence[tuple[int, int]]  # (target, file) where the target is that file's average
    dtypes: Sequence[str]
    offsets: Sequence[int]


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

    kernel = fastest_kernel()
    digests: list[PageDigest | None] = [None] * len(used)
    if check:
        for i, snapshot in enumerate(used):
            if [n for n in snapshot.entries if n in snapshot.averages] == order:
                # Read in the order of its bytes: checked on the way.
                digests[i] = PageDigest(kernel.page_numbers)
            else:
                snapshot.verify()

    with _Reader(used, digests, kernel) as reader:
        for run in runs:
            sink.start(run.outputs)
            for start, block in reader.blocks(run):
                # A sum is finite only if all of it is, and costs no temporary.
                with np.errstate(invalid="ignore", over="ignore"):
                    finite = np.isfinite(block.sum(dtype=np.float64))
                if not finite:
                    _raise_non_finite(used, run, start, block)
                sink.write(start, block)
                progress(sum(block.shape[1] * ITEM_SIZE[dtype] for dtype in run.dtypes))
    for snapshot, digest in zip(used, digests, strict=True):
        if digest is not None:
            snapshot.check_digest("averages", digest)


class _Reader:
    """Combines the files block by block.

    One file is the reference R, and the sum runs over differences: R + Σ x_i (S_i - R). Weights
    that do not move come back exactly, and rounding is relative to the movement, not multiplied
    by large coefficients of either sign. A block is taken from a few files at a time, so that
    what was read and converted is still in the cache when it is multiplied.
    """

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        digests: Sequence[PageDigest | None],
        kernel: Kernel,
    ) -> None:
        self._snapshots, self._digests, self._kernel = snapshots, digests, kernel
        self._reference = len(snapshots) - 1
        others = [i for i in range(len(snapshots)) if i != self._reference]
        self._groups = [others[k : k + _TOGETHER] for k in range(0, len(others), _TOGETHER)]
        self._threads = min(os.cpu_count() or 1, _TOGETHER)
        self._stack = ExitStack()
        self._maps: list[tuple[mmap.mmap, NDArray[np.uint8]]] = []
        self._rows = np.empty((_TOGETHER + 1) * _BLOCK, np.float32)
        self._raw = [np.empty(0, np.uint8) for _ in range(self._threads)]

    def __enter__(self) -> _Reader:
        from concurrent.futures import ThreadPoolExecutor  # slow to import

        self._stack.callback(self._kernel.leave)
        self._pool = self._stack.enter_context(
            ThreadPoolExecutor(self._threads, initializer=self._kernel.enter_thread)
        )
        for snapshot in self._snapshots[:_KEPT_OPEN]:
            with snapshot.opened() as file:
                # Private, so that arrays on it count as writable; nothing writes.
                mapped = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
            self._maps.append((mapped, np.frombuffer(mapped, np.uint8)))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def blocks(self, run: _Run) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the start of each block of a run and its ``[targets, m]`` combinations."""
        dtype = run.coefficients.dtype
        # Few elements of many targets, to bound the memory of their block.
        size = int(np.clip((1 << 20) // len(run.coefficients), 1 << 14, _BLOCK))
        size = size // PageDigest.PAGE * PageDigest.PAGE * 4 // dtype.itemsize
        total = sum(entry.count for entry in run.outputs)
        buffer = self._rows.view(dtype).reshape(_TOGETHER + 1, -1)
        for start in range(0, total, size):
            count = min(size, total - start)
            base, rows = buffer[0, :count], buffer[1:, :count]
            exact: dict[int, NDArray[Any]] = {}
            self._each(partial(self._fill, run, [self._reference], start, None, [base], exact))
            out = np.repeat(base[None], len(run.coefficients), axis=0)
            for files in self._groups:
                part = rows[: len(files)]
                self._each(partial(self._fill, run, files, start, base, part, exact))
                factors = np.ascontiguousarray(run.coefficients[:, files])
                self._each(partial(self._accumulate, out, factors, part))
            for target, i in run.copied:
                out[target] = exact[i]
            yield start, out

    def _each(self, task: Callable[[int], None]) -> None:
        """Run a task in every thread; its exceptions surface here."""
        list(self._pool.map(task, range(self._threads)))

    def _fill(
        self,
        run: _Run,
        files: Sequence[int],
        start: int,
        base: NDArray[Any] | None,
        rows: Sequence[NDArray[Any]] | NDArray[Any],
        exact: dict[int, NDArray[Any]],
        k: int,
    ) -> None:
        """Convert the k-th thread's share of files, one to a row, as differences from base."""
        for i, row in list(zip(files, rows, strict=True))[k :: self._threads]:
            item = ITEM_SIZE[run.dtypes[i]]
            offset = run.offsets[i] + start * item
            raw = self._bytes(k, i, offset, len(row) * item)
            digest = self._digests[i]
            if digest is not None:
                digest.update(raw)
            self._kernel.decode_into(raw, run.dtypes[i], row)
            self._release(i, offset, len(raw))
            if any(i == file for _, file in run.copied):
                exact[i] = row.copy()
            if base is not None:
                with np.errstate(invalid="ignore"):  # damaged bytes may be anything
                    np.subtract(row, base, out=row)

    def _accumulate(
        self, out: NDArray[Any], factors: NDArray[Any], rows: NDArray[Any], k: int
    ) -> None:
        """Add the k-th thread's share of columns."""
        share = -(-rows.shape[1] // self._threads)
        columns = slice(k * share, (k + 1) * share)
        with np.errstate(invalid="ignore", over="ignore"):
            self._kernel.accumulate(out[:, columns], factors, rows[:, columns])

    def _bytes(self, k: int, i: int, offset: int, size: int) -> NDArray[np.uint8]:
        """Bytes of one file, from its memory map where it has one."""
        snapshot = self._snapshots[i]
        if i < len(self._maps):
            mapped, array = self._maps[i]
            if mapped.size() < len(array):  # reading on would be a bus error
                raise CorruptSnapshotError(f"{snapshot.path} was truncated while it was read")
            return array[offset : offset + size]
        if len(self._raw[k]) < size:
            self._raw[k] = np.empty(size, np.uint8)
        raw = self._raw[k][:size]
        with snapshot.opened() as file:
            snapshot.read_bytes(file, offset, raw)
        return raw

    def _release(self, i: int, offset: int, size: int) -> None:
        """Give mapped pages that were read back to the system, a stretch at a time."""
        stop = (offset + size) // _STRETCH * _STRETCH
        start = offset // _STRETCH * _STRETCH
        if i < len(self._maps) and stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[i][0].madvise(mmap.MADV_DONTNEED, start, stop - start)


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
            runs.append(
                _Run(
                    outputs[first:k],
                    coefficients.astype(np.float64 if double else np.float32),
                    [
                        (k, int(np.flatnonzero(row)[0]))
                        for k, row in enumerate(coefficients)
                        if np.count_nonzero(row) == 1
                    ],
                    [entry.dtype for entry in entries[first]],
                    [entry.offset for entry in entries[first]],
                )
            )
        first = k
    return runs


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
