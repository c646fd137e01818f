"""Training data: one interface to every kind of data set, and the two halves of each.

Where images come from is the business of the `data_*` modules: digits that come with the package,
IDX files, folders and ZIPs, arrays. How they become network input is that of `encoders`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from reference_model.configs import DIGITS, FASHION_MNIST, HELD_OUT
from reference_model.data_arrays import holds_arrays, open_arrays
from reference_model.data_digits import open_digits
from reference_model.data_idx import find_idx, open_idx
from reference_model.data_images import open_files
from reference_model.data_order import (
    held_out_members,
    sample_indices,
    stream_noise,
    stream_positions,
)
from reference_model.data_source import Source

Split = Literal["train", "held_out"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """One half of a data set: images, uint8, or latents, float32, each with a class.

    Args:
        source: The whole set.
        members: Which of its images this half has, int64 `[N]`.
    """

    source: Source
    members: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image or a latent."""
        return self.source.shape

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the images have none."""
        return self.source.num_classes

    @cached_property
    def labels(self) -> Tensor:
        """Class of each image, int64 `[N]`; zeros if they have none."""
        if self.source.labels is None:
            return torch.zeros(len(self), dtype=torch.int64)
        return torch.from_numpy(self.source.labels[self.members])

    def read(self, indices: NDArray[np.int64] | None = None) -> Tensor:
        """Return images by number.

        Args:
            indices: int64 `[B]`; `None` for all.

        Returns:
            uint8 `[B, C, H, W]`; of latents the means, float32.

        Raises:
            ValueError: If a file cannot be read, or is of another size.
        """
        stored = self.source.read(self.members if indices is None else self.members[indices])
        return torch.from_numpy(stored[:, 0] if self.source.latent else stored)

    def stream(
        self, nimg: int, count: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return what an endless stream has at positions `nimg` to `nimg + count`.

        It is a function of its arguments alone, see `sample_indices`. Latents are drawn anew each
        time they come up: mean + std · ε, with ε from seed and position.

        Args:
            nimg: Images seen so far, by all processes.
            count: Images wanted, by all processes.
            seed: Seed of order and noise.
            rank: Number of this process, from 0.
            world_size: Number of processes.

        Returns:
            Images, uint8 `[B, C, H, W]` (latents: float32), and one-hot classes, float32 `[B, K]`.

        Raises:
            ValueError: If a file cannot be read, or is of another size.
        """
        indices = sample_indices(len(self), nimg, count, seed, rank, world_size)
        images = self.source.read(self.members[indices])
        if self.source.latent:
            # Means, and standard deviations where there are any.
            mean, std = images[:, 0], images[:, 1:]
            positions = stream_positions(nimg, count, rank, world_size)
            if std.size:
                mean = mean + std[:, 0] * stream_noise(self.shape, positions, seed)
            images = mean
        return torch.from_numpy(images), self.one_hot(indices)

    def one_hot(self, indices: NDArray[np.int64]) -> Tensor:
        """Return classes by number of the image, one-hot, float32 `[B, K]`."""
        if self.num_classes == 0:
            return torch.zeros(len(indices), 0)
        return F.one_hot(self.labels[torch.from_numpy(indices)], self.num_classes).float()


def load_dataset(data: str, split: Split = "train", *, held_out: float = HELD_OUT) -> Dataset:
    """Open one half of a data set.

    Args:
        data: "digits", which is built in, or a path: see `open_source`.
        split: Images to train on, or those kept apart to measure on.
        held_out: Fraction of each class to keep apart, always the same images. Sets with a test
            set of their own use that instead. 0: both halves are the whole set, as where the paper
            measures against all training images.

    Returns:
        The half.

    Raises:
        ValueError: If nothing is there, it cannot be read, or the half is empty.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out' (got {split!r})")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1) (got {held_out})")
    source = open_source(data)
    if source.held_out is not None:
        chosen = source.held_out == (split == "held_out")
    elif held_out == 0:
        chosen = np.ones(source.size, dtype=bool)
    else:
        labels = np.zeros(source.size, np.int64) if source.labels is None else source.labels
        chosen = held_out_members(labels, held_out) == (split == "held_out")
    if not chosen.any():
        raise ValueError(
            f"the {split} half of {source.where} is empty: its classes have too few images for "
            f"held_out={held_out:g} to leave one in each half"
        )
    return Dataset(source, np.flatnonzero(chosen))


def open_source(data: str) -> Source:
    """Open a whole data set, of the kind that is found at a path.

    Args:
        data: "digits"; a ZIP, or a folder searched at every depth, of images or latents
            (`data_images`); IDX files (`data_idx`); NPZ or NPY arrays (`data_arrays`).

    Returns:
        The set.

    Raises:
        ValueError: If nothing is there, or it cannot be read.
    """
    kind = recognise(data)
    if kind == "digits":
        return open_digits()
    path = Path(data).expanduser()
    return {"idx": open_idx, "arrays": open_arrays, "files": open_files}[kind](path)


def recognise(data: str) -> Literal["digits", "idx", "arrays", "files"]:
    """Say of which kind a data set is; arguments and errors as those of `open_source`."""
    if data == DIGITS:
        return "digits"
    if not data:
        raise ValueError(f"no data set given; {DIGITS!r} is built in, others are given by path")
    path = Path(data).expanduser()
    if not path.exists():
        hint = ""
        if data == FASHION_MNIST:
            hint = " (on Debian, `apt-get install dataset-fashion-mnist` puts it there)"
        raise ValueError(
            f"there is no data set at {data!r}{hint}; give {DIGITS!r}, which is built in, or the "
            "path of a folder or ZIP of images, of IDX files, or of NPZ or NPY arrays"
        )
    if find_idx(path):
        return "idx"
    if holds_arrays(path):
        return "arrays"
    if path.is_dir() or path.suffix == ".zip":
        return "files"
    raise ValueError(
        f"{data!r} is no data set: expected a folder, a .zip, .npz or .npy file, or IDX files "
        "named as those of MNIST (train-images-idx3-ubyte, .gz or not)"
    )
