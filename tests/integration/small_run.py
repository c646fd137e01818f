"""A small training run on numpy arrays, for tests of what reads snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from posthoc_ema import EMA

STEPS = 320


def write_run(folder: Path, *, every: float = 20, seed: int = 0, **options: Any) -> Path:
    """Weights on a random walk of slowing pace, 320 updates; returns the folder of snapshots.

    1,100 averaged weights in two tensors and one integer buffer.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "net.weight": rng.standard_normal((33, 30)).astype(np.float32),
        "net.bias": rng.standard_normal(110).astype(np.float32),
        "steps": np.array(0),
    }
    ema = EMA(snapshots=folder, every=every, **options)
    for step in range(1, STEPS + 1):
        pace = 0.02 * min(1, (40 / step) ** 0.5)
        for name in ("net.weight", "net.bias"):
            weights[name] += pace * rng.standard_normal(weights[name].shape).astype(np.float32)
        weights["steps"] = np.array(step)
        ema.update(weights)
    return folder


def flip_a_byte(path: Path, place: int = -5) -> None:
    """Damage a file without changing its length; by default among the values."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
