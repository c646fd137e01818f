"""Feature networks: what turns images into vectors that a distance between sets is taken of.

One is trained on the data set itself (`classifier`); others come from files (`feature_files`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH_SIZE = 64
"""Images in one pass through a network from a file."""


class FeatureNetwork(Protocol):
    """What a measure needs of a feature network.

    Attributes:
        name: Kind of network, for people.
        dim: Length of a feature vector.
        digest: Twelve hexadecimal digits that change with the network's weights.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def digest(self) -> str: ...  # noqa: D102

    def describe(self, images: Tensor) -> NDArray[np.float64]:
        """Turn images, uint8 `[N, C, H, W]`, into features, float64 `[N, dim]`."""


class FileFeatures:
    """A feature network whose weights come from a file or a folder.

    Args:
        name: As in `FeatureNetwork`.
        digest: As in `FeatureNetwork`.
        extract: From uint8 `[N, C, H, W]` on `device` to features `[N, dim]`.
        image_shape: Channels, height and width of the images to come.
        where: Path, for messages.
        device: Where to compute.

    Raises:
        ValueError: If the network does not take such images.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        extract: Callable[[Tensor], Any],
        image_shape: tuple[int, int, int],
        where: str,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.digest = name, digest
        self._extract, self._where, self._device = extract, where, device
        # A first pass tells the dimension, and what does not fit before hours of sampling.
        self.dim: int = self._pass(torch.zeros(2, *image_shape, dtype=torch.uint8)).shape[1]

    def describe(self, images: Tensor) -> NDArray[np.float64]:
        """Turn images, uint8 `[N, C, H, W]`, into features, float64 `[N, dim]`."""
        batches = [self._pass(batch) for batch in images.split(BATCH_SIZE) if len(batch)]
        return np.concatenate([np.empty((0, self.dim)), *batches])

    @torch.inference_mode()
    def _pass(self, images: Tensor) -> NDArray[np.float64]:
        given = f"images of shape {tuple(images.shape)}"
        try:
            features = self._extract(images.to(self._device))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{self._where} cannot describe {given}: {reason}") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            kind = type(features).__name__
            got = tuple(features.shape) if isinstance(features, Tensor) else f"a {kind}"
            raise ValueError(
                f"{self._where} turned {given} into {got}; a feature network returns a tensor "
                f"[{len(images)}, dim]"
            )
        return features.double().cpu().numpy()


def as_rgb(images: Tensor) -> Tensor:
    """Turn grey images into colour by repeating the channel, and leave colour ones alone.

    Raises:
        ValueError: For another number of channels, as of images with transparency.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"networks trained on photographs take grey or RGB images (got {images.shape[1]} "
            "channels); `python -m reference_model prepare` makes RGB of transparent ones"
        )
    return images.expand(-1, 3, -1, -1)


def weights_digest(state: Iterable[tuple[str, Tensor]]) -> str:
    """Twelve hexadecimal digits that change with named tensors, whatever file they came from."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state, key=lambda item: item[0]):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]
