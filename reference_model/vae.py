"""The autoencoder of latent diffusion, through `diffusers`, loaded from a local folder only."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class VAE:
    """A frozen autoencoder.

    The Stability VAE was made for pixels in [−1, 1]; EDM2 feeds it with [0, 1], and the constants
    that normalise latents belong to that.

    Args:
        model: An `AutoencoderKL` of diffusers.

    Source:
        Karras et al. 2024, arXiv:2312.02696, App. B; convention of the published models.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Describe images by one normal distribution for each pixel of the latent.

        Args:
            images: uint8 `[B, 3, H, W]`; sides are multiples of the VAE's reduction, 8 for
                Stability's.

        Returns:
            Mean and standard deviation, float32 `[B, C, H/8, W/8]`.
        """
        self.model.to(images.device)
        distribution = self.model.encode(images.float() / 255).latent_dist
        return distribution.mean, distribution.std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Turn latents, `[B, C, H, W]`, into pixels, uint8 `[B, 3, 8H, 8W]`."""
        if not len(z):  # which the model's attention does not take
            sides = (side * self.reduction for side in z.shape[2:])
            return torch.empty(0, self.model.config.out_channels, *sides, dtype=torch.uint8)
        self.model.to(z.device)
        pixels = self.model.decode(z.float()).sample
        return (pixels.clamp(0, 1) * 255 + 0.5).to(torch.uint8)

    @property
    def reduction(self) -> int:
        """How many pixels across become one of the latent."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))


@lru_cache(maxsize=1)
def load_vae(path: str | Path) -> VAE:
    """Load an autoencoder in float32; nothing is ever downloaded.

    Args:
        path: Folder as `AutoencoderKL.save_pretrained` writes it, such as a copy of
            stabilityai/sd-vae-ft-mse: `config.json` and weights.

    Raises:
        ValueError: If the folder is no such, or diffusers is not installed.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"{str(path)!r} is not the folder of an autoencoder: it has no config.json; "
            "copy stabilityai/sd-vae-ft-mse there"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"latents need the package diffusers, which cannot be imported ({error}); "
            "`pip install diffusers`"
        ) from error
    try:
        model = AutoencoderKL.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,  # would need the package accelerate
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"no autoencoder can be loaded from {path}: {error}") from error
    return VAE(model)
