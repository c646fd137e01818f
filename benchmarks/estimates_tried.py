"""What was tried to estimate movement better, and what it gained: the evidence for leaving it out.

On the training runs of ``reconstruct_accuracy.py``, with what its folder keeps: an estimate for
each tensor of its own (small ones together), and one more pair of snapshots early in training.

    python -m benchmarks.estimates_tried --dir FOLDER [--runs ...]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import harness
from benchmarks.reconstruct_accuracy import UNSTORED, geometric_mean
from benchmarks.trajectories import CANDIDATES, TARGETS, TRACKS, Recording
from posthoc_ema import PowerFunction, SnapshotStore, reconstruct
from posthoc_ema.snapshots import AverageSource, RunIdentity

TIMES = (8, 16, 32)
ENCODINGS = ("float16", "float32")
ALONE = 512  # weights that a tensor needs for an estimate of its own


def squared_errors(
    recording: Recording, names: Sequence[str], places: Iterable[int], encoding: str
) -> NDArray[np.float64]:
    """``[targets]`` sums over the weights of some tensors, from a store of these alone."""
    run = RunIdentity("benchmark", "steps", "numpy", 1)
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(folder)
        for k in places:
            for j, sigma_rel in enumerate(TRACKS):
                tensors = recording.split(recording.tracks[k, j].astype(np.float32))
                sources = [
                    AverageSource(n, tensors[n].shape, "F32", "F32", partial(_flat, tensors[n]))
                    for n in names
                ]
                profile = PowerFunction(sigma_rel)
                store.write(run, int(recording.times[k]), profile, sources, encoding=encoding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = reconstruct(store, UNSTORED, framework="numpy", progress=False)
    squares = []
    for result, sigma_rel in zip(made, UNSTORED, strict=True):
        true = recording.split(recording.true[-1, TARGETS.index(sigma_rel)])
        squares.append(sum(float(((result.params[n] - true[n]) ** 2).sum()) for n in names))
    return np.array(squares)


def _flat(values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [values.ravel()]


def gains(recording: Recording, number: int, encoding: str) -> list[NDArray[np.float64]]:
    """Error of one estimate for all tensors over that of each alternative, for each target."""
    names = list(recording.shapes)
    step = CANDIDATES // number
    places = range(step - 1, CANDIDATES, step)
    usual = squared_errors(recording, names, places, encoding)
    alone = [[n] for n in names if np.prod(recording.shapes[n]) >= ALONE]
    together = [n for n in names if [n] not in alone]
    groups = [*alone, together] if together else alone
    each = sum(squared_errors(recording, group, places, encoding) for group in groups)
    early = squared_errors(recording, names, [0, *places], encoding)
    return [np.sqrt(usual / each), np.sqrt(usual / early)]


def main() -> None:
    from benchmarks.training_runs import RUNS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="as of reconstruct_accuracy")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.runs:
        recording = Recording.of(RUNS[name], arguments.dir)
        for encoding in ENCODINGS:
            for number in TIMES:
                each, early = gains(recording, number, encoding)
                rows.append(
                    [
                        name,
                        encoding,
                        number,
                        f"{geometric_mean(each):.3f} ({each.min():.2f} … {each.max():.2f})",
                        f"{geometric_mean(early):.3f}",
                        f"{early[-1]:.2f}",
                    ]
                )
                print(rows[-1], flush=True)
    head = ["run", "encoding", "times", "an estimate for each tensor", "early snapshots"]
    print(harness.table([*head, f"at {UNSTORED[-1]:g}"], rows))


if __name__ == "__main__":
    main()
