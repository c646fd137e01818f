"""A measure that needs no sampling: how well a network removes noise from held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from reference_model.configs import TrainConfig
from reference_model.data import load_dataset
from reference_model.encoders import make_encoder
from reference_model.folding import folded_weights
from reference_model.protocol import Protocol
from reference_model.sampler import evaluating

LOSS = "held-out loss"


class HeldOutLoss:
    """Mean denoising error on held-out images, weighted as in training.

    L = E[ λ(σ) ‖D(y + σ n; σ) − y‖² ] per element, ln σ ~ N(P_mean, P_std²), without the
    uncertainty that training learns. Images, noise levels and noise of a repeat are the same for
    all weights, so that differences between them vary much less than the losses; each repeat
    takes others.

    Args:
        config: The run's config: its data, and which noise levels.
        protocol: Images of a repeat, repeats, batch size and first seed.

    Source:
        Karras et al. 2022, arXiv:2206.00364, Eq. 8 and Table 1.
    """

    def __init__(self, config: TrainConfig, protocol: Protocol) -> None:
        self._config, self._protocol = config, protocol
        dataset = load_dataset(config.data, "held_out", held_out=config.held_out)
        encoder = make_encoder(config.encoder, config.vae)
        self._batches = []
        for repeat in range(protocol.repeats):
            rng = np.random.default_rng((protocol.first_seed, repeat))
            chosen = rng.permutation(len(dataset))[: protocol.images]
            for start in range(0, len(chosen), protocol.batch_size):
                indices = chosen[start : start + protocol.batch_size]
                images = encoder.encode(dataset.read(indices))
                self._batches.append((repeat, images, dataset.one_hot(indices)))

    @torch.no_grad()
    def __call__(
        self, net: Any, on_batch: Callable[[int], object] = lambda images: None
    ) -> tuple[float, ...]:
        """Measure one network.

        Args:
            net: A `Denoiser`.
            on_batch: Called after each batch with its number of images.

        Returns:
            One value for each repeat; lower is better.
        """
        config, sums = self._config, np.zeros(self._protocol.repeats)
        counts = np.zeros_like(sums)
        sigma_data = config.network.sigma_data
        generator = torch.Generator().manual_seed(self._protocol.first_seed)
        with evaluating(net), folded_weights(net):
            for repeat, images, labels in self._batches:
                levels = torch.randn(len(images), generator=generator)
                sigma = (levels * config.P_std + config.P_mean).exp()
                s = sigma.reshape(-1, 1, 1, 1)
                noise = torch.randn(images.shape, generator=generator)
                denoised = net(images + s * noise, sigma, labels if net.config.label_dim else None)
                weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
                sums[repeat] += float((weight * (denoised - images) ** 2).double().sum())
                counts[repeat] += images.numel()
                on_batch(len(images))
        return tuple((sums / counts).tolist())
