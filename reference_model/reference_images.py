"""The real images that generated ones are compared with: which, of what classes, their features."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.feature_set import FeatureSet
from reference_model.features import FeatureNetwork
from reference_model.pictures import Pictures
from reference_model.protocol import HELD_OUT_IMAGES, TRAINING_IMAGES

UNEVEN = 2
"""Classes count as equally frequent unless one has more than so many times another's images."""


def reference_features(
    reference: str,
    pictures: Pictures,
    network: FeatureNetwork,
    cache_dir: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> FeatureSet:
    """Load the features of the real images, or compute and store them.

    Args:
        reference: `Protocol.reference`: if it is a file, this is read and nothing computed.
        pictures: The real images.
        network: The feature network.
        cache_dir: Folder of the cached file, created if missing.
        progress: Whether to show progress if they must be computed.

    Returns:
        Their features.

    Raises:
        ValueError: If the file cannot be read, or is of another network.
    """
    empty = FeatureSet(network.dim, network.name, network.digest)
    if reference not in (HELD_OUT_IMAGES, TRAINING_IMAGES):
        features = FeatureSet.load(Path(reference).expanduser())
        try:
            features.check_network(empty.network, empty.digest)
        except ValueError as error:
            raise ValueError(f"{reference} cannot be compared with: {error}") from error
        return features
    key = hashlib.sha256(f"{network.name} {network.digest} {pictures.fingerprint}".encode())
    path = Path(cache_dir) / f"reference-{key.hexdigest()[:12]}.npz"
    if path.exists():
        return FeatureSet.load(path)
    features = pictures.describe(network, progress=progress)
    features.save(path)
    return features


def class_cycle(shares: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Choose the classes of generated images.

    Args:
        shares: Training images of each class, `[num_classes]`; at least one is above 0.
        count: Number of images.

    Returns:
        Classes, int64 `[count]`: all that there are, in turn. If one of them has more than `UNEVEN`
        times as many images as another, as many of each as its share, rounded, in a fixed random
        order: with equal numbers, the distance would be one between different mixtures.
    """
    present = np.flatnonzero(shares)
    if shares[present].max() <= UNEVEN * shares[present].min():
        return np.resize(present, count)
    ends = np.round(np.cumsum(shares) * count / shares.sum()).astype(np.int64)
    classes = np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0))
    return np.random.default_rng(0).permutation(classes)


def draw_images(
    labels: NDArray[np.int64],
    classes: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw real images without replacement, mixed as generated ones are.

    Args:
        labels: Class of each image, `[N]`.
        classes: Those of the generated images, `[count]`.
        rng: Source of random numbers.

    Returns:
        Numbers of images, int64; fewer than `classes` where there are not as many.
    """
    wanted = np.bincount(classes, minlength=int(labels.max()) + 1)
    members = [np.flatnonzero(labels == c) for c in range(len(wanted))]
    # As many of all as the scarcest class allows keep the mixture.
    scale = min([1.0, *(len(m) / w for m, w in zip(members, wanted, strict=True) if w and len(m))])
    drawn = [
        rng.permutation(m)[: int(w * scale)] for m, w in zip(members, wanted, strict=True) if w
    ]
    return np.concatenate(drawn)
