"""The images that a protocol asks for, with a batch on each CPU thread at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from reference_model.encoders import PIXELS, Encoder
from reference_model.folding import folded_weights
from reference_model.protocol import Protocol
from reference_model.sampler import evaluating, generate_images


def generate_in_parallel(
    net: Any,
    protocol: Protocol,
    repeat: int,
    classes: Tensor | None = None,
    encoder: Encoder = PIXELS,
    **sampler_options: Any,
) -> Tensor:
    """Images of one repeat, with a batch on each CPU thread at a time.

    A network of few channels leaves a second thread inside its operations nothing to do: two
    batches side by side take half the time of one after the other. The images are the same.

    Args:
        net: A network as `generate_images` takes it.
        protocol: What is generated and how.
        repeat: Which repeat, counted from 0.
        classes: Class of each image, int64 ``[images]``; not used by an unconditional network.
        encoder: Turns network output into pixels.
        **sampler_options: As `image_batches` takes them: guidance, for example.

    Returns:
        uint8 ``[images, C, H, W]``.
    """
    seeds, labels = protocol.seeds(repeat), classes if net.config.label_dim else None

    def generate(start: int) -> Tensor:
        batch = slice(start, start + protocol.batch_size)
        return generate_images(
            net,
            seeds[batch],
            None if labels is None else labels[batch],
            batch_size=protocol.batch_size,
            num_steps=protocol.num_steps,
            encoder=encoder,
            **sampler_options,
        )

    starts = range(0, len(seeds), protocol.batch_size)
    threads = torch.get_num_threads()
    if next(net.parameters()).device.type != "cpu" or threads == 1:
        return torch.cat([generate(start) for start in starts])
    nets = (net, sampler_options.get("gnet"))
    torch.set_num_threads(1)  # of each thread of the pool
    try:
        # Before the threads share them; in each sampler alone, others would find them unfolded.
        with evaluating(*nets), folded_weights(*nets), ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(generate, starts)))
    finally:
        torch.set_num_threads(threads)
