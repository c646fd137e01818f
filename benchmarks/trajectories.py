"""What a training run leaves behind for judging reconstructions: true averages, and tracks.

The trajectory itself is never stored. While training, averages of all lengths are accumulated in
float64; those of the two tracks are kept at 64 evenly spaced times, all of them at the end and at
one time in between. A snapshot store of any number of times and any encoding is written from that.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.training_runs import TrainingRun, flat_weights
from posthoc_ema import PowerFunction, SnapshotStore
from posthoc_ema.snapshots import AverageSource, RunIdentity

T = TypeVar("T")

TRACKS = (0.05, 0.10)
TARGETS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.10, 0.13, 0.16, 0.20, 0.25)
CANDIDATES = 64
MIDDLE = 0.7  # of training; not a snapshot time


class Averages:
    """Power-function averages of vectors of weights, exact in float64.

    Vectors are taken in blocks: with F the cumulative profile at the block's end t and t₀ its
    start, the average becomes F(t₀)·average + Σ (F(t_i) - F(t_{i-1}))·θ_i, one matrix product.

    Args:
        sigma_rels: EMA lengths.
    """

    def __init__(self, sigma_rels: tuple[float, ...]) -> None:
        self.profiles = [PowerFunction(sigma_rel) for sigma_rel in sigma_rels]
        self._values: NDArray[np.float64] | float = 0.0
        self._times, self._block = [0.0], list[NDArray[np.float64]]()

    def add(self, t: float, weights: NDArray[np.float64]) -> None:
        """The weights in force from the last time added until ``t``."""
        self._times.append(t)
        self._block.append(weights)
        if len(self._block) == 64:
            self.values()

    def values(self) -> NDArray[np.float64]:
        """``[averages, weights]`` at the last time added."""
        if self._block:
            times = np.array(self._times)
            cumulative = np.stack([p.cumulative(times, times[-1]) for p in self.profiles])
            block = np.diff(cumulative, axis=1) @ np.stack(self._block)
            self._values = cumulative[:, :1] * self._values + block
            self._times, self._block = self._times[-1:], []
        return np.array(self._values)


@dataclass(frozen=True, eq=False)
class Recording:
    """What is known of one run.

    Attributes:
        shapes: Of the parameters, by name, in the model's order.
        times: ``[64]`` candidate snapshot times, in steps.
        tracks: ``[64, 2, weights]`` averages of the two tracks there.
        ends: ``[2]`` middle and end of training, in steps.
        true: ``[2, 13, weights]`` averages of all target lengths there.
    """

    shapes: dict[str, tuple[int, ...]]
    times: NDArray[np.int64]
    tracks: NDArray[np.float64]
    ends: NDArray[np.int64]
    true: NDArray[np.float64]

    @classmethod
    def of(cls, run: TrainingRun, folder: Path) -> Recording:
        """Read it from the folder, or train."""
        path = folder / f"{run.name}-{run.steps}.npz"
        if not path.exists():
            recording = record(run)
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.tmp")
            with open(partial, "wb") as file:
                np.savez(
                    file,
                    times=recording.times,
                    tracks=recording.tracks,
                    ends=recording.ends,
                    true=recording.true,
                )
            os.replace(partial, path)
        shapes = {n: tuple(p.shape) for n, p in run.make().model.named_parameters()}
        with np.load(path) as stored:
            return cls(shapes, *(stored[key] for key in ("times", "tracks", "ends", "true")))

    def split(self, vector: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """A vector of all weights as tensors by name."""
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        pieces = np.split(vector, np.cumsum(sizes)[:-1])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def join(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """Tensors by name as a vector of all weights."""
        return np.concatenate([tensors[name].ravel() for name in self.shapes], dtype=np.float64)

    def write(self, folder: Path, number: int, encoding: str) -> SnapshotStore:
        """Write snapshots at ``number`` evenly spaced times, in order, as a run would have."""
        store = SnapshotStore(folder)
        run = RunIdentity("benchmark", "steps", "numpy", 1)
        step = CANDIDATES // number
        for k in range(step - 1, CANDIDATES, step):
            for j, sigma_rel in enumerate(TRACKS):
                # Averages live in float32 whatever the encoding.
                tensors = self.split(self.tracks[k, j].astype(np.float32))
                sources = [
                    AverageSource(
                        name, values.shape, "F32", "F32", lambda values=values: [values.ravel()]
                    )
                    for name, values in tensors.items()
                ]
                profile = PowerFunction(sigma_rel)
                store.write(run, int(self.times[k]), profile, sources, encoding=encoding)
        return store


def record(run: TrainingRun) -> Recording:
    """Train once."""
    if run.steps % CANDIDATES:
        raise ValueError(f"steps must be a multiple of {CANDIDATES} (got {run.steps})")
    times = np.arange(1, CANDIDATES + 1) * (run.steps // CANDIDATES)
    ends = np.array([round(MIDDLE * run.steps), run.steps])
    averages = Averages(TARGETS)
    columns = [TARGETS.index(sigma_rel) for sigma_rel in TRACKS]
    tracks, true = [], []
    for step, task in run.train():
        averages.add(step, flat_weights(task.model))
        if step in times:
            tracks.append(averages.values()[columns])
        if step in ends:
            true.append(averages.values())
    shapes = {name: tuple(p.shape) for name, p in task.model.named_parameters()}
    return Recording(shapes, times, np.stack(tracks), ends, np.stack(true))


def of_each_run(
    measure: Callable[..., T],
    names: Sequence[str],
    folder: Path | None,
    steps: int | None,
    workers: int | None,
) -> list[T]:
    """What a function finds of each training run, in several processes.

    Args:
        measure: Takes a name of ``training_runs.RUNS``, and ``folder=`` and ``steps=``.
        names: Of the runs.
        folder: Where recordings are kept; None for one that is deleted.
        steps: Fewer than the runs have, to see that it works.
        workers: Number of processes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        one = partial(measure, folder=folder or Path(scratch), steps=steps)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            return list(pool.map(one, names))
