"""In which order images are seen: an endless stream that is a function of the position alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SPLIT_SEED = 0
NOISE = 1
"""Sets the seeds of latents' noise apart from those of the shuffles."""


def sample_indices(
    dataset_size: int, nimg: int, count: int, seed: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return which images come at positions `nimg` to `nimg + count` of an endless stream.

    The stream is one shuffle of the data set after another. It is a function of its arguments
    alone, so a run resumes from the number of images seen and stores nothing else. Of several
    processes each takes every `world_size`-th position, so that together they see what a single
    one would.

    Args:
        dataset_size: Number of images N.
        nimg: Images seen so far, by all processes.
        count: Images wanted, by all processes.
        seed: Seed of the shuffles.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Returns:
        Indices in `[0, N)`, int64 `[count / world_size]`.

    Raises:
        ValueError: If there is no such process.
    """
    positions = stream_positions(nimg, count, rank, world_size)
    epochs, offsets = np.divmod(positions, dataset_size)
    pieces = [
        _shuffle(dataset_size, seed, int(epoch))[offsets[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate([np.empty(0, np.int64), *pieces])


def stream_positions(
    nimg: int, count: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return the positions that one of several processes takes; arguments as `sample_indices`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1} (got {rank})")
    return np.arange(nimg + rank, nimg + count, world_size, dtype=np.int64)


def stream_noise(
    shape: tuple[int, ...], positions: NDArray[np.int64], seed: int
) -> NDArray[np.float32]:
    """Draw unit normal noise for positions of the stream, the same whoever asks for it.

    Args:
        shape: Shape of one draw.
        positions: Positions in the stream, int64 `[B]`.
        seed: Seed of the stream.

    Returns:
        float32 `[B, *shape]`.
    """
    draws = [
        np.random.default_rng((seed, int(position), NOISE)).standard_normal(shape, np.float32)
        for position in positions
    ]
    return np.stack(draws) if draws else np.empty((0, *shape), np.float32)


def held_out_members(labels: NDArray[np.integer], fraction: float) -> NDArray[np.bool_]:
    """Choose the same fraction of each class, rounded to whole images, by a fixed seed.

    Args:
        labels: Class of each image, `[N]`.
        fraction: Part of each class, from 0 to 1.

    Returns:
        Whether each image is chosen, `[N]`.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(labels), dtype=bool)
    by_class = np.argsort(labels, kind="stable")
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        chosen[rng.permutation(members)[: round(len(members) * fraction)]] = True
    return chosen


@lru_cache(maxsize=4)
def _shuffle(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of one epoch; PCG64 and SeedSequence are stable across numpy versions."""
    return np.random.default_rng((seed, epoch)).permutation(dataset_size)
