"""How good are a network's images? One protocol for every set of weights of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reference_model.classifier import Classifier, ClassifierConfig, cached_classifier
from reference_model.configs import TrainConfig
from reference_model.data import load_dataset
from reference_model.encoders import make_encoder
from reference_model.feature_files import load_features
from reference_model.feature_set import FeatureSet
from reference_model.features import FeatureNetwork
from reference_model.held_out_loss import LOSS, LossMeter
from reference_model.metrics import frechet_distance, mean_and_error
from reference_model.parallel_generation import generate_in_parallel
from reference_model.pictures import Pictures
from reference_model.precision_recall import precision_recall
from reference_model.protocol import CLASSIFIER, HELD_OUT_IMAGES, TRAINING_IMAGES, Protocol
from reference_model.reference_images import class_cycle, draw_images, reference_features


@dataclass(frozen=True)
class Score:
    """Measurements of one set of weights, one number for each repeat.

    Attributes:
        distances: Fréchet distance to the real images; lower is better.
        agreement: Fraction of images that the classifier reads as the class asked for; empty
            where no class was asked for, and with feature networks that read none.
        more: Other measures by name: "precision" and "recall", and "held-out loss" if the
            protocol asks for it.
    """

    distances: tuple[float, ...]
    agreement: tuple[float, ...] = ()
    more: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """Mean distance."""
        return mean_and_error(self.distances)[0]

    @property
    def error(self) -> float:
        """Standard error of the mean distance; NaN for a single repeat."""
        return mean_and_error(self.distances)[1]


class Judge:
    """Compares images with real ones of a data set, in the space of a feature network.

    Args:
        config: The run's config: its data set, and how pixels become network input.
        protocol: What is generated, and with what it is compared.
        cache_dir: Where the classifier, and the features of the real images, are kept.
        classifier: How the classifier is built and trained; `None`: by the number of images.
        device: Where feature networks from files compute.
        progress: Whether to show progress of what is not in the cache.

    Attributes:
        encoder: Turns network output into pixels.
        num_classes: Number of classes of the data set; 0 if it has none.
        digest: Identifies the feature network; scores under another are not comparable.
        accuracy: Of the classifier on the held-out images; `None` without classifier.

    Raises:
        ValueError: If the feature network cannot be had, or the protocol or the data set has too
            few images for its features.
    """

    def __init__(
        self,
        config: TrainConfig,
        protocol: Protocol,
        cache_dir: str | os.PathLike[str],
        *,
        classifier: ClassifierConfig | None = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        self.protocol = protocol
        self.encoder = make_encoder(config.encoder, config.vae)
        halves = [
            Pictures(load_dataset(config.data, split, held_out=config.held_out), self.encoder)
            for split in ("train", "held_out")
        ]
        self._train, self._held_out = halves
        self.num_classes = self._held_out.dataset.num_classes
        shares = np.bincount(self._train.dataset.labels.numpy())
        self._classes = class_cycle(shares, protocol.images)
        # Here, so that what it refuses is not refused after an hour of sampling.
        self._loss = (
            LossMeter(config, protocol, self._held_out.dataset) if protocol.held_out_loss else None
        )

        self._classifier: Classifier | None = None
        self._network: FeatureNetwork
        if protocol.features == CLASSIFIER:
            if self.num_classes == 0:
                raise ValueError(
                    f"{config.data} has no classes, and this measure is a classifier's; give the "
                    "images classes, or choose other features: inception:FILE, dinov2:FOLDER or "
                    "torchscript:FILE"
                )
            classifier = classifier or ClassifierConfig.for_images(len(self._train))
            self._check_counts(classifier.num_features)
            self._classifier = cached_classifier(
                classifier, self._train, cache_dir, progress=progress
            )
            self._network = self._classifier
        else:
            self._network = load_features(protocol.features, self._held_out.shape, device)
            self._check_counts(self._network.dim)
        self.digest = self._network.digest
        self._reference = reference_features(
            protocol.reference, self._real_images, self._network, cache_dir, progress=progress
        )
        self.accuracy = self._measure_accuracy()

    def describe(self) -> dict[str, Any]:
        """What the numbers rest on, as plain data for reports.

        Returns:
            "network": name of the feature network; "digest": identifies it; "features": their
            number; "accuracy": of the classifier, `None` without; "train_images" and
            "held_out_images": sizes of the halves; "reference_images" and "reference": number
            and fingerprint of the real images that are compared with.
        """
        return {
            "network": self._network.name,
            "digest": self.digest,
            "features": self._network.dim,
            "accuracy": self.accuracy,
            "train_images": len(self._train),
            "held_out_images": len(self._held_out),
            "reference_images": len(self._reference),
            "reference": self._reference.fingerprint,
        }

    @property
    def classes(self) -> Tensor:
        """Class of each image of a repeat, int64 `[images]`; zeros where there are no classes.

        They come in turn, the same number of each; where some classes have more than twice as many
        training images as others, as often as in the data set, in a fixed random order.
        """
        return torch.from_numpy(self._classes)

    def judge(self, images: Tensor, classes: Tensor) -> tuple[float, Tensor]:
        """Compare one set of images with the real ones.

        Args:
            images: uint8 ``[N, C, H, W]``, N above the number of features.
            classes: The class that each was meant to show, int64 ``[N]``.

        Returns:
            The Fréchet distance, and the class as which each is read, int64 ``[N]``; no class is
            read without classifier.
        """
        if len(classes) != len(images):
            raise ValueError(f"{len(images)} images with {len(classes)} classes")
        features, read_as = self._look_at(images)
        return frechet_distance(features.statistics, self._reference.statistics), read_as

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
                the classes that they are read as, int64 ``[N]``, or none without classifier.
            **sampler_options: As `image_batches` takes them: guidance, for example.
        """
        protocol, classes = self.protocol, self.classes
        sets, agreement = [], []
        for repeat in range(protocol.repeats):
            images = generate_in_parallel(
                net, protocol, repeat, classes, self.encoder, **sampler_options
            )
            features, read_as = self._look_at(images)
            sets.append(features)
            if self._classifier is not None and net.config.label_dim:
                agreement.append(float((read_as == classes).double().mean()))
            on_repeat(images, read_as)
        more = {} if self._loss is None else {LOSS: self._loss.measure(net)}
        return self.score_features(sets, agreement, more)

    def score_real(self) -> Score:
        """Score real images in place of generated ones: what a perfect model would get.

        It is not zero: both sets are finite. They come from the half that is not compared with:
        training images, or with `reference="train"` held-out ones. Each repeat draws as many
        images, of the same classes, as a repeat of :meth:`score` generates; fewer where the half
        has not as many.
        """
        half = self._held_out if self.protocol.reference == TRAINING_IMAGES else self._train
        labels, sets, agreement = half.dataset.labels, [], []
        for repeat in range(self.protocol.repeats):
            rng = np.random.default_rng((self.protocol.first_seed, repeat))
            chosen = draw_images(labels.numpy(), self._classes, rng)
            features, read_as = self._look_at(half.read(chosen))
            sets.append(features)
            if self._classifier is not None:
                agreement.append(float((read_as == labels[chosen]).double().mean()))
        return self.score_features(sets, agreement)

    def describe_pictures(self, pictures: Pictures, *, progress: bool = False) -> FeatureSet:
        """Features of images that are there already, for `score_features`.

        Args:
            pictures: The images.
            progress: Whether to show progress.

        Raises:
            ValueError: If they are of another shape than the real ones.
        """
        if pictures.shape != self._held_out.shape:
            raise ValueError(
                f"{pictures.dataset.source.where} has images of shape {pictures.shape}, and the "
                f"real ones are of shape {self._held_out.shape} (channels, height, width)"
            )
        return pictures.describe(self._network, progress=progress)

    def score_features(
        self,
        sets: Sequence[FeatureSet],
        agreement: Iterable[float] = (),
        more: Mapping[str, tuple[float, ...]] | None = None,
    ) -> Score:
        """Compare features with those of the real images, each set as one repeat.

        Args:
            sets: Features of this judge's network.
            agreement: Of each repeat, where a classifier has read classes.
            more: Other measures to include.

        Raises:
            ValueError: If a set is too small, of another network, or of another size than the
                first: distances of unequal sizes cannot be compared.
        """
        for features in sets:
            self._reference.check_network(features.network, features.digest)
            if len(features) != len(sets[0]):
                raise ValueError(
                    f"the sets have {len(sets[0])} and {len(features)} images; the fewer images, "
                    "the larger the distance: give all sets the same number"
                )
        real = self._reference
        distances = [frechet_distance(s.statistics, real.statistics) for s in sets]
        pairs = [precision_recall(real.sample, s.sample) for s in sets]
        return Score(
            tuple(distances),
            tuple(agreement),
            {
                "precision": tuple(p.precision for p in pairs),
                "recall": tuple(p.recall for p in pairs),
                **(more or {}),
            },
        )

    def real_images(self, classes: Sequence[int]) -> Tensor:
        """Real images of these classes, in turn: uint8 ``[len(classes), C, H, W]``.

        They are held-out ones, or training images of classes that have no held-out one; without
        classes, the first held-out ones.
        """
        used: dict[int, int] = {}
        chosen = []
        for c in classes:
            half, members = self._members(c)
            chosen.append(half.read(members[[used.get(c, 0) % len(members)]]))
            used[c] = used.get(c, 0) + 1
        return torch.cat(chosen)

    def _members(self, label: int) -> tuple[Pictures, NDArray[np.int64]]:
        """Images of a class, and the half that they are in."""
        for half in (self._held_out, self._train):
            members = np.flatnonzero(half.dataset.labels.numpy() == label)
            if len(members):
                return half, members
        raise ValueError(f"the data set has no image of class {label}")

    @property
    def _real_images(self) -> Pictures:
        return self._train if self.protocol.reference == TRAINING_IMAGES else self._held_out

    def _look_at(self, images: Tensor) -> tuple[FeatureSet, Tensor]:
        """Features of images, and the classes as which the classifier, if any, reads them."""
        features = FeatureSet(self._network.dim, self._network.name, self.digest)
        read_as = np.empty(0, np.int64)
        if self._classifier is not None:
            vectors, read_as = self._classifier.read(images)
        else:
            vectors = self._network.describe(images)
        features.update(vectors)
        return features, torch.from_numpy(read_as)

    def _measure_accuracy(self) -> float | None:
        if self._classifier is None:
            return None
        images, labels = self._held_out.some()
        return float((self._classifier.read(images)[1] == labels.numpy()).mean())

    def _check_counts(self, dim: int) -> None:
        """Refuse what the distance would refuse too, but after minutes or hours of work."""
        if self.protocol.images <= dim:
            raise ValueError(
                f"a Fréchet distance of {dim} features needs at least {dim + 1} images in each "
                f"repeat (got {self.protocol.images})"
            )
        real = len(self._real_images)
        if self.protocol.reference in (HELD_OUT_IMAGES, TRAINING_IMAGES) and real <= dim:
            raise ValueError(
                f"a Fréchet distance of {dim} features needs at least {dim + 1} real images (got "
                f"{real} as {self.protocol.reference} ones); compare with more: "
                "--reference train, or a file of `statistics`"
            )
