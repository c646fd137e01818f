"""What every kind of data set boils down to: numbered images, and their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Source:
    """Images or latents that are read when they are asked for.

    Attributes:
        where: Path or name, for messages.
        size: Number of images N.
        shape: Channels, height and width of an image or a latent.
        read: From indices, int64 `[B]`, to images, uint8 `[B, C, H, W]`; of latents float32
            `[B, 1, C, H, W]`, or `[B, 2, C, H, W]` with a standard deviation beside each mean.
        labels: Class of each image, int64 `[N]`; `None` if there are no classes.
        latent: Whether these are latents.
        held_out: Whether each image belongs to the set's own test set, bool `[N]`; `None` if it
            has none of its own.
    """

    where: str
    size: int
    shape: tuple[int, int, int]
    read: Callable[[NDArray[np.int64]], NDArray[Any]]
    labels: NDArray[np.int64] | None = None
    latent: bool = False
    held_out: NDArray[np.bool_] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest; 0 if there are none."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


def check_labels(labels: ArrayLike, size: int, where: str) -> NDArray[np.int64]:
    """Return labels as int64 `[size]`, or say which of them is none.

    Args:
        labels: Classes as they were stored.
        size: Number of images.
        where: File or array that they come from.

    Raises:
        ValueError: If there are more or fewer than images, or one is not an integer from 0.
    """
    stored = np.asarray(labels)
    if stored.shape != (size,):
        raise ValueError(
            f"{where} holds labels of shape {stored.shape} for {size} images; "
            "there must be one class number for each"
        )
    if not np.issubdtype(stored.dtype, np.integer):
        raise ValueError(f"{where} holds labels of type {stored.dtype}; classes are integers")
    classes = stored.astype(np.int64)
    bad = np.flatnonzero(classes < 0)
    if len(bad):
        raise ValueError(
            f"{where} gives image {bad[0]} the class {classes[bad[0]]}; classes count from 0"
        )
    return classes
