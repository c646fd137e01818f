"""Dropout whose mask for an image depends on that image's seed, not on its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ImageDropout(nn.Dropout):
    """Dropout that draws each image's mask from a generator of its own, under `image_seeds`.

    How a batch is split then does not matter. Elsewhere it draws as `nn.Dropout` does.
    """

    generators: Sequence[torch.Generator] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, ...]` to the same shape."""
        if not self.training or self.p == 0 or self.generators is None:
            return super().forward(x)
        # Always in the same order of elements, whatever the strides: that in which activations
        # are stored, pixels before channels.
        keep = x.new_empty(x.movedim(1, -1).shape)
        for mask, generator in zip(keep, self.generators, strict=True):
            mask.bernoulli_(1 - self.p, generator=generator)
        return (x * keep.movedim(-1, 1)).mul_(1 / (1 - self.p))


@contextmanager
def image_seeds(net: nn.Module, seeds: Sequence[int]) -> Iterator[None]:
    """Let all dropout of a network depend on one seed for each image of the batch.

    Args:
        net: The network; its `ImageDropout` layers share one generator for each image, in the
            order in which they are used.
        seeds: A seed for each image, B numbers in [0, 2⁶³).
    """
    layers = [m for m in net.modules() if isinstance(m, ImageDropout) and m.p > 0]
    if layers:
        device = next(net.parameters()).device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        for layer in layers:
            layer.generators = generators
    try:
        yield
    finally:
        for layer in layers:
            layer.generators = None
