"""How images become network input, and back: the one place that knows either direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Mean and standard deviation of each channel of the Stability VAE's latents (sd-vae-ft-mse, fed
# with pixels in [0, 1]); network input gets mean 0 and standard deviation 0.5 (σ_data).
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
LATENT_STD = (4.17, 4.62, 3.71, 3.28)
SIGMA_DATA = 0.5


def encode_pixels(images: Tensor) -> Tensor:
    """Map uint8 to float32 in [−1, 1]: x / 127.5 − 1."""
    return images.float() / 127.5 - 1


def decode_pixels(x: Tensor) -> Tensor:
    """Map [−1, 1] to uint8, rounding to nearest and clipping: inverse of `encode_pixels`."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class Encoder(Protocol):
    """Images of a data set to network input, and network output to pixels."""

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of the network input for images of a data set of shape `shape`.

        Raises:
            ValueError: If images of that shape cannot be encoded.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Turn images as a data set has them, `[B, C, H, W]`, into network input, float32."""

    def decode(self, x: Tensor) -> Tensor:
        """Turn network output, `[B, C, H, W]`, into pixels, uint8 `[B, C', H', W']`."""


@dataclass(frozen=True)
class RGB:
    """Pixels in [−1, 1], of any number of channels."""

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `shape`."""
        return shape

    def encode(self, images: Tensor) -> Tensor:
        """Map uint8 to [−1, 1]."""
        return encode_pixels(_expect_pixels(images))

    def decode(self, x: Tensor) -> Tensor:
        """Map [−1, 1] to uint8."""
        return decode_pixels(x)


@dataclass(frozen=True)
class SpaceToDepth:
    """Pixels in [−1, 1], each square of them stacked as channels: exactly invertible.

    A network works at a quarter of the pixels, four times as wide at its ends: for small images
    on small machines what a VAE is for large ones.

    Args:
        factor: Side of a square.
    """

    factor: int = 2

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `(C·factor², H/factor, W/factor)`."""
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"space-to-depth needs sides that are multiples of {self.factor} "
                f"(got {width}×{height} pixels); `prepare --size` resizes"
            )
        return channels * self.factor**2, height // self.factor, width // self.factor

    def encode(self, images: Tensor) -> Tensor:
        """Map uint8 to [−1, 1] and stack squares."""
        return F.pixel_unshuffle(encode_pixels(_expect_pixels(images)), self.factor)

    def decode(self, x: Tensor) -> Tensor:
        """Put the squares back, and map to uint8."""
        return decode_pixels(F.pixel_shuffle(x, self.factor))


@dataclass(frozen=True)
class Latents:
    """Latents of the Stability VAE, normalised channel by channel: (z − mean) · σ_data / std.

    Args:
        vae: Folder of the autoencoder, which `decode` needs.

    Source:
        Karras et al. 2024, arXiv:2312.02696, App. B.
    """

    vae: str = ""

    def input_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return `shape`, of four channels."""
        if shape[0] != len(LATENT_MEAN):
            raise ValueError(
                f"the encoder 'latents' takes {len(LATENT_MEAN)} channels (got {shape[0]}); it is "
                "for what `prepare --vae` writes"
            )
        return shape

    def encode(self, images: Tensor) -> Tensor:
        """Normalise latents."""
        if not images.is_floating_point():
            raise ValueError(
                "the encoder 'latents' takes latents, and the data set has pixels; "
                "`python -m reference_model prepare --vae` makes latents of them"
            )
        mean, scale = self._constants(images)
        return (images - mean) * scale

    def decode(self, x: Tensor) -> Tensor:
        """Undo the normalisation, and let the autoencoder turn latents into pixels.

        Raises:
            ValueError: If there is no autoencoder.
        """
        if not self.vae:
            raise ValueError(
                "turning latents into pixels needs the autoencoder: `python -m reference_model "
                "train --run-dir RUN --vae FOLDER` tells a run, also a finished one, where it is"
            )
        from reference_model.vae import load_vae

        mean, scale = self._constants(x)
        return load_vae(self.vae).decode(x / scale + mean)

    @staticmethod
    def _constants(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and factor of each channel, `[C, 1, 1]`."""
        mean, std = (x.new_tensor(c).reshape(-1, 1, 1) for c in (LATENT_MEAN, LATENT_STD))
        return mean, SIGMA_DATA / std


PIXELS: Encoder = RGB()
"""The encoder of networks that nothing else is said of."""

ENCODERS: dict[str, Callable[[str], Encoder]] = {
    "rgb": lambda vae: PIXELS,
    "space-to-depth": lambda vae: SpaceToDepth(),
    "latents": Latents,
}
"""Encoders by name, made with the folder of an autoencoder."""


def make_encoder(name: str, vae: str = "") -> Encoder:
    """Return an encoder by name.

    Args:
        name: One of `ENCODERS`.
        vae: Folder of the autoencoder of "latents"; needed to decode only.

    Raises:
        ValueError: If there is no encoder of this name.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)} (got {name!r})")
    return ENCODERS[name](vae)


def _expect_pixels(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise ValueError(
            f"pixels are uint8 (got {images.dtype}); latents take the encoder 'latents'"
        )
    return images
