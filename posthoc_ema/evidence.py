"""What a set of snapshots says about its training run: movement, noise, magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.ahead import REQUESTS
from posthoc_ema.blocks import BLOCK
from posthoc_ema.chain import is_residual, with_inputs
from posthoc_ema.encoding import all_finite, block_bits, decode_into, stored_size
from posthoc_ema.errors import NonFiniteError
from posthoc_ema.kernels import read_pieces
from posthoc_ema.memory import fresh
from posthoc_ema.movement import Movement, fit_movement, informative
from posthoc_ema.reading import OpenFile, Reader, check_unreplaced, for_each
from posthoc_ema.snapshot_file import Snapshot

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_SIZE = 1 << 16
"""Weights sampled from each snapshot (all, if there are fewer)."""

_SAMPLE_BYTES = 32 << 20  # of all snapshots together: with many, fewer weights of each
_RUN = 512  # weights read in one piece: neighbours cost nothing once the disk has been asked
_GAP, _READ = 1 << 14, 1 << 20  # bytes between pieces that one read joins, and at most of it
_MIN_SAMPLE = 64
_ROOM = 1.1  # for the rounding of storage
_CHUNK = 1 << 13
# Averages live in float32 (or float64), so even exact storage leaves them this uncertain
# (variance, relative to the mean square).
_ROUNDING = {"F32": 2.0**-50, "F64": 2.0**-108}


@dataclass(frozen=True, eq=False)
class Evidence:
    """Estimates from the snapshots of one run.

    Attributes:
        movement: Variance rate, over time, of the weights that move at all.
        noise: ``[n]`` variance of storage rounding of such a weight in each snapshot.
        moving_share: Share of all weights that move; the others (frozen layers) come back
            exactly from any coefficients that sum to one.
        mean_square: Mean squared weight of the last snapshot.
        remarks: What the data could not support, for people.
    """

    movement: Movement
    noise: NDArray[np.float64]
    moving_share: float
    mean_square: float
    remarks: tuple[str, ...]

    def relative_error(self, expected_square: Any) -> NDArray[np.float64]:
        """Expected RMS error over all weights, relative to their RMS."""
        square = self.moving_share * np.asarray(expected_square)
        return np.sqrt(square / (self.mean_square or 1.0))


def gather_evidence(snapshots: Sequence[Snapshot], seed: int = 0) -> Evidence:
    """Estimate from a seeded sample of weights, the same ones in every snapshot.

    Reads about a megabyte of each file. With too little to go by, the movement is taken to be
    constant, and ``remarks`` says so.
    """
    mean_square = float(snapshots[-1].statistics["mean_square"])
    t_last = float(snapshots[-1].t)
    times = np.array([float(s.t) for s in snapshots])
    chosen = np.flatnonzero(np.isin(times, informative(times)))
    sampled = [snapshots[int(i)] for i in chosen]
    sample, weights = sample_weights(sampled, seed)
    _check_sizes(sampled, sample)
    if len(snapshots) < 2:
        remark = "one snapshot: the movement of the weights is unknown, no error is predicted"
        unknown = Movement.constant(t_last, np.nan)
        return Evidence(unknown, np.zeros(len(snapshots)), 1.0, mean_square, (remark,))
    moves = (sample != sample[0]).any(axis=0)
    share = float(weights[moves].sum() / max(weights.sum(), 1))
    if not moves.any():
        # Any coefficients that sum to one are right, if this is so; choose them as if not.
        remark = "the sampled weights are the same in all snapshots: no error is expected"
        movement = Movement.constant(t_last, mean_square / t_last or 1.0)
        noise = np.full(len(snapshots), _ROUNDING["F32"] * mean_square)
        return Evidence(movement, noise, 0.0, mean_square, (remark,))

    if not moves.all():
        sample = np.compress(moves, sample, axis=1)  # by rows in memory, unlike sample[:, moves]
    weights = weights[moves] / weights[moves].sum()
    remarks = []
    if sample.shape[1] < _MIN_SAMPLE:
        remarks.append(f"only {sample.shape[1]} weights: the predicted error is a rough guess")
    squares, products = _products(sample, weights)
    noise = _noise(snapshots, np.interp(times, times[chosen], squares))
    inputs = [(float(s.t), s.profile) for s in sampled]
    if np.isfinite(products).all():
        movement = fit_movement(inputs, products, noise[chosen], 1 / (weights**2).sum())
    else:  # large only because of damage, which the pass will find
        movement = Movement.constant(t_last, mean_square / t_last or 1.0)
    return Evidence(movement, noise, share, mean_square, tuple(remarks))


def _check_sizes(snapshots: Sequence[Snapshot], sample: NDArray[Any]) -> None:
    """No weight is larger than all of them together were when the file was written.

    A file that turns out to count little is not read further, and its digest not compared; a
    flipped bit of an exponent must not have decided that.
    """
    largest = np.abs(sample).max(axis=1, initial=0)
    for snapshot, found in zip(snapshots, largest.tolist(), strict=True):
        square = snapshot.statistics["count"] * snapshot.statistics["mean_square"]
        if not found <= _ROOM * square**0.5:
            for file in with_inputs([snapshot]):
                file.verify()


def _products(
    sample: NDArray[Any], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean squares of the rows, and mean products of the differences between consecutive ones."""
    n = len(sample)
    squares, products = np.zeros(n), np.zeros((n - 1, n - 1))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, sample.shape[1], _CHUNK):
            piece = sample[:, start : start + _CHUNK].astype(np.float64)
            piece *= np.sqrt(weights[start : start + _CHUNK])
            squares += np.einsum("ij,ij->i", piece, piece)
            # Differences of neighbours, not from one reference: small ones keep their digits.
            difference = np.diff(piece, axis=0)
            products += difference @ difference.T
    return np.minimum(squares, np.finfo(np.float64).max), products


def _noise(snapshots: Sequence[Snapshot], mean_squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of rounding of weights of this size in each: that of floats is relative."""
    counts = {name: entry.count for name, entry in snapshots[0].entries.items()}
    kept = sum(
        _ROUNDING["F64" if dtype in ("F64", "C128") else "F32"] * counts[name]
        for name, dtype in snapshots[0].averages.items()
    ) / max(snapshots[0].statistics["count"], 1)
    stored = [
        s.statistics["rounding_square"] / (s.statistics["mean_square"] or 1.0) for s in snapshots
    ]
    return (kept + np.array(stored)) * mean_squares


def sample_weights(
    snapshots: Sequence[Snapshot], seed: int = 0
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The same seeded sample of averaged weights from every snapshot.

    Short runs of neighbouring weights, of every tensor some, the rest spread evenly by size: a
    few that move among many that are frozen shall not be missed.

    Returns:
        ``[snapshots, sample]`` float32 or float64, and for each sampled weight the number of
        weights that it stands for.
    """
    entries = [snapshots[0].entries[name] for name in snapshots[0].averages]
    double = any(entry.dtype == "F64" for entry in entries)
    item = 8 if double else 4
    size = min(SAMPLE_SIZE, _SAMPLE_BYTES // (item * len(snapshots)))
    total = sum(entry.count for entry in entries)
    least = int(np.clip(size // (2 * max(len(entries), 1)), 1, _RUN))

    generator = np.random.default_rng(seed)
    pieces: list[tuple[str, int, int]] = []  # name, first element, number of elements
    stands_for: list[NDArray[np.float64]] = []
    for entry in entries:
        if not entry.count:
            continue
        wanted = min(entry.count, max(least, round(size * entry.count / max(total, 1))))
        number = -(-wanted // _RUN)
        # One run from each of equal strata, at a random place in it.
        edges = np.linspace(0, entry.count, number + 1).astype(np.int64)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            length = min(-(-wanted // number), stop - start)
            first = start + int(generator.integers(stop - start - length + 1))
            first -= first % BLOCK  # where blocks of few bits begin
            pieces.append((entry.name, first, length))
            stands_for.append(np.full(length, (stop - start) / length))

    count = sum(length for _, _, length in pieces)
    files = with_inputs(snapshots)
    out = fresh((len(files), count), np.float64 if double else np.float32)
    row_of = {snapshot.digests["header"]: row for row, snapshot in enumerate(files)}
    read = list(zip(out, files, strict=True))
    for _ in for_each(lambda item: _read_pieces(item[1], pieces, item[0]), read, files[0].path):
        pass
    check_unreplaced(path for snapshot in files for path in snapshot.files)
    for row, snapshot in read:
        if snapshot.inputs:
            residual = np.repeat(
                [is_residual(snapshot, name) for name, _, _ in pieces],
                [length for _, _, length in pieces],
            )
            for factor, other in snapshot.inputs:
                row += out.dtype.type(factor) * out[row_of[other.digests["header"]]] * residual
    rows = [row_of[snapshot.digests["header"]] for snapshot in snapshots]
    if rows != list(range(len(out))):
        out = out[rows]
    return out, np.concatenate([*stands_for, np.empty(0)])


def _read_pieces(
    snapshot: Snapshot, pieces: Sequence[tuple[str, int, int]], row: NDArray[Any]
) -> None:
    """Fill a row with pieces of a file, each of a tensor's elements from one on."""
    entries = [snapshot.entries[name] for name, _, _ in pieces]
    ends = np.cumsum([length for _, _, length in pieces])
    for dtype in {entry.dtype for entry in entries}:
        chosen = [k for k, entry in enumerate(entries) if entry.dtype == dtype]
        # Their order in memory is that of the row, whatever that in the file.
        places, size = [], 0
        for k in chosen:
            _, first, length = pieces[k]
            bytes_ = stored_size(dtype, length)
            places.append((entries[k].offset + stored_size(dtype, first), size, bytes_))
            size += bytes_
        raw = np.empty(size, np.uint8)
        with snapshot.opened() as file:
            _read_places(file, sorted(places), raw)
        if not all_finite(raw, dtype):
            snapshot.verify()  # damage shall be called damage
            bad = next(
                pieces[k][0]
                for (_, at, n), k in zip(places, chosen, strict=True)
                if not all_finite(raw[at : at + n], dtype)
            )
            raise NonFiniteError(
                f"{bad!r} is not finite in {snapshot.path}, which holds NaN or infinity; "
                "delete such a snapshot to reconstruct from the others"
            )
        step = BLOCK if block_bits(dtype) else 1
        padded = [-(-pieces[k][2] // step) * step for k in chosen]
        if sum(padded) == len(row):
            decode_into(raw, dtype, row)
            continue
        values = np.empty(sum(padded), row.dtype)
        decode_into(raw, dtype, values)
        done = 0
        for k, taken in zip(chosen, padded, strict=True):
            length = pieces[k][2]
            row[ends[k] - length : ends[k]] = values[done : done + length]
            done += taken


def _read_places(
    file: Reader, places: Sequence[tuple[int, int, int]], out: NDArray[np.uint8]
) -> None:
    """Read (offset in the file, place in ``out``, bytes); those close to each other in one go."""
    if isinstance(file, OpenFile) and read_pieces(file.descriptor, places, out):
        return  # else what follows does it, or says what is wrong
    groups: list[list[tuple[int, int, int]]] = []
    for place in places:
        offset, _, size = place
        if groups:
            (start, *_), (last, _, length) = groups[-1][0], groups[-1][-1]
            if offset - (last + length) <= _GAP and offset + size - start <= _READ:
                groups[-1].append(place)
                continue
        groups.append([place])
    spans = [(group[0][0], group[-1][0] + group[-1][2]) for group in groups]
    # Of files elsewhere many are read at a time.
    file.expect([(start, stop - start) for start, stop in spans], together=REQUESTS)
    for group, (start, stop) in zip(groups, spans, strict=True):
        if len(group) == 1:
            _, at, size = group[0]
            file.read(start, out[at : at + size])
            continue
        buffer = np.empty(stop - start, np.uint8)
        file.read(start, buffer)
        for offset, at, size in group:
            out[at : at + size] = buffer[offset - start : offset - start + size]
