"""A data set as people see it: pixels of all its images, latents decoded, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from reference_model.data import Dataset
from reference_model.encoders import PIXELS, Encoder
from reference_model.feature_set import FeatureSet
from reference_model.features import FeatureNetwork

BATCH_SIZE = 500
"""Images read, and latents decoded, at once."""

IN_MEMORY = 60_000
"""A classifier is trained on at most so many images, and on at most `BYTES_IN_MEMORY`."""

BYTES_IN_MEMORY = 1 << 30

FINGERPRINT_BYTES = 64 << 20
"""Sets up to this size are identified by all of their pixels, larger ones by as many."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pixels of one half of a data set, or of any other set of images.

    Args:
        dataset: The images or latents.
        encoder: Decodes latents; not needed for images.
    """

    dataset: Dataset
    encoder: Encoder = PIXELS

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        channels, height, width = self.read(np.zeros(1, np.int64)).shape[1:]
        return channels, height, width

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Return pictures by number.

        Args:
            indices: int64 `[B]`.

        Returns:
            uint8 `[B, C, H, W]`.
        """
        images = self.dataset.read(indices)
        if not images.is_floating_point():
            return images
        return self.encoder.decode(self.encoder.encode(images))

    def some(self) -> tuple[Tensor, Tensor]:
        """Return all pictures and their classes, or of a large set as many as fit in memory.

        Returns:
            uint8 `[N, C, H, W]` and int64 `[N]`.
        """
        size = int(np.prod(self.shape))
        chosen = self._evenly(max(1, min(IN_MEMORY, BYTES_IN_MEMORY // size)))
        parts = np.array_split(chosen, -(-len(chosen) // BATCH_SIZE))
        return torch.cat([self.read(p) for p in parts]), self.dataset.labels[chosen]

    def describe(
        self, network: FeatureNetwork, *, part: tuple[int, int] = (1, 1), progress: bool = False
    ) -> FeatureSet:
        """Run all pictures through a feature network.

        Args:
            network: The network.
            part: `(i, n)`: only every n-th picture, from the i-th on, `1 <= i <= n`; the parts
                that other processes describe are to be merged.
            progress: Whether to show progress.

        Returns:
            Their features.

        Raises:
            ValueError: If there is no such part.
        """
        index, parts = part
        if not 1 <= index <= parts:
            raise ValueError(f"part must be (i, n) with 1 <= i <= n (got {part})")
        features = FeatureSet(network.dim, network.name, network.digest)
        own = np.arange(index - 1, len(self), parts)
        bar = tqdm(total=len(own), desc="describe", unit="img", disable=not progress)
        with bar:
            for batch in _batches(own):
                features.update(network.describe(self.read(batch)))
                bar.update(len(batch))
        return features

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digits that change with the images or their classes."""
        shape = (len(self), *self.dataset.shape)
        sha = hashlib.sha256(f"{shape} {self.encoder}".encode())
        sha.update(self.dataset.labels.numpy().tobytes())
        count = max(1, FINGERPRINT_BYTES // int(np.prod(self.dataset.shape)))
        for batch in _batches(self._evenly(count)):
            sha.update(self.dataset.read(batch).numpy().tobytes())
        return sha.hexdigest()

    def _evenly(self, count: int) -> NDArray[np.int64]:
        """At most `count` numbers of pictures, evenly spaced."""
        count = min(count, len(self))
        return np.arange(count, dtype=np.int64) * len(self) // count


def _batches(indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), BATCH_SIZE):
        yield indices[start : start + BATCH_SIZE]
