"""How good are a network's images? One protocol for every set of weights of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reference_model.classifier import ClassifierConfig, cached_classifier
from reference_model.configs import TrainConfig
from reference_model.data import Dataset, load_dataset
from reference_model.encoders import PIXELS, Encoder, make_encoder
from reference_model.folding import folded_weights
from reference_model.metrics import FeatureStatistics, frechet_distance, mean_and_error
from reference_model.protocol import Protocol
from reference_model.sampler import evaluating, generate_images


@dataclass(frozen=True)
class Score:
    """Measurements of one set of weights, one number for each repeat.

    Attributes:
        distances: Fréchet distance to the held-out images; lower is better.
        agreement: Fraction of images that the classifier reads as the class asked for.
    """

    distances: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def distance(self) -> float:
        """Mean distance."""
        return mean_and_error(self.distances)[0]

    @property
    def error(self) -> float:
        """Standard error of the mean distance; NaN for a single repeat."""
        return mean_and_error(self.distances)[1]


class Pixels(NamedTuple):
    """Images, uint8 ``[N, C, H, W]``, and their classes, int64 ``[N]``."""

    images: Tensor
    labels: Tensor


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


class Judge:
    """Compares images with a data set's held-out images, in a classifier's feature space.

    Args:
        config: The run's config: its data set, and how pixels become network input.
        protocol: What is generated and how.
        cache_dir: Where the classifier is kept once trained.
        classifier: How the classifier is built and trained.
        progress: Whether to show a progress bar if the classifier must be trained.

    Attributes:
        encoder: Turns network output into pixels.
        digest: Identifies classifier and training data; scores under another are not comparable.
        accuracy: Of the classifier on the held-out images.
    """

    def __init__(
        self,
        config: TrainConfig,
        protocol: Protocol,
        cache_dir: str | Path,
        *,
        classifier: ClassifierConfig | None = None,
        progress: bool = True,
    ) -> None:
        classifier = classifier or ClassifierConfig()
        if protocol.images <= classifier.num_features:
            # Refused by the distance too, but after minutes of training and sampling.
            raise ValueError(
                f"a Fréchet distance of {classifier.num_features} features needs at least "
                f"{classifier.num_features + 1} images in each repeat (got {protocol.images})"
            )
        self.protocol = protocol
        self.encoder = make_encoder(config.encoder, config.vae)
        self._train = self._pixels(load_dataset(config.data, "train", held_out=config.held_out))
        held_out = load_dataset(config.data, "held_out", held_out=config.held_out)
        self._held_out = self._pixels(held_out)
        self.num_classes = held_out.num_classes
        if self.num_classes == 0:
            raise ValueError(
                f"{config.data} has no classes, and this measure is a classifier's; give the "
                "images classes"
            )
        self._classifier, self.digest = cached_classifier(
            classifier, self._train.images, self._train.labels, cache_dir, progress=progress
        )
        self.accuracy = self._classifier.accuracy(self._held_out.images, self._held_out.labels)
        self._reference = self._statistics(self._classifier.describe(self._held_out.images)[0])

    def describe(self) -> dict[str, Any]:
        """What the numbers rest on, as plain data for reports."""
        return {
            "digest": self.digest,
            "features": self._reference.dim,
            "accuracy": self.accuracy,
            "train_images": len(self._train.images),
            "held_out_images": len(self._held_out.images),
        }

    def judge(self, images: Tensor, classes: Tensor) -> tuple[float, Tensor]:
        """Compare one set of images with the held-out ones.

        Args:
            images: uint8 ``[N, C, H, W]``, N above the number of features.
            classes: The class that each was meant to show, int64 ``[N]``.

        Returns:
            The Fréchet distance, and the class as which each is read, int64 ``[N]``.
        """
        features, read_as = self._classifier.describe(images)
        if len(classes) != len(images):
            raise ValueError(f"{len(images)} images with {len(classes)} classes")
        return frechet_distance(self._statistics(features), self._reference), torch.from_numpy(
            read_as
        )

    def score(
        self,
        net: Any,
        on_repeat: Callable[[Tensor, Tensor], object] = lambda images, read: None,
        **sampler_options: Any,
    ) -> Score:
        """Generate images by the protocol and measure them.

        Args:
            net: A network as `generate_images` takes it.
            on_repeat: Called after each repeat with its images, uint8 ``[N, C, H, W]``, and
                the classes that they are read as, int64 ``[N]``.
            **sampler_options: As `image_batches` takes them: guidance, for example.
        """
        protocol = self.protocol
        classes = torch.tensor(protocol.classes(self.num_classes))
        distances, agreement = [], []
        for repeat in range(protocol.repeats):
            images = generate_in_parallel(
                net, protocol, repeat, classes, self.encoder, **sampler_options
            )
            distance, read_as = self.judge(images, classes)
            distances.append(distance)
            agreement.append(float((read_as == classes).double().mean()))
            on_repeat(images, read_as)
        return Score(tuple(distances), tuple(agreement))

    def score_real(self) -> Score:
        """Score real training images in place of generated ones: what a perfect model would get.

        It is not zero: both sets are finite. Each repeat draws as many images, as evenly over the
        classes, as a repeat of :meth:`score` generates; fewer where the data set has not as many.
        """
        distances, agreement = [], []
        labels = self._train.labels.numpy()
        members = [np.flatnonzero(labels == c) for c in range(self.num_classes)]
        each = min(self.protocol.images // self.num_classes, min(map(len, members)))
        for repeat in range(self.protocol.repeats):
            rng = np.random.default_rng((self.protocol.first_seed, repeat))
            drawn = np.concatenate([rng.permutation(of_class)[:each] for of_class in members])
            chosen = torch.from_numpy(drawn)
            classes = self._train.labels[chosen]
            distance, read_as = self.judge(self._train.images[chosen], classes)
            distances.append(distance)
            agreement.append(float((read_as == classes).double().mean()))
        return Score(tuple(distances), tuple(agreement))

    def real_images(self, classes: Sequence[int]) -> Tensor:
        """Held-out images of these classes, in turn: uint8 ``[len(classes), C, H, W]``."""
        labels = self._held_out.labels.numpy()
        members = {c: np.flatnonzero(labels == c) for c in set(classes)}
        used = dict.fromkeys(members, 0)
        chosen = []
        for c in classes:
            chosen.append(members[c][used[c] % len(members[c])])
            used[c] += 1
        return self._held_out.images[torch.tensor(chosen)]

    def _pixels(self, dataset: Dataset) -> Pixels:
        """All images of a data set, latents decoded."""
        images = dataset.read()
        if images.is_floating_point():
            batches = images.split(self.protocol.batch_size)
            decoded = [self.encoder.decode(self.encoder.encode(z)) for z in batches]
            images = torch.cat(decoded)
        return Pixels(images, dataset.labels)

    def _statistics(self, features: Any) -> FeatureStatistics:
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features)
        return statistics
