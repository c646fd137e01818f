"""Snapshots of a made-up training run, in this library's format and in that of its peers.

The weights walk at random along some directions, and snapshots hold their true averages. Files
are kept and reused: writing gigabytes takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posthoc_ema import PowerFunction, SnapshotStore
from posthoc_ema.snapshots import AverageSource, RunIdentity

SIGMA_RELS = (0.05, 0.10)
_INTERVAL = 1000  # steps between snapshots
_DIRECTIONS, _SPEED = 16, 0.002
_DONE = "complete"


@dataclass(frozen=True)
class MadeRun:
    """What to make.

    Attributes:
        times: Number of snapshot times; each has one snapshot for each of two tracks.
        parameters: Number of weights.
        tensors: Number of tensors that they are divided into.
        encoding: ``"float32"`` or ``"float16"``.
        framework: What the snapshots say wrote them.
    """

    times: int
    parameters: int
    tensors: int
    encoding: str
    framework: str = "torch"

    @property
    def size(self) -> int:
        """Weights of one tensor."""
        return self.parameters // self.tensors

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [f"layers.{k}.weight" for k in range(self.tensors)]

    def snapshots(self) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Time, track and the first tensor; tensor ``k`` is that one rolled by ``k``."""
        generator = np.random.default_rng(0)
        shape = (1 + _DIRECTIONS, self.size)
        base = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        steps = self.times * _INTERVAL
        walk = generator.standard_normal((steps, _DIRECTIONS)).cumsum(axis=0) * _SPEED
        times = np.arange(steps + 1)
        for end in range(_INTERVAL, steps + 1, _INTERVAL):
            for track, sigma_rel in enumerate(SIGMA_RELS):
                cumulative = PowerFunction(sigma_rel).cumulative(times, end)
                place = np.diff(cumulative) @ walk
                yield end, track, base[0] + place.astype(np.float32) @ base[1:]

    def store(self, folder: Path) -> Path:
        """The run as this library writes it; made if it is not there."""
        path = folder / f"ours-{self._label()}"
        if not (path / _DONE).exists():
            store = SnapshotStore(path)
            run = RunIdentity("benchmark", "steps", self.framework, 1)
            for t, track, values in self.snapshots():
                sources = [
                    AverageSource(
                        name,
                        (self.size,),
                        "F32",
                        "F32",
                        lambda values=values, k=k: [np.roll(values, k)],
                    )
                    for k, name in enumerate(self.names)
                ]
                profile = PowerFunction(sigma_rel=SIGMA_RELS[track])
                store.write(run, t, profile, sources, encoding=self.encoding)
            (path / _DONE).touch()
        return path

    def checkpoints(self, folder: Path) -> Path:
        """The same weights as ema-pytorch and pytorch-posthoc-ema keep them: ``track.step.pt``."""
        import torch

        path = folder / f"peers-{self._label()}"
        if not (path / _DONE).exists():
            path.mkdir(parents=True, exist_ok=True)
            dtype = getattr(torch, self.encoding)
            for t, track, values in self.snapshots():
                state = {
                    f"ema_model.{name}": torch.from_numpy(np.roll(values, k)).to(dtype)
                    for k, name in enumerate(self.names)
                }
                # Tensors of the tracker itself; both libraries expect them.
                state |= {"initted": torch.tensor(True), "step": torch.tensor(float(t))}
                torch.save(state, path / f"{track}.{t}.pt")
            (path / _DONE).touch()
        return path

    def _label(self) -> str:
        return f"{self.times}x2x{self.parameters}-{self.encoding}-{self.framework}"


def files_of(path: Path) -> list[Path]:
    """The files of a run that hold weights."""
    return sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt"))


def read_all(path: Path) -> int:
    """Merely read every byte of a run, one file after the other; return their number."""
    buffer, total = bytearray(1 << 20), 0
    for file_path in files_of(path):
        with open(file_path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def drop_from_cache(path: Path) -> None:
    """Tell the system that the files of a run will not be needed: room for the next ones."""
    for file_path in files_of(path):
        descriptor = os.open(file_path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
