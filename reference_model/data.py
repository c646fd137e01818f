"""Training data: the embedded digits, the order in which they are seen, pixels as numbers.

The digits are the 1,797 images of the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), as scikit-learn's
`load_digits` has them: 8×8 pixels, each the number of ink dots, 0 to 16, in a 4×4 cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

HELD_OUT_FRACTION = 0.25
SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Images with classes, in memory.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: Class of each image, int64 `[N]`.
        num_classes: Number of classes.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return images `[B, C, H, W]` as float32 in [−1, 1] and one-hot classes `[B, K]`."""
        chosen = torch.from_numpy(indices)
        labels = F.one_hot(self.labels[chosen], self.num_classes).float()
        return encode_pixels(self.images[chosen]), labels


def encode_pixels(images: Tensor) -> Tensor:
    """Map uint8 to float32 in [−1, 1]: x / 127.5 − 1."""
    return images.float() / 127.5 - 1


def decode_pixels(x: Tensor) -> Tensor:
    """Map [−1, 1] to uint8, rounding to nearest and clipping: inverse of `encode_pixels`."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def load_dataset(name: str, split: Literal["train", "held_out"] = "train") -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits", the one that is built in.
        split: Images to train on, or those kept apart to measure on.

    Returns:
        The data set.

    Raises:
        ValueError: If there is no data set of this name.
    """
    if name != "digits":
        problem = f"unknown data set {name!r}" if name else "no data set given"
        raise ValueError(f"{problem}; 'digits' is built in")
    images, labels = load_digits(split)
    return Dataset(images, labels, num_classes=10)


def load_digits(split: Literal["train", "held_out"] = "train") -> tuple[Tensor, Tensor]:
    """Load the embedded handwritten digits.

    Ink counts of 0 to 16 are stretched to 0 to 255 by round(255/16 · count), so that pixels
    use the range that image data uses everywhere. A quarter of each class is held out, always
    the same images.

    Args:
        split: "train" (1,345 images) or "held_out" (452 images).

    Returns:
        Images, uint8 `[N, 1, 8, 8]`, and classes, int64 `[N]`.

    Raises:
        ValueError: If `split` is neither.

    Source:
        UCI Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out' (got {split!r})")
    with resources.files("reference_model").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file)
        ink, labels = stored["images"], stored["labels"]
    held_out = _held_out(labels)
    chosen = held_out if split == "held_out" else ~held_out
    images = np.rint(ink[chosen] * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels[chosen].astype(np.int64))


def _held_out(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Choose the same fraction of each class, by a fixed seed."""
    rng = np.random.default_rng(SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) * HELD_OUT_FRACTION)]] = True
    return held_out


def sample_indices(dataset_size: int, nimg: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return which images come at positions `nimg` to `nimg + count` of an endless stream.

    The stream is one shuffle of the data set after another. It is a function of its arguments
    alone, so a run resumes from the number of images seen and stores nothing else.

    Args:
        dataset_size: Number of images N.
        nimg: Images seen so far.
        count: Images wanted.
        seed: Seed of the shuffles.

    Returns:
        Indices in `[0, N)`, int64 `[count]`.
    """
    pieces = []
    while count > 0:
        epoch, offset = divmod(nimg, dataset_size)
        piece = _shuffle(dataset_size, seed, epoch)[offset : offset + count]
        pieces.append(piece)
        nimg, count = nimg + len(piece), count - len(piece)
    return np.concatenate(pieces)


@lru_cache(maxsize=4)
def _shuffle(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of one epoch; PCG64 and SeedSequence are stable across numpy versions."""
    return np.random.default_rng((seed, epoch)).permutation(dataset_size)
