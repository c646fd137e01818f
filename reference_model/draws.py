"""What is drawn for the images of a step: noise levels, noise, and seeds of their dropout.

It follows from the run's seed and the images' numbers, and not from who trains on them: how a
step is split over processes and micro-batches makes no difference, and a resumed run repeats it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference_model.distributed import Processes
from reference_model.loss import EDM2Loss

_DROPOUT = 2
"""Sets the seeds of dropout apart from those of noise."""


class Draws(NamedTuple):
    """Draws for the images that one process has in a step.

    Attributes:
        sigma: Noise level of each image, `[B]`.
        noise: Noise of unit variance, `[B, C, H, W]`.
        dropout_seeds: A seed for each image, B numbers.
    """

    sigma: Tensor
    noise: Tensor
    dropout_seeds: list[int]


def draw(
    loss_fn: EDM2Loss,
    shape: tuple[int, int, int],
    nimg: int,
    batch_size: int,
    seed: int,
    processes: Processes,
) -> Draws:
    """Draw for images `nimg` to `nimg + batch_size` of a run, and keep this process's share.

    Every process draws for all: that costs less than to agree otherwise.

    Args:
        loss_fn: Knows the distribution of noise levels.
        shape: Channels, height and width of the network input.
        nimg: Images seen before the step.
        batch_size: Images of the step, of all processes.
        seed: Seed of the run.
        processes: Who trains; each takes every `count`-th image, as `Dataset.stream` does.

    Returns:
        The draws, on the device of the process.
    """
    generator = torch.Generator(processes.device).manual_seed(iteration_seed(seed, nimg))
    sigma, noise = loss_fn.draw((batch_size, *shape), generator, processes.device)
    seeds = np.random.SeedSequence((seed, nimg, _DROPOUT)).generate_state(batch_size, np.uint64)
    own = slice(processes.rank, None, processes.count)
    return Draws(sigma[own], noise[own], (seeds >> 1)[own].tolist())


def iteration_seed(seed: int, nimg: int) -> int:
    """Mix run seed and images seen into a seed for torch, alike on every machine."""
    return int(np.random.SeedSequence((seed, nimg)).generate_state(1, np.uint64)[0] >> 1)
