"""What a set of snapshots says about its training run: movement, noise, magnitude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.encoding import ITEM_SIZE, decode_into
from posthoc_ema.movement import Movement, fit_movement, neighbours
from posthoc_ema.snapshot_file import Snapshot, sum_of_squares

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_SIZE = 1 << 18
"""Weights sampled from each snapshot (all, if there are fewer)."""

_SAMPLE_BYTES = 128 << 20  # of all snapshots together: with many, fewer weights of each
_RUN = 512  # weights read in one piece: neighbours cost nothing once the disk has been asked
_MIN_SAMPLE = 64
# Averages live in float32, so even exact storage leaves them this uncertain (relative, squared).
_FLOAT32_ROUNDING = 2.0**-50


@dataclass(frozen=True, eq=False)
class Evidence:
    """Estimates from the snapshots of one run.

    Attributes:
        movement: Variance rate of the weights over time.
        noise: ``[n]`` variance of storage rounding per weight of each snapshot.
        mean_square: Mean squared weight of the last snapshot.
        remarks: What the data could not support, for people.
    """

    movement: Movement
    noise: NDArray[np.float64]
    mean_square: float
    remarks: tuple[str, ...]


def gather_evidence(snapshots: Sequence[Snapshot], seed: int = 0) -> Evidence:
    """Estimate from a seeded sample of weights, the same ones in every snapshot.

    Reads about a megabyte of each file. With too little to go by, the movement is taken to be
    constant, and ``remarks`` says so.
    """
    mean_square = float(snapshots[-1].statistics["mean_square"])
    noise = np.array(
        [
            s.statistics["rounding_square"] + _FLOAT32_ROUNDING * s.statistics["mean_square"]
            for s in snapshots
        ]
    )
    t_last = float(snapshots[-1].t)
    if len(snapshots) < 2:
        remark = "one snapshot: the movement of the weights is unknown, no error is predicted"
        return Evidence(Movement.constant(t_last, np.nan), noise, mean_square, (remark,))
    sample = sample_weights(snapshots, seed)
    remarks = []
    if sample.shape[1] < _MIN_SAMPLE:
        remarks.append(f"only {sample.shape[1]} weights: the predicted error is a rough guess")
    inputs = [(float(s.t), s.profile) for s in snapshots]
    first, second = neighbours(np.array([t for t, _ in inputs]))
    distances = np.array(
        [
            sum_of_squares(sample[i] - sample[j]) / sample.shape[1]
            for i, j in zip(first, second, strict=True)
        ]
    )
    movement = fit_movement(inputs, (first, second), distances, noise)
    if not movement.rate.any():
        remarks.append("the weights do not differ between snapshots: no error is expected")
    return Evidence(movement, noise, mean_square, tuple(remarks))


def sample_weights(snapshots: Sequence[Snapshot], seed: int = 0) -> NDArray[Any]:
    """The same seeded sample of averaged weights from every snapshot.

    Short runs of neighbouring weights, spread evenly over all tensors by size.

    Returns:
        ``[snapshots, sample]`` float32.
    """
    names = list(snapshots[0].averages)
    counts = np.array([snapshots[0].entries[name].count for name in names])
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    size = min(SAMPLE_SIZE, _SAMPLE_BYTES // (4 * len(snapshots)))
    if total <= size:
        starts = np.arange(0, total, _RUN)
    else:
        # One run from each of equal strata, at a random place in it.
        number = max(size // _RUN, 1)
        stratum = total / number
        offsets = np.random.default_rng(seed).uniform(0, max(stratum - _RUN, 0), number)
        starts = (np.arange(number) * stratum + offsets).astype(np.int64)

    pieces: list[tuple[str, int, int]] = []  # name, first element, number of elements
    for start in starts.tolist():
        stop = min(start + _RUN, total)
        k = int(np.searchsorted(ends, start, "right"))
        while start < stop:
            end = min(stop, int(ends[k]))
            if end > start:
                pieces.append((names[k], start - int(ends[k] - counts[k]), end - start))
            start, k = end, k + 1

    out = np.empty((len(snapshots), sum(size for _, _, size in pieces)), np.float32)
    for row, snapshot in zip(out, snapshots, strict=True):
        with snapshot.opened() as file:
            done = 0
            for name, start, size in pieces:
                entry = snapshot.entries[name]
                item = ITEM_SIZE[entry.dtype]
                raw = np.empty(size * item, np.uint8)
                snapshot.read_bytes(file, entry.offset + start * item, raw)
                decode_into(raw, entry.dtype, row[done : done + size])
                done += size
    return out
