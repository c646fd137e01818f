"""The denoising loss on held-out images: a cheap criterion of little noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference_model.configs import TrainConfig
from reference_model.data import Dataset, load_dataset
from reference_model.encoders import SIGMA_DATA, Encoder, make_encoder
from reference_model.folding import folded_weights
from reference_model.metrics import mean_and_error
from reference_model.protocol import Protocol
from reference_model.sampler import SeededNoise, evaluating

LOSS = "held-out loss"
"""Name of this measure in scores and records."""

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise levels σ: about evenly spaced in log σ over those that matter to an image of σ_data 0.5."""


@dataclass(frozen=True)
class HeldOutLoss:
    """λ(σ)·‖D(y + σε; σ) − y‖² of each image at each noise level, per element of an image.

    Attributes:
        levels: Noise levels σ, `[L]`.
        per_image: Losses, float64 `[L, N]`.
    """

    levels: tuple[float, ...]
    per_image: NDArray[np.float64]

    @property
    def by_level(self) -> NDArray[np.float64]:
        """Mean over images, `[L]`."""
        return self.per_image.mean(axis=1)

    @property
    def mean(self) -> float:
        """Mean over images and levels."""
        return mean_and_error(self.per_image.mean(axis=0))[0]

    @property
    def error(self) -> float:
        """Standard error of the mean, over images.

        Most of it is common to all weights that saw the same images and noise: to compare two,
        take `difference`.
        """
        return mean_and_error(self.per_image.mean(axis=0))[1]

    def difference(self, other: HeldOutLoss) -> tuple[float, float]:
        """By how much this loss exceeds another's, and the standard error of that.

        Args:
            other: Of other weights, for the same images, noise and levels.

        Raises:
            ValueError: If they were measured at other levels, or on another number of images.
        """
        if self.levels != other.levels or self.per_image.shape != other.per_image.shape:
            raise ValueError(
                f"{len(self.levels)} levels of {self.per_image.shape[1]} images cannot be paired "
                f"with {len(other.levels)} levels of {other.per_image.shape[1]}"
            )
        return mean_and_error((self.per_image - other.per_image).mean(axis=0))


@torch.no_grad()
def loss_at_levels(
    net: Any,
    dataset: Dataset,
    encoder: Encoder,
    levels: Sequence[float] = LEVELS,
    *,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> HeldOutLoss:
    """Measure how well a network denoises images at fixed noise levels.

    Images, and the noise of each, follow from the seed alone, so that all weights see the same and
    their losses differ by what the weights do. The loss is the weighted square of Eq. 13 and 14,
    not the training loss of Eq. 21: that one divides by an uncertainty which each set of weights
    brings along, and would measure each by a scale of its own.

    Args:
        net: A `Denoiser`; in evaluation mode while this runs.
        dataset: The images, best held-out ones, with their classes if the network takes some.
        encoder: Turns them into network input: that which the network was trained with.
        levels: Noise levels σ, positive.
        count: How many of the images; `None` for all. They are drawn without replacement.
        seed: Decides which images, the latents drawn for them, and the noise: image number i gets
            that of seed + i.
        batch_size: Images denoised at once: a matter of memory and speed only.

    Returns:
        The loss of each image at each level.

    Raises:
        ValueError: If a level is not positive, there are too few images, or the network takes
            other classes than the images have.

    Source:
        Karras et al. 2024, arXiv:2312.02696, Eq. 13 and 14; λ(σ) = (σ² + σ_data²) / (σ·σ_data)².
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < level < float("inf") for level in levels):
        raise ValueError(f"noise levels must be positive numbers (got {levels})")
    count = len(dataset) if count is None else count
    if not 1 <= count <= len(dataset):
        raise ValueError(f"count must lie in 1..{len(dataset)}, the images there are (got {count})")
    label_dim = net.config.label_dim
    if label_dim and label_dim != dataset.num_classes:
        raise ValueError(
            f"the network takes {label_dim} classes, and the images have {dataset.num_classes}"
        )

    parameter = next(net.parameters())
    sigma_data = getattr(net.config, "sigma_data", SIGMA_DATA)
    per_image = np.empty((len(levels), count))
    with evaluating(net), folded_weights(net):
        for start in range(0, count, batch_size):
            batch = slice(start, min(start + batch_size, count))
            images, one_hot = dataset.stream(start, batch.stop - start, seed)
            clean = encoder.encode(images).to(parameter.device)
            labels = one_hot.to(parameter.device) if label_dim else None
            noise = SeededNoise(range(seed + start, seed + batch.stop))
            for row, level in enumerate(levels):
                noisy = clean + level * noise.randn_like(clean)
                sigmas = torch.full((len(clean),), level, device=clean.device)
                error = net(noisy, sigmas, labels).double() - clean.double()
                weight = (level**2 + sigma_data**2) / (level * sigma_data) ** 2
                per_image[row, batch] = weight * error.square().mean(dim=(1, 2, 3)).cpu().numpy()
    return HeldOutLoss(levels, per_image)


class LossMeter:
    """Measures networks of a run on its held-out images, in the repeats of a protocol.

    It needs no classes, no feature network, and of latents no autoencoder.

    Args:
        config: Of the run: its data set, and how that becomes network input.
        protocol: How many images, in how many repeats.
        dataset: The held-out images, where they are at hand.

    Raises:
        ValueError: If the run trained on all images.
    """

    def __init__(
        self, config: TrainConfig, protocol: Protocol, dataset: Dataset | None = None
    ) -> None:
        if dataset is None:
            dataset = load_dataset(config.data, "held_out", held_out=config.held_out)
        if not config.held_out and dataset.source.held_out is None:
            raise ValueError(
                f"the run trained on all of {config.data} (held_out=0): there are no held-out "
                "images to measure a loss on"
            )
        self._dataset, self._protocol = dataset, protocol
        self._encoder = make_encoder(config.encoder, config.vae)

    def measure(
        self, net: Any, on_repeat: Callable[[int], object] = lambda images: None
    ) -> tuple[float, ...]:
        """Measure the denoising error, which needs no sampling.

        Images and noise of a repeat are the same for all weights, and other ones in each repeat.

        Args:
            net: A `Denoiser`.
            on_repeat: Called after each repeat with the protocol's number of images: a repeat
                denoises about so many, at all noise levels together.

        Returns:
            `HeldOutLoss.mean` of each repeat; lower is better.
        """
        protocol = self._protocol
        count = min(-(-protocol.images // len(LEVELS)), len(self._dataset))
        losses = []
        for repeat in range(protocol.repeats):
            loss = loss_at_levels(
                net,
                self._dataset,
                self._encoder,
                count=count,
                seed=protocol.seeds(repeat).start,
                batch_size=protocol.batch_size,
            )
            losses.append(loss.mean)
            on_repeat(protocol.images)
        return tuple(losses)
