"""One pass over many snapshot files at once, block by block, combining them linearly.

All averaged tensors of a file are one long sequence of numbers. A block of that sequence is
read from every file, converted to one row each of a matrix, and multiplied by the coefficients
of all targets: memory does not depend on the size of the model or the number of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from threading import local
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema import native
from posthoc_ema.blocks import BLOCK
from posthoc_ema.chain import is_residual, stored_coefficients, with_inputs
from posthoc_ema.digests import Digest
from posthoc_ema.encoding import block_bits, decode_into, stored_size
from posthoc_ema.errors import NonFiniteError, SnapshotError
from posthoc_ema.kernels import combine, combine_files, finish
from posthoc_ema.places import RemotePath
from posthoc_ema.reading import Check, FileCheck, OpenFile, Reader, check_unreplaced
from posthoc_ema.snapshot_file import Snapshot
from posthoc_ema.tensorfile import TensorEntry
from posthoc_ema.workers import Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_BYTES = 16 * Digest.PIECE  # read of each file at once
_TOGETHER = 8  # files whose blocks are read before they are combined: they stay in the cache
_RESULTS = 1 << 19  # elements of all targets that a block may have
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
    reference: int | None  # a file with the averages themselves, if any
    together: Sequence[Sequence[int]]  # all others that count, in groups of one type
    dtypes: Sequence[str]
    offsets: Sequence[int]  # of its first byte in each file
    sections: Sequence[int]  # the same, counted within all averages of the file

    @cached_property
    def count(self) -> int:
        """Number of elements."""
        return sum(entry.count for entry in self.outputs)


def files_needed(
    snapshots: Sequence[Snapshot], groups: Sequence[Group], sparse: bool = False
) -> list[Snapshot]:
    """The files to read, each after those that it was predicted from.

    A combination rests on all files, those of coefficient zero too: damage may have made it so.
    Where it is ``sparse``, they are zero on purpose.
    """
    needed = np.any([(group.coefficients != 0).any(0) for group in groups], axis=0)
    if not sparse:
        needed |= any((np.count_nonzero(g.coefficients, 1) > 1).any() for g in groups)
    return with_inputs(s for s, need in zip(snapshots, needed, strict=True) if need)


def stream(
    snapshots: Sequence[Snapshot],
    groups: Sequence[Group],
    sink: Sink,
    *,
    check: bool,
    sparse: bool = False,
    progress: Callable[[int], object],
) -> None:
    """Combine the averages of many snapshots.

    Args:
        snapshots: ``n`` files of one structure.
        groups: All tensors wanted, by their coefficients.
        sink: Where results go.
        check: Compare the digest of every file read; needs all averaged tensors in ``groups``.
        sparse: Whether to leave out files whose coefficients are all zero.
        progress: Called with the number of bytes read.

    Raises:
        CorruptSnapshotError: If a file was damaged since it was written.
        NonFiniteError: If a result holds NaN or infinity.
    """
    used = files_needed(snapshots, groups, sparse)
    groups = [_for_files(group, snapshots, used) for group in groups]
    wanted = {name for group in groups for name in group.names}
    order = [name for name in used[0].entries if name in wanted]
    runs = _runs(used, groups, order, sink)

    checks = [snapshot.check("averages") for snapshot in used] if check else []
    with _Reader(used, checks) as reader:
        reader.expect(runs)
        for run in runs:
            sink.start(run.outputs)
            for count in reader.combine(run, sink.write):
                progress(sum(stored_size(dtype, count) for dtype in run.dtypes))
    for finished in checks:
        # What counts for no target was not read: files that only tell how others were predicted.
        finished.finish()
    if not checks:  # digests would have told more
        check_unreplaced(path for snapshot in used for path in snapshot.files)


class _Reader:
    """Combines the files block by block, every block a task for one of several threads.

    One file is the reference R, and the sum runs over differences: R + Σ x_i (S_i - R). Weights
    that do not move come back exactly, and rounding is relative to the movement, not multiplied
    by large coefficients of either sign. Residuals are differences as they are. The order of the
    sum, and so the result, does not depend on the number of threads.
    """

    def __init__(self, snapshots: Sequence[Snapshot], checks: Sequence[Check]) -> None:
        self._snapshots, self._checks = snapshots, checks
        self._buffers = local()
        self._stack = ExitStack()
        self._files: list[Reader] = []

    def __enter__(self) -> _Reader:
        remote = isinstance(self._snapshots[0].path, RemotePath)
        kept = self._snapshots if remote else self._snapshots[:_KEPT_OPEN]
        with ExitStack() as stack:
            self._files = [stack.enter_context(snapshot.opened()) for snapshot in kept]
            self._workers = stack.enter_context(Workers())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def expect(self, runs: Sequence[_Run]) -> None:
        """Say what will be read, for files that fetch it ahead."""
        wanted = [
            [
                (run.offsets[i], stored_size(run.dtypes[i], run.count))
                for run in runs
                if run.reference == i or any(i in files for files in run.together)
            ]
            for i in range(len(self._files))
        ]
        together = sum(map(bool, wanted))
        for file, ranges in zip(self._files, wanted, strict=True):
            file.expect(ranges, together)

    def combine(self, run: _Run, write: Callable[[int, NDArray[Any]], None]) -> Iterator[int]:
        """Write all blocks of the results; yield the number of elements of each that is done."""
        targets = len(run.coefficients)
        smallest = min(stored_size(dtype, BLOCK) for dtype in run.dtypes)
        size = min(_BLOCK_BYTES * BLOCK // smallest, max(_RESULTS // targets, 1 << 12))
        size = 1 << (size.bit_length() - 1)  # whole pieces of files, or whole fractions of them
        starts = range(0, run.count, size)
        blocks = ((start, min(start + size, run.count)) for start in starts)
        yield from self._workers.in_order(partial(self._combine, run, write), blocks)

    def _combine(
        self, run: _Run, write: Callable[[int, NDArray[Any]], None], block: tuple[int, int]
    ) -> int:
        """One block of the results."""
        start, stop = block
        count, dtype = stop - start, run.coefficients.dtype
        base = self._buffer("base", count * dtype.itemsize).view(dtype)
        if run.reference is None:
            base.fill(0)
        else:
            stored = self._read(run, [run.reference], start, count)
            decode_into(stored[0], run.dtypes[run.reference], base)
        total = self._buffer("total", len(run.coefficients) * count * 8).view(np.float64)
        total = total.reshape(len(run.coefficients), count)
        total.fill(0)
        exact = {run.reference: base}
        for files in run.together:
            if self._combine_files(run, files, start, base, total):
                continue
            for some in (files[k : k + _TOGETHER] for k in range(0, len(files), _TOGETHER)):
                stored_as = run.dtypes[some[0]]
                stored = self._read(run, some, start, count)
                factors = np.ascontiguousarray(run.coefficients[:, some])
                # Residuals are differences already.
                combine(stored, stored_as, None if block_bits(stored_as) else base, factors, total)
                for i in {i for _, i in run.copied}.intersection(some):
                    exact[i] = np.empty(count, dtype)
                    decode_into(stored[some.index(i)], stored_as, exact[i])
        out = self._buffer("out", len(run.coefficients) * count * dtype.itemsize).view(dtype)
        out = out.reshape(total.shape)
        finite = finish(total, base, out)
        for target, i in run.copied:
            if i in exact:
                out[target] = exact[i]
            else:  # the compiled loops read it, and kept nothing
                stored = self._read(run, [i], start, count, again=True)
                decode_into(stored[0], run.dtypes[i], out[target])
        if not (finite or np.isfinite(out).all()):  # those put in place may be all right
            _raise_non_finite(self._snapshots, run, start, out)
        write(start, out)
        return count

    def _combine_files(
        self,
        run: _Run,
        files: Sequence[int],
        start: int,
        base: NDArray[Any],
        total: NDArray[np.float64],
    ) -> bool:
        """Add the same elements of files of one type, if compiled loops can read them."""
        dtype = run.dtypes[files[0]]
        if dtype not in native.ITEM or base.dtype != np.float32 or native.library() is None:
            return False
        skip, size = stored_size(dtype, start), stored_size(dtype, len(base))
        chosen, digests = [], []
        for i in files:
            file = self._files[i] if i < len(self._files) else None
            if not isinstance(file, OpenFile):
                return False
            chosen.append(file)
            if self._checks:
                check = self._checks[i]
                if not (isinstance(check, FileCheck)
                        and check.digest.takes_hashes(run.sections[i] + skip, size)):  # fmt: skip
                    return False
                digests.append(check.digest)
        hashes = combine_files(
            [file.descriptor for file in chosen],
            [run.offsets[i] + skip for i in files],
            dtype,
            base,
            run.coefficients[:, files],
            total,
            buffer=partial(self._buffer, "stored"),
            hashed=bool(digests),
        )
        if hashes is None:
            for i in files:
                self._read(run, [i], start, len(base), again=True)  # which says what is wrong
            raise SnapshotError(
                f"reading failed once, among {chosen[0].path} and others: try again"
            )
        for digest, i, found in zip(digests, files, hashes, strict=False):
            digest.add_hashes(run.sections[i] + skip, found)
        return True

    def _read(
        self, run: _Run, files: Sequence[int], start: int, count: int, *, again: bool = False
    ) -> NDArray[np.uint8]:
        """The same elements of a few files, as bytes, one file to a row; and digest them."""
        size = stored_size(run.dtypes[files[0]], count)
        rows = self._buffer("stored", len(files) * size).reshape(len(files), size)
        for i, row in zip(files, rows, strict=True):
            skip = stored_size(run.dtypes[i], start)
            snapshot = self._snapshots[i]
            # Reads, not a memory map: page faults cost as much, no resident memory grows, and a
            # file that shrinks gives an error instead of a bus error.
            if i < len(self._files):
                self._files[i].read(run.offsets[i] + skip, row)
            else:
                with snapshot.opened() as file:
                    file.read(run.offsets[i] + skip, row)
            if self._checks and not again:
                self._checks[i].add(run.sections[i] + skip, row)
        return rows

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """Memory of this thread, used again and again."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer[:size]


def _runs(
    used: Sequence[Snapshot],
    groups: Sequence[Group],
    order: Sequence[str],
    sink: Sink,
) -> list[_Run]:
    """Cut the sequence of tensors where types, places or coefficients change."""
    group_of = {name: k for k, group in enumerate(groups) for name in group.names}
    # Most files of a run have the same tensors in the same places: one of each kind tells.
    layouts = {tuple(id(s.entries[name]) for name in order): s for s in used}.values()
    entries = [[snapshot.entries[name] for snapshot in layouts] for name in order]
    outputs = [
        TensorEntry(name, "F64" if all(e.dtype == "F64" for e in row) else "F32", row[0].shape)
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
                b.dtype != a.dtype
                or b.offset != a.offset + a.nbytes
                or (a.count % BLOCK and block_bits(a.dtype) is not None)
                for a, b in zip(entries[k - 1], entries[k], strict=True)
            )
        ):
            continue
        if k > first:
            runs.append(_run(used, groups[group_of[order[first]]], outputs[first:k], sections))
        first = k
    return runs


def _for_files(group: Group, snapshots: Sequence[Snapshot], files: Sequence[Snapshot]) -> Group:
    """The same coefficients by file; zero for those that others were predicted from."""
    coefficients = np.zeros((len(group.coefficients), len(files)))
    row_of = {snapshot.digests["header"]: row for row, snapshot in enumerate(files)}
    for k, snapshot in enumerate(snapshots):
        row = row_of.get(snapshot.digests["header"])
        if row is not None:
            coefficients[:, row] = group.coefficients[:, k]
    return Group(group.names, coefficients)


def _run(
    files: Sequence[Snapshot],
    group: Group,
    outputs: Sequence[TensorEntry],
    sections: Sequence[Mapping[str, int]],
) -> _Run:
    name = outputs[0].name
    entries = [snapshot.entries[name] for snapshot in files]
    coefficients = stored_coefficients(files, group.coefficients, name)
    whole = [i for i, snapshot in enumerate(files) if not is_residual(snapshot, name)]
    counting = np.flatnonzero((coefficients != 0).any(axis=0))
    reference = max(set(whole) & set(counting.tolist()), default=whole[-1] if whole else None)
    others = [i for i in counting.tolist() if i != reference]
    return _Run(
        outputs,
        coefficients.astype(np.float64 if outputs[0].dtype == "F64" else np.float32),
        [
            (target, int(np.flatnonzero(row)[0]))
            for target, row in enumerate(coefficients)
            if np.count_nonzero(row) == 1
        ],
        reference,
        _together(others, [entry.dtype for entry in entries]),
        [entry.dtype for entry in entries],
        [entry.offset for entry in entries],
        [section[name] for section in sections],
    )


def _together(chosen: Sequence[int], dtypes: Sequence[str]) -> list[list[int]]:
    """Files in groups of one type."""
    return [[i for i in chosen if dtypes[i] == d] for d in sorted({dtypes[i] for i in chosen})]


def _raise_non_finite(used: Sequence[Snapshot], run: _Run, start: int, block: NDArray[Any]) -> None:
    place = start + int(np.flatnonzero(~np.isfinite(block).all(0))[0])
    for entry in run.outputs:
        if place < entry.count:
            break
        place -= entry.count
    bad = [s for s in used if not np.isfinite(s.stored(entry.name)).all()]
    for snapshot in bad or used:
        snapshot.verify()  # damage shall be called damage
    culprits = [snapshot.path for snapshot in bad]
    where = f"in {', '.join(map(str, culprits))}" if culprits else "by overflow of float32"
    raise NonFiniteError(
        f"the reconstruction of {entry.name!r} is not finite: NaN or infinity {where}; "
        "delete such a snapshot to reconstruct from the others"
    )
