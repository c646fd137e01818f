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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema.encoding import ITEM_SIZE, PageDigest, decode_into
from posthoc_ema.errors import NonFiniteError
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import TensorEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MATRIX_BYTES = 64 << 20
_KEPT_OPEN = 128  # files; others are opened for each block, for systems allow only so many
_ALIGNMENT = PageDigest.PAGE  # elements: keeps the pages of every type whole


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

    digests: list[PageDigest | None] = [None] * len(used)
    if check:
        for i, snapshot in enumerate(used):
            if [n for n in snapshot.entries if n in snapshot.averages] == order:
                digests[i] = PageDigest()  # read in the order of its bytes: checked on the way
            else:
                snapshot.verify()

    with ExitStack() as stack:
        reader = stack.enter_context(_Reader(used, digests))
        for run in runs:
            sink.start(run.outputs)
            for start, rows in reader.blocks(run):
                block = run.coefficients @ rows
                for target, i in run.copied:
                    block[target] = rows[i]
                # A sum is finite only if all of it is, and costs no temporary.
                if not np.isfinite(block.sum(dtype=np.float64)):
                    _raise_non_finite(used, run, start, block)
                sink.write(start, block)
                progress(sum(rows.shape[1] * ITEM_SIZE[dtype] for dtype in run.dtypes))
    for snapshot, digest in zip(used, digests, strict=True):
        if digest is not None:
            snapshot.check_digest("averages", digest)


class _Reader:
    """Reads blocks of all files into the rows of a matrix, on all cores."""

    def __init__(self, files: Sequence[Snapshot], digests: Sequence[PageDigest | None]) -> None:
        from concurrent.futures import ThreadPoolExecutor  # slow to import

        self._files, self._digests = files, digests
        size = _MATRIX_BYTES // (4 * len(files)) // _ALIGNMENT * _ALIGNMENT
        self._size = int(np.clip(size, _ALIGNMENT, 64 * _ALIGNMENT))
        self._matrix = np.empty(len(files) * self._size, np.float32)
        workers = min(os.cpu_count() or 1, 8, len(files))
        self._shares = [range(k, len(files), workers) for k in range(workers)]
        self._raw = [np.empty(self._size * 8, np.uint8) for _ in self._shares]
        self._pool = ThreadPoolExecutor(workers)
        self._stack = ExitStack()
        self._open: list[int] = []

    def __enter__(self) -> _Reader:
        self._stack.callback(self._pool.shutdown)
        try:
            for snapshot in self._files[:_KEPT_OPEN]:
                self._open.append(self._stack.enter_context(snapshot.opened()))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def blocks(self, run: _Run) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the start of each block of a run and its ``[files, m]`` values."""
        double = run.outputs[0].dtype == "F64"
        size = self._size // 2 if double else self._size
        matrix = self._matrix.view(np.float64) if double else self._matrix
        total = sum(entry.count for entry in run.outputs)
        for start in range(0, total, size):
            count = min(size, total - start)
            rows = matrix[: len(self._files) * count].reshape(len(self._files), count)

            def fill(k: int, rows: NDArray[Any] = rows, start: int = start) -> None:
                for i in self._shares[k]:
                    item = ITEM_SIZE[run.dtypes[i]]
                    raw = self._raw[k][: rows.shape[1] * item]
                    self._read(i, run.offsets[i] + start * item, raw)
                    digest = self._digests[i]
                    if digest is not None:
                        digest.update(raw)
                    decode_into(raw, run.dtypes[i], rows[i])

            # list: exceptions of the workers surface here.
            list(self._pool.map(fill, range(len(self._shares))))
            yield start, rows

    def _read(self, i: int, offset: int, raw: NDArray[np.uint8]) -> None:
        snapshot = self._files[i]
        if i < len(self._open):
            snapshot.read_bytes(self._open[i], offset, raw)
            return
        with snapshot.opened() as file:
            snapshot.read_bytes(file, offset, raw)


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
                    # A sum with zeros would lose the sign of a zero.
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
    culprits = [s.path for s in used if not np.isfinite(s.read(entry.name)).all()]
    where = f"in {', '.join(map(str, culprits))}" if culprits else "by overflow of float32"
    raise NonFiniteError(
        f"the reconstruction of {entry.name!r} is not finite: NaN or infinity {where}; "
        "delete such a snapshot to reconstruct from the others"
    )
